"""Starting: what is wrong is said before there is a port, and the ways in."""

import os
import signal
import subprocess
import sys

import pytest
from harness import PATIENCE
from serving import FORKRING, Started, run

def refused(folder, handler, *says, source=None, ends="the reason is in the lines above"):
    if source is not None:
        (folder / "app.py").write_text(source)
    outcome = run(FORKRING, "serve", handler, "--listen", "127.0.0.1:0", "--name", f"start-{os.getpid()}", folder=folder)
    assert (outcome.returncode, outcome.stdout) == (2, ""), outcome.stderr
    for words in says:
        assert words in outcome.stderr, outcome.stderr
    assert "/forkring/_" not in outcome.stderr and "importlib" not in outcome.stderr
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("forkring: pool `") and last.endswith(ends)
    assert not [name for name in os.listdir("/dev/shm") if f"start-{os.getpid()}" in name]
    return outcome.stderr


def test_an_import_that_fails_shows_its_traceback(tmp_path):
    refused(
        tmp_path,
        "app:handle",
        "Traceback (most recent call last)",
        f'File "{tmp_path}/app.py", line 2',
        "ZeroDivisionError: division by zero",
        source="# a model\nx = 1 / 0\n",
    )
    refused(tmp_path, "app:handle", "ModuleNotFoundError: No module named 'torchh'", source="import torchh")
    refused(tmp_path, "app:handle", "SyntaxError", "app.py", source="def handle(item:\n")
    refused(tmp_path, "app:handle", "SystemExit: 3", source="import sys; sys.exit(3)")


@pytest.mark.parametrize("ending, says", [("_exit(3)", "exit status: 3"), ("kill(os.getpid(), 9)", "signal: 9 (SIGKILL)")])
def test_an_import_that_ends_the_process_is_said_to(tmp_path, ending, says):
    ends = f"to import it ended the process ({says}), and not by an exception"
    refused(tmp_path, "app:handle", source=f"import os; os.{ending}", ends=ends)


BATCH = "import forkring\n@forkring.batch()\n"


@pytest.mark.parametrize(
    "source, says",
    [
        ("def handle(): pass", "called with one argument, the item, but it is `handle()`"),
        ("def handle(a, b): pass", "but it is `handle(a, b)`"),
        ("def handle(*, item): pass", "but it is `handle(*, item)`"),
        ("handle = 7", "`app:handle` is 7, of type int: a handler is a function or class"),
        ("def handel(item): pass", "`app` has no `handle`: did you mean `handel`?"),
        ("", "`app` has no `handle`"),
        ("class handle: pass", "the class `app:handle` has no `def __call__(self, item)`"),
        ("class handle:\n def __init__(self, x): pass\n def __call__(self, item): pass", "with no arguments, but it is"),
        ("class handle:\n def __call__(self): pass", "but it is `__call__(self)`"),
        ("async def handle(): pass", "called with one argument, the item, but it is `handle()`"),
        ("def handle(item, more): yield", "but it is `handle(item, more)`"),
        (BATCH + "def handle(): pass", "called with one argument, the list of items, but it is `handle()`"),
        (BATCH + "async def handle(items): pass", "`app:handle` has @forkring.batch and is a coroutine function"),
        (BATCH + "def handle(items): yield", "`app:handle` has @forkring.batch and is a generator"),
        (BATCH + "class handle:\n async def __call__(self, items): yield", "is an async generator: one for batches is"),
        ("import forkring\n@forkring.concurrency(3)\ndef handle(item): pass", "and is no `async def`: a worker calls it"),
    ],
)
def test_what_is_no_handler_is_refused(tmp_path, source, says):
    assert "Traceback" not in refused(tmp_path, "app:handle", says, source=source)


@pytest.mark.parametrize(
    "decorator, says",
    [
        ("batch", "TypeError: batch() takes the most items of a batch: write @forkring.batch(), with brackets"),
        ("batch(0)", "ValueError: max_size is 0: it must be an integer from 1 to 1048576"),
        ("batch(1, -1)", "ValueError: max_delay is -1: it must be a number of seconds from 0 to"),
        ("concurrency", "write @forkring.concurrency(8)"),
        ("concurrency(0)", "ValueError: most is 0: it must be an integer from 1 to 1048576"),
    ],
)
def test_a_decorator_says_what_is_wrong(tmp_path, decorator, says):
    refused(tmp_path, "app:handle", says, source=f"import forkring\n@forkring.{decorator}\ndef handle(item): pass")


def test_a_module_that_is_not_there_is_one_line(tmp_path):
    assert "Traceback" not in refused(tmp_path, "nowhere:handle", f"no module `nowhere` in {tmp_path} nor where Python")
    assert "Traceback" not in refused(tmp_path, "nowhere.py:handle", "there is no file nowhere.py")


COMMON = "import os, sys\n\ndef shout(item):\n    return bytes(item.payload).upper()\n"


