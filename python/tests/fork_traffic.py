"""Forks four children while threads call and streams run, all on one client, and sees that everybody gets on.

    fork_traffic.py ADDRESS sync|aio

An alarm kills a child that makes no progress, so that its exit code says that it hung. Each call renews the alarm: how long all
of them take depends on the machine.
"""

import asyncio
import faulthandler
import os
import signal
import sys
import threading
import traceback

import forkring.aio
import forkring.client

CHILDREN, CALLS, PATIENCE = 4, 100, 60


def use(client):
    """Every kind of call, each checked."""
    for n in range(CALLS):
        signal.alarm(PATIENCE)
        assert client.call(b"item %d" % n, pool="echo").payload == b"item %d" % n
    signal.alarm(PATIENCE)
    subscription = f"of {os.getpid()}"
    assert client.submit([b"x"] * 10, subscription=subscription).accepted == 10
    assert sorted(result.id for result in client.updates(subscription, limit=10)) == list(range(10))
    assert sorted(result.id for result in client.process([b"y"] * 100)) == list(range(100))


async def use_aio(client):
    results = await asyncio.gather(*(client.call(b"item %d" % n, pool="echo") for n in range(CALLS)))
    assert [result.payload for result in results] == [b"item %d" % n for n in range(CALLS)]
    subscription = f"aio of {os.getpid()}"
    assert (await client.submit([b"x"] * 10, subscription=subscription)).accepted == 10
    assert len([result async for result in client.updates(subscription, limit=10)]) == 10
    assert len([result async for result in client.process([b"y"] * 100)]) == 100


class Traffic:
    """Threads that call, and one that keeps a stream busy, until they are told to end."""

    def __init__(self, client):
        self._client = client
        self._end = threading.Event()
        self._beats = [threading.Semaphore(0) for _ in range(3)]
        self._errors = []
        targets = [self._call, self._call, self._stream]
        self._threads = [threading.Thread(target=self._run, args=pair) for pair in zip(targets, self._beats)]
        for thread in self._threads:
            thread.start()

    def _run(self, work, beat):
        try:
            work(beat)
        except Exception as error:
            self._errors.append(error)

    def _call(self, beat):
        while not self._end.is_set():
            assert self._client.call(b"traffic").payload == b"traffic"
            beat.release()

    def _stream(self, beat):
        for result in self._client.process(b"traffic" for _ in iter(self._end.is_set, True)):
            assert result.payload == b"traffic"
            beat.release()

    def wait(self, beats):
        """Until each of them has done so much more."""
        for beat in self._beats:
            for _ in range(beats):
                assert beat.acquire(timeout=PATIENCE), self._errors

    def end(self):
        self._end.set()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert self._errors == []


def fork(traffic, child, leave=sys.exit):
    """Forks children that run `child`, with traffic between; their exit codes."""
    pids = []
    for _ in range(CHILDREN):
        traffic.wait(20)
        pid = os.fork()
        if pid == 0:
            # Says where it hangs before it is killed.
            faulthandler.register(signal.SIGALRM, chain=True)
            signal.alarm(PATIENCE)
            try:
                child()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            leave(0)
        pids.append(pid)
    traffic.wait(50)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def grandchild(client):
    """The child's own fork."""
    use(client)
    pid = os.fork()
    if pid == 0:
        use(client)
        os._exit(0)
    use(client)
    # The grandchild has an alarm of its own.
    signal.alarm(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    signal.alarm(PATIENCE)


def main(address, kind):
    client = forkring.client.Client(address, pool="echo")
    aio = forkring.aio.Client(address, pool="echo")
    traffic = Traffic(client)
    traffic.wait(1)
    # What a child has of its parent's must not hinder the end of its interpreter either.
    if kind == "sync":
        codes = fork(traffic, lambda: grandchild(client))
    else:

        async def parent():
            await use_aio(aio)
            # Streams and calls that are under way in this very thread.
            async with aio.process(b"x" for _ in range(10**6)) as results:
                calls = [asyncio.ensure_future(aio.call(b"y")) for _ in range(100)]
                await results.__anext__()
                # asyncio's own rule: the child must not return into its parent's loop, for it has the same selector.
                codes = fork(traffic, lambda: asyncio.run(use_aio(aio)), os._exit)
                await results.__anext__()
                await asyncio.gather(*calls)
            await use_aio(aio)
            return codes

        codes = asyncio.run(parent())
        codes += fork(traffic, lambda: asyncio.run(use_aio(aio)))
    traffic.end()
    use(client)
    assert codes and not any(codes), codes


if __name__ == "__main__":
    main(*sys.argv[1:])
