"""Handlers of batches."""

import os
import time

import numpy

import forkring

begun = 0


@forkring.batch(max_size=8, max_delay=5)
def sizes(items):
    """Each has the size of its batch, and its own payload."""
    return [b"%d " % len(items) + bytes(item.payload) for item in items]


@forkring.batch()
def echo(items):
    time.sleep(0.001)
    return [item.payload for item in items]


@forkring.batch(max_size=4, max_delay=30)
def four(items):
    return [str(len(items))] * len(items)


class Model:
    """Made once, and takes batches."""

    def __init__(self):
        self.batches = 0

    @forkring.batch(max_size=4, max_delay=0.01)
    def __call__(self, items):
        self.batches += 1
        rows = numpy.stack([item.numpy("float32") for item in items])
        return rows * 2

    @forkring.batch(max_size=2)
    def other(self, items):
        return [f"{len(items)}" for _ in items]


model = Model()


@forkring.batch(max_size=3, max_delay=30)
def mixed(items):
    """Fails each as its payload says, or all of them."""
    results = []
    for item in items:
        match bytes(item.payload):
            case b"abort":
                results.append(forkring.Abort("NOT_FOUND", "no such row", "NO_SUCH_ROW"))
            case b"value":
                results.append(ValueError("not this one"))
            case b"int":
                results.append(7)
            case b"large":
                results.append(bytes(17 << 20))
            case b"raise":
                raise KeyError("all of you")
            case b"short":
                return [b"one"]
            case b"bytes":
                return b"abc"
            case b"none":
                return None
            case b"tuple":
                return tuple(bytes(item.payload) for item in items)
            case b"die" if item.attempt == 1:
                os._exit(3)
            case b"reply":
                out = memoryview(item.reply(100_000))
                out[:] = b"r" * 100_000
                results.append(None)
            case other:
                results.append(other)
    items.clear()
    return results


kept = []


@forkring.batch(max_size=4, max_delay=0.01)
def keep(items):
    kept.extend((item.payload[0], len(item.payload), memoryview(item.payload)) for item in items)
    faults = [byte for byte, size, view in kept if bytes(view) != bytes([byte]) * size]
    return [str(faults)] * len(items)


@forkring.batch(max_size=4, max_delay=0.01)
def late(items):
    for item in items:
        if item.metadata.get("raise"):
            views = [memoryview(item.payload) for item in items]
            raise ValueError(str(len(views)))
    if items[0].metadata.get("view"):
        return [memoryview(item.payload) for item in items]
    return [str(forkring.late_views())] * len(items)
