"""Handlers that fail: what the client is told, and that nobody else notices."""

import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import grpc
import harness
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from harness import error_of
from serving import FORKRING, run, until

import forkring
from forkring._failures import Failures


@pytest.fixture
def ways(serve):
    return serve("failing.py:ways")


def traceback_of(error):
    status = rpc_status.from_call(error)
    return "\n".join(harness.detail_of(status, error_details_pb2.DebugInfo).stack_entries)


def test_an_exception_is_its_items_error(ways):
    before = ways.call("ways", b"fine")
    for way, message, says in [
        ("value", "ValueError: that is no number", 'raise ValueError("that is no number")'),
        ("own", "failing.OutOfStock: of shoes", "in deeper\n"),
        ("bare", "KeyError", "raise KeyError\n"),
        ("chained", "RuntimeError: while looking", "The above exception was the direct cause"),
        ("exit", "SystemExit: 3", "sys.exit(3)"),
        ("interrupt", "KeyboardInterrupt", "raise KeyboardInterrupt\n"),
        ("memory", "MemoryError", "bytearray(1 << 60)"),
        ("recursion", "RecursionError: maximum recursion depth exceeded", "in recurse\n"),
    ]:
        error = ways.error("ways", way.encode())
        code, reason, told = error_of(error)
        assert (code, reason) == ("INTERNAL", "HANDLER_RAISED")
        assert told.startswith(message), told
        traceback = traceback_of(error)
        assert says in traceback and traceback.splitlines()[-1].startswith(message), traceback
        # The user's frames are there and ours are not.
        assert "failing.py" in traceback and "/forkring/_" not in traceback, traceback
    assert ways.call("ways", b"fine") == before, "the same process"


def test_a_failure_can_be_a_line_of_the_log(serve):
    app = serve("failing.py:ways", arguments=["--log-failures", "--log", "json"], quiet=False)
    app.error("ways", b"value", id=7)
    line = json.loads(until("a line", app.log))
    assert (line["level"], line["message"], line["item"]) == ("WARN", "an item failed", 7)
    assert (line["pool"], line["worker"], line["reason"]) == ("ways", 0, "HANDLER_RAISED")
    assert line["error"] == line["traceback"] == "ValueError: that is no number"
    assert line["at"].startswith('File "') and "failing.py" in line["at"], line


def test_the_traceback_is_shown_wherever_an_item_fails(ways, tmp_path):
    (tmp_path / "value").write_text("value")
    addr = ["--addr", ways.address]
    code = 'raise ValueError("that is no number")'

    called = run(FORKRING, "call", "ways", "value", *addr, folder=tmp_path)
    said = called.stderr.splitlines()
    assert (called.returncode, said[0], said[-2]) == (
        1,
        "Traceback (most recent call last):",
        "ValueError: that is no number",
    )
    assert code in called.stderr
    assert said[-1] == "forkring: value: INTERNAL (HANDLER_RAISED): ValueError: that is no number"
    called = run(FORKRING, "call", "ways", "value", "--json", *addr, folder=tmp_path)
    assert len(called.stderr.splitlines()) == 1
    assert code in json.loads(called.stdout)["error"]["traceback"]

    run(FORKRING, "submit", "ways", "value", "value", *addr, folder=tmp_path)
    updates = run(FORKRING, "updates", "--limit", "1", *addr, folder=tmp_path)
    assert len(updates.stdout.splitlines()) == 1 and code in updates.stderr
    updates = run(FORKRING, "updates", "--limit", "1", "--json", *addr, folder=tmp_path)
    assert code in json.loads(updates.stdout)["error"]["traceback"] and updates.stderr == ""


@pytest.mark.parametrize(
    "use",
    [
        "client.call(b'value')",
        "raise next(client.process([b'value'])).error",
    ],
)
def test_an_error_that_nobody_catches_shows_where_it_was(ways, tmp_path, use):
    program = f"""
        import forkring
        with forkring.Client({ways.address!r}) as client:
            {use}
    """
    said = run(sys.executable, "-c", textwrap.dedent(program), folder=tmp_path).stderr
    ours, _, theirs = said.partition("forkring.Error: INTERNAL (HANDLER_RAISED): ValueError: that is no number\n")
    assert 'raise ValueError("that is no number")' in theirs and theirs.endswith("ValueError: that is no number\n"), said
    assert "RpcError" not in said and said.count("Traceback") == 2, said


