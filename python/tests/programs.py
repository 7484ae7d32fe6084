"""Programs that fork, and may hang."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import PATIENCE

TESTS = Path(__file__).resolve().parent


def run_program(name: str, *arguments: str, fork_support: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a program, by its path from this folder, in a session of its own, of which nothing is left if it hangs."""
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
