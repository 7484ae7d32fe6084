"""The clients' calls, blocking and for asyncio, against a real server."""

import array
import asyncio
import hashlib
import math
import queue
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy
import pytest
from harness import GATE, PATIENCE, Server
from programs import run_program
from serving import until

from forkring import aio
from forkring._attempts import Attempts, Outage, settings_of
from forkring.client import Client, Code, Error, Work

LARGE = 8 << 20
SOON = 0.2  # seconds


class Blocking:
    """The asyncio client behind the blocking one's methods: each test runs for both."""

    def __init__(self, *arguments, **named):
        self._loop = asyncio.new_event_loop()
        self._client = aio.Client(*arguments, **named)

    def _run(self, work):
        return self._loop.run_until_complete(asyncio.wait_for(work, PATIENCE))

    def call(self, *arguments, **named):
        return self._run(self._client.call(*arguments, **named))

    def submit(self, *arguments, **named):
        return self._run(self._client.submit(*arguments, **named))

    def updates(self, *arguments, **named):
        return self._iterate(lambda: self._client.updates(*arguments, **named))

    def process(self, *arguments, **named):
        return self._iterate(lambda: self._client.process(*arguments, **named))

    def _iterate(self, begin):
        async def make():
            return begin()

        results = self._run(make())
        while True:
            try:
                yield self._run(results.__anext__())
            except StopAsyncIteration:
                return

    def close(self):
        self._run(self._client.close())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
        self._loop.close()


@pytest.fixture(params=[Client, Blocking], ids=["sync", "aio"])
def make(request):
    return request.param


@pytest.fixture
def client(make, server):
    with make(server.address, pool="echo") as client:
        yield client


def error_of(work):
    with pytest.raises(Error) as caught:
        work()
    return caught.value


def test_call(client):
    result = client.call(b"hello", id=7, metadata={"a": "1", "ä": "ö"}, priority=3)
    assert (result.id, result.payload, result.attempts) == (7, b"hello", 1)
    assert result.ok and result.error is None
    assert result.timing.worked > 0
    assert result.worker in (0, 1)


def test_clients_and_works_show_what_they_are():
    assert repr(Client("h:1")) == "<forkring.Client of h:1>"
    assert repr(aio.Client("http://h:1")) == "<forkring.aio.Client of h:1>"
    assert repr(Work(b"x", id=7, pool="p")) == "forkring.Work(id=7, payload=b'x', pool='p', priority=0)"


def test_call_of_another_pool(client):
    assert client.call(b"abc", pool="hash").payload == hashlib.sha256(b"abc").digest()


@pytest.mark.parametrize(
    ("payload", "sent"),
    [
        ("ä", "ä".encode()),
        (bytearray(b"ab"), b"ab"),
        (memoryview(b"abcd")[::2], b"ac"),
        (array.array("H", [1, 256]), b"\x01\x00\x00\x01"),
        (b"", b""),
    ],
)
def test_payloads_are_text_or_any_buffer(client, payload, sent):
    assert client.call(payload).payload == sent


def test_a_payload_that_is_none(client):
    with pytest.raises(TypeError, match="a payload is bytes, str or a buffer, not int"):
        client.call(7)


def test_an_array_of_objects_is_no_payload(client):
    with pytest.raises(TypeError, match="no array of Python objects"):
        client.call(numpy.array([object()]))
    with pytest.raises(TypeError, match="no array of Python objects"):
        list(client.process([numpy.array([("a", 1)], dtype="O,i4")]))


@pytest.mark.parametrize("items", ["abc", b"abc", bytearray(b"abc"), memoryview(b"abc"), Work(b"abc")], ids=lambda items: type(items).__name__)
def test_one_payload_is_not_its_parts(client, items):
    for work in (client.submit, lambda items: list(client.process(items))):
        with pytest.raises(TypeError, match=r"items is an iterable of payloads: write \[payload\]"):
            work(items)