def test_errors_and_works_are_where_they_say(ways):
    with forkring.Client(ways.address) as client:
        (result,) = client.process([forkring.Work(b"value", id=7)])
    error = pickle.loads(pickle.dumps(result.error))
    assert isinstance(error, forkring.Error) and str(error) == str(result.error)
    assert (error.traceback, error.__notes__) == (result.error.traceback, [result.error.traceback])
    assert pickle.loads(pickle.dumps(forkring.Work(b"x", id=7))).id == 7


def test_what_cannot_be_told_is_an_error_all_the_same(ways):
    for way, says in [("silent", "describing it raised RuntimeError"), ("long", "ValueError: ä")]:
        code, reason, message = error_of(ways.error("ways", way.encode()))
        assert (code, reason) == ("INTERNAL", "HANDLER_RAISED") and says in message


def test_abort_chooses_what_the_client_is_told(ways):
    for way, told in {
        "abort": ("NOT_FOUND", "NO_SUCH_ROW", "there is no row 7"),
        "abort-name": ("OUT_OF_RANGE", "HANDLER_ABORTED", "too far"),
        "abort-grpc": ("UNAUTHENTICATED", "HANDLER_ABORTED", "who?"),
    }.items():
        error = ways.error("ways", way.encode())
        assert error_of(error) == told
        assert len(rpc_status.from_call(error).details) == 1, "no traceback"
    assert "ValueError: 0 is no code to abort with" in ways.error("ways", b"abort-ok").details()


def test_a_result_that_is_too_large_is_refused(ways):
    for way in (b"large", b"larger"):
        code, reason, message = error_of(ways.error("ways", way))
        assert (code, reason) == ("RESOURCE_EXHAUSTED", "RESULT_TOO_LARGE") and "--max-message" in message


def test_on_a_stream_the_others_go_on(ways):
    items = [ways.item("ways", b"own" if at % 2 else b"fine", id=at) for at in range(100)]
    results = {result.id: result for result in ways.stream(items)}
    assert len(results) == 100
    for at, result in results.items():
        assert result.HasField("status") == bool(at % 2)
        if at % 2:
            assert (result.status.code, result.status.reason) == (13, "HANDLER_RAISED")
            assert "in deeper\n" in result.status.traceback
            assert result.status.traceback.endswith(result.status.message)


@pytest.mark.parametrize(
    "way, says",
    [("exit", "exit code 3"), ("segfault", "killed by SIGSEGV"), ("kill", "killed by SIGKILL")],
)
def test_a_worker_that_dies_is_replaced_and_its_item_retried(serve, way, says):
    app = serve("failing.py:deaths", quiet=False)
    assert app.call("deaths", metadata={"way": way, "times": "1"}) == b"attempt 2"
    code, reason, message = error_of(app.error("deaths", metadata={"way": way}))
    assert (code, reason, message) == ("ABORTED", "WORKER_CRASHED", f"worker 0 died: {says}")
    assert app.call("deaths", metadata={"way": way, "times": "0"}) == b"attempt 1"
    assert says in app.log()


@pytest.mark.parametrize("handler", ["loop", "async_loop", "batch_loop"])
def test_an_endless_loop_is_ended(serve, handler):
    app = serve(f"loop=failing.py:{handler}", arguments=["--item-timeout", "300ms"], quiet=False)

    def once():
        attempt = app.call("loop", b"once").removeprefix(b"attempt ")
        # On a busy machine the second may not have come to its end in time either.
        return int(attempt) >= 2

    assert once()
    code, reason, _ = error_of(app.error("loop", b"ever"))
    assert (code, reason) == ("DEADLINE_EXCEEDED", "ITEM_TIMEOUT")
    assert once()