@pytest.mark.parametrize("command", [[FORKRING], [sys.executable, "-m", "forkring"]])
def test_the_command_and_the_module_serve_alike(tmp_path, command):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "app.py").write_text(COMMON + "class Shouts:\n    loud = staticmethod(shout)\n")
    name = f"start-{os.getpid()}"
    listen = ["--listen", "127.0.0.1:0", "--name", name, "--workers", "2"]
    with Started(*command, "serve", "package.app:Shouts.loud", *listen, "--pool", "echo=echo", folder=tmp_path) as server:
        assert server.call("loud", "hello") == "HELLO"
        assert server.call("echo", "hello") == "hello"


def test_a_script_serves_its_own_functions(tmp_path):
    (tmp_path / "other.py").write_text("def whisper(item):\n    return bytes(item.payload).lower()\n")
    (tmp_path / "app.py").write_text(
        COMMON
        + "import forkring\nfrom other import whisper\n\nif __name__ == '__main__':\n"
        + f"    forkring.serve(shout, whisper, workers=1, listen='127.0.0.1:0', name='start-{os.getpid()}')\n"
        + "    print('drained')\n"
    )
    with Started(sys.executable, "app.py", folder=tmp_path) as server:
        assert server.call("shout", "Hello") == "HELLO"
        assert server.call("whisper", "Hello") == "hello"
    assert server.output == "drained\n"


def test_workers_have_their_environment_and_cpu(tmp_path):
    cpu = min(os.sched_getaffinity(0))
    (tmp_path / "app.py").write_text(
        "import os, forkring\n\nAT_IMPORT = os.environ['DEVICE']\n\ndef tell(item):\n"
        "    return f\"{AT_IMPORT} {os.environ['MODE']} {os.sched_getaffinity(0)}\"\n\nif __name__ == '__main__':\n"
        "    os.environ['DEVICE'] = 'none'\n"
        "    variables = {'DEVICE': 'gpu{worker}', 'MODE': 'a, b=c'}\n"
        f"    forkring.serve(tell, workers=1, listen='127.0.0.1:0', name='start-{os.getpid()}',\n"
        f"                   worker_env=variables, affinity=[{cpu}])\n"
    )
    with Started(sys.executable, "app.py", folder=tmp_path, DEVICE="none") as server:
        assert server.call("tell", "?") == f"gpu0 a, b=c {{{cpu}}}"


def test_serve_refuses_what_workers_cannot_import(tmp_path):
    for handler, says in [
        ("lambda item: b''", "cannot be imported by workers"),
        ("7", "cannot be imported by workers"),
        ("handle, workers=0", "workers is 0: it must be an integer from 1 to 1024"),
        ("handle, affinity=[]", "`` is not an affinity"),
    ]:
        (tmp_path / "app.py").write_text(
            f"import forkring\n\ndef handle(item): pass\n\nif __name__ == '__main__':\n    forkring.serve({handler})\n"
        )
        outcome = run(sys.executable, "app.py", folder=tmp_path)
        assert outcome.returncode != 0 and says in outcome.stderr, outcome.stderr


def test_serve_refuses_a_process_with_threads(tmp_path):
    (tmp_path / "app.py").write_text(
        "import forkring, threading\n\ndef handle(item): pass\n\nif __name__ == '__main__':\n"
        "    threading.Thread(target=threading.Event().wait, daemon=True).start()\n    forkring.serve(handle)\n"
    )
    outcome = run(sys.executable, "app.py", folder=tmp_path)
    assert outcome.returncode == 2 and "cannot fork: this process has 2 threads" in outcome.stderr, outcome.stderr


def test_a_worker_is_not_started_by_hand(tmp_path):
    (tmp_path / "app.py").write_text("def handle(item): pass\n")
    outcome = run(sys.executable, "-m", "forkring._worker", "app:handle", folder=tmp_path)
    assert outcome.returncode == 1 and "FORKRING_WORKER is not set" in outcome.stderr


def test_what_an_import_starts_has_nothing_of_the_server(tmp_path):
    # A daemon that kept it would keep the server's name after its death.
    (tmp_path / "app.py").write_text(
        "import subprocess\n\n"
        "listing = subprocess.run(['ls', '-l', '/proc/self/fd'], close_fds=False, capture_output=True, text=True)\n\n"
        "def handle(item):\n    return listing.stdout.encode()\n"
    )
    name = f"start-{os.getpid()}"
    arguments = ["serve", "app:handle", "--workers", "1", "--listen", "127.0.0.1:0", "--name", name]
    with Started(FORKRING, *arguments, folder=tmp_path) as server:
        open_files = server.call("handle", "")
    assert "pipe:" in open_files, open_files
    assert "anon_inode" not in open_files and "/dev/shm" not in open_files, open_files


def test_ctrl_c_ends_a_command_that_waits(tmp_path):
    server = "echo=echo"
    name = f"start-{os.getpid()}"
    with Started(FORKRING, "serve", "--pool", server, "--listen", "127.0.0.1:0", "--name", name, folder=tmp_path) as server:
        updates = subprocess.Popen(
            [FORKRING, "updates", "--addr", server.address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            # It is up when it has connected.
            tcp = lambda: any("socket:" in link for link in links(updates.pid))  # noqa: E731
            from serving import until

            until("its connection", tcp)
            updates.send_signal(signal.SIGINT)
            assert updates.wait(PATIENCE) == -signal.SIGINT
        finally:
            updates.kill()
            updates.communicate()


def links(pid):
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except OSError:
            pass
    return found
