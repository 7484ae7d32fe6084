"""How items end early: deadlines, cancels, and a server that drains."""

import socket

import grpc
import pytest
from forkring.v1.dispatcher_pb2 import GetUpdatesRequest, WorkItem
from forkring.v1.dispatcher_pb2_grpc import DispatcherStub
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from harness import GATE, PATIENCE, Server, error_of

SOON = 0.2  # seconds


def is_refused(address):
    """Whether a connection ends at once, if there is one."""
    host, port = address.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), PATIENCE) as connection:
            return connection.recv(1) == b""
    except ConnectionError:
        return True


def run_one(stub, gate):
    """Shows that the pool's one worker is free."""
    held = gate()
    call = stub.Call.future(WorkItem(pool="gate", payload=held.payload), timeout=PATIENCE)
    held.wait_until_begun()
    held.open()
    assert call.result().payload == b"done\n"


def test_the_deadline_of_a_call_frees_its_worker(stub, gate):
    with pytest.raises(grpc.RpcError) as caught:
        stub.Call(WorkItem(pool="gate", payload=gate().payload), timeout=SOON)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    run_one(stub, gate)


def test_the_timeout_of_an_item_is_its_deadline(stub, gate):
    item = WorkItem(pool="gate", payload=gate().payload, timeout=Duration(nanos=int(SOON * 1e9)))
    with pytest.raises(grpc.RpcError) as caught:
        stub.Call(item, timeout=PATIENCE)
    assert error_of(caught.value)[:2] == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
    (result,) = stub.Process(iter([item]), timeout=PATIENCE)
    assert result.status.reason == "DEADLINE_EXCEEDED"
    item.subscription = "late"
    assert stub.Submit(iter([item])).accepted == 1
    (result,) = stub.GetUpdates(GetUpdatesRequest(subscription="late", limit=1), timeout=PATIENCE)
    assert result.status.reason == "DEADLINE_EXCEEDED"
    run_one(stub, gate)


def test_an_item_that_expires_in_the_queue_never_runs(stub, gate):
    first, second = gate(), gate()
    running = stub.Call.future(WorkItem(pool="gate", payload=first.payload), timeout=PATIENCE)
    first.wait_until_begun()
    with pytest.raises(grpc.RpcError):
        stub.Call(WorkItem(pool="gate", payload=second.payload), timeout=SOON)
    first.open()
    assert running.result().payload == b"done\n"
    # The worker takes them in order: once it has done a third, the second will never come.
    run_one(stub, gate)
    assert not second.has_begun()


def test_a_cancel_reaches_the_running_handler(stub, gate):
    held = gate()
    call = stub.Call.future(WorkItem(pool="gate", payload=held.payload), timeout=PATIENCE)
    held.wait_until_begun()
    call.cancel()
    held.wait_until_killed()


def test_leaving_a_stream_cancels_its_items(stub, gate):
    running, queued = gate(), gate()
    items = [WorkItem(pool="gate", payload=held.payload) for held in (running, queued)]
    results = stub.Process(iter(items), timeout=PATIENCE)
    running.wait_until_begun()
    results.cancel()
    running.wait_until_killed()
    run_one(stub, gate)
    assert not queued.has_begun()


def test_a_lost_connection_cancels_its_items(server, stub, gate):
    held = gate()
    with server.channel(("grpc.use_local_subchannel_pool", 1)) as channel:
        call = DispatcherStub(channel).Call.future(WorkItem(pool="gate", payload=held.payload), timeout=PATIENCE)
        held.wait_until_begun()
    assert call.code() is grpc.StatusCode.CANCELLED
    held.wait_until_killed()
    run_one(stub, gate)


def test_a_drain_finishes_what_was_accepted_and_takes_nothing_new(gate):
    with Server("--pool", f"gate:1={GATE}", "--pool", "echo:1=echo") as server, server.channel() as channel:
        stub = DispatcherStub(channel)
        running, submitted = gate(), gate()
        call = stub.Call.future(WorkItem(pool="gate", payload=running.payload), timeout=PATIENCE)
        running.wait_until_begun()
        item = WorkItem(pool="gate", id=9, payload=submitted.payload, subscription="s")
        assert stub.Submit(iter([item])).accepted == 1
        updates = stub.GetUpdates(GetUpdatesRequest(subscription="s"), timeout=PATIENCE)
        updates.initial_metadata()
        request = health_pb2.HealthCheckRequest(service="gate")
        health = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=PATIENCE)
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING

        server.terminate()
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Call(WorkItem(pool="echo"), timeout=PATIENCE)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert is_refused(server.address), "a new client is to go elsewhere, not to wait here"

        running.open(b"first")
        assert call.result().payload == b"first\n"
        submitted.open(b"second")
        assert [(result.id, result.payload) for result in updates] == [(9, b"second\n")]
        assert updates.code() is grpc.StatusCode.OK
        # One who watches the health must not hold the server up until its grace is over.
        assert server.process.wait(PATIENCE) == 0
        assert health.code() in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
