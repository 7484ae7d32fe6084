"""The four shapes of the service, by grpcio's blocking client."""

import hashlib
import queue
import threading

import grpc
import pytest
from forkring.v1.dispatcher_pb2 import GetUpdatesRequest, WorkItem
from forkring.v1.dispatcher_pb2_grpc import DispatcherStub

from harness import PATIENCE, Server

LARGE = 8 << 20


def echoes(count, **fields):
    return [WorkItem(pool="echo", id=n, payload=b"item %d" % n, **fields) for n in range(1, count + 1)]


class Feed:
    """The request stream of a call, fed one item at a time."""

    def __init__(self):
        self._items = queue.SimpleQueue()

    def put(self, item):
        self._items.put(item)

    def end(self):
        self._items.put(None)

    def __iter__(self):
        return iter(self._items.get, None)


def test_call(stub):
    result = stub.Call(WorkItem(pool="echo", id=7, payload=b"hello", priority=3, metadata={"a": "1", "ä": "ö"}))
    assert (result.id, result.payload, result.attempts) == (7, b"hello", 1)
    assert not result.HasField("status")
    assert result.timing.worked_ns > 0
    assert result.worker in (0, 1), "the workers of the first pool"


def test_call_of_another_pool(stub):
    assert stub.Call(WorkItem(pool="hash", payload=b"abc")).payload == hashlib.sha256(b"abc").digest()


