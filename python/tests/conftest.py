"""Real servers from the installed wheel; their clients are grpcio and the package's own. The programs that are served
are in `apps/`."""

import contextlib
import os
import sys
from pathlib import Path

import pytest

# What these tests share with those of other clients: servers, gates, statuses taken apart.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "clients" / "python"))
os.environ["FORKRING_BIN"] = str(Path(sys.executable).with_name("forkring"))
pytest.register_assert_rewrite("harness", "serving")

import stubs  # noqa: E402
from harness import GATE, Gate, Server  # noqa: E402
from serving import App  # noqa: E402


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


@pytest.fixture(scope="session")
def messages():
    return stubs.messages()


@pytest.fixture
def serve(messages):
    """Makes servers: `serve("file.py:handler", …)`; each is drained when the test ends."""
    apps = []

    def make(*pools, **options):
        apps.append(App(messages, *pools, **options))
        return apps[-1]

    yield make
    failed = None
    for app in reversed(apps):
        try:
            app.close()
        except BaseException as error:  # noqa: B902 - the others must be ended, too
            failed = failed or error
    if failed:
        raise failed
