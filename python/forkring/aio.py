"""The client for asyncio, with the same methods as the blocking one.

    async with forkring.aio.Client("127.0.0.1:50051") as client:
        async for result in client.updates("mine"):
            print(result.id, result.payload)

A client makes its connection when it is first needed, one for each process and event loop. So it may be made anywhere,
also before a fork and outside of any loop. It waits for a server that is not there yet as the blocking client does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any

from forkring import _grpc, _messages
from forkring._arguments import seconds, text, whole
from forkring._attempts import Attempts, Outage, settings_of
from forkring._types import NO_CONNECTION, closed, error_of, item_of, items_of, receipt_of, result_of
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
        self,
        target: str,
        *,
        pool: str = "",
        retries: int = 10,
        idempotent: bool = False,
        connect_timeout: float | None = 10.0,
        options: Options = (),
    ) -> None:
        self._settings = settings_of(target, pool, retries, idempotent, connect_timeout, options)
        self._outage = Outage(self._settings.target)
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
        work = Work(payload, id=id, pool=pool, metadata=metadata, priority=priority)
        item = item_of(work, 0, self._settings.pool)
        attempts = self._attempts(timeout)
        while True:
            grpc, stubs = self._stubs()
            try:
                message = await _answer(_grpc.own(stubs.call(item, timeout=attempts.left())))
            except grpc.RpcError as failed:
                error = self._error_of(failed)
            else:
                self._outage.ends()
                return result_of(message)
            pause = attempts.pause(error)
            if pause is None:
                raise error
            await asyncio.sleep(pause)
            if self._closed:
                raise closed("client")

    async def submit(self, items: Items, *, subscription: str = "", timeout: float | None = None) -> Receipt:
        """Many items in, one receipt out; the results go to `updates`."""
        feed = _Feed(items, self._settings.pool, text("subscription", subscription))
        attempts = self._attempts(timeout)
        grpc, stubs = await self._reached(attempts)
        try:
            receipt = receipt_of(await _answer(_grpc.own(stubs.submit(feed.messages(), timeout=attempts.left()))))
        except grpc.RpcError as failed:
            error = self._error_of(failed)
            raise error from error.__cause__
        feed.check()
        return receipt

    def updates(self, subscription: str = "", *, limit: int = 0, timeout: float | None = None) -> Results:
        """The results of submitted items as they are done; ends after `limit` of them, unless that is 0, and when the
        server shuts down."""
        request = _messages.GetUpdatesRequest(
            subscription=text("subscription", subscription), limit=whole("limit", limit, 0, 2**64 - 1)
        )
        return self._results(lambda stubs, left: stubs.updates(request, timeout=left), None, timeout)

    def process(self, items: Items, *, timeout: float | None = None) -> Results:
        """Items in, results out, both at once; results come as they are done, match them by `id`."""
        feed = _Feed(items, self._settings.pool)
        return self._results(lambda stubs, left: stubs.process(feed.messages(), timeout=left), feed, timeout)

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

    def __repr__(self) -> str:
        return f"<forkring.aio.Client of {self._settings.target}>"

    def __reduce__(self) -> Any:
        return _remade, (type(self), self._settings)

    def _attempts(self, timeout: Any) -> Attempts:
        return Attempts(self._settings, self._outage, seconds("timeout", timeout, "no limit"))

    def _error_of(self, failed: Any) -> Error:
        return error_of(failed, self._settings.target)

    def _results(self, begin: Callable[[_messages.Stubs, float | None], Any], feed: _Feed | None, timeout: Any) -> Results:
        attempts = self._attempts(timeout)
        # Raises what there is to raise of a client that is closed, or used outside of a loop.
        grpc, _ = self._stubs()

        async def opened() -> Any:
            try:
                _, stubs = await self._reached(attempts)
            except Exception as error:
                return error
            return _grpc.own(begin(stubs, attempts.left()))

        return Results(grpc, asyncio.ensure_future(opened()), feed, self._settings.target)

    async def _reached(self, attempts: Attempts) -> tuple[Any, _messages.Stubs]:
        """Waits until there is a server, before a stream takes items that could not be taken again."""
        while True:
            grpc, stubs = self._stubs()
            try:
                await _answer(_grpc.own(stubs.probe(b"", timeout=attempts.left())))
            except grpc.RpcError as failed:
                error = self._error_of(failed)
                if error.reason == NO_CONNECTION:
                    pause = attempts.pause(error)
                    if pause is None:
                        raise error from error.__cause__
                    await asyncio.sleep(pause)
                    if self._closed:
                        raise closed("client")
                    continue
            # If the time is over the stream says so.
            self._outage.ends()
            return grpc, stubs

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
            channel = _grpc.own(grpc.aio.insecure_channel(self._settings.target, self._settings.channel_options()))
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
            raise closed(what) from None
        raise


class Results(AsyncIterator[Result]):
    """A stream of results. It ends itself; leave it early with `close`, or by `async with`."""

    def __init__(self, grpc: Any, opening: asyncio.Future[Any], feed: _Feed | None, target: str) -> None:
        self._grpc = grpc
        # Its result is the call, or why there is none.
        self._opening = opening
        self._feed = feed
        self._target = target
        self._generation = _grpc.generation()
        self._pid = os.getpid()

    async def __anext__(self) -> Result:
        if self._generation != _grpc.generation():
            raise ForkError(self._pid)
        call = await self._opened()
        try:
            with _told_from_a_cancel(call, "stream"):
                message = await call.read()
        except self._grpc.RpcError as failed:
            error = error_of(failed, self._target)
            raise error from error.__cause__
        if message is self._grpc.aio.EOF:
            if self._feed is not None:
                self._feed.check()
            raise StopAsyncIteration
        return result_of(message)

    async def _opened(self) -> Any:
        if not self._opening.done():
            # Also if it is cancelled. A cancel of this task is that, and leaves the stream open.
            await asyncio.wait([self._opening])
        if self._opening.cancelled():
            raise closed("stream")
        call = self._opening.result()
        if isinstance(call, Exception):
            raise call
        return call

    async def close(self) -> None:
        """Cancels the stream, and what of its items is not done. In another process it does nothing."""
        if self._generation == _grpc.generation() and not self._opening.cancel() and not self._opening.cancelled():
            call = self._opening.result()
            if not isinstance(call, Exception):
                call.cancel()

    async def __aenter__(self) -> Results:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Feed:
    """Items on their way into a stream. An error of theirs ends the stream and waits to be raised where its results
    are read."""

    def __init__(self, items: Items, pool: str, subscription: str = "") -> None:
        self._items = items_of(items, (Iterable, AsyncIterable))
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
