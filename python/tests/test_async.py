"""`async def`: many items at once in one worker, on one event loop."""

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forkring
import grpc
import pytest
from harness import PATIENCE, error_of
from serving import until

pytestmark = pytest.mark.parametrize("loop", ["uvloop", "asyncio"])


# Seconds in which a handler has begun, however busy the machine is.
DEADLINE = 5.0


@pytest.fixture
def files(tmp_path, loop, monkeypatch):
    if loop == "asyncio":
        monkeypatch.setenv("PLAIN_LOOP", "1")
    return Files(tmp_path)


class Files:
    """What items wait for, and what they note."""

    def __init__(self, folder):
        self._folder = folder
        self.journal = folder / "journal"

    def metadata(self, name=""):
        return {"journal": str(self.journal), "until": str(self._folder / f"go-{name}")}

    def make(self, name=""):
        (self._folder / f"go-{name}").touch()

    def lines(self):
        return self.journal.read_text().splitlines() if self.journal.exists() else []

    def began(self, count):
        """Waits until so many lines are there, and gives the pids that they name."""
        until(f"{count} items", lambda: len(self.lines()) >= count)
        return [int(line.split(" in ")[1].split()[0]) for line in self.lines() if " began in " in line]


def gates(app, files, ids, pool="gate", size=1000):
    """Calls that wait, one by one."""
    begun = []
    for id in ids:
        before = len(files.lines())
        begun.append(app.begin(pool, bytes([id]) * size * id, id=id, metadata=files.metadata(str(id))))
        files.began(before + 1)
    return begun


def test_they_are_open_beside_each_other_and_end_in_any_order(serve, files, loop):
    app = serve("asynchronous.py:gate")
    calls = gates(app, files, range(1, 9))
    assert [line.split()[-1] for line in files.lines()] == [str(n) for n in range(8)]
    for id in (8, 1, 5, 4, 7, 2, 3, 6):
        files.make(str(id))
        assert calls[id - 1].result().payload == bytes([id]) * 1000 * id


def test_no_more_of_them_than_it_says(serve, files, loop):
    app = serve("asynchronous.py:three", "asynchronous.py:Model")
    # Small, for when a large result is fetched the worker looks, too.
    calls = gates(app, files, range(1, 4), "three", 1)
    rest = [app.begin("three", id=id, metadata=files.metadata("rest")) for id in range(4, 9)]

    def assert_no_more_than(count):
        files.began(count)
        # Others of the server are served: those five had time to come.
        for _ in range(20):
            app.call("Model")
        assert len(files.lines()) == count

    assert_no_more_than(3)
    for id, call in enumerate(calls, 1):
        files.make(str(id))
        call.result()
        assert_no_more_than(3 + id)
    files.make("rest")
    for call in rest:
        call.result()
    beside = [int(line.split()[-1]) for line in files.lines() if "began" in line]
    assert len(beside) == 8 and max(beside) == 2


def test_many_items_of_all_sizes(serve, files, loop):
    app = serve("asynchronous.py:echo", "asynchronous.py:reply", "asynchronous.py:Model")
    for pool in ("echo", "reply"):
        items = {id: os.urandom([0, 10, 64, 65, 5000, 200_000][id % 6]) for id in range(600)}
        results = app.stream([app.item(pool, payload, id=id) for id, payload in items.items()], timeout=None)
        assert {result.id: result.payload for result in results} == items
    seen = [app.call("Model").split() for _ in range(5)]
    assert [int(items) for _, items in seen] == [1, 2, 3, 4, 5]


def test_the_loop_has_no_thread_and_sleeps(serve, files, loop):
    app = serve("asynchronous.py:loop_kind")
    kind, threads = json.loads(app.call("loop_kind"))
    assert kind.startswith(loop) and threads == 1
    (worker,) = app.workers().values()

    def sleeps():
        """How often it has gone to sleep."""
        lines = Path(f"/proc/{worker}/status").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("voluntary_ctxt_switches:")]
        return int(line.split()[1])

    def stays_asleep(seconds):
        before = sleeps()
        time.sleep(seconds)
        return sleeps() == before

    # Nothing runs in it while nothing comes; it may be on its way to sleep.
    until("sleep", lambda: stays_asleep(0.1))
    assert stays_asleep(0.5)