def test_large_payloads_both_ways():
    payload = bytes(range(256)) * (LARGE // 256)
    with Server("--pool", "echo:1=echo") as server, Client(server.address) as client:
        assert client.call(payload).payload == payload
        assert [result.payload == payload for result in client.process([payload] * 3)] == [True] * 3


def test_http_is_a_way_to_write_an_address(make, server):
    with make(f"http://{server.address}/", pool="echo") as client:
        assert client.call(b"x").payload == b"x"


def test_what_is_no_address_is_refused(make):
    for target in ["127.0.0.1", "localhost", "http://localhost/", ":50051", "::1", "h:x", "https://h:1", "h:123456", ""]:
        with pytest.raises(ValueError, match="is not an address: give HOST:PORT"):
            make(target)
    for target in ["h:1", "[::1]:1", "http://[::1]:1/", "dns:///h:1", "ipv4:127.0.0.1:1", "unix:/tmp/s"]:
        make(target)


METHODS = {
    "call": lambda client, **named: client.call(b"x", **named),
    "submit": lambda client, **named: client.submit([b"x"], subscription="mine", **named),
    "updates": lambda client, **named: next(client.updates("mine", **named)),
    "process": lambda client, **named: next(client.process([b"x"], **named)),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_server_that_is_not_there_is_an_error_with_a_reason(make, nobody, method):
    with make(nobody, connect_timeout=0) as client:
        error = error_of(lambda: METHODS[method](client))
    assert (error.code, error.reason) == (Code.UNAVAILABLE, "NO_CONNECTION")
    assert error.message == f"there is no server at {nobody} (Connection refused)"
    assert str(error) == f"UNAVAILABLE (NO_CONNECTION): {error.message}"
    # gRPC's own error says no more, and would bury it.
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)


def test_a_host_that_there_is_not_is_no_server(make):
    with make("no-such-host.invalid:1", connect_timeout=0) as client:
        error = error_of(lambda: client.call(b"x"))
    assert (error.code, error.reason) == (Code.UNAVAILABLE, "NO_CONNECTION")
    assert error.message.startswith("there is no server at no-such-host.invalid:1 (")


@pytest.mark.parametrize("method", METHODS)
def test_a_time_out_of_the_client_has_a_reason(make, serve_nothing, method):
    with make(serve_nothing) as client:
        error = error_of(lambda: METHODS[method](client, timeout=SOON))
    assert (error.code, error.reason) == (Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    assert str(error) == "DEADLINE_EXCEEDED: the timeout of the call is over"


@pytest.mark.parametrize("method", METHODS)
def test_a_connection_that_breaks_has_a_reason(make, method):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer_and_break, args=[listener], daemon=True)
        thread.start()
        with make("127.0.0.1:%d" % listener.getsockname()[1]) as client:
            error = error_of(lambda: METHODS[method](client, timeout=PATIENCE))
        assert (error.code, error.reason) == (Code.UNAVAILABLE, "CONNECTION_LOST")
        assert error.message.startswith("the connection to 127.0.0.1:")
        assert type(error.__cause__).__name__ in ("_InactiveRpcError", "_MultiThreadedRendezvous", "AioRpcError")
        # A thread that waits in `accept` is not woken by a close.
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED])
def test_what_a_proxy_says_is_passed_on_without_a_reason(make, code):
    def refuse(request, context):
        context.set_trailing_metadata([("server", "envoy")])
        context.abort(code, "no healthy upstream")

    class Handlers(grpc.GenericRpcHandler):
        def service(self, call):
            if call.method.endswith("/Check"):
                return None
            return grpc.unary_unary_rpc_method_handler(refuse)

    with ThreadPoolExecutor(2) as threads:
        proxy = grpc.server(threads, handlers=[Handlers()])
        port = proxy.add_insecure_port("127.0.0.1:0")
        proxy.start()
        with make(f"127.0.0.1:{port}") as client:
            error = error_of(lambda: client.call(b"x", timeout=PATIENCE))
        proxy.stop(None).wait()
    assert (error.code.name, error.reason, error.message) == (code.name, "", "no healthy upstream")
    assert error.__cause__ is not None


def answer_and_break(listener):
    """Lets a client connect and greets it, as HTTP/2 has it; breaks the connection when a call has come."""
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        greet_until_a_call(client)
        client.close()


