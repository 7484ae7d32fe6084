"""The baseline's worker: takes an item, works on it, puts the result back.

The work is an echo, after $WORK_SECONDS if set; or, if it is set, the digest of a digest, $WORK_DIGESTS times over.
"""

import asyncio
import base64
import hashlib
import os
import time

WORK = float(os.environ.get("WORK_SECONDS", 0))
DIGESTS = int(os.environ.get("WORK_DIGESTS", 0))


async def work(item):
    # proto3's JSON form leaves out what is empty.
    payload = item.get("payload", "")
    if WORK:
        time.sleep(WORK)
    if DIGESTS:
        digest = base64.b64decode(payload)
        for _ in range(DIGESTS):
            digest = hashlib.sha256(digest).digest()
        payload = base64.b64encode(digest).decode()
    return {"id": item.get("id", "0"), "payload": payload}


def worker(work_queue, update_queue, port):
    async def do_work():
        while True:
            # blocks this process until we get something to work on
            item = work_queue.get()
            result = await work(item)
            update_queue.put(result)

    asyncio.run(do_work())