def test_who_gives_up_cancels_the_task(serve, files, loop):
    app = serve("asynchronous.py:gate")
    first, second = gates(app, files, [1, 2])
    first.cancel()
    until("the cancel", lambda: "1 cancelled True" in files.lines())
    # So does its deadline.
    with pytest.raises(grpc.RpcError):
        app.call("gate", id=3, metadata=files.metadata("never"), timeout=DEADLINE)
    until("the deadline", lambda: "3 cancelled True" in files.lines())
    assert not second.done()
    files.make("2")
    assert second.result().payload == b"\2" * 2000


def test_a_submitted_item_has_its_deadline_too(serve, files, loop):
    app = serve("asynchronous.py:gate")
    with forkring.Client(app.address, pool="gate") as client:
        work = forkring.client.Work(b"x", id=9, metadata=files.metadata("never"), timeout=DEADLINE)
        client.submit([work], subscription="s")
        (result,) = client.updates("s", limit=1, timeout=PATIENCE)
    assert result.error.code is forkring.Code.DEADLINE_EXCEEDED
    until("the deadline", lambda: "9 cancelled True" in files.lines())


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_waits_for_all_of_them(serve, files, loop, kind):
    app = serve("asynchronous.py:gate")
    calls = gates(app, files, range(1, 6))
    if kind == signal.SIGINT:
        app.interrupt()
    else:
        app.terminate()
    for id, call in enumerate(calls, 1):
        files.make(str(id))
        assert call.result().payload == bytes([id]) * 1000 * id
    app.close()


def test_an_exception_is_the_item_s_error(serve, files, loop):
    app = serve("asynchronous.py:ways", "asynchronous.py:breaks")
    pid = app.call("ways")
    for payload, code, reason, says in [
        (b"value", "INTERNAL", "HANDLER_RAISED", "ValueError: that is no number"),
        (b"exit", "INTERNAL", "HANDLER_RAISED", "SystemExit: 3"),
        (b"int", "INTERNAL", "BAD_RESULT", "returned `int`"),
        (b"abort", "NOT_FOUND", "NO_SUCH_ROW", "there is no row 7"),
        (b"itself", "INTERNAL", "HANDLER_RAISED", "CancelledError"),
        (b"deep", "INTERNAL", "HANDLER_RAISED", "KeyError: 'deep'"),
        (b"large", "RESOURCE_EXHAUSTED", "RESULT_TOO_LARGE", "17825792 bytes is too large"),
    ]:
        error = error_of(app.error("ways", payload))
        assert error[:2] == (code, reason) and says in error[2]
    assert app.call("ways") == pid
    part, end = app.stream([app.item("breaks")])
    assert (part.payload, end.status.reason) == (b"one", "HANDLER_RAISED") and "asynchronous.py" in end.status.traceback


@pytest.mark.parametrize("way", [b"die", b"break"])
def test_a_worker_that_dies_gives_all_of_them_back(serve, files, loop, way):
    app = serve("asynchronous.py:crowd", quiet=False)
    calls = [app.begin("crowd", b"x", id=id, metadata=files.metadata()) for id in range(1, 5)]
    files.began(4)
    calls.append(app.begin("crowd", way, id=5, metadata=files.metadata()))
    first = files.began(5)[0]
    files.make()
    assert [call.result().payload for call in calls] == [b"attempt 2"] * 5
    assert first not in app.workers().values()


def test_parts_of_many_at_once(serve, files, loop):
    app = serve("asynchronous.py:count")
    counts = {id: id * 7 % 60 for id in range(40)}
    seen = {id: [] for id in counts}
    for result in app.stream([app.item("count", str(count).encode(), id=id) for id, count in counts.items()]):
        assert result.sequence == len(seen[result.id])
        seen[result.id].append(result.payload if result.partial else None)
    assert seen == {id: [*(str(n).encode() for n in range(count)), None] for id, count in counts.items()}
    assert app.call("count", b"12") == b"01234567891011"


