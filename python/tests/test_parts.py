"""Generators: each value is a partial result, streamed as it is made."""

import os

import forkring
import pytest
from harness import PATIENCE, error_of
from serving import until


def parts_of(app, pool, payload=b"", **fields):
    """What a stream of one item gives: the parts, and the result."""
    *parts, end = app.stream([app.item(pool, payload, **fields)])
    assert [part.sequence for part in parts] == list(range(len(parts))) and all(part.partial for part in parts)
    assert (end.partial, end.sequence) == (False, len(parts))
    return [part.payload for part in parts], end


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_each_value_is_a_part_and_what_is_returned_the_result(serve):
    app = serve("parts.py:squares")
    for count in (0, 1, 3, 200):
        parts, end = parts_of(app, "squares", str(count).encode())
        assert parts == [str(n * n).encode() for n in range(count)]
        assert end.payload == f"{count} squares".encode()
    # To whom it comes in one.
    assert app.call("squares", b"4") == b"01494 squares"


def test_whatever_has_bytes_is_a_part(serve):
    app = serve("parts.py:forms")
    payload = os.urandom(70_000)
    parts, end = parts_of(app, "forms", payload)
    wanted = [
        b"bytes",
        b"text",
        b"",
        b"bytearray",
        b"0123",
        b"cba",
        payload,
        b"x" * 100_000,
        b"y" * 10,
        b"first something else",
        b"z" * 200,
    ]
    assert parts == wanted and end.payload == b"end"
    assert app.call("forms", payload) == b"".join(wanted) + b"end"


def test_a_class_may_be_a_generator(serve):
    app = serve("parts.py:Hasher")
    for items in (1, 2):
        parts, end = parts_of(app, "Hasher", os.urandom(250_000))
        assert [len(part) for part in parts] == [32] * 3 and end.payload == str(items).encode()


# Of small parts it is credit that ends first; of large ones it is room in the arena.
@pytest.mark.parametrize(("count", "size"), [(1500, 100_000), (30, 8_000_000)])
def test_a_part_comes_before_the_next_is_made(serve, tmp_path, count, size):
    """It is made no faster than it is read, and its threads run meanwhile."""
    app = serve("parts.py:sleepy")
    journal = tmp_path / "journal"
    metadata = {"journal": str(journal), "size": str(size)}
    stream = app.stream([app.item("sleepy", str(count).encode(), metadata=metadata)])
    assert next(stream).partial
    # The client has read one part: the handler stands still, and its thread does not.
    sent, ticks = -1, 0

    def stands_still():
        nonlocal sent, ticks
        now = lines(journal)
        if now.count("sent") != sent:
            sent, ticks = now.count("sent"), now.count("tick")
        return now.count("tick") - ticks > 100

    until("the handler to wait", stands_still)
    assert 0 < sent < count
    *rest, end = stream
    assert [len(part.payload) for part in rest] == [size] * (count - 1) and not end.partial


@pytest.mark.parametrize("size", [b"0", b"1000", b"1000000"])
def test_who_is_not_read_is_closed(serve, tmp_path, size):
    app = serve("parts.py:endless", "parts.py:squares")
    journal = tmp_path / "journal"
    metadata = {"journal": str(journal)}
    stream = app.stream([app.item("endless", size, metadata=metadata)])
    assert next(stream).partial
    stream.cancel()
    until("the end of it", lambda: any(line.startswith("closed True") for line in lines(journal)))
    # The same worker goes on.
    (worker,) = [int(line.split()[-1]) for line in lines(journal) if line.startswith("began")]
    parts_of(app, "squares", b"5")
    assert worker in app.workers().values()


def test_a_call_and_a_deadline_close_it_too(serve, tmp_path):
    app = serve("parts.py:endless")
    journal = tmp_path / "journal"
    metadata = {"journal": str(journal)}
    call = app.begin("endless", b"0", metadata=metadata)
    until("its begin", lambda: len(lines(journal)) == 1)
    call.cancel()
    until("its end", lambda: len(lines(journal)) == 2)
    # It has begun by then, however busy the machine is.
    assert app.error("endless", b"0", metadata=metadata, timeout=5.0).code().name == "DEADLINE_EXCEEDED"
    until("its end", lambda: len(lines(journal)) == 4)
    assert [line.split()[:2] for line in lines(journal)[1::2]] == [["closed", "True"]] * 2


def test_an_exception_midway_is_the_item_s_error(serve):
    app = serve("parts.py:breaks")
    for payload, reason, says in [
        (b"raise", "HANDLER_RAISED", "ValueError: after one"),
        (b"int", "BAD_RESULT", "returned `int`"),
        (b"exit", "HANDLER_RAISED", "SystemExit: 3"),
    ]:
        parts, end = parts_of(app, "breaks", payload)
        assert parts == [b"one"] and (end.status.code, end.status.reason) == (13, reason) and says in end.status.message
        if reason == "HANDLER_RAISED":
            assert "parts.py" in end.status.traceback
        assert error_of(app.error("breaks", payload))[1] == reason


def test_a_death_midway_begins_it_anew(serve):
    app = serve("parts.py:breaks", quiet=False)
    results = list(app.stream([app.item("breaks", b"die")]))
    second = [result for result in results if result.attempts == 2]
    assert [(result.partial, result.sequence, result.payload) for result in second] == [
        (True, 0, b"one"),
        (True, 1, b"two"),
        (False, 2, b""),
    ]


def test_what_is_kept_of_items_with_parts_is_nobody_elses(serve):
    app = serve("parts.py:keep", quiet=False)
    for byte in range(1, 40):
        payload = bytes([byte]) * (10_000 + byte)
        parts, end = parts_of(app, "keep", payload)
        assert parts == [bytes([byte]) * 50_000] * 3 and end.payload == b"[]"
        if byte % 10 == 0:
            assert app.call("keep", payload) == bytes([byte]) * 150_000 + b"[]"


def test_our_client_shows_parts(serve):
    app = serve("parts.py:squares")
    with forkring.Client(app.address, pool="squares") as client:
        results = list(client.process([b"3"]))
        assert [(one.partial, one.sequence, one.payload) for one in results] == [
            (True, 0, b"0"),
            (True, 1, b"1"),
            (True, 2, b"4"),
            (False, 3, b"3 squares"),
        ]
        assert not client.call(b"3").partial


def test_our_asyncio_client_shows_parts(serve):
    import asyncio

    app = serve("parts.py:squares")

    async def ask():
        async with forkring.aio.Client(app.address, pool="squares") as client:
            return [(one.partial, one.sequence) async for one in client.process([b"2"])]

    assert asyncio.run(asyncio.wait_for(ask(), PATIENCE)) == [(True, 0), (True, 1), (False, 2)]
