"""Handlers on an event loop."""

import asyncio
import contextlib
import json
import os
import sys

import forkring

if os.environ.get("PLAIN_LOOP"):
    sys.modules["uvloop"] = None

open_now = 0


def note(item, text):
    """Into the journal that the client named."""
    with open(item.metadata["journal"], "a") as journal:
        journal.write(text + "\n")


async def opened(path):
    """Until there is a file: the loop has nothing to watch for that, so it looks."""
    while not os.path.exists(path):
        await asyncio.sleep(0.002)


async def gate(item):
    """Ends when the client makes the file that it named, with its payload."""
    global open_now
    open_now += 1
    try:
        note(item, f"{item.id} began in {os.getpid()} beside {open_now - 1}")
        await opened(item.metadata["until"])
        return item.payload
    except asyncio.CancelledError:
        note(item, f"{item.id} cancelled {item.cancelled}")
        raise
    finally:
        open_now -= 1


@forkring.concurrency(3)
async def three(item):
    return await gate(item)


class Model:
    """Made once, and asynchronous."""

    def __init__(self):
        self.items = 0

    @forkring.concurrency(2)
    async def __call__(self, item):
        self.items += 1
        await asyncio.sleep(0)
        return f"{os.getpid()} {self.items}"


async def echo(item):
    return item.payload


async def loop_kind(item):
    threads = len(os.listdir("/proc/self/task"))
    return json.dumps([type(asyncio.get_running_loop()).__module__, threads])


async def reply(item):
    """Filled in place, also when it takes long."""
    out = item.reply(len(item.payload))
    await asyncio.sleep(0)
    memoryview(out)[:] = item.payload
    return out


async def ways(item):
    """Fails as the payload says."""
    match bytes(item.payload):
        case b"value":
            raise ValueError("that is no number")
        case b"exit":
            sys.exit(3)
        case b"int":
            return 7
        case b"abort":
            raise forkring.Abort(forkring.Code.NOT_FOUND, "there is no row 7", "NO_SUCH_ROW")
        case b"itself":
            raise asyncio.CancelledError
        case b"deep":
            await asyncio.gather(ways_of(), asyncio.sleep(0))
        case b"large":
            return bytes(17 << 20)
    return str(os.getpid())


async def ways_of():
    raise KeyError("deep")


async def crowd(item):
    """Dies when told to, with all that is open beside it."""
    note(item, f"{item.id} began in {os.getpid()}")
    if item.payload == b"die" and item.attempt == 1:
        await opened(item.metadata["until"])
        os._exit(3)
    if item.payload == b"break" and item.attempt == 1:
        await opened(item.metadata["until"])

        async def breaks():
            # Not caught by anybody: it ends the loop.
            raise SystemExit(4)

        broken = asyncio.create_task(breaks())
        await asyncio.sleep(60)
        await broken
    if item.attempt == 1:
        await asyncio.sleep(60)
    return f"attempt {item.attempt}"


async def count(item):
    """Parts, and a pause between them."""
    for n in range(int(bytes(item.payload))):
        yield str(n)
        await asyncio.sleep(0)


async def endless(item):
    """Ends when nobody wants more, and says so."""
    note(item, f"began in {os.getpid()}")
    part = bytes(int(bytes(item.payload)))
    try:
        while True:
            yield part
            note(item, "sent")
    finally:
        await asyncio.sleep(0)
        note(item, "closed")


async def blocks(item):
    """So many MB, of which each is a part."""
    try:
        for n in range(int(bytes(item.payload))):
            yield bytes([n]) * 1_000_000
    finally:
        note(item, "closed")


@forkring.concurrency(1)
async def one_by_one(item):
    async with contextlib.aclosing(blocks(item)) as parts:
        async for part in parts:
            yield part


async def breaks(item):
    yield b"one"
    raise ValueError("after one")


async def eager(item):
    """Has the loop begin tasks at once, from the first item on, and then ends where it begins."""
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    return item.payload


kept = []


async def keep(item):
    """Keeps views of payloads, and tells whether they are what they were."""
    kept.append((item.payload[0], len(item.payload), memoryview(item.payload)))
    await asyncio.sleep(0)
    return json.dumps([byte for byte, size, view in kept if bytes(view) != bytes([byte]) * size])


async def late(item):
    """How many views were late, having made some that were not."""
    view = memoryview(item.payload)
    await asyncio.sleep(0)
    if item.metadata.get("raise"):
        raise ValueError(str(len(view)))
    return view if item.metadata.get("view") else str(forkring.late_views())
