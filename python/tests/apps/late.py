"""Handlers that keep what they should not."""

import gc
import json

import numpy

import forkring

kept = []


def keep(item):
    """Keeps a view of the payload in the way that the metadata says, and tells what all the kept ones have by now."""
    match item.metadata.get("keep"):
        case "view":
            kept.append(memoryview(item.payload))
        case "part":
            kept.append(memoryview(item.payload)[10:20])
        case "object":
            kept.append(item.payload)
        case "numpy":
            kept.append(item.numpy("uint8"))
        case "cycle":
            cycle = [item.numpy("uint8")]
            cycle.append(cycle)
        case "raise":
            view = memoryview(item.payload)
            kept.append(view)
            raise ValueError("kept, and failed")
        case "drop":
            kept.clear()
            gc.collect()
    return tell()


def tell():
    """The byte that each view that is kept consists of, and its length."""
    views = []
    for view in kept:
        content = bytes(view)
        mixed = content != content[:1] * len(content)
        views.append((sorted(set(content)) if mixed else [content[0]], len(content)))
    return json.dumps({"views": views, "late": forkring.late_views()})


def keep_reply(item):
    """Fills its reply, writes to all replies that were kept, and keeps its own."""
    out = item.reply(len(item.payload))
    view = memoryview(out)
    view[:] = item.payload
    for old in kept:
        memoryview(old)[:] = b"\xff" * len(old)
    if item.metadata.get("keep") == "numpy":
        kept.append(numpy.frombuffer(out, dtype="uint8"))
    else:
        kept.append(view)
    if item.metadata.get("then") == "raise":
        raise ValueError("kept, and failed")
    if item.metadata.get("then") == "other":
        return bytes(item.payload)
    if item.metadata.get("then") == "short":
        return view[:10]
    return out


items = []


def keep_item(item):
    """What a completed item says."""
    said = []
    for old in items:
        said.append([old.id, old.attempt])
        for ask in (
            lambda: old.payload,
            lambda: old.metadata,
            lambda: old.cancelled,
            lambda: old.remaining(),
            lambda: old.numpy(),
            lambda: old.reply(1),
        ):
            try:
                said.append(repr(ask()))
            except RuntimeError as error:
                said.append(str(error))
    items.append(item)
    return json.dumps(said)