def greet_until_a_call(connection):
    """Greets a client, as HTTP/2 has it, and reads until a call has come."""
    connection.sendall(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
    read = b""
    # A frame of type HEADERS begins a call.
    while b"\x01\x04\x00\x00\x00\x01" not in read and (more := connection.recv(1 << 16)):
        read += more


@pytest.fixture
def serve_nothing():
    """An address at which connections are taken and nothing is answered."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield "127.0.0.1:%d" % listener.getsockname()[1]


@pytest.mark.parametrize(
    ("pool", "named", "code", "reason", "says"),
    [
        ("größe", {}, Code.NOT_FOUND, "UNKNOWN_POOL", "there is no pool `größe`: this server has echo"),
        ("", {}, Code.INVALID_ARGUMENT, "POOL_REQUIRED", "names no pool"),
        ("fail", {}, Code.INTERNAL, "EXEC_FAILED", "50 % of it\nis gone"),
    ],
)
def test_errors_have_a_code_a_reason_and_a_message(client, pool, named, code, reason, says):
    error = error_of(lambda: client.call("50 % of it\nis gone", pool=pool, **named))
    assert (error.code, error.reason, error.retry_delay) == (code, reason, None)
    assert says in error.message
    assert str(error) == f"{code.name} ({reason}): {error.message}"
    assert error.__cause__ is None, "what the server says is not buried below gRPC's own error"


def test_a_timeout_frees_the_worker(client, gate):
    held = gate()
    begin = time.monotonic()
    assert error_of(lambda: client.call(held.payload, pool="gate", timeout=SOON)).code is Code.DEADLINE_EXCEEDED
    assert time.monotonic() - begin >= SOON * 0.9
    after = gate()
    after.open()
    assert client.call(after.payload, pool="gate", timeout=PATIENCE).payload == b"done\n"


def test_submit_and_updates(client, make):
    subscription = f"later {make.__name__}"
    items = [Work("one", id=100), b"two", Work("3", pool="hash", metadata={"k": "v"}, priority=1, timeout=60.5)]
    receipt = client.submit(items, subscription=subscription)
    assert receipt == (3, 0, ())
    results = {result.id: result.payload for result in client.updates(subscription, limit=3)}
    assert results == {100: b"one", 1: b"two", 2: hashlib.sha256(b"3").digest()}


def test_submit_says_what_was_rejected(client):
    receipt = client.submit([Work(b"", pool="nope", id=n) for n in range(40)], subscription="rejected")
    assert (receipt.accepted, receipt.rejected) == (0, 40)
    assert [rejection.id for rejection in receipt.rejections] == list(range(32)), "the first of them"
    error = receipt.rejections[0].error
    assert (error.code, error.reason) == (Code.NOT_FOUND, "UNKNOWN_POOL")


def test_process_pipelines(client):
    results = client.process(b"item %d" % n for n in range(3000))
    assert sorted((result.id, result.payload) for result in results) == [(n, b"item %d" % n) for n in range(3000)]


def test_process_sends_while_it_receives(client):
    answers = queue.SimpleQueue()

    def items():
        # Each is made of the answer to the one before.
        yield b"0"
        for _ in range(50):
            yield b"%d" % (int(answers.get(timeout=PATIENCE)) + 1)

    seen = []
    if isinstance(client, Client):
        for result in client.process(items()):
            seen.append(result.payload)
            answers.put(result.payload)
    else:

        async def main():
            answers = asyncio.Queue()

            async def items():
                yield b"0"
                for _ in range(50):
                    yield b"%d" % (int(await answers.get()) + 1)

            async for result in client._client.process(items()):
                seen.append(result.payload)
                answers.put_nowait(result.payload)

        client._run(main())
    assert seen == [b"%d" % n for n in range(51)]


def test_a_failed_item_does_not_end_the_stream(client):
    items = [Work(b"", pool="nope"), Work(b"why", pool="fail"), b"fine"]
    results = {result.id: result for result in client.process(items)}
    assert (results[0].ok, results[0].error.code, results[0].error.reason) == (False, Code.NOT_FOUND, "UNKNOWN_POOL")
    assert (results[1].ok, results[1].payload, results[1].error.reason) == (False, b"", "EXEC_FAILED")
    assert results[1].error.message.endswith("why")
    assert (results[2].ok, results[2].payload) == (True, b"fine")


def test_what_the_items_raise_comes_out_after_the_results(client, make):
    def items():
        yield b"one"
        yield b"two"
        raise LookupError("no third")

    results = client.process(items())
    assert sorted([next(results).payload, next(results).payload]) == [b"one", b"two"]
    with pytest.raises(LookupError, match="no third"):
        next(results)
    subscription = f"broken {make.__name__}"
    with pytest.raises(LookupError, match="no third"):
        client.submit(items(), subscription=subscription)
    assert sorted(result.payload for result in client.updates(subscription, limit=2)) == [b"one", b"two"]
    with pytest.raises(TypeError, match="not int"):
        list(client.process([7]))


def test_a_closed_client_says_so(make, server):
    client = make(server.address, pool="echo")
    client.call(b"x")
    client.close()
    for work in (lambda: client.call(b"x"), lambda: client.submit([b"x"]), lambda: next(client.updates())):
        with pytest.raises(RuntimeError, match="this client is closed: make a new one"):
            work()


@pytest.mark.parametrize("method", METHODS)
def test_a_client_that_is_closed_while_a_call_begins_says_so(server, method, monkeypatch):
    def close_after(name):
        original = getattr(client, name)

        def wrapper(*arguments):
            result = original(*arguments)
            client.close()
            return result

        monkeypatch.setattr(client, name, wrapper)

    for name in ["_stubs"] if method == "call" else ["_stubs", "_reached"]:
        client = Client(server.address, pool="echo")
        close_after(name)
        error = error_of(lambda: METHODS[method](client, timeout=PATIENCE))
        assert (error.code, error.message) == (Code.CANCELLED, "the client was closed")


@pytest.mark.parametrize("method", METHODS)
def test_a_client_that_is_closed_while_its_server_is_silent_says_so(method):
    answers = queue.SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = Client("127.0.0.1:%d" % listener.getsockname()[1])
        thread = threading.Thread(target=lambda: answers.put(error_of(lambda: METHODS[method](client, timeout=PATIENCE))))
        thread.start()
        connection, _ = listener.accept()
        with connection:
            greet_until_a_call(connection)
            client.close()
            error = answers.get(timeout=PATIENCE)
        thread.join(PATIENCE)
    assert (error.code, error.message) == (Code.CANCELLED, "the client was closed")


def test_leaving_a_stream_cancels_its_items(server, gate):
    held = gate()
    with Client(server.address, pool="gate") as client:
        with client.process([held.payload]) as results:
            held.wait_until_begun()
        held.wait_until_killed()
        assert error_of(lambda: next(results)).code is Code.CANCELLED


def test_leaving_an_aio_stream_and_cancelling_a_task_cancels_their_items(server, gate):
    async def main():
        async with aio.Client(server.address, pool="gate") as client:
            held = gate()
            async with client.process([held.payload]):
                await asyncio.to_thread(held.wait_until_begun)
            await asyncio.to_thread(held.wait_until_killed)
            held = gate()
            call = asyncio.ensure_future(client.call(held.payload))
            await asyncio.to_thread(held.wait_until_begun)
            call.cancel()
            await asyncio.to_thread(held.wait_until_killed)

    asyncio.run(main())


def test_what_another_task_closes_is_an_error_and_no_cancel(server, gate):
    async def reads(results):
        with pytest.raises(Error) as caught:
            await results.__anext__()
        return caught.value

    async def calls(client, held):
        with pytest.raises(Error) as caught:
            await client.call(held.payload)
        return caught.value

    async def submits(client):
        async def endless():
            await asyncio.Event().wait()
            yield b"x"

        with pytest.raises(Error) as caught:
            await client.submit(endless(), subscription="closed")
        return caught.value

    async def main():
        async with aio.Client(server.address, pool="gate") as client:
            held = gate()
            results = client.process([held.payload])
            reader = asyncio.ensure_future(reads(results))
            await asyncio.to_thread(held.wait_until_begun)
            await results.close()
            error = await reader
            assert (error.code, error.reason, error.message) == (Code.CANCELLED, "CANCELLED", "the stream was closed")
            assert (await reads(results)).code is Code.CANCELLED, "also who comes later"
            await asyncio.to_thread(held.wait_until_killed)

            held = gate()
            tasks = [asyncio.ensure_future(calls(client, held))]
            # There is one worker: what comes with it might have it.
            await asyncio.to_thread(held.wait_until_begun)
            work = [reads(client.process([gate().payload])), submits(client)]
            tasks += [asyncio.ensure_future(one) for one in work]
            await asyncio.sleep(0)
            await client.close()
            assert [error.code for error in await asyncio.gather(*tasks)] == [Code.CANCELLED] * 3
            assert tasks[0].result().message == "the client was closed"
            await asyncio.to_thread(held.wait_until_killed)

        # And a cancel of the reader's own task is that.
        async with aio.Client(server.address, pool="gate") as client:
            for work in (client.call(gate().payload), client.process([gate().payload]).__anext__()):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(SOON):
                        await work

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_ctrl_c_ends_a_call(server, gate):
    held = gate()

    def interrupt():
        held.wait_until_begun()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with Client(server.address) as client, pytest.raises(KeyboardInterrupt):
        client.call(held.payload, pool="gate", timeout=PATIENCE)
    thread.join()
    held.wait_until_killed()


def test_an_aio_client_follows_updates_of_what_it_submits(server):
    async def main():
        async with aio.Client(server.address, pool="echo") as client:
            arrived = asyncio.Queue()

            async def items():
                for n in range(100):
                    yield b"item %d" % n
                    # The next one is not sent before this one's result is here.
                    assert (await arrived.get()).payload == b"item %d" % n

            async def follow():
                async with client.updates("followed") as updates:
                    async for result in updates:
                        arrived.put_nowait(result)

            follower = asyncio.ensure_future(follow())
            assert (await client.submit(items(), subscription="followed")).accepted == 100
            follower.cancel()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_an_aio_client_serves_one_loop_after_another(server):
    client = aio.Client(server.address, pool="echo")
    for n in range(3):
        assert asyncio.run(client.call(b"%d" % n)).payload == b"%d" % n
    assert len(client._made) == 1, "what belongs to loops that have ended is let go"


def test_a_thousand_aio_calls_at_once(server):
    async def main():
        async with aio.Client(server.address, pool="echo") as client:
            results = await asyncio.gather(*(client.call(b"%d" % n, id=n) for n in range(1000)))
            assert [(result.id, result.payload) for result in results] == [(n, b"%d" % n) for n in range(1000)]

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


@pytest.fixture
def nobody():
    """An address at which nobody listens, and that the kernel gives to nobody else."""
    with socket.socket() as holder:
        # Beside who does not listen a server may.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{holder.getsockname()[1]}"


@pytest.mark.parametrize("method", METHODS)
def test_a_server_that_is_not_there_yet_is_waited_for(make, nobody, method, caplog):
    answers = queue.SimpleQueue()

    def use():
        with make(nobody, connect_timeout=None) as client:
            answers.put(METHODS[method](client, timeout=PATIENCE))

    thread = threading.Thread(target=use)
    thread.start()
    # After a second of waiting it says so; then there is a server.
    until("a warning", lambda: [record for record in caplog.records if record.name == "forkring"])
    assert answers.empty()
    (record,) = (record for record in caplog.records if record.name == "forkring")
    assert record.levelname == "WARNING"
    assert record.getMessage() == f"there is no server at {nobody} (Connection refused); waiting for one"
    with Server("--pool", "echo:1=echo", "--listen", nobody):
        if method == "updates":
            with Client(nobody) as client:
                client.submit([b"x"], subscription="mine")
        answer = answers.get(timeout=PATIENCE)
        thread.join(PATIENCE)
        assert method == "submit" or answer.payload == b"x"
        if method == "submit":
            with Client(nobody) as client:
                assert next(client.updates("mine", limit=1)).payload == b"x"
    assert len([record for record in caplog.records if record.name == "forkring" and record.levelname == "WARNING"]) == 1


@pytest.mark.parametrize(
    "connect_timeout, longest", [(10, 10_000), (0, 20_000), (None, 20_000), (math.inf, 20_000), (3600, 20_000), (0.1, 1_000)]
)
def test_grpc_looks_for_a_server_ten_times_a_second(connect_timeout, longest):
    own = ("grpc.max_reconnect_backoff_ms", 7)
    settings = settings_of("h:1", "", 10, False, connect_timeout, [own])
    *options, last = settings.channel_options()
    assert last == own, "what the caller says wins"
    options = dict(options)
    # By itself its pauses grow to two minutes, and a server that starts is found after the next of them.
    assert options["grpc.initial_reconnect_backoff_ms"] == options["grpc.max_reconnect_backoff_ms"] == 100
    # One attempt to connect is not to take longer than a call waits.
    assert options["grpc.min_reconnect_backoff_ms"] == longest


def refusal(reason="", code=Code.UNAVAILABLE, delay=None):
    return Error(code, reason, "", retry_delay=delay)


@pytest.mark.parametrize(
    "named, timeout, error, least, most",
    [
        # Nothing was sent: soon again, while there is time.
        ({}, None, refusal("NO_CONNECTION"), 0.05, 0.075),
        ({"retries": 0}, None, refusal("NO_CONNECTION"), 0.05, 0.075),
        ({"connect_timeout": 0}, None, refusal("NO_CONNECTION"), None, None),
        ({"connect_timeout": None}, 0, refusal("NO_CONNECTION"), None, None),
        # The server said when.
        ({}, None, refusal("QUEUE_FULL", Code.RESOURCE_EXHAUSTED, 0.2), 0.2, 0.3),
        ({"connect_timeout": 0}, None, refusal("QUEUE_FULL", Code.RESOURCE_EXHAUSTED, 0.2), 0.2, 0.3),
        ({"retries": 0}, None, refusal("QUEUE_FULL", Code.RESOURCE_EXHAUSTED, 0.2), None, None),
        ({}, 0.1, refusal("QUEUE_FULL", Code.RESOURCE_EXHAUSTED, 0.2), None, None),
        ({}, None, refusal("QUEUE_FULL", Code.RESOURCE_EXHAUSTED), None, None),
        # It may have been sent.
        ({}, None, refusal("CONNECTION_LOST"), None, None),
        ({"idempotent": True}, None, refusal("CONNECTION_LOST"), 0.05, 0.075),
        ({"idempotent": True}, None, refusal(""), 0.05, 0.075),
        ({"idempotent": True}, None, refusal("DRAINING"), None, None),
        ({"idempotent": True}, None, refusal("", Code.INTERNAL), None, None),
        ({"idempotent": True, "retries": 0}, None, refusal("CONNECTION_LOST"), None, None),
    ],
)
def test_when_a_call_is_tried_again(named, timeout, error, least, most):
    made = {"pool": "", "retries": 10, "idempotent": False, "connect_timeout": 10, "options": (), **named}
    attempts = Attempts(settings_of("h:1", **made), Outage("h:1"), timeout)
    pause = attempts.pause(error)
    assert (pause is None) if least is None else least <= pause <= most


def test_one_thread_ends_an_outage_while_another_notes_it():
    class Ended(Outage):
        """Loses the beginning of the outage right after the first look at it, as if another thread had ended it."""

        @property
        def _began(self):
            began, self._kept = self._kept, None
            return began

        @_began.setter
        def _began(self, began):
            self._kept = began

    outage = Ended("h:1")
    for _ in range(2):
        outage.lasts(refusal("NO_CONNECTION"))
    outage.lasts(refusal("NO_CONNECTION"))
    outage.ends()
    outage.ends()


def test_the_timeout_of_a_call_bounds_its_wait_for_a_server(make, nobody):
    with make(nobody, connect_timeout=None) as client:
        for method in METHODS.values():
            error = error_of(lambda method=method: method(client, timeout=SOON))
            assert (error.code, error.reason) == (Code.UNAVAILABLE, "NO_CONNECTION")


def test_without_a_timeout_for_it_a_server_is_not_waited_for(make, nobody):
    with make(nobody, retries=10**6, connect_timeout=0) as client:
        error = error_of(lambda: client.call(b"x"))
        assert (error.code, error.reason) == (Code.UNAVAILABLE, "NO_CONNECTION")


def test_a_client_that_is_closed_waits_no_more(make, nobody):
    answers = queue.SimpleQueue()
    clients = []

    def use(method):
        client = make(nobody, connect_timeout=None)
        clients.append(client)
        answers.put(error_of(lambda: METHODS[method](client)))

    if make is Client:
        for method in METHODS:
            thread = threading.Thread(target=use, args=[method])
            thread.start()
            until("a client", lambda: clients)
            until("its attempt", lambda: clients[0]._outage._began is not None)
            clients.pop().close()
            error = answers.get(timeout=PATIENCE)
            thread.join(PATIENCE)
            assert (error.code, error.message) == (Code.CANCELLED, "the client was closed")
        return

    async def main():
        for method in ("call", "submit", "updates", "process"):
            client = aio.Client(nobody, connect_timeout=None)
            work = {
                "call": lambda: client.call(b"x"),
                "submit": lambda: client.submit([b"x"]),
                "updates": lambda: client.updates().__anext__(),
                "process": lambda: client.process([b"x"]).__anext__(),
            }[method]
            task = asyncio.ensure_future(work())
            while client._outage._began is None:
                await asyncio.sleep(0.005)
            await client.close()
            with pytest.raises(Error) as caught:
                await task
            assert (caught.value.code, caught.value.message) == (Code.CANCELLED, "the client was closed")
        # A stream that is closed while it waits.
        async with aio.Client(nobody, connect_timeout=None) as client:
            results = client.process([b"x"])
            reader = asyncio.ensure_future(results.__anext__())
            while client._outage._began is None:
                await asyncio.sleep(0.005)
            await results.close()
            with pytest.raises(Error) as caught:
                await reader
            assert (caught.value.reason, caught.value.message) == ("CANCELLED", "the stream was closed")

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


@pytest.fixture
def full(gate):
    """A server whose two places are taken, and what takes them."""
    with (
        Server("--pool", f"gate:1={GATE}", "--capacity", "2") as server,
        Client(server.address, retries=10**6) as filler,
    ):
        held = [gate(), gate()]
        thread = threading.Thread(target=filler.call, args=[held[0].payload])
        thread.start()
        held[0].wait_until_begun()
        # It has its place once there is a receipt; nobody may come to be between.
        assert filler.submit([held[1].payload], subscription="held").accepted == 1
        yield server, held
        for one in held:
            one.open()
        thread.join(PATIENCE)
        assert len(list(filler.updates("held", limit=1))) == 1


class Proxy:
    """Is in the way of a server: remembers what it is asked, and breaks connections once a call has come that says so, as many
    times as told."""

    def __init__(self, breaks, address):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.broken = 0
        self.requests = bytearray()
        self._breaks = breaks
        self._server = address
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            host, port = self._server.rsplit(":", 1)
            server = socket.create_connection((host, int(port)))
            for one, other in ((server, client), (client, server)):
                threading.Thread(target=self._pass_on, args=[one, other, one is client], daemon=True).start()

    def _pass_on(self, one, other, requests):
        try:
            while data := one.recv(1 << 16):
                if requests:
                    self.requests += data
                if requests and b"break me" in data and self.broken < self._breaks:
                    self.broken += 1
                    break
                other.sendall(data)
        except OSError:
            pass
        for end in (one, other):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self):
        self._listener.close()


def refused(client, gate):
    """The error of a call that there is no room for: until there is none, calls time out."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        error = error_of(lambda: client.call(gate().payload, timeout=SOON))
        if error.code is Code.RESOURCE_EXHAUSTED:
            return error
    raise AssertionError("never refused")


def test_a_full_server_says_when_to_try_again(make, full, gate):
    with make(full[0].address, retries=0) as client:
        error = refused(client, gate)
        assert error.reason in ("QUEUE_FULL", "LANE_FULL")
        assert error.retry_delay == 0.05


def test_a_call_that_is_refused_for_lack_of_room_is_tried_again(make, full, gate):
    server, held = full
    with make(server.address, retries=0) as client:
        refused(client, gate)
    waiting = gate()
    waiting.open(b"at last")
    proxy = Proxy(0, server.address)

    def make_room():
        until("another attempt", lambda: proxy.requests.count(waiting.payload) > 1)
        for one in held:
            one.open()

    with make(proxy.address, retries=10**6) as client, ThreadPoolExecutor() as threads:
        made = threads.submit(make_room)
        assert client.call(waiting.payload, timeout=PATIENCE).payload == b"at last\n"
        made.result()
    proxy.close()


def test_retries_end_with_the_timeout(make, full, gate):
    with make(full[0].address, retries=10**6) as client:
        begin = time.monotonic()
        error = error_of(lambda: client.call(gate().payload, timeout=2 * SOON))
        assert error.code in (Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED)
        assert time.monotonic() - begin < PATIENCE


@pytest.mark.parametrize("idempotent", [False, True])
def test_an_item_whose_fate_is_unknown_is_sent_again_only_if_it_is_idempotent(make, server, idempotent):
    proxy = Proxy(2, server.address)
    with make(proxy.address, pool="echo", idempotent=idempotent) as client:
        assert client.call(b"fine", timeout=PATIENCE).payload == b"fine"
        if idempotent:
            assert client.call(b"break me", timeout=PATIENCE).payload == b"break me"
            assert proxy.broken == 2
        else:
            error = error_of(lambda: client.call(b"break me", timeout=PATIENCE))
            assert (error.code, error.reason) == (Code.UNAVAILABLE, "CONNECTION_LOST")
            assert proxy.broken == 1
    proxy.close()


def python(program, *arguments):
    """What a fresh interpreter says to a program."""
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("missing", ["grpc", "google.protobuf"])
@pytest.mark.parametrize(
    "use", ["import forkring.client", "from forkring import Client", "import forkring.aio", "import forkring; forkring.aio"]
)
def test_a_client_without_grpc_says_what_to_do(missing, use):
    program = """
        import sys
        class Nothing:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name == sys.argv[1]:
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Nothing)
        import forkring
        exec(sys.argv[2])
    """
    said = python(program, missing, use).stderr.splitlines()
    assert said[-1] == "ImportError: forkring's clients need grpcio and protobuf: pip install grpcio protobuf"
    assert not [line for line in said if "During handling" in line]


def test_the_package_loads_nothing_of_grpc_before_a_client_is_asked_for():
    program = """
        import sys
        from forkring import *
        import forkring, forkring._worker
        assert not [name for name in sys.modules if name.partition(".")[0] in ("grpc", "google")]
        assert forkring.Client is forkring.client.Client and forkring.aio.Client
        assert "google.protobuf" in sys.modules
        try:
            forkring.nothing
        except AttributeError as error:
            print(error)
    """
    ended = python(program)
    assert (ended.stdout, ended.stderr) == ("module 'forkring' has no attribute 'nothing'\n", "")


def test_an_exception_of_a_handler_comes_with_its_traceback(make, serve):
    with make(serve("failing.py:ways").address) as client:
        error = error_of(lambda: client.call(b"own"))
        assert (error.code, error.reason) == (Code.INTERNAL, "HANDLER_RAISED")
        assert error.message == "failing.OutOfStock: of shoes"
        assert "in deeper\n" in error.traceback and error.traceback.endswith(error.message)
        (result,) = client.process([b"own"])
        assert (result.error.message, result.error.traceback) == (error.message, error.traceback)


def test_the_example_that_follows_updates():
    with Server("--pool", "sha256:1=sha256") as server:
        ended = run_program("../../examples/python/follow_updates.py", server.address)
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.startswith("1000 items submitted, 1000 results followed, in ")
