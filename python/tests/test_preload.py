"""`--preload`: one process imports the app, and forks the workers."""

import os
import random
import re
import resource
import signal
import subprocess
from pathlib import Path

import grpc
import numpy
import pytest
from harness import PATIENCE
from serving import APPS, FORKRING, run, until


def origin(app):
    born_in, frozen, parent, device, pid, _ = app.call("origin").decode().split(" ")
    return {"born_in": int(born_in), "frozen": frozen, "parent": int(parent), "device": device, "pid": int(pid)}


def private(pid):
    """Bytes that a process shares with nobody."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return sum(int(size) << 10 for size in re.findall(r"Private_\w+: +(\d+) kB", file.read()))


def test_workers_are_forked_from_one_import(serve):
    app = serve("origin:2=preloaded.py:origin", arguments=["--preload", "--worker-env", "DEVICE=gpu{worker}"])
    app.call("origin")
    nursery = app.nursery()
    workers = until("both workers", lambda: (found := app.workers()) and len(found) == 2 and found)
    told = origin(app)
    assert (told["born_in"], told["frozen"], told["parent"]) == (nursery, "True", app.process_id)
    assert workers[f"forkring-w{told['device'].removeprefix('gpu')}"] == told["pid"]
    assert private(told["pid"]) < 32 << 20, "64 MiB are the nursery's"


def test_a_class_is_made_by_each_worker(serve):
    app = serve("preloaded.py:Made", arguments=["--preload"])
    assert app.call("Made") == b"True False"


def test_who_dies_comes_from_the_nursery_again(serve):
    app = serve("preloaded.py:origin", arguments=["--preload"], quiet=False)
    first = origin(app)
    os.kill(first["pid"], signal.SIGKILL)
    second = origin(app)
    assert second["pid"] != first["pid"] and second["born_in"] == first["born_in"]
    os.kill(app.nursery(), signal.SIGKILL)
    nursery = until("another nursery", lambda: (pid := app.nursery()) != second["born_in"] and pid)
    assert origin(app)["pid"] == second["pid"], "the workers live on"
    os.kill(second["pid"], signal.SIGKILL)
    third = origin(app)
    assert third["born_in"] == nursery and third["parent"] == app.process_id
    assert "the zygote of pool \"origin\"" in app.log()


def test_who_was_ordered_of_a_nursery_that_dies_is_ordered_again(serve):
    app = serve("preloaded.py:origin", arguments=["--preload"], quiet=False)
    worker, nursery = origin(app)["pid"], app.nursery()
    # It does not get to its order.
    os.kill(nursery, signal.SIGSTOP)
    os.kill(worker, signal.SIGKILL)
    until("the end of the worker", lambda: worker not in app.children(states=".").values())
    os.kill(nursery, signal.SIGKILL)
    assert origin(app)["born_in"] != nursery


def test_who_the_supervisor_cannot_know_never_begins(serve):
    app = serve("preloaded.py:origin", arguments=["--preload"], quiet=False)
    first = origin(app)
    limits = resource.prlimit(app.process_id, resource.RLIMIT_NOFILE)
    # It has no descriptor for another process than it has now, not even for one in the place of the first.
    used = descriptors(app.process_id)
    mine = next(fd for fd in used if f"Pid:\t{first['pid']}\n" in fdinfo(app.process_id, fd))
    least = next(fd for fd in range(len(used) + 1) if fd == mine or fd not in used)
    resource.prlimit(app.process_id, resource.RLIMIT_NOFILE, (least, limits[1]))
    os.kill(first["pid"], signal.SIGKILL)
    cannot = "a zygote cannot fork, trying again"
    until("two more", lambda: app.log().count(cannot) >= 2)
    assert app.error("origin", timeout=0.5).code() == grpc.StatusCode.DEADLINE_EXCEEDED
    resource.prlimit(app.process_id, resource.RLIMIT_NOFILE, limits)
    second = origin(app)
    assert second["pid"] == app.workers()["forkring-w0"] and second["born_in"] == first["born_in"]
    until("the others' end", lambda: len(app.processes(".*", ".")) == 3)


def descriptors(pid):
    return sorted(int(fd) for fd in os.listdir(f"/proc/{pid}/fd"))


def fdinfo(pid, fd):
    with open(f"/proc/{pid}/fdinfo/{fd}") as file:
        return file.read()


def test_limits_are_for_them_too(serve):
    cpu = max(os.sched_getaffinity(0))
    options = ["--preload", "--worker-memory", "limits=256MiB", "--item-timeout", "sleeps_once=300ms"]
    app = serve(
        "preloaded.py:limits",
        "preloaded.py:sleeps_once",
        arguments=[*options, "--affinity", f"limits={cpu}"],
        quiet=False,
    )
    assert app.call("limits") == b"limited"
    assert os.sched_getaffinity(app.workers()["forkring-w0"]) == {cpu}
    other = until("the other pool's worker", lambda: app.workers().get("forkring-w1"))
    assert os.sched_getaffinity(other) == os.sched_getaffinity(0)
    assert app.call("sleeps_once") == b"ended"


def test_all_die_with_the_supervisor(serve, messages):
    app = serve("origin:2=preloaded.py:origin", arguments=["--preload"], quiet=False)
    app.call("origin")
    family = until("all of them", lambda: (found := app.children()) and len(found) == 4 and found)
    os.kill(app.process_id, signal.SIGKILL)
    app.process.wait(PATIENCE)
    until("their end", lambda: not any(is_running(pid) for pid in family.values()))
    # The name is free again, which it is when nobody has the memory: whoever comes adopts it, and drains.
    again = run(FORKRING, "serve", "--name", app.name, "--pool", "x=echo", "--listen", "127.0.0.1:0", folder=APPS)
    assert again.returncode == 2 and "in use" not in again.stderr and "--fresh" in again.stderr, again.stderr
    os.unlink(f"/dev/shm/forkring-{app.name}")
    app.process.stdout.close()
    app.abandon()


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_what_workers_leave_behind_is_reaped(serve, tmp_path):
    app = serve("preloaded.py:begins_and_dies", arguments=["--preload"], quiet=False)
    fifo, file = str(tmp_path / "fifo"), tmp_path / "pid"
    os.mkfifo(fifo)
    assert app.call("begins_and_dies", metadata={"fifo": fifo, "pid": str(file)}) == b"over"
    left = int(file.read_text())
    assert left in app.children().values(), "it is the supervisor's now"
    with open(fifo, "w"):
        pass
    until("its end", lambda: left not in app.children(states=".").values())


def test_nothing_is_lost_while_all_of_them_are_killed(serve):
    options = ["--preload", "--max-attempts", "100"]
    app = serve("number:3=preloaded.py:number", arguments=options, quiet=False)
    chance = random.Random(7)
    for _ in range(12):
        items = [app.item("number", str(at).encode(), id=at) for at in range(100)]
        results = {}
        for result in app.stream(items):
            assert result.id not in results
            results[result.id] = result.payload
            if len(results) == 10:
                family = until("somebody to kill", lambda: list(app.children(r"forkring-[wn]\d+").values()))
                os.kill(chance.choice(family), signal.SIGKILL)
        assert results == {at: str(at).encode() for at in range(100)}
    # And all are there again.
    until("three workers and a nursery", lambda: len(app.children(r"forkring-[wn]\d+")) == 4)
    assert app.call("number", b"7") == b"7"


@pytest.mark.parametrize(
    "source, says",
    [
        (
            "import threading\nthreading.Thread(target=threading.Event().wait, name='feeder', daemon=True).start()\n",
            ["its import has started a thread (`feeder` of threading). Make such things"],
        ),
        (
            "import json, other, string\n",
            ["has started 2 threads", "`ThreadPoolExecutor-0_0` of concurrent.futures.thread", "when it came to `other`."],
        ),
        ("import native\n", ["has started a thread (`pool-thread`), when it came to `native`."]),
        (
            # What is dead cannot be asked what it is.
            "import grpc, weakref\nDEAD = weakref.proxy(set())\nCHANNEL = grpc.insecure_channel('localhost:1')\n",
            ["its import has made a gRPC object (`grpc._channel.Channel`), and gRPC does not survive a fork"],
        ),
        (
            "import concurrent.futures, grpc\nSERVER = grpc.server(concurrent.futures.ThreadPoolExecutor())\n",
            ["its import has made a gRPC object (`grpc._server._Server`), and gRPC does not survive a fork"],
        ),
        (
            "import grpc.aio\nCHANNEL = grpc.aio.insecure_channel('localhost:1')\n",
            ["its import has made a gRPC object (`grpc.aio._channel.Channel`), and gRPC does not survive a fork"],
        ),
        pytest.param(
            "import numpy\n",
            ["its import has started", "when it came to `numpy", "(--worker-env OPENBLAS_NUM_THREADS=1 keeps openblas from it)"],
            marks=pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="on one CPU OpenBLAS starts no threads"),
        ),
    ],
)
def test_an_import_that_starts_threads_or_grpc_is_refused(tmp_path, monkeypatch, source, says):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    (tmp_path / "app.py").write_text(source + "\ndef handle(item): pass\n")
    (tmp_path / "other.py").write_text(
        "import concurrent.futures, threading\nPOOL = concurrent.futures.ThreadPoolExecutor(2)\n"
        "BOTH = threading.Barrier(3)\nPOOL.submit(BOTH.wait)\nPOOL.submit(BOTH.wait)\n"
    )
    # A thread that Python knows nothing of, as a library's own.
    (tmp_path / "native.py").write_text(
        "import ctypes\nlibc = ctypes.CDLL(None)\nthread = ctypes.c_ulong()\n"
        "start = ctypes.cast(libc.pause, ctypes.c_void_p)\n"
        "libc.pthread_create(ctypes.byref(thread), None, start, None)\n"
        "libc.pthread_setname_np(thread, b'pool-thread')\n"
    )
    outcome = run(FORKRING, "serve", "app:handle", "--preload", "--listen", "127.0.0.1:0", folder=tmp_path)
    assert (outcome.returncode, outcome.stdout) == (2, ""), outcome.stderr
    reason, last = outcome.stderr.splitlines()
    assert reason.startswith("forkring: --preload cannot fork workers from `app`: ")
    for words in says:
        assert words in reason, reason
    assert last.endswith("the reason is in the lines above")


# The first worker is dead before the server can know of it. It is the second of two forks, of which the first waits for that.
DIES_AT_ONCE = """
import os

