"""A handler that does a bit of everything, and says what is left of it."""

import gc
import json
import os
import sys

import numpy

import forkring

kept = []


def handle(item):
    """What is done goes by the item's id."""
    if item.metadata.get("do") == "tell":
        return left()
    # What the last one kept.
    kept.clear()
    match item.id % 8:
        case 0:
            return item.payload
        case 1:
            return f"{item.metadata} {item.deadline} {item.remaining()} {item.cancelled}"
        case 2:
            numbers = item.numpy("uint8")
            out = numpy.frombuffer(item.reply(numbers.nbytes), dtype="uint8")
            numpy.add(numbers, 1, out=out)
            return out
        case 3:
            raise ValueError(f"item {item.id}")
        case 4:
            raise forkring.Abort("NOT_FOUND", "no such thing", "NOTHING")
        case 5:
            kept.append(item.numpy("uint8"))
        case 6:
            kept.extend([item.payload, memoryview(item.reply(len(item.payload)))])
        case 7:
            # The garbage collector's.
            cycle = [item, memoryview(item.payload)]
            cycle.append(cycle)
    return None


def left():
    """The worker, and what it has: objects, and mappings of memory."""
    kept.clear()
    gc.collect()
    with open("/proc/self/maps") as maps:
        mappings = len(maps.readlines())
    return json.dumps({"pid": os.getpid(), "blocks": sys.getallocatedblocks(), "mappings": mappings})
