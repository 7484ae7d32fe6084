"""The blocking client.

    with forkring.Client("127.0.0.1:50051", pool="sha256") as client:
        print(client.call(b"some bytes").payload)

A client may be made before a fork and used after it, in the parent and in the child, also while other threads use it,
and whatever `GRPC_ENABLE_FORK_SUPPORT` says: its connection is made when it is first needed, once for each process
(`forkring._grpc` says how). A stream belongs to the process that opened it; another gets `ForkError`. A client may also
be pickled, as multiprocessing's `spawn` and `forkserver` do with arguments.

It is safe to share among threads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from forkring import _grpc, _messages
from forkring._codes import Code
from forkring._types import (
    DEFAULTS,
    Error,
    ForkError,
    Receipt,
    Rejection,
    Result,
    Retries,
    Sendable,
    Timing,
    Work,
    error_of,
    item_of,
    items_of,
    receipt_of,
    result_of,
    target_of,
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

    `pool` is for items that name none. `retries` is how often `call` tries again what was certainly not accepted; with
    `idempotent=True` it also does after a connection broke, when the item may have run already. `options` are channel
    arguments of gRPC.
    """

    def __init__(
        self, target: str, *, pool: str = "", retries: int = 10, idempotent: bool = False, options: Options = ()
    ) -> None:
        self._target = target_of(target)
        self._pool = pool
        self._retries = retries
        self._idempotent = idempotent
        self._options = tuple(options)
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
        item = item_of(Work(payload, pool=pool, metadata=metadata, priority=priority), id, self._pool)
        end = None if timeout is None else time.monotonic() + timeout
        retries = Retries(self._retries, self._idempotent)
        while True:
            grpc, stubs = self._stubs()
            try:
                return result_of(stubs.call(item, timeout=None if end is None else end - time.monotonic()))
            except grpc.RpcError as failed:
                error = error_of(failed)
            pause = retries.pause(error)
            if pause is None or (end is not None and time.monotonic() + pause >= end):
                raise error
            time.sleep(pause)

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
        grpc, stubs = self._stubs()
        feed = _Feed(items, self._pool, subscription)
        try:
            receipt = receipt_of(stubs.submit(feed, timeout=timeout))
        except grpc.RpcError as failed:
            error = error_of(failed)
            raise error from error.__cause__
        feed.check()
        return receipt

    def updates(self, subscription: str = "", *, limit: int = 0, timeout: float | None = None) -> Results:
        """The results of submitted items as they are done; ends after `limit` of them, unless that is 0, and when the
        server shuts down."""
        _, stubs = self._stubs()
        request = _messages.GetUpdatesRequest(subscription=subscription, limit=limit)
        return Results(stubs.updates(request, timeout=timeout), None)

    def process(self, items: Iterable[Work | Sendable], *, timeout: float | None = None) -> Results:
        """Items in, results out, both at once; results come as they are done, match them by `id`.

        `items` is read by another thread, as fast as results are read. If it raises, the results of what it gave before
        still come, and then what it raised.
        """
        _, stubs = self._stubs()
        feed = _Feed(items, self._pool)
        return Results(stubs.process(feed, timeout=timeout), feed)

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

    def __reduce__(self) -> Any:
        return _remade, (type(self), self._target, self._pool, self._retries, self._idempotent, self._options)

    def _stubs(self) -> tuple[Any, _messages.Stubs]:
        made = self._made
        if made is None or made[0] != _grpc.generation():
            with _grpc.lock():
                made = self._made
                if made is None or made[0] != _grpc.generation():
                    if self._closed:
                        raise RuntimeError("this client is closed: make a new one")
                    grpc = _grpc.load()
                    channel = _grpc.own(grpc.insecure_channel(self._target, [*DEFAULTS, *self._options]))
                    made = self._made = (_grpc.generation(), grpc, _messages.Stubs(channel))
        return made[1], made[2]


def _remade(kind: Any, target: str, pool: str, retries: int, idempotent: bool, options: Options) -> Any:
    return kind(target, pool=pool, retries=retries, idempotent=idempotent, options=options)


class Results(Iterator[Result]):
    """A stream of results. It ends itself; leave it early with `close`, or by `with`."""

    def __init__(self, call: Any, feed: _Feed | None) -> None:
        self._call = _grpc.own(call)
        self._feed = feed
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
            error = error_of(failed)
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
