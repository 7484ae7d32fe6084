"""`@forkring.batch`: a list of items in, a list of results out."""

import os
import time

import numpy
import pytest
from harness import error_of


def begin(app, pool, payloads):
    return [app.begin(pool, payload, id=id) for id, payload in enumerate(payloads)]


def outcomes(calls):
    """Results, and what of an error says what it is."""
    seen = []
    for call in calls:
        failed = call.exception()
        seen.append(call.result().payload if failed is None else error_of(failed))
    return seen


def test_a_full_batch_does_not_wait(serve):
    app = serve("batches.py:four")
    before = time.monotonic()
    for _ in range(5):
        assert outcomes(begin(app, "four", [b""] * 4)) == [b"4"] * 4
    assert time.monotonic() - before < 30, "one that waited would have taken as long"


def test_the_first_item_waits_no_longer_than_it_says(serve):
    app = serve("batches.py:sizes")
    before = time.monotonic()
    calls = begin(app, "sizes", [b"a", b"b", b"c"])
    assert outcomes(calls) == [b"3 a", b"3 b", b"3 c"]
    assert 5 - 0.1 <= time.monotonic() - before < 30


def test_many_items_of_all_sizes(serve):
    app = serve("batches.py:echo")
    items = {id: os.urandom([0, 10, 64, 65, 5000, 200_000][id % 6]) for id in range(1000)}
    results = app.stream([app.item("echo", payload, id=id) for id, payload in items.items()], timeout=None)
    assert {result.id: result.payload for result in results} == items
    assert app.call("echo", b"alone") == b"alone"


@pytest.mark.parametrize("handler", ["Model", "model"])
def test_a_class_takes_batches(serve, handler):
    app = serve(f"m=batches.py:{handler}", "other=batches.py:model.other")
    rows = [numpy.arange(5, dtype="float32") + n for n in range(20)]
    calls = begin(app, "m", [row.tobytes() for row in rows])
    assert outcomes(calls) == [(row * 2).tobytes() for row in rows]
    assert outcomes(begin(app, "other", [b"", b""]))[0] in (b"1", b"2")


def test_one_failure_fails_one_item(serve):
    app = serve("batches.py:mixed")
    aborted = ("NOT_FOUND", "NO_SUCH_ROW", "no such row")
    assert outcomes(begin(app, "mixed", [b"a", b"abort", b"b"])) == [b"a", aborted, b"b"]
    pid = app.workers()
    one, value, number = outcomes(begin(app, "mixed", [b"a", b"value", b"int"]))
    assert (one, value) == (b"a", ("INTERNAL", "HANDLER_RAISED", "ValueError: not this one"))
    assert number[:2] == ("INTERNAL", "BAD_RESULT") and "returned `int`" in number[2]
    large, reply, one = outcomes(begin(app, "mixed", [b"large", b"reply", b"a"]))
    assert (large[:2], reply, one) == (("RESOURCE_EXHAUSTED", "RESULT_TOO_LARGE"), b"r" * 100_000, b"a")
    assert outcomes(begin(app, "mixed", [b"a", b"tuple", b"b"])) == [b"a", b"tuple", b"b"]
    assert app.workers() == pid


@pytest.mark.parametrize(
    "payload, reason, says",
    [
        (b"raise", "HANDLER_RAISED", "KeyError: 'all of you'"),
        (b"short", "BAD_RESULT", "returned 1 results for a batch of 3: return a list with a result for each item"),
        (b"bytes", "BAD_RESULT", "returned `bytes` for a batch of 3"),
        (b"none", "BAD_RESULT", "returned `NoneType` for a batch of 3"),
    ],
)
def test_what_fails_all_of_them(serve, payload, reason, says):
    app = serve("batches.py:mixed")
    seen = outcomes(begin(app, "mixed", [b"a", payload, b"b"]))
    assert [one[:2] for one in seen] == [("INTERNAL", reason)] * 3 and all(says in one[2] for one in seen)


def test_a_death_gives_all_of_them_back(serve):
    app = serve("batches.py:mixed", quiet=False)
    calls = begin(app, "mixed", [b"a", b"die", b"b"])
    assert [call.result().attempts for call in calls] == [2] * 3
    assert outcomes(calls) == [b"a", b"die", b"b"]


def test_what_is_kept_is_nobody_elses_and_what_is_not_is_not_late(serve):
    app = serve("batches.py:late", "batches.py:keep", quiet=False)
    for size in (100, 5000, 200_000):
        assert app.call("late", bytes(size), metadata={"view": "1"}) == bytes(size)
        app.error("late", bytes(size), metadata={"raise": "1"})
        assert app.call("late", bytes(size)) == b"0"
    assert "was kept" not in app.log()
    for byte in range(1, 60):
        calls = [app.begin("keep", bytes([byte + n]) * (1000 + byte * 100)) for n in range(3)]
        assert {call.result().payload for call in calls} == {b"[]"}
    assert app.log().count("was kept after its handler") == 1
