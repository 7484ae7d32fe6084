"""A soak by grpcio and by h2load, each over one connection that is kept throughout.

Every call ends as it was meant to, and the server has nothing to warn of (its log is empty, see `Server`).
`FORKRING_TEST_CALLS` is the number of calls and messages of the size that has most of them.
"""

import os
import re
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from harness import Server, error_of

CALLS = int(os.environ.get("FORKRING_TEST_CALLS", 20_000))
# Payloads, and the part of the calls that they have, as a divisor.
SIZES = [(0, 10), (64, 2), (1 << 10, 10), (4 << 10, 1), (64 << 10, 20), (1 << 20, 40)]
THREADS = 8


@pytest.fixture
def busy():
    """A server with pools that answer at once, too late, in parts and with a failure."""
    pools = ["echo:2=echo", "stuck=sleep:200ms", "parts=echo:3000", "fail=exec:false"]
    with Server(*(f"--pool={pool}" for pool in pools), "--arena=32MiB", "--max-message=2MiB") as server:
        yield server


class Connection:
    """A channel whose connection must not be replaced."""

    def __init__(self, server):
        self.channel = server.channel()
        self.lost = []
        grpc.channel_ready_future(self.channel).result()
        self.channel.subscribe(self._note)

    def _note(self, state):
        if state is not grpc.ChannelConnectivity.READY:
            self.lost.append(state)

    def __enter__(self):
        from forkring.v1.dispatcher_pb2_grpc import DispatcherStub

        return DispatcherStub(self.channel)

    def __exit__(self, kind, *_):
        self.channel.unsubscribe(self._note)
        self.channel.close()
        if kind is None:
            assert not self.lost


def in_threads(count, function):
    """Calls the function with each number below `count`, in a few threads; the first failure ends it."""
    numbers = iter(range(count))
    lock = threading.Lock()
    failed = threading.Event()

    def work():
        while not failed.is_set():
            with lock:
                n = next(numbers, None)
            if n is None:
                return
            try:
                function(n)
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(THREADS) as threads:
        for done in [threads.submit(work) for _ in range(THREADS)]:
            done.result()


def call(stub, n, payload):
    """One call; which kind it is and what it must come to depends on its number."""
    from forkring.v1.dispatcher_pb2 import WorkItem

    kind = n % 64
    if kind in (1, 21, 41):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Call(WorkItem(pool="none", payload=payload, id=n))
        assert error_of(caught.value)[:2] == ("NOT_FOUND", "UNKNOWN_POOL")
    elif kind == 2:
        with pytest.raises(grpc.RpcError) as caught:
            stub.Call(WorkItem(pool="fail", payload=payload, id=n))
        assert error_of(caught.value)[:2] == ("INTERNAL", "EXEC_FAILED")
    elif n % 1024 == 9:
        with pytest.raises(grpc.RpcError) as caught:
            stub.Call(WorkItem(pool="echo", payload=bytes(3 << 20), id=n))
        assert error_of(caught.value)[:2] == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
    elif kind % 10 == 5:
        expire(stub, n, payload)
    elif kind % 10 == 8:
        answer = stub.Call.future(WorkItem(pool="stuck", payload=payload, id=n))
        answer.cancel()
        assert answer.cancelled()
    else:
        answer = stub.Call(WorkItem(pool="echo", payload=payload, id=n))
        assert (answer.id, answer.payload) == (n, payload)


def expire(stub, n, payload):
    """A call whose deadline passes."""
    from forkring.v1.dispatcher_pb2 import WorkItem

    with pytest.raises(grpc.RpcError) as caught:
        stub.Call(WorkItem(pool="stuck", payload=payload, id=n), timeout=0.002)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_calls(busy):
    with Connection(busy) as stub:
        for size, part in SIZES:
            payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
            in_threads(CALLS // part, lambda n, payload=payload: call(stub, n, payload))


def test_every_call_is_cancelled_by_its_deadline(busy):
    payload = bytes(4 << 10)
    with Connection(busy) as stub:
        in_threads(CALLS, lambda n: expire(stub, n, payload))


def test_streams(busy):
    from forkring.v1.dispatcher_pb2 import GetUpdatesRequest, WorkItem

    with Connection(busy) as stub:
        for size, part in SIZES:
            count, payload = CALLS // part, bytes(size)
            pools = ["echo", "parts", "echo", "none"]
            items = (WorkItem(pool=pools[n % 4], payload=payload, id=n) for n in range(count))
            ended = [(result.id, result.status.code) for result in stub.Process(items) if not result.partial]
            assert sorted(ended) == [(n, 5 if n % 4 == 3 else 0) for n in range(count)]

            name = f"size-{size}"
            items = (WorkItem(pool="echo", payload=payload, id=n, subscription=name) for n in range(count))
            receipt = stub.Submit.future(items)
            updates = stub.GetUpdates(GetUpdatesRequest(subscription=name, limit=count))
            assert sorted(result.id for result in updates) == list(range(count))
            assert receipt.result().accepted == count


@pytest.mark.skipif(not shutil.which("h2load"), reason="there is no h2load: install nghttp2-client")
@pytest.mark.parametrize("size, part", SIZES)
def test_h2load(busy, tmp_path, size, part):
    from forkring.v1.dispatcher_pb2 import WorkItem

    message = WorkItem(pool="echo", payload=bytes(size)).SerializeToString()
    body = tmp_path / "body"
    body.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
    count = CALLS // part
    command = ["h2load", "-n", str(count), "-c", "1", "-m", "32", "-d", body]
    for header in ("content-type: application/grpc", "te: trailers"):
        command += ["-H", header]
    command.append(f"http://{busy.address}/forkring.v1.Dispatcher/Call")
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600).stdout
    (requests,) = re.findall(r"^requests: .*$", said, re.MULTILINE)
    wanted = f"{count} total, {count} started, {count} done, {count} succeeded, 0 failed, 0 errored, 0 timeout"
    assert requests == f"requests: {wanted}"