@pytest.mark.parametrize("length", [0, 1, 64, 65, 16 << 10, (16 << 10) + 1, LARGE])
def test_call_of_any_length(stub, length):
    # No two blocks alike, so that none can be lost, doubled or swapped.
    payload = b"".join(b"%08x" % n for n in range(-(-length // 8)))[:length]
    result = stub.Call(WorkItem(pool="echo", payload=payload))
    assert result.payload == payload


def test_the_pool_may_be_left_out_if_there_is_one():
    with Server("--pool", "only:1=echo") as server, server.channel() as channel:
        assert DispatcherStub(channel).Call(WorkItem(payload=b"x")).payload == b"x"


def test_submit_and_then_updates(stub):
    items = echoes(1000, subscription="later")
    receipt = stub.Submit(iter(items))
    assert (receipt.accepted, receipt.rejected) == (1000, 0)
    updates = stub.GetUpdates(GetUpdatesRequest(subscription="later", limit=1000), timeout=PATIENCE)
    assert sorted((result.id, result.payload) for result in updates) == [(item.id, item.payload) for item in items]
    assert updates.code() is grpc.StatusCode.OK, "the stream ends after its limit"


def test_updates_come_while_the_submit_stream_is_open(stub):
    updates = stub.GetUpdates(GetUpdatesRequest(subscription="live"), timeout=PATIENCE)
    # The subscriber is told at once that it is one, though there is no result.
    updates.initial_metadata()
    feed = Feed()
    receipt = stub.Submit.future(iter(feed))
    for item in echoes(10, subscription="live"):
        feed.put(item)
        result = next(updates)
        assert (result.id, result.payload) == (item.id, item.payload)
    feed.end()
    assert receipt.result(PATIENCE).accepted == 10
    updates.cancel()


def test_large_updates(stub):
    payload = bytes(range(256)) * (LARGE // 256)
    items = (WorkItem(pool="echo", id=n, payload=payload, subscription="large") for n in range(3))
    assert stub.Submit(items).accepted == 3
    updates = stub.GetUpdates(GetUpdatesRequest(subscription="large", limit=3), timeout=PATIENCE)
    assert sorted(result.id for result in updates if result.payload == payload) == [0, 1, 2]


def test_rejected_items_have_a_reason_and_no_result(stub):
    bad = [WorkItem(pool="nope", id=n, subscription="mixed") for n in range(100, 140)]
    receipt = stub.Submit(iter([*bad, *echoes(2, subscription="mixed")]))
    assert (receipt.accepted, receipt.rejected) == (2, 40)
    assert [rejection.id for rejection in receipt.rejections] == list(range(100, 132)), "the first 32"
    status = receipt.rejections[0].status
    assert (status.code, status.reason) == (grpc.StatusCode.NOT_FOUND.value[0], "UNKNOWN_POOL")
    assert "echo" in status.message, "it says what pools there are"
    updates = stub.GetUpdates(GetUpdatesRequest(subscription="mixed", limit=2), timeout=PATIENCE)
    assert sorted(result.id for result in updates) == [1, 2]


def test_each_result_goes_to_one_of_two_subscribers(stub):
    streams = [stub.GetUpdates(GetUpdatesRequest(subscription="two"), timeout=PATIENCE) for _ in range(2)]
    for stream in streams:
        stream.initial_metadata()
    results = queue.SimpleQueue()

    def read(stream):
        try:
            for result in stream:
                results.put(result.id)
        except grpc.RpcError as error:
            results.put(error.code())

    readers = [threading.Thread(target=read, args=[stream]) for stream in streams]
    for reader in readers:
        reader.start()
    assert stub.Submit(iter(echoes(200, subscription="two"))).accepted == 200
    assert sorted(results.get(timeout=PATIENCE) for _ in range(200)) == list(range(1, 201))
    for stream, reader in zip(streams, readers, strict=True):
        stream.cancel()
        reader.join(PATIENCE)
    assert {results.get_nowait(), results.get_nowait()} == {grpc.StatusCode.CANCELLED}, "and nothing came twice"


def test_what_a_subscriber_did_not_get_goes_to_the_next():
    count, payload = 100, bytes(64 << 10)
    # A window of 64 KiB, so that little is on its way to a subscriber that does not read.
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 64 << 10)]
    with Server("--pool", "echo:1=echo") as server, server.channel(*narrow) as channel:
        stub = DispatcherStub(channel)
        items = (WorkItem(id=n, payload=payload, subscription="heir") for n in range(count))
        assert stub.Submit(items).accepted == count
        first = stub.GetUpdates(GetUpdatesRequest(subscription="heir"), timeout=PATIENCE)
        seen = {next(first).id}
        first.cancel()
        stub.Call(WorkItem())
        second = stub.GetUpdates(GetUpdatesRequest(subscription="heir"), timeout=PATIENCE)
        seen.add(next(second).id)
        # A draining server ends the stream after the last result.
        server.terminate()
        seen.update(result.id for result in second)
        # What was written to the first is its own: what fits into the window and the client's read-ahead.
        assert len(seen) >= count - 3


def test_process_pipelines(stub):
    items = echoes(5000)
    results = stub.Process(iter(items), timeout=PATIENCE)
    assert sorted((result.id, result.payload) for result in results) == [(item.id, item.payload) for item in items]
    assert results.code() is grpc.StatusCode.OK


def test_process_answers_while_the_stream_is_open(stub):
    feed = Feed()
    results = stub.Process(iter(feed), timeout=PATIENCE)
    for item in echoes(100):
        feed.put(item)
        assert next(results).id == item.id
    feed.end()
    assert list(results) == []
    assert results.code() is grpc.StatusCode.OK


def test_process_ends_after_the_last_result(stub, gate):
    held, feed = gate(), Feed()
    results = stub.Process(iter(feed), timeout=PATIENCE)
    feed.put(WorkItem(pool="gate", id=1, payload=held.payload))
    feed.end()
    held.wait_until_begun()
    held.open(b"at last")
    assert [(result.id, result.payload) for result in results] == [(1, b"at last\n")]
    assert results.code() is grpc.StatusCode.OK


def test_results_come_as_they_complete(stub, gate):
    held, feed = gate(), Feed()
    results = stub.Process(iter(feed), timeout=PATIENCE)
    feed.put(WorkItem(pool="gate", id=1, payload=held.payload))
    held.wait_until_begun()
    feed.put(WorkItem(pool="echo", id=2))
    assert next(results).id == 2, "it does not wait for the one before it"
    held.open()
    feed.end()
    assert [result.id for result in results] == [1]


def test_process_of_nothing(stub):
    results = stub.Process(iter([]), timeout=PATIENCE)
    assert list(results) == []
    assert results.code() is grpc.StatusCode.OK


def test_process_of_large_items(stub):
    payloads = [bytes([n]) * LARGE for n in range(4)]
    items = (WorkItem(pool="echo", id=n, payload=payload) for n, payload in enumerate(payloads))
    results = stub.Process(items, timeout=PATIENCE)
    assert sorted(result.id for result in results if result.payload == payloads[result.id]) == [0, 1, 2, 3]


def test_a_failed_item_does_not_end_the_stream(stub):
    items = [WorkItem(pool="nope", id=1), WorkItem(pool="fail", id=2, payload=b"why"), WorkItem(pool="echo", id=3)]
    results = {result.id: result for result in stub.Process(iter(items), timeout=PATIENCE)}
    assert (results[1].status.code, results[1].status.reason) == (grpc.StatusCode.NOT_FOUND.value[0], "UNKNOWN_POOL")
    assert (results[2].status.code, results[2].status.reason) == (grpc.StatusCode.INTERNAL.value[0], "EXEC_FAILED")
    assert results[2].status.message.endswith("why"), "the end of the program's stderr"
    assert results[2].payload == b""
    assert not results[3].HasField("status")