def test_memory_beyond_the_limit_is_a_memory_error(serve):
    app = serve("failing.py:hog", arguments=["--worker-memory", "512MiB"])
    assert app.call("hog", b"1000000") == b"1000000"
    assert error_of(app.error("hog", b"600000000"))[2] == "MemoryError"
    assert app.call("hog", b"1000000") == b"1000000"


def test_a_class_that_cannot_be_made_is_made_again(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))
    app = serve("failing.py:Unmade", quiet=False)
    assert app.call("Unmade") == b"made"
    log = app.log()
    assert "RuntimeError: the model is not there yet" in log and "exit code 2" in log


def test_calls_to_a_class_that_can_never_be_made_are_refused(serve):
    app = serve("failing.py:Unmakeable", quiet=False)
    code, reason, message = error_of(app.error("Unmakeable"))
    assert (code, reason) == ("UNAVAILABLE", "POOL_FAILING")
    assert "`Unmakeable`" in message and "log" in message
    assert "RuntimeError: the model is broken" in app.log()


@pytest.mark.parametrize("arguments", [[], ["--preload"]], ids=["programs", "preload"])
def test_what_workers_cannot_start_for_is_told_once(serve, tmp_path, monkeypatch, arguments):
    marker = tmp_path / "marker"
    monkeypatch.setenv("MARKER", str(marker))
    marker.write_text("the model is not there yet")
    app = serve("made:2=failing.py:MadeAsTold", arguments=arguments, quiet=False)
    again = "forkring: the same error as before, {} times now: RuntimeError: {}"
    until("the third failure", lambda: again.format(3, "the model is not there yet") in app.log())
    assert app.log().count("Traceback (most recent call last)") == 1, app.log()

    # Another error is shown in full, and then counted.
    marker.write_text("the model is broken")
    until("another failure", lambda: again.format(2, "the model is broken") in app.log())
    assert app.log().count("Traceback (most recent call last)") == 2, app.log()
    assert "\nRuntimeError: the model is broken (" in app.log()

    # So is the first one, after a worker that started.
    marker.write_text("")
    pid = int(app.call("made"))
    until("both workers", lambda: len(app.workers()) == 2)
    marker.write_text("the model is not there yet")
    before = len(app.log())
    os.kill(pid, 9)
    until("a failure", lambda: "RuntimeError: the model is not there yet" in app.log()[before:])
    marker.write_text("")
    log = app.log()[before:]
    assert log.index("Traceback (most recent call last)") < log.index("RuntimeError: the model is not there yet")


def test_what_a_pool_fails_of_is_not_inherited(serve):
    app = serve("basic.py:open_files")
    lines = app.call("open_files").decode().splitlines()
    assert [line.rpartition(" ")[2] for line in lines if "forkring-failures" in line] == ["False"]
    assert "FORKRING_WORKER_FAILURES" not in lines


def test_a_worker_that_starts_waits_for_one_that_notes_its_failure(monkeypatch):
    holds = "import fcntl, sys; fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    file = os.memfd_create("forkring-failures")
    os.write(file, b"a record")
    monkeypatch.setenv("FORKRING_WORKER_FAILURES", str(file))
    failures = Failures()
    command = [sys.executable, "-c", holds, str(file)]
    with subprocess.Popen(command, pass_fds=[file], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        thread = threading.Thread(target=failures.forget)
        thread.start()
        waits = re.compile(rf"-> POSIX .* {os.getpid()} [0-9a-f:]+:{os.fstat(file).st_ino} ")
        until("the end of its wait", lambda: waits.search(Path("/proc/locks").read_text()) or not thread.is_alive())
        assert thread.is_alive() and os.pread(file, 100, 0) == b"a record"
        holder.stdin.close()
        thread.join(harness.PATIENCE)
    assert os.pread(file, 100, 0) == b""
    os.close(file)


def test_a_pool_that_there_is_not(ways):
    with pytest.raises(grpc.RpcError) as failed:
        ways.result("nobody")
    assert error_of(failed.value)[:2] == ("NOT_FOUND", "UNKNOWN_POOL")
