"""Functions and classes as handlers: what they get and what they give."""

import hashlib
import json
import os
import time
from pathlib import Path

import numpy
import pytest
from harness import Gate, error_of
from serving import until


def test_a_function_handles_payloads_of_any_size(serve):
    app = serve("basic.py:digest", "basic.py:echo")
    for size in (0, 1, 64, 65, 100, 4096, 100_000, 5_000_000):
        payload = os.urandom(size)
        assert app.call("digest", payload) == hashlib.sha256(payload).digest()
        assert app.call("echo", payload) == payload


def test_an_item_says_what_the_client_did(serve):
    app = serve("basic.py:facts")
    before = time.monotonic()
    facts = json.loads(app.call("facts", b"payload", id=7, metadata={"a": "1", "ä": "ü"}, timeout=500.0))
    deadline, remaining = facts.pop("deadline"), facts.pop("remaining")
    assert before < deadline < before + 600 and 0 < remaining < 500
    assert facts == {
        "id": 7,
        "attempt": 1,
        "cancelled": False,
        "metadata": {"a": "1", "ä": "ü"},
        "pool": "facts",
        "len": 7,
        "repr": "<forkring.Item id=7 attempt=1><forkring.Payload of 7 bytes>",
        "first": ord("p"),
        "slice": "ay",
        "equal": True,
        "same": True,
        "type": True,
    }
    (result,) = app.stream([app.item("facts", b"payload")], timeout=None)
    facts = json.loads(result.payload)
    assert (facts["deadline"], facts["remaining"], facts["metadata"]) == (None, None, {})


def test_whatever_has_bytes_is_a_result(serve):
    app = serve("basic.py:returns")
    for returned, result in {
        "none": b"",
        "bytes": b"bytes",
        "str": "sträng".encode(),
        "bytearray": b"bytearray",
        "memoryview": b"memoryview",
        "reversed": b"cba",
        "array": b"\1\0\2\0",
        "numpy": numpy.arange(12, dtype="int32").tobytes(),
        "columns": numpy.array([1, 5, 9], dtype="int32").tobytes(),
        "empty": b"",
    }.items():
        assert app.call("returns", returned.encode()) == result, returned
    for returned, says in {
        "int": "returned `int`: return bytes, str",
        "list": "returned `list`",
        "objects": "an array of Python objects",
        "surrogate": "surrogates not allowed",
    }.items():
        code, reason, message = error_of(app.error("returns", returned.encode()))
        assert (code, reason) == ("INTERNAL", "BAD_RESULT") and says in message, message


def test_a_class_is_made_once_per_worker(serve):
    app = serve("c:2=basic.py:Counter")
    seen = {}
    for result in app.stream(app.item("c", id=at) for at in range(200)):
        pid, made, items = map(int, result.payload.split())
        assert made == 1
        seen.setdefault(pid, []).append(items)
    # One may have had them all.
    assert set(seen) <= set(app.workers().values())
    for items in seen.values():
        assert sorted(items) == list(range(1, len(items) + 1))


def test_nothing_is_copied_on_the_way_to_numpy_and_back(serve):
    app = serve("basic.py:places", "basic.py:double")
    places = json.loads(app.call("places", bytes(4 << 20)))
    segment = f"/dev/shm/forkring-{app.name}"
    assert places == {"same": True, "payload": segment, "reply": segment, "read_only": True, "zero": True}
    for count in (1, 8, 9, 1_000_000):
        numbers = numpy.arange(count)
        assert app.call("double", numbers.tobytes()) == (numbers * 2).tobytes()
    # What others wrote there before is not seen.
    assert json.loads(app.call("places", bytes(4 << 20)))["zero"]


