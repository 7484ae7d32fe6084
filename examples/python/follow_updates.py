"""An asyncio client that follows updates: what a loop over `sleep(0.1)` and a queue becomes.

    python follow_updates.py HOST:PORT [COUNT]

One task submits items, another follows the results as they are pushed; both over one connection. It needs a server with
a pool `sha256`: `forkring serve --pool sha256=sha256`.
"""

import asyncio
import hashlib
import os
import sys
import time

from forkring import aio


async def main(address, count):
    payloads = {n: f"item {n}".encode() for n in range(count)}
    subscription = f"follow-{os.getpid()}"
    begin = time.monotonic()
    async with aio.Client(address, pool="sha256") as client:

        async def follow():
            async with client.updates(subscription, limit=count) as updates:
                async for result in updates:
                    if result.error:
                        raise result.error
                    assert result.payload == hashlib.sha256(payloads[result.id]).digest()

        following = asyncio.create_task(follow())
        receipt = await client.submit(payloads.values(), subscription=subscription)
        assert receipt.accepted == count, receipt.rejections
        await following
    print(f"{count} items submitted, {count} results followed, in {time.monotonic() - begin:.2f} s")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: python follow_updates.py HOST:PORT [COUNT]")
    asyncio.run(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1000))
