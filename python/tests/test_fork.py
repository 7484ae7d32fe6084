"""A client that was made before a fork works after it, in the parent and in the child, whatever gRPC is told."""

import asyncio
import multiprocessing
import os
import pickle
import select
import subprocess
import sys

import pytest
from harness import PATIENCE
from programs import run_program

from forkring import aio
from forkring.client import Client, Code, ForkError

# Newer Pythons warn of forks with threads, which is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


FINE = "children: 4 fine; parent: fine"


@pytest.mark.parametrize("fork_support", [None, "0", "1"])
@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_four_children_forked_mid_traffic(server, kind, fork_support):
    ended = run_program("fork_traffic.py", server.address, kind, fork_support=fork_support)
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout == ""


def in_child(work):
    """Runs it in a fork of this process, with its end bounded; what it returned or raised, as text."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            said = repr(work())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    try:
        os.set_blocking(read, False)
        poll = select.poll()
        poll.register(read)
        assert poll.poll(PATIENCE * 1000), "the child hangs"
        return os.read(read, 1 << 16).decode()
    finally:
        os.close(read)
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_a_stream_of_the_parent_is_a_clear_error_in_the_child(server):
    with Client(server.address, pool="echo") as client, client.updates("across") as updates:
        said = in_child(lambda: next(updates))
        assert said.startswith("ForkError: FAILED_PRECONDITION (FORKED): ")
        assert f"this stream belongs to process {os.getpid()}; open a new one after fork" in said
        # Closing it there closes it there only.
        assert in_child(updates.close) == "None"
        assert in_child(lambda: client.submit([b"x"], subscription="across").accepted) == "1"
        assert next(updates).payload == b"x"


def test_an_aio_stream_of_the_parent_is_a_clear_error_in_the_child(server):
    async def main():
        async with aio.Client(server.address, pool="echo") as client, client.updates("aio across") as updates:
            said = in_child(lambda: asyncio.run(updates.__anext__()))
            assert f"this stream belongs to process {os.getpid()}; open a new one after fork" in said
            assert (await client.submit([b"x"], subscription="aio across")).accepted == 1
            assert (await updates.__anext__()).payload == b"x"

    asyncio.run(main())


def test_the_error_of_a_stream_can_be_sent_to_another_process():
    error = pickle.loads(pickle.dumps(ForkError(7)))
    assert (error.code, error.reason) == (Code.FAILED_PRECONDITION, "FORKED")


def test_what_the_child_closes_stays_open_in_the_parent(server):
    with Client(server.address, pool="echo") as client:
        client.call(b"x")

        def work():
            with client:
                return client.call(b"y").payload

        assert in_child(work) == "b'y'"
        assert client.call(b"z").payload == b"z"


def call_of(client, payload):
    return client.call(payload).payload


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_multiprocessing(server, method):
    with Client(server.address, pool="echo") as client:
        client.call(b"before")
        with multiprocessing.get_context(method).Pool(2) as pool:
            answers = pool.starmap_async(call_of, [(client, b"%d" % n) for n in range(20)])
            assert answers.get(PATIENCE) == [b"%d" % n for n in range(20)]
        assert client.call(b"after").payload == b"after"


def test_a_programs_own_grpc_is_left_alone(server):
    program = """if True:
        import os, sys
        from forkring.client import Client
        from forkring import aio
        client = Client(sys.argv[1], pool="echo")
        assert client.call(b"x").payload == b"x"
        assert os.environ["GRPC_ENABLE_FORK_SUPPORT"] == "1"
        assert not [name for name in sys.modules if name == "grpc" or name.startswith("grpc.")]
        import grpc, grpc.aio
        from grpc import aio as theirs
        assert grpc.aio is theirs and client._stubs()[0] is not grpc
        assert grpc._cython.cygrpc.is_fork_support_enabled()
        with grpc.insecure_channel(sys.argv[1]) as channel:
            call = channel.unary_unary("/forkring.v1.Dispatcher/Call")
            assert b"theirs" in call(b"\\x0a\\x04echo\\x12\\x06theirs", timeout=60)
        assert client.call(b"y").payload == b"y"
    """
    environment = {**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "1"}
    command = [sys.executable, "-c", program, server.address]
    subprocess.run(command, env=environment, timeout=PATIENCE, check=True)


def test_the_pitfall_of_plain_grpcio_is_not_ours(server):
    ended = run_program("../../examples/python/fork_pitfall.py", server.address)
    assert ended.returncode == 0, ended.stdout
    rows = [tuple(part.strip() for part in line.split("|")) for line in ended.stdout.splitlines()]
    all_fine = {(setting.split(" ", 1)[1], client) for setting, client, said in rows if said == FINE}
    assert len(rows) == 9, ended.stdout
    assert {(setting, "forkring.Client") for setting in ("not set", "0", "1")} <= all_fine, ended.stdout
    # With the other settings it is a matter of luck: with this one gRPC has no threads in the child, ever.
    for client in ("grpcio, inherited channel", "grpcio, new channel"):
        assert ("0", client) not in all_fine, ended.stdout
