"""Every refusal is a status with a code, a reason for programs in google.rpc.ErrorInfo, and a line for people."""

import queue

import grpc
import pytest
from forkring.v1.dispatcher_pb2 import GetUpdatesRequest, WorkItem
from forkring.v1.dispatcher_pb2_grpc import DispatcherStub
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from harness import GATE, PATIENCE, Server, detail_of, error_of

DISPATCHER = "/forkring.v1.Dispatcher/"


def failure(call, *arguments, **named):
    """How the call fails; a stream, when it is read."""
    with pytest.raises(grpc.RpcError) as caught:
        answer = call(*arguments, timeout=named.pop("timeout", PATIENCE), **named)
        for _ in answer if isinstance(answer, grpc.Call) else ():
            pass
    return caught.value


@pytest.mark.parametrize(
    ("item", "code", "reason", "says"),
    [
        (WorkItem(pool="größe"), "NOT_FOUND", "UNKNOWN_POOL", "there is no pool `größe`: this server has echo"),
        (WorkItem(), "INVALID_ARGUMENT", "POOL_REQUIRED", "names no pool"),
        (WorkItem(pool="echo", priority=4), "INVALID_ARGUMENT", "BAD_PRIORITY", "0 to 3"),
        (WorkItem(pool="echo", timeout=Duration(seconds=-1)), "INVALID_ARGUMENT", "BAD_TIMEOUT", "0 or more"),
        (WorkItem(pool="echo", metadata={"k": "v" * 20000}), "INVALID_ARGUMENT", "FIELD_TOO_LONG", "metadata"),
        (WorkItem(pool="p" * 300), "INVALID_ARGUMENT", "FIELD_TOO_LONG", "pool"),
        (WorkItem(pool="fail", payload=b"50 % of it\nis gone"), "INTERNAL", "EXEC_FAILED", "50 % of it\nis gone"),
        (WorkItem(pool="gone"), "FAILED_PRECONDITION", "EXEC_FAILED", "cannot run `/"),
    ],
)
def test_refusals(stub, item, code, reason, says):
    seen_code, seen_reason, message = error_of(failure(stub.Call, item))
    assert (seen_code, seen_reason) == (code, reason)
    assert says in message


@pytest.mark.parametrize("method", ["Call", "Submit", "Process", "GetUpdates"])
def test_compressed_messages_are_refused(stub, method):
    requests = {
        "Call": WorkItem(pool="echo", payload=bytes(1000)),
        "GetUpdates": GetUpdatesRequest(subscription="z" * 200),
    }
    request = requests.get(method) or iter([requests["Call"]])
    failed = failure(getattr(stub, method), request, compression=grpc.Compression.Gzip)
    code, reason, message = error_of(failed)
    assert (code, reason) == ("UNIMPLEMENTED", "COMPRESSED_MESSAGE")
    assert "gzip" in message


@pytest.mark.parametrize("method", ["Call", "Submit", "Process", "GetUpdates"])
@pytest.mark.parametrize("message", [b"\xff", b"\x12\x7fshort", b"\x0a\x02\xff\xfe"])
def test_malformed_messages(channel, method, message):
    # Field 1 of all requests is a string, field 2 of an item its payload.
    if method in ("Call", "GetUpdates"):
        failed = failure(channel.unary_stream(DISPATCHER + method), message)
    else:
        failed = failure(channel.stream_stream(DISPATCHER + method), iter([message]))
    assert error_of(failed)[:2] == ("INTERNAL", "MALFORMED_MESSAGE")


def test_a_call_needs_exactly_one_message(channel):
    call = channel.stream_unary(DISPATCHER + "Call")
    assert error_of(failure(call, iter([])))[:2] == ("INTERNAL", "NO_MESSAGE")


def test_the_longest_message_fits_into_the_headers_that_clients_take():
    # grpc's own clients refuse more than 8 KiB, and some of them at random.
    pools = [f"{n:02}{'p' * 62}:1=echo" for n in range(64)]
    small = ["--spin", "off", "--arena", "64KiB", "--max-message", "32KiB"]
    with Server(*small, *(f"--pool={pool}" for pool in pools)) as server, server.channel() as channel:
        stub = DispatcherStub(channel)
        for _ in range(30):
            assert error_of(failure(stub.Call, WorkItem(pool="x" * 200)))[:2] == ("NOT_FOUND", "UNKNOWN_POOL")


def test_unknown_methods_and_services(channel):
    for path in (DISPATCHER + "Nope", "/no.such.Service/Call"):
        assert failure(channel.unary_unary(path), b"").code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_bad_item_of_a_stream_ends_neither_the_connection_nor_other_streams(channel, stub, gate):
    held = gate()
    running = stub.Call.future(WorkItem(pool="gate", payload=held.payload), timeout=PATIENCE)
    held.wait_until_begun()
    failure(channel.stream_stream(DISPATCHER + "Process"), iter([b"\xff"]))
    held.open()
    assert running.result().payload == b"done\n"


def test_too_large_a_message():
    small = ["--max-message", "1MiB", "--arena", "4MiB"]
    with Server("--pool", "echo:1=echo", *small) as server, server.channel() as channel:
        stub = DispatcherStub(channel)
        large = WorkItem(pool="echo", payload=bytes(2 << 20))
        for failed in (
            failure(stub.Call, large),
            failure(stub.Submit, iter([large])),
            failure(stub.Process, iter([large])),
        ):
            code, reason, message = error_of(failed)
            assert (code, reason) == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
            assert "--max-message" in message
        assert stub.Call(WorkItem(pool="echo", payload=b"x")).payload == b"x"


def test_a_full_server_refuses_calls_and_says_when_to_try_again(gate):
    capacity = 4
    with Server("--pool", f"gate:1={GATE}", "--capacity", str(capacity)) as server, server.channel() as channel:
        stub = DispatcherStub(channel)
        gates = [gate() for _ in range(capacity + 1)]
        calls = [stub.Call.future(WorkItem(payload=held.payload), timeout=PATIENCE) for held in gates]
        # None of them can be done, so there is room for all but one, and that one is refused.
        refused = queue.SimpleQueue()
        for call in calls:
            call.add_done_callback(refused.put)
        failed = refused.get(timeout=PATIENCE).exception()
        assert error_of(failed)[:2] == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        retry = detail_of(rpc_status.from_call(failed), error_details_pb2.RetryInfo)
        assert retry.retry_delay.ToNanoseconds() > 0
        for held in gates:
            held.open()
        assert sum(call.exception() is None for call in calls) == capacity