def test_arrays_of_4_mib_are_where_the_front_wrote_and_reads_them(serve):
    app = serve("basic.py:marked")
    segment = Path(f"/dev/shm/forkring-{app.name}")
    random = numpy.random.default_rng()
    # The second has other places, and what the first left there.
    for _ in range(2):
        numbers = random.integers(2**63, size=(4 << 20) // 8, dtype="uint64")
        sent = numbers.tobytes()
        result = app.call("marked", sent)
        returned = numpy.frombuffer(result, dtype="uint64")
        assert (returned[2:] == numbers[2:] + 1).all()
        # Nobody has used the memory since: it is all there, and nowhere else.
        memory = segment.read_bytes()
        for place, whole in zip(map(int, returned[:2]), (sent, result)):
            assert memory[place : place + len(whole)] == whole
            part = whole[3 << 20 :][:64]
            assert memory.count(part) == 1


def test_a_reply_is_filled_in_place(serve):
    app = serve("basic.py:reply")
    for size in (6, 64, 65, 100_000):
        filled = b"abc" + bytes(size - 6) + b"xyz"
        for returned, result in {
            "none": filled,
            "reply": filled,
            "view": filled,
            "start": filled[:5],
            "end": filled[-5:],
            "other": b"other",
            "larger": filled + b"more",
        }.items():
            assert app.call("reply", metadata={"len": str(size), "return": returned}) == result, returned
        error = app.error("reply", metadata={"len": str(size), "return": "again"})
        assert "ValueError: the item has its reply" in error.details()


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_child_that_a_handler_forks_has_nothing_of_the_item_and_lives(serve, size):
    app = serve("basic.py:family")
    whose = {
        "the payload": "bytes view first equal",
        "the item": "cancelled remaining again",
        "the reply": "reply",
    }
    payload = b"abc" + bytes(size - 3)
    seen = json.loads(app.call("family", payload, id=7, metadata={"ways": " ".join(whose.values())}))
    *here, pid = seen.pop("here")
    assert here == [7, True, True] and pid in app.workers().values()
    assert seen.pop("given") == size
    assert seen.pop("safe") == repr((7, "bytes", size, f"<forkring.Payload of {size} bytes>", b"abc"))
    for what, ways in whose.items():
        for way in ways.split():
            error = f"RuntimeError: {what} belongs to process {pid}: pass bytes(item.payload) to the child"
            assert seen.pop(way) == error, way
    assert seen == {}


def test_a_decorator_that_hides_what_a_handler_is_is_told(serve):
    kinds = {"coroutine": "an `async def`", "generator": "a generator", "async_generator": "an async generator"}
    app = serve(*(f"basic.py:hidden_{kind}" for kind in kinds), quiet=False)
    for kind, written in kinds.items():
        code, reason, message = error_of(app.error(f"hidden_{kind}"))
        assert (code, reason) == ("INTERNAL", "BAD_RESULT")
        assert message.startswith(f"the handler returned `{kind}`: a decorator of {written}"), message


def test_a_plain_function_can_see_that_nobody_waits(serve, tmp_path):
    app = serve("basic.py:patient", "basic.py:echo")
    journal = tmp_path / "journal"
    metadata = {"journal": str(journal)}
    lines = lambda: journal.read_text().splitlines() if journal.exists() else []  # noqa: E731
    call = app.begin("patient", metadata=metadata)
    until("its begin", lambda: lines() == ["began False"])
    call.cancel()
    until("its end", lambda: len(lines()) == 2)
    word, left = lines()[1].split()
    assert word == "cancelled" and float(left) > 0
    # Its own deadline is seen as well; a call's would be its client's before.
    (_,) = app.stream([app.item("patient", metadata=metadata, timeout={"seconds": 5})])
    until("its end", lambda: len(lines()) == 4)
    assert lines()[2:] == ["began False", "cancelled 0.0"]


def test_threads_of_a_handler_see_its_item(serve):
    app = serve("basic.py:thread")
    for payload in (b"small", bytes(100_000)):
        assert app.call("thread", payload) == payload


def test_programs_that_a_handler_starts_are_as_without_us(serve):
    app = serve("basic.py:signals", "basic.py:inherited")
    assert json.loads(app.call("signals")) == {"blocked": [], "child": "0 set()\n", "forked": 0}
    # No segment, no doorbells, no listener.
    links = app.call("inherited").decode()
    assert not any(word in links for word in ("forkring-", "eventfd", "socket:")), links


def test_ctrl_c_drains(serve, tmp_path):
    app = serve("g:2=basic.py:gate")
    gates = [Gate(tmp_path) for _ in range(2)]
    calls = [app.begin("g", str(gate.path).encode()) for gate in gates]
    for gate in gates:
        gate.wait_until_begun()
    app.interrupt()
    for gate in gates:
        gate.open(b"finished")
    assert [call.result().payload for call in calls] == [b"finished 1"] * 2
    # Not before: a line that nobody has read goes with its last end.
    for gate in gates:
        gate.close()


def test_the_item_of_a_worker_that_is_killed_goes_to_another(serve, tmp_path):
    app = serve("g:2=basic.py:gate", quiet=False)
    gate = Gate(tmp_path)
    call = app.begin("g", str(gate.path).encode())
    gate.wait_until_begun()
    victims = [pid for pid in app.workers().values() if f"{gate.path}" in _open_files(pid)]
    assert len(victims) == 1
    os.kill(victims[0], 9)
    # It is not the first to open the gate.
    gate.wait_until_begun()
    gate.open(b"done")
    result = call.result()
    assert (result.payload, result.attempts) == (b"done 2", 2)
    gate.close()
    # It is logged once the worker's remains are in order, which the item does not wait for.
    until("a line about it", lambda: "killed by SIGKILL" in app.log())


def _open_files(pid):
    names = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            names.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except OSError:
            pass
    return " ".join(names)
