"""The blocking client.

    with forkring.Client("127.0.0.1:50051", pool="sha256") as client:
        print(client.call(b"some bytes").payload)

A client may be made before a fork and used after it, in the parent and in the child, also while other threads use it,
and whatever `GRPC_ENABLE_FORK_SUPPORT` says: its connection is made when it is first needed, once for each process
(`forkring._grpc` says how). A stream belongs to the process that opened it; another gets `ForkError`. A client may also
be pickled, as multiprocessing's `spawn` and `forkserver` do with arguments.

It is safe to share among threads.

A client may be made, and used, before its server is there. A call that finds no server waits for one, up to the client's
`connect_timeout` and its own `timeout`, and goes on within some 100 ms of the server's start; so does the opening of a stream.
After a second of that the logger `forkring` has a warning. If none comes the error is UNAVAILABLE, reason NO_CONNECTION.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from forkring import _grpc, _messages
from forkring._arguments import seconds, text, whole
from forkring._attempts import Attempts, Outage, Settings, settings_of
from forkring._codes import Code
from forkring._types import (
    NO_CONNECTION,
    Error,
    ForkError,
    Receipt,
    Rejection,
    Result,
    Sendable,
    Timing,
    Work,
    closed,
    error_of,
    item_of,
    items_of,
    receipt_of,
    result_of,
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

Options = Sequence[tuple[str, Any]]


class Client:
    """A client of the server at `target`, `HOST:PORT`.

    `pool` is for items that name none. `retries` is how often `call` tries again what the server refused with a hint when to
    come back; with `idempotent=True` it also does after a connection broke, when the item may have run already.
    `connect_timeout`, in seconds, is how long a call waits for a server that is not there, if its own timeout is not over
    before; 0: not at all, None: as long as it takes. `options` are channel arguments of gRPC.
    """

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
        self._made: tuple[int, Any, _messages.Stubs] | None = None
        self._closed = False

    def call(
        self,
        payload: Sendable,
        *,
        pool: str | None = None,
        id: int = 0,
        metadata: Mapping[str, str] | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Result:
        """One item in, its result out; a failed item raises `Error`.

        `timeout`, in seconds, is for all of it: when it is over the item is cancelled, also while it runs.
        """
        work = Work(payload, id=id, pool=pool, metadata=metadata, priority=priority)
        item = item_of(work, 0, self._settings.pool)
        attempts = self._attempts(timeout)
        while True:
            grpc, stubs = self._stubs()
            try:
                message = self._begin(stubs.call, item, attempts)
            except grpc.RpcError as failed:
                error = self._error_of(failed)
            else:
                self._outage.ends()
                return result_of(message)
            pause = attempts.pause(error)
            if pause is None:
                raise error
            time.sleep(pause)
            if self._closed:
                raise closed("client")

    def submit(
        self,
        items: Iterable[Work | Sendable],
        *,
        subscription: str = "",
        timeout: float | None = None,
    ) -> Receipt:
        """Many items in, one receipt out; the results go to `updates`.

        `items` is read by another thread, as fast as the server takes them. If it raises, what it gave before is
        submitted, and what it raised is raised here.
        """
        feed = _Feed(items, self._settings.pool, text("subscription", subscription))
        attempts = self._attempts(timeout)
        grpc, stubs = self._reached(attempts)
        try:
            receipt = receipt_of(self._begin(stubs.submit, feed, attempts))
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
        attempts = self._attempts(timeout)
        _, stubs = self._reached(attempts)
        return Results(self._begin(stubs.updates, request, attempts), None, self._settings.target)

    def process(self, items: Iterable[Work | Sendable], *, timeout: float | None = None) -> Results:
        """Items in, results out, both at once; results come as they are done, match them by `id`.

        `items` is read by another thread, as fast as results are read. If it raises, the results of what it gave before
        still come, and then what it raised.
        """
        feed = _Feed(items, self._settings.pool)
        attempts = self._attempts(timeout)
        _, stubs = self._reached(attempts)
        return Results(self._begin(stubs.process, feed, attempts), feed, self._settings.target)

    def close(self) -> None:
        """Closes this process's connection and cancels what runs on it. Other processes keep theirs."""
        self._closed = True
        made, self._made = self._made, None
        if made is not None and made[0] == _grpc.generation():
            made[2].channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<forkring.Client of {self._settings.target}>"

    def __reduce__(self) -> Any:
        return _remade, (type(self), self._settings)

    def _attempts(self, timeout: Any) -> Attempts:
        return Attempts(self._settings, self._outage, seconds("timeout", timeout, "no limit"))

    def _error_of(self, failed: Any) -> Error:
        return error_of(failed, self._settings.target)

    def _begin(self, method: Callable[..., Any], request: Any, attempts: Attempts) -> Any:
        """Invokes a method of the stubs, and raises an `Error` if another thread has closed the client meanwhile."""
        try:
            return method(request, timeout=attempts.left())
        except ValueError:
            # gRPC refuses a call on a closed channel with it.
            if self._closed:
                raise closed("client") from None
            raise

    def _reached(self, attempts: Attempts) -> tuple[Any, _messages.Stubs]:
        """Waits until there is a server, before a stream takes items that could not be taken again."""
        while True:
            grpc, stubs = self._stubs()
            try:
                self._begin(stubs.probe, b"", attempts)
            except grpc.RpcError as failed:
                error = self._error_of(failed)
                # The probe also fails if another thread closes the client, and then there is no channel for the stream.
                if self._closed:
                    raise closed("client") from None
                if error.reason == NO_CONNECTION:
                    pause = attempts.pause(error)
                    if pause is None:
                        raise error from error.__cause__
                    time.sleep(pause)
                    if self._closed:
                        raise closed("client")
                    continue
            # If the time is over the stream says so.
            self._outage.ends()
            return grpc, stubs

    def _stubs(self) -> tuple[Any, _messages.Stubs]:
        made = self._made
        if made is None or made[0] != _grpc.generation():
            with _grpc.lock():
                made = self._made
                if made is None or made[0] != _grpc.generation():
                    if self._closed:
                        raise RuntimeError("this client is closed: make a new one")
                    grpc = _grpc.load()
                    channel = _grpc.own(grpc.insecure_channel(self._settings.target, self._settings.channel_options()))
                    made = self._made = (_grpc.generation(), grpc, _messages.Stubs(channel))
        return made[1], made[2]


