"""The client for asyncio, with the same methods as the blocking one.

    async with forkring.aio.Client("127.0.0.1:50051") as client:
        async for result in client.updates("mine"):
            print(result.id, result.payload)

A client makes its connection when it is first needed, one for each process and event loop. So it may be made anywhere,
also before a fork and outside of any loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from typing import Any

from forkring import _grpc, _messages
from forkring._types import DEFAULTS, Retries, error_of, item_of, items_of, receipt_of, result_of, target_of
from forkring.client import (
    Code,
    Error,
    ForkError,
    Options,
    Receipt,
    Rejection,
    Result,
    Sendable,
    Timing,
    Work,
    _remade,
)

__all__ = [
    "Client",
    "Code",
    "Error",
    "ForkError",
    "Sendable",
    "Receipt",
    "Rejection",
    "Result",
    "Results",
    "Timing",
    "Work",
]

Items = Iterable[Work | Sendable] | AsyncIterable[Work | Sendable]


class Client:
    """As `forkring.Client`; `submit` and `process` take asynchronous iterables as well."""

    def __init__(
        self, target: str, *, pool: str = "", retries: int = 10, idempotent: bool = False, options: Options = ()
    ) -> None:
        self._target = target_of(target)
        self._pool = pool
        self._retries = retries
        self._idempotent = idempotent
        self._options = tuple(options)
        self._generation = _grpc.generation()
        self._made: dict[asyncio.AbstractEventLoop, tuple[Any, _messages.Stubs]] = {}
        self._closed = False

    async def call(
        self,
        payload: Sendable,
        *,
        pool: str | None = None,
        id: int = 0,
        metadata: Mapping[str, str] | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Result:
        """One item in, its result out; a failed item raises `Error`. Cancelling the task cancels the item."""
        item = item_of(Work(payload, pool=pool, metadata=metadata, priority=priority), id, self._pool)
        end = None if timeout is None else time.monotonic() + timeout
        retries = Retries(self._retries, self._idempotent)
        while True:
            grpc, stubs = self._stubs()
            try:
                left = None if end is None else end - time.monotonic()
                return result_of(await _answer(_grpc.own(stubs.call(item, timeout=left))))
            except grpc.RpcError as failed:
                error = error_of(failed)
            pause = retries.pause(error)
            if pause is None or (end is not None and time.monotonic() + pause >= end):
                raise error
            await asyncio.sleep(pause)

    async def submit(self, items: Items, *, subscription: str = "", timeout: float | None = None) -> Receipt:
        """Many items in, one receipt out; the results go to `updates`."""
        grpc, stubs = self._stubs()
        feed = _Feed(items, self._pool, subscription)
        try:
            receipt = receipt_of(await _answer(_grpc.own(stubs.submit(feed.messages(), timeout=timeout))))
        except grpc.RpcError as failed:
            error = error_of(failed)
            raise error from error.__cause__
        feed.check()
        return receipt

    def updates(self, subscription: str = "", *, limit: int = 0, timeout: float | None = None) -> Results:
        """The results of submitted items as they are done; ends after `limit` of them, unless that is 0, and when the
        server shuts down."""
        grpc, stubs = self._stubs()
        request = _messages.GetUpdatesRequest(subscription=subscription, limit=limit)
        return Results(grpc, stubs.updates(request, timeout=timeout), None)

    def process(self, items: Items, *, timeout: float | None = None) -> Results:
        """Items in, results out, both at once; results come as they are done, match them by `id`."""
        grpc, stubs = self._stubs()
        feed = _Feed(items, self._pool)
        return Results(grpc, stubs.process(feed.messages(), timeout=timeout), feed)

    async def close(self) -> None:
        """Closes the connection of this process and loop, and cancels what runs on it."""
        self._closed = True
        if self._generation == _grpc.generation():
            made = self._made.pop(asyncio.get_running_loop(), None)
            if made is not None:
                await made[1].channel.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __reduce__(self) -> Any:
        return _remade, (type(self), self._target, self._pool, self._retries, self._idempotent, self._options)

    def _stubs(self) -> tuple[Any, _messages.Stubs]:
        loop = asyncio.get_running_loop()
        if self._generation == _grpc.generation():
            made = self._made.get(loop)
            if made is not None:
                return made
        with _grpc.lock():
            if self._closed:
                raise RuntimeError("this client is closed: make a new one")
            if self._generation != _grpc.generation():
                self._generation, self._made = _grpc.generation(), {}
            for ended in [one for one in self._made if one.is_closed()]:
                del self._made[ended]
            grpc = _grpc.load()
            channel = _grpc.own(grpc.aio.insecure_channel(self._target, [*DEFAULTS, *self._options]))
            made = self._made[loop] = (grpc, _messages.Stubs(channel))
        return made


async def _answer(call: Any) -> Any:
    with _told_from_a_cancel(call, "client"):
        return await call


@contextlib.contextmanager
def _told_from_a_cancel(call: Any, what: str) -> Iterator[None]:
    """Of a call that somebody else closes, gRPC says that this task is cancelled. Here that is an `Error`."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if call.cancelled() and not (task and task.cancelling()):
            raise Error(Code.CANCELLED, "", f"the {what} was closed") from None
        raise


class Results(AsyncIterator[Result]):
    """A stream of results. It ends itself; leave it early with `close`, or by `async with`."""

    def __init__(self, grpc: Any, call: Any, feed: _Feed | None) -> None:
        self._grpc = grpc
        self._call = _grpc.own(call)
        self._feed = feed
        self._generation = _grpc.generation()
        self._pid = os.getpid()

    async def __anext__(self) -> Result:
        if self._generation != _grpc.generation():
            raise ForkError(self._pid)
        try:
            with _told_from_a_cancel(self._call, "stream"):
                message = await self._call.read()
        except self._grpc.RpcError as failed:
            error = error_of(failed)
            raise error from error.__cause__
        if message is self._grpc.aio.EOF:
            if self._feed is not None:
                self._feed.check()
            raise StopAsyncIteration
        return result_of(message)

    async def close(self) -> None:
        """Cancels the stream, and what of its items is not done. In another process it does nothing."""
        if self._generation == _grpc.generation():
            self._call.cancel()

    async def __aenter__(self) -> Results:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Feed:
    """Items on their way into a stream. An error of theirs ends the stream and waits to be raised where its results
    are read."""

    def __init__(self, items: Items, pool: str, subscription: str = "") -> None:
        self._items = items_of(items)
        self._pool = pool
        self._subscription = subscription
        self._error: Exception | None = None

    async def messages(self) -> AsyncIterator[Any]:
        """The items as messages."""
        index = 0
        try:
            if isinstance(self._items, AsyncIterable):
                async for work in self._items:
                    yield item_of(work, index, self._pool, self._subscription)
                    index += 1
            else:
                for work in self._items:
                    yield item_of(work, index, self._pool, self._subscription)
                    index += 1
        except Exception as error:
            self._error = error

    def check(self) -> None:
        """Raises what the items raised, if they did."""
        if self._error is not None:
            raise self._error
