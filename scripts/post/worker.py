"""The post's worker: takes an item, works on it, puts the result back. The work is an echo, after $WORK_SECONDS if set."""

import asyncio
import os
import time

WORK = float(os.environ.get("WORK_SECONDS", 0))


async def echo(item):
    if WORK:
        time.sleep(WORK)
    # proto3's JSON form leaves out what is empty.
    return {"id": item.get("id", "0"), "payload": item.get("payload", "")}


def worker(work_queue, update_queue, port):
    async def do_work():
        while True:
            # blocks this process until we get something to work on
            item = work_queue.get()
            result = await echo(item)
            update_queue.put(result)

    asyncio.run(do_work())
