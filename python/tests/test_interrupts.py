"""A Ctrl-C while a server starts: it ends quietly, by the signal, and no process shows a traceback of Python's.

Until a program of the package has begun, the process is Python's own, and shows its own traceback."""

import os
import signal
import subprocess
import sys

import pytest
from harness import PATIENCE
from serving import FORKRING, until

COMMANDS = {"script": [FORKRING], "module": [sys.executable, "-m", "forkring"]}
# At which import, counted from the first that the package does, the signal comes; there are some forty.
MOMENTS = [1, 2, 3, 4, 6, 9, 13, 20, 30]

# Python runs this at its start. It sends the signal at an import: moments that do not depend on the machine's speed.
SITECUSTOMIZE = """
import os, signal, sys

program, first, moment = os.environ["INTERRUPTED"].split()
is_check = "--check" in sys.orig_argv
seen = 0

def hook(event, arguments):
    global seen
    if event == "import" and is_check == (program == "check"):
        if seen or arguments[0] == first:
            seen += 1
        if seen == int(moment) + 1:
            os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(hook)
"""


@pytest.fixture
def start(tmp_path):
    """Starts `serve` of an app in a group of its own, as a terminal does."""
    (tmp_path / "app.py").write_text("import decimal, email, http.client\n\ndef handle(item):\n    return b'fine'\n")
    processes = []

    def begin(command, handler="app:handle", **variables):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FORKRING_")}
        own = ["--workers", "1", "--arena", "1MiB", "--max-message", "512KiB", "--listen", "127.0.0.1:0"]
        # It ends with the tests, however these end.
        own += ["--parent", str(os.getpid())]
        process = subprocess.Popen(
            [*command, "serve", handler, *own, "--name", f"interrupts-{os.getpid()}"],
            cwd=tmp_path,
            env={**environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()
    left = [name for name in os.listdir("/dev/shm") if f"interrupts-{os.getpid()}" in name]
    for name in left:
        os.unlink(f"/dev/shm/{name}")
    assert not left


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("way", COMMANDS)
def test_an_interrupt_while_the_command_is_imported(start, tmp_path, way, moment):
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    # By then `python -m` has looked for the module, and the script has begun.
    first = {"script": "forkring", "module": "forkring._interrupts"}[way]
    process = start(COMMANDS[way], PYTHONPATH=str(tmp_path), INTERRUPTED=f"command {first} {moment}")
    output, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output, error) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("moment", [*MOMENTS, 45, 70])
def test_an_interrupt_while_the_app_is_looked_at(start, tmp_path, moment):
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    process = start([FORKRING], PYTHONPATH=str(tmp_path), INTERRUPTED=f"check forkring {moment}")
    output, error = process.communicate(timeout=PATIENCE)
    # The signal came to that process alone, and the server says what became of it.
    assert (process.returncode, output) == (2, "")
    assert error.startswith("forkring: ") and "signal: 2 (SIGINT)" in error and len(error.splitlines()) == 1, error


def test_an_interrupt_of_the_first_process_before_all_else(start, tmp_path):
    # It is held back from the moment of its start.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\nif '--check' in sys.orig_argv:\n    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    process = start([FORKRING], PYTHONPATH=str(tmp_path))
    _, error = process.communicate(timeout=PATIENCE)
    assert "signal: 2 (SIGINT)" in error and "Traceback" not in error and "KeyboardInterrupt" not in error, error


@pytest.mark.parametrize("way", COMMANDS)
def test_ctrl_c_while_a_long_import_runs(start, tmp_path, way):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "slow.py").write_text(f"open({str(pipe)!r}).read()\n\ndef handle(item):\n    return b''\n")
    process = start(COMMANDS[way], "slow:handle")
    # It opens when the import is under way.
    with open(pipe, "w"):
        os.killpg(process.pid, signal.SIGINT)
        output, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output, error) == (-signal.SIGINT, "", "")


def test_ctrl_c_at_any_moment_after_that(start):
    for moment in range(12):
        process = start([FORKRING], FORKRING_LOG="warn")
        # From not yet listening to serving.
        names = ["forkring-w0", "forkring-front"]
        if moment >= 4:
            assert process.stdout.readline().startswith("listening on ")
        if moment >= 8:
            until("its processes", lambda process=process: children(process.pid) >= set(names))
        else:
            # Its own handler is gone, and Python's is what it was for.
            until("the command", lambda process=process: not catches_interrupts(process.pid))
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=PATIENCE)
        assert error == "" and process.returncode in (0, -signal.SIGINT), (moment, process.returncode, error)


def catches_interrupts(pid):
    """Whether the process is Python and has Python's handler, or has not come to be Python yet."""
    with open(f"/proc/{pid}/status") as file:
        (caught,) = (line.split()[1] for line in file if line.startswith("SigCgt:"))
    with open(f"/proc/{pid}/maps") as file:
        is_begun = "_core.abi3.so" in file.read()
    return not is_begun or bool(int(caught, 16) >> (signal.SIGINT - 1) & 1)


def children(pid):
    found = set()
    for number in os.listdir("/proc"):
        try:
            with open(f"/proc/{number}/stat") as file:
                name, rest = file.read().split(" (", 1)[1].rsplit(") ", 1)
        except (OSError, IndexError):
            continue
        if rest.split()[1] == str(pid):
            found.add(name)
    return found


@pytest.mark.parametrize("preload", [False, True], ids=["programs", "preload"])
def test_ctrl_c_while_workers_import_the_app_is_not_theirs(serve, tmp_path, monkeypatch, preload):
    path = str(tmp_path / "load")
    os.mkfifo(path)
    monkeypatch.setenv("LOAD", path)
    app = serve("loading.py:handle", arguments=["--preload"] if preload else [])
    call = app.begin("handle")
    # It opens when there is a reader.
    with open(path, "w") as pipe:
        # A worker has the name of its program until it has attached.
        pids = app.children("(?!forkring-front).*")
        assert pids
        for pid in pids.values():
            os.kill(pid, signal.SIGINT)
        pipe.write("loaded")
    assert call.result(PATIENCE).payload == b"loaded"
    assert app.log() == "", "it is the server that decides"
