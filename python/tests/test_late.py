"""What a handler keeps of an item after its end: never another item's bytes, and never freed memory."""

import json

import pytest

SIZES = [100, 5000, 1_000_000]


def keep(app, byte, size, pool="keep", **metadata):
    metadata = {key: value for key, value in metadata.items() if value}
    said = json.loads(app.call(pool, bytes([byte]) * size, metadata=metadata))
    return said["views"], said["late"]


@pytest.mark.parametrize("size", SIZES)
def test_what_is_kept_stays_what_it_was(serve, size):
    ways = ["view", "object", "numpy"]
    app = serve(*(f"{way}=late.py:keep" for way in ways), quiet=False)
    for way in ways:
        for byte in range(1, 6):
            keep(app, byte, size, way, keep=way)
    for way in ways:
        # The memory of the first ones has been given to others many times.
        for byte in range(100, 140):
            views, late = keep(app, byte, size + byte, way)
        assert views == [[[byte], size] for byte in range(1, 6)]
        assert late == 5
        # Let go, the memory is as before.
        keep(app, 1, size, way, keep="drop")
        for byte in range(1, 40):
            views, late = keep(app, byte, size + byte, way, keep="view" if byte == 20 else "")
            assert views == ([[[20], size + 20]] if byte >= 20 else [])
        assert late == 6
    said = app.log().count("RuntimeWarning: an item's payload was kept after its handler had returned")
    assert said == len(ways), "once for each worker"


def test_a_part_of_it_is_enough(serve):
    app = serve("late.py:keep", quiet=False)
    keep(app, 7, 5000, keep="part")
    for byte in range(20, 30):
        views, late = keep(app, byte, 5000)
    assert (views, late) == ([[[7], 10]], 1)


def test_what_a_failed_item_had_is_kept_too(serve):
    app = serve("late.py:keep", quiet=False)
    assert "ValueError: kept, and failed" in app.error("keep", b"\7" * 5000, metadata={"keep": "raise"}).details()
    for byte in range(20, 30):
        views, late = keep(app, byte, 5000)
    assert (views, late) == ([[[7], 5000]], 1)


def test_small_payloads_are_copies_and_cost_nothing_to_keep(serve):
    app = serve("late.py:keep")
    for byte in range(1, 6):
        keep(app, byte, 64, keep="view")
    views, late = keep(app, 9, 64)
    assert (views, late) == ([[[byte], 64] for byte in range(1, 6)], 0)


def test_what_only_the_garbage_collector_finds_is_harmless(serve):
    app = serve("late.py:keep", quiet=False)
    for round in range(200):
        keep(app, round % 250 + 1, 100_000, keep="cycle")
    assert keep(app, 1, 10, keep="drop") == ([], 200)
    assert keep(app, 1, 100_000, keep="view") == ([[[1], 100_000]], 200)


def test_views_that_are_dropped_in_time_are_not_late(serve):
    app = serve("basic.py:digest", "late.py:keep")
    for size in SIZES:
        app.call("digest", bytes(size))
    assert keep(app, 1, 10)[1] == 0


@pytest.mark.parametrize("way", ["view", "numpy"])
def test_late_writes_to_a_reply_reach_no_other_item(serve, way):
    thens = ["return", "other", "short", "raise"]
    app = serve(*(f"{then}=late.py:keep_reply" for then in thens))
    for then in thens:
        for byte in range(1, 30):
            payload = bytes([byte]) * (10_000 + byte)
            if then == "raise":
                app.error(then, payload, metadata={"keep": way, "then": then})
            else:
                result = app.call(then, payload, metadata={"keep": way, "then": then})
                assert result == (payload[:10] if then == "short" else payload), byte


def test_a_completed_item_says_so(serve):
    app = serve("late.py:keep_item")
    app.call("keep_item", bytes(1000), id=5)
    said = json.loads(app.call("keep_item", b"", id=6))
    assert said == [[5, 1], *["the item is completed: ask for this while its handler runs"] * 6]
