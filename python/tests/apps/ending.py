"""Handlers of an app that leaves threads and tasks running."""

import asyncio
import concurrent.futures
import threading

import forkring

threading.Thread(target=threading.Event().wait, name="feeder").start()
pool = concurrent.futures.ThreadPoolExecutor(1)
tasks = []


def plain(item):
    """With a thread that waits for work, which is Python's to end."""
    return pool.submit(bytes, item.payload).result()


@forkring.batch(max_size=4)
def batch(items):
    return [item.payload for item in items]


async def loop(item):
    tasks.append(asyncio.create_task(stubborn()))
    tasks.append(asyncio.create_task(asyncio.to_thread(threading.Event().wait)))
    # They have begun when this goes on.
    await asyncio.sleep(0)
    return item.payload


async def stubborn():
    """Does not hear of its end."""
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass


async def orderly(item):
    tasks.append(asyncio.create_task(says_goodbye()))
    await asyncio.sleep(0)
    return item.payload


async def says_goodbye():
    try:
        await asyncio.sleep(3600)
    finally:
        await asyncio.sleep(0)
        raise ValueError("at the very end")