def _remade(kind: Any, settings: Settings) -> Any:
    return kind(**settings._asdict())


class Results(Iterator[Result]):
    """A stream of results. It ends itself; leave it early with `close`, or by `with`."""

    def __init__(self, call: Any, feed: _Feed | None, target: str) -> None:
        self._call = _grpc.own(call)
        self._feed = feed
        self._target = target
        self._generation = _grpc.generation()
        self._pid = os.getpid()

    def __next__(self) -> Result:
        if self._generation != _grpc.generation():
            raise ForkError(self._pid)
        try:
            return result_of(next(self._call))
        except StopIteration:
            if self._feed is not None:
                self._feed.check()
            raise
        except _grpc.load().RpcError as failed:
            error = error_of(failed, self._target)
            raise error from error.__cause__

    def close(self) -> None:
        """Cancels the stream, and what of its items is not done. In another process it does nothing."""
        if self._generation == _grpc.generation():
            self._call.cancel()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Feed(Iterator[Any]):
    """Items on their way into a stream. An error of theirs ends the stream and waits to be raised where its results
    are read: gRPC, which reads this in a thread of its own, would only log it."""

    def __init__(self, items: Iterable[Any], pool: str, subscription: str = "") -> None:
        self._items = iter(items_of(items))
        self._index = -1
        self._pool = pool
        self._subscription = subscription
        self._error: BaseException | None = None

    def __next__(self) -> Any:
        try:
            work = next(self._items)
            self._index += 1
            return item_of(work, self._index, self._pool, self._subscription)
        except StopIteration:
            raise
        except BaseException as error:
            self._error = error
            raise StopIteration from None

    def check(self) -> None:
        """Raises what the items raised, if they did."""
        if self._error is not None:
            raise self._error
