"""What the clients' tests share: a real server, items that run until they are told to end, programs that fork."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
os.environ.setdefault("FORKRING_BIN", str(Path(sys.executable).with_name("forkring")))
# What these tests share with those of other clients: servers and gates.
sys.path.insert(0, str(TESTS.parents[1] / "tests" / "clients" / "python"))

from harness import GATE, PATIENCE, Gate, Server  # noqa: E402

__all__ = ["GATE", "PATIENCE", "Gate", "Server", "gate", "run_program", "server"]


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
