"""What the clients' tests share: a real server, items that run until they are told to end, programs that fork."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
BINARY = os.environ.get("FORKRING_BIN") or shutil.which("forkring") or TESTS.parents[1] / "target/debug/forkring"
PATIENCE = 60  # seconds; only a defect needs them

# The program of a Gate's pool: it says that it has begun, and its result is the line that it is then given.
GATE = """exec:sh -c 'read path; exec 3>"$path.alive"; echo >&3; exec head -n 1 "$path.line"'"""

_serial = itertools.count()


class Server:
    """A `forkring serve` of its own; leaving it drains it."""

    def __init__(self, *arguments: str) -> None:
        self.name = f"pyclients-{os.getpid()}-{next(_serial)}"
        self._log = tempfile.TemporaryFile(mode="w+")
        listen = [] if "--listen" in arguments else ["--listen", "127.0.0.1:0"]
        # The kernel ends it if this process dies; settings of the machine's owner are not its own.
        command = [BINARY, "serve", "--name", self.name, *listen, "--parent", str(os.getpid()), *arguments]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FORKRING_")}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**environment, "FORKRING_LOG": "warn"},
        )
        line = self.process.stdout.readline()
        if not line.startswith("listening on "):
            self.process.wait()
            raise RuntimeError(f"the server did not start: {self.log()}")
        self.address = line.removeprefix("listening on ").strip()

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.process.terminate()
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.process.stdout.close()
        if kind is None:
            assert code == 0, self.log()
            assert [name for name in os.listdir("/dev/shm") if self.name in name] == []


class Gate:
    """An item of a pool that runs GATE: it is known when it begins and ends, and it ends when it is told."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"gate-{next(_serial)}"
        for end in ("alive", "line"):
            os.mkfifo(f"{self.path}.{end}")
        self._alive = os.open(f"{self.path}.alive", os.O_RDONLY | os.O_NONBLOCK)
        # Read and write: so it opens at once, and what is written waits for its reader.
        self._line = os.open(f"{self.path}.line", os.O_RDWR)

    @property
    def payload(self) -> str:
        return f"{self.path}\n"

    def wait_until_begun(self) -> None:
        assert self._poll(select.POLLIN), "the item has not begun"
        os.read(self._alive, 1)

    def open(self, result: bytes = b"done") -> None:
        """Ends the item; its result is a line."""
        os.write(self._line, result + b"\n")

    def wait_until_killed(self) -> None:
        assert self._poll(0), "the item still runs"

    def _poll(self, events: int) -> bool:
        poll = select.poll()
        poll.register(self._alive, events)
        return bool(poll.poll(PATIENCE * 1000))

    def close(self) -> None:
        os.close(self._alive)
        os.close(self._line)


@pytest.fixture(scope="session")
def server():
    """One server for all tests that do not disturb each other."""
    pools = ["echo:2=echo", "hash:1=sha256", f"gate:1={GATE}", "fail:1=exec:sh -c 'cat >&2; exit 3'"]
    with Server(*(f"--pool={pool}" for pool in pools)) as server:
        yield server


@pytest.fixture
def gate(tmp_path):
    """Makes gates: `gate()`."""
    with contextlib.ExitStack() as gates:
        yield lambda: gates.enter_context(contextlib.closing(Gate(tmp_path)))


def run_program(name: str, *arguments: str, fork_support: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a program of this folder in a session of its own, of which nothing is left if it hangs."""
    environment = {key: value for key, value in os.environ.items() if key != "GRPC_ENABLE_FORK_SUPPORT"}
    if fork_support is not None:
        environment["GRPC_ENABLE_FORK_SUPPORT"] = fork_support
    with tempfile.TemporaryFile(mode="w+") as output:
        process = subprocess.Popen(
            # Newer Pythons warn of forks with threads, which is what is tested.
            [sys.executable, "-W", "ignore::DeprecationWarning", str(TESTS / name), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(2 * PATIENCE)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        output.seek(0)
        return subprocess.CompletedProcess(process.args, code, output.read())
