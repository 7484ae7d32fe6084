"""Compiles the project's proto before the tests are imported; fixtures that most of them use."""

import sys
import tempfile
from pathlib import Path

import pytest
from grpc_tools import protoc

pytest.register_assert_rewrite("harness")

from harness import GATE, ROOT, Gate, Server  # noqa: E402

_stubs = tempfile.TemporaryDirectory()


def pytest_configure():
    includes = Path(protoc.__file__).parent / "_proto"
    out = _stubs.name
    arguments = [f"-I{ROOT / 'proto'}", f"-I{includes}", f"--python_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(["protoc", *arguments, "forkring/v1/dispatcher.proto"]) != 0:
        pytest.exit("cannot compile forkring/v1/dispatcher.proto", returncode=1)
    sys.path.insert(0, out)


def pytest_unconfigure():
    _stubs.cleanup()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One server for all tests that do not disturb each other."""
    gone = tmp_path_factory.mktemp("programs") / "gone"
    gone.touch(mode=0o700)
    pools = [
        "echo:2=echo",
        "hash:1=sha256",
        f"gate:1={GATE}",
        "fail:1=exec:sh -c 'cat >&2; exit 3'",
        f"gone:1=exec:{gone}",
    ]
    with Server(*(f"--pool={pool}" for pool in pools)) as server:
        gone.unlink()
        yield server


@pytest.fixture
def channel(server):
    with server.channel() as channel:
        yield channel


@pytest.fixture
def stub(channel):
    from forkring.v1.dispatcher_pb2_grpc import DispatcherStub

    return DispatcherStub(channel)


@pytest.fixture
def gate(tmp_path):
    """Makes gates: `gate()`."""
    gates = []

    def make():
        gates.append(Gate(tmp_path))
        return gates[-1]

    yield make
    for made in gates:
        made.close()
