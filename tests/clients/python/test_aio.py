"""The four shapes by grpc.aio, and a thousand calls and streams at once."""

import asyncio

import grpc
import pytest
from forkring.v1.dispatcher_pb2 import GetUpdatesRequest, WorkItem
from forkring.v1.dispatcher_pb2_grpc import DispatcherStub

from harness import PATIENCE, error_of

MANY = 1000


@pytest.fixture
def run(server):
    """Runs `test(stub)` on a loop and a channel of its own."""

    async def with_stub(test):
        async with server.aio_channel() as channel:
            await asyncio.wait_for(test(DispatcherStub(channel)), PATIENCE)

    return lambda test: asyncio.run(with_stub(test))


def item(n, **fields):
    return WorkItem(pool="echo", id=n, payload=b"item %d" % n, **fields)


def test_call_and_its_failure(run):
    async def test(stub):
        result = await stub.Call(item(7))
        assert (result.id, result.payload) == (7, b"item 7")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Call(WorkItem(pool="nope"))
        assert error_of(Failed(caught.value))[:2] == ("NOT_FOUND", "UNKNOWN_POOL")

    run(test)


def test_submit_and_updates(run):
    async def test(stub):
        updates = stub.GetUpdates(GetUpdatesRequest(subscription="aio"))
        await updates.initial_metadata()
        submit = stub.Submit()
        for n in range(100):
            await submit.write(item(n, subscription="aio"))
            assert (await updates.read()).id == n
        await submit.done_writing()
        assert (await submit).accepted == 100
        updates.cancel()

    run(test)


def test_process_both_at_once(run):
    async def test(stub):
        stream = stub.Process()

        async def write():
            for n in range(MANY):
                await stream.write(item(n))
            await stream.done_writing()

        writer = asyncio.create_task(write())
        results = [(result.id, result.payload) async for result in stream]
        await writer
        assert sorted(results) == [(n, b"item %d" % n) for n in range(MANY)]
        assert await stream.code() is grpc.StatusCode.OK

    run(test)


def test_a_cancelled_task_cancels_its_item(run, gate):
    async def test(stub):
        held = gate()
        call = asyncio.ensure_future(call_of(stub, held))
        await asyncio.to_thread(held.wait_until_begun)
        call.cancel()
        await asyncio.to_thread(held.wait_until_killed)

    async def call_of(stub, held):
        return await stub.Call(WorkItem(pool="gate", payload=held.payload))

    run(test)


def test_a_thousand_calls_at_once(run):
    async def test(stub):
        results = await asyncio.gather(*(stub.Call(item(n)) for n in range(MANY)))
        assert [(result.id, result.payload) for result in results] == [(n, b"item %d" % n) for n in range(MANY)]

    run(test)


def test_a_thousand_streams_at_once(run):
    async def test(stub):
        async def begin(n):
            stream = stub.Process()
            await stream.write(item(n))
            assert (await stream.read()).id == n
            return stream

        async def end(stream):
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
            assert await stream.code() is grpc.StatusCode.OK

        # Each of them is open, and has been answered, before the first is closed.
        streams = await asyncio.gather(*(begin(n) for n in range(MANY)))
        await asyncio.gather(*(end(stream) for stream in streams))

    run(test)


class Failed:
    """A failed aio call as `grpc_status.rpc_status.from_call` wants it."""

    def __init__(self, error):
        self.code, self.details, self.trailing_metadata = error.code, error.details, error.trailing_metadata
