"""Real servers from the installed wheel, and grpcio as their client. The programs that are served are in `apps/`."""

import os
import sys
from pathlib import Path

import pytest

# What these tests share with those of other clients: servers, gates, statuses taken apart.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "clients" / "python"))
os.environ["FORKRING_BIN"] = str(Path(sys.executable).with_name("forkring"))
pytest.register_assert_rewrite("harness", "serving")

import stubs  # noqa: E402
from serving import App  # noqa: E402


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