FORKS = []

def parent():
    if len(FORKS) == 1 and not os.path.exists("again"):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        open("again", "w").close()

def child():
    FORKS.append(os.getpid())
    if len(FORKS) == 2 and not os.path.exists("again"):
        os._exit(3)

os.register_at_fork(after_in_child=child, after_in_parent=parent)
"""


def test_a_library_that_is_told_to_start_no_threads_is_not_refused(serve, monkeypatch):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    app = serve("basic.py:double", arguments=["--preload", "--worker-env", "OPENBLAS_NUM_THREADS=1"])
    numbers = numpy.arange(5)
    assert app.call("double", numbers.tobytes()) == (numbers * 2).tobytes()


def test_dead_proxies_beside_grpc_are_no_hindrance(serve, tmp_path):
    (tmp_path / "app.py").write_text(
        "import grpc, weakref\nDEAD = weakref.proxy(set())\n\ndef handle(item): return b'fine'\n"
    )
    app = serve("app.py:handle", apps=tmp_path, arguments=["--preload"])
    assert app.call("handle") == b"fine"


@pytest.mark.parametrize(
    "source",
    [
        # Nobody waits for children.
        "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n",
        DIES_AT_ONCE,
    ],
    ids=["nobody waits", "a worker dies at once"],
)
def test_the_nursery_lives_whatever_becomes_of_those_it_forks(serve, tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "app.py").write_text(source + "import os\n\ndef handle(item): return str(os.getpid())\n")
    app = serve("app.py:handle", apps=tmp_path, arguments=["--preload"], quiet=False)
    worker = int(app.call("handle"))
    nursery = app.nursery()
    os.kill(worker, signal.SIGKILL)
    assert int(app.call("handle")) != worker
    assert app.nursery() == nursery and "the zygote of pool" not in app.log()


def test_who_only_imports_grpc_is_not_refused(serve):
    app = serve("failing.py:deaths", arguments=["--preload"], quiet=False)
    assert app.call("deaths", metadata={"way": "kill", "times": "1"}) == b"attempt 2"


def test_a_nursery_is_not_started_by_hand(tmp_path):
    (tmp_path / "app.py").write_text("def handle(item): pass\n")
    environment = {key: value for key, value in os.environ.items() if key != "FORKRING_NURSERY"}
    command = [os.path.join(os.path.dirname(FORKRING), "python"), "-m", "forkring._worker", "--preload", "app:handle"]
    outcome = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert outcome.returncode != 0 and "FORKRING_NURSERY is not set" in outcome.stderr


def test_each_process_says_in_its_title_what_it_is(serve):
    app = serve("shared=preloaded.py:origin", arguments=["--preload"])
    plain = serve("alone=preloaded.py:origin")

    def title(pid):
        return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0")

    app.call("shared")
    plain.call("alone")
    assert title(app.nursery()) == "forkring: zygote shared"
    assert title(app.workers()["forkring-w0"]) == "forkring: worker 0 shared"
    assert title(app.front()) == f"forkring: front 0 ({app.name})"
    assert title(plain.workers()["forkring-w0"]) == "forkring: worker 0 alone"
    assert title(plain.process_id) == f"forkring: supervisor ({plain.name})"