@pytest.mark.parametrize("size", [b"0", b"1000000"])
def test_who_is_not_read_waits_alone_and_is_closed(serve, files, loop, size):
    app = serve("asynchronous.py:endless")
    stream = app.stream([app.item("endless", size, metadata=files.metadata())])
    assert next(stream).partial
    until("some parts", lambda: files.lines().count("sent") > 3)
    # Another item of the same worker has its parts meanwhile.
    other = app.stream([app.item("endless", b"5", metadata={"journal": "/dev/null"})])
    assert [len(next(other).payload) for _ in range(500)] == [5] * 500
    other.cancel()
    stream.cancel()
    until("its end", lambda: files.lines()[-1] == "closed")


def test_who_finds_no_room_waits_alone(serve, files, loop):
    app = serve("asynchronous.py:endless")
    streams = [app.stream([app.item("endless", b"4000000", metadata=files.metadata())]) for _ in range(3)]

    def is_full():
        nonlocal sent, same
        now = files.lines().count("sent")
        sent, same = now, same + 1 if now == sent else 0
        # As many as the arena holds have been made, and no more for a while: three streams have credit for twelve.
        return sent >= 4 and same > 50

    sent, same = 0, 0
    until("a full arena", is_full)
    other = app.stream([app.item("endless", b"5", metadata={"journal": "/dev/null"})])
    assert [len(next(other).payload) for _ in range(500)] == [5] * 500
    other.cancel()

    def read(stream):
        sizes = [len(next(stream).payload) for _ in range(6)]
        stream.cancel()
        return sizes

    # There is room again as they are read; all at once, for one may have the memory that another waits for.
    with ThreadPoolExecutor() as readers:
        assert list(readers.map(read, streams)) == [[4_000_000] * 6] * 3
    until("their end", lambda: files.lines().count("closed") == 3)


def blocks(count):
    return b"".join(bytes([n]) * 1_000_000 for n in range(count))


@pytest.mark.skipif(sys.version_info < (3, 12), reason="there is no eager_task_factory")
def test_a_handler_may_begin_its_tasks_at_once(serve, files, loop):
    app = serve("asynchronous.py:eager")
    items = [app.item("eager", b"%d" % id, id=id) for id in range(100)]
    assert {result.id: result.payload for result in app.stream(items)} == {id: b"%d" % id for id in range(100)}


def test_parts_that_come_in_one_have_all_the_room_there_is(serve, files, loop):
    # 20 MiB are the arena's, and the largest result may have 16.
    app = serve("asynchronous.py:blocks")
    for _ in range(2):
        assert app.call("blocks", b"16", metadata=files.metadata()) == blocks(16)
    # And so have those of many at once, one after the other.
    calls = [app.begin("blocks", b"%d" % count, metadata=files.metadata()) for count in range(1, 17)]
    for count, call in enumerate(calls, 1):
        assert call.result().payload == blocks(count)


@pytest.mark.parametrize("handler", ["asynchronous.py:one_by_one", "parts.py:blocks"])
def test_parts_that_nobody_fetches_are_refused(serve, files, loop, handler):
    app = serve(f"blocks={handler}")
    with forkring.Client(app.address, pool="blocks") as client:
        # Half of the arena is for results that wait for a subscriber.
        metadata = files.metadata()
        client.submit([forkring.Work(b"4", metadata=metadata) for _ in range(3)], subscription="s")
        until("all to be over", lambda: files.lines().count("closed") == 3)
        results = list(client.updates("s", limit=3, timeout=PATIENCE))
    assert [result.payload for result in results if result.ok] == [blocks(4)] * 2
    (error,) = [result.error for result in results if not result.ok]
    assert (error.code, error.reason) == (forkring.Code.RESOURCE_EXHAUSTED, "RESULTS_FULL")


def test_what_is_kept_is_nobody_elses_and_what_is_not_is_not_late(serve, files, loop):
    app = serve("asynchronous.py:late", "asynchronous.py:keep", quiet=False)
    for size in (100, 5000, 200_000):
        assert app.call("late", bytes(size), metadata={"view": "1"}) == bytes(size)
        app.error("late", bytes(size), metadata={"raise": "1"})
        assert app.call("late", bytes(size)) == b"0"
    assert "was kept" not in app.log()
    for byte in range(1, 60):
        assert app.call("keep", bytes([byte]) * (1000 + byte * 100)) == b"[]"
    assert app.log().count("was kept after its handler") == 1
