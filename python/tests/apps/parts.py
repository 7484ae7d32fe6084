"""Generators: partial results."""

import hashlib
import json
import os
import threading

import numpy


def note(item, text):
    """Into the journal that the client named."""
    with open(item.metadata["journal"], "a") as journal:
        journal.write(text + "\n")


def squares(item):
    """So many parts, and what is returned."""
    count = int(bytes(item.payload))
    for n in range(count):
        yield str(n * n)
    return f"{count} squares"


def forms(item):
    """Whatever has bytes."""
    yield b"bytes"
    yield "text"
    yield None
    yield bytearray(b"bytearray")
    yield numpy.arange(4, dtype="uint8") + 48
    yield memoryview(b"abc")[::-1]
    yield item.payload
    out = item.reply(100_000)
    numpy.frombuffer(out, dtype="uint8")[:] = 120
    yield out
    # The next one is another: the part before is not the handler's any more.
    out = memoryview(item.reply(1000))
    out[:] = b"y" * 1000
    yield out[10:20]
    out = item.reply(200)
    yield b"first something else"
    memoryview(out)[:] = b"z" * 200
    yield out
    small = item.reply(3)
    memoryview(small)[:] = b"end"
    return None


def endless(item):
    """Ends when nobody wants more, and says so."""
    note(item, f"began in {os.getpid()}")
    sent = 0
    try:
        while True:
            yield bytes(int(bytes(item.payload)))
            sent += 1
    finally:
        # The item is still there.
        note(item, f"closed {item.cancelled} {sent}")


def sleepy(item):
    """Waits for its client most of the time; another thread runs meanwhile."""
    done = threading.Event()

    def tick():
        while not done.wait(0.001):
            note(item, "tick")

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for _ in range(int(bytes(item.payload))):
            yield bytes(int(item.metadata["size"]))
            note(item, "sent")
    finally:
        done.set()
        thread.join()


def blocks(item):
    """So many MB, of which each is a part."""
    try:
        for n in range(int(bytes(item.payload))):
            yield bytes([n]) * 1_000_000
    finally:
        note(item, "closed")


def breaks(item):
    yield b"one"
    match bytes(item.payload):
        case b"raise":
            raise ValueError("after one")
        case b"int":
            yield 7
        case b"exit":
            raise SystemExit(3)
        case b"die":
            if item.attempt == 1:
                os._exit(3)
    yield b"two"


class Hasher:
    """Made once, and a generator."""

    def __init__(self):
        self.items = 0

    def __call__(self, item):
        self.items += 1
        for at in range(0, len(item.payload), 100_000):
            yield hashlib.sha256(item.payload[at : at + 100_000]).digest()
        return json.dumps(self.items)


kept = []


def keep(item):
    """Keeps views of what it was given and gave."""
    kept.append((bytes(item.payload[:1]), len(item.payload), memoryview(item.payload)))
    for _ in range(3):
        out = item.reply(50_000)
        numpy.frombuffer(out, dtype="uint8")[:] = item.payload[0]
        yield out
    faults = [byte for byte, size, view in kept if bytes(view) != byte * size]
    return json.dumps(faults)
