"""The forms that a handler may have, and how a worker of each form works."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from forkring import _core
from forkring._arguments import seconds, whole
from forkring._errors import describe

_BATCH = "__forkring_batch__"
_CONCURRENCY = "__forkring_concurrency__"
_DEFAULT_CONCURRENCY = 64
# The limit of items in a server, which is more than a server has by default.
MOST_ITEMS = 2**20

Handler = TypeVar("Handler", bound=Callable[..., Any])


class BadForm(Exception):
    """Says of a handler, whose name comes before it, what is wrong."""


class _Batch(NamedTuple):
    size: int
    delay: float


def batch(max_size: int = 32, max_delay: float = 0.002) -> Callable[[Handler], Handler]:
    """The handler takes a list of up to `max_size` items and returns a list of as many results.

    A result that is an exception, such as a `forkring.Abort`, is that item's error; what the handler raises is
    every item's. The first item of a batch waits for others at most `max_delay` seconds, and not at all if as many are
    there. It is for functions, methods and classes with a `__call__`.
    """
    if callable(max_size):
        raise TypeError("batch() takes the most items of a batch: write @forkring.batch(), with brackets")
    size = whole("max_size", max_size, 1, MOST_ITEMS)
    delay = seconds("max_delay", max_delay)
    return _marks(_BATCH, _Batch(size, math.inf if delay is None else delay))


def concurrency(most: int) -> Callable[[Handler], Handler]:
    """A worker has up to `most` items of this `async def` handler open at once; without this they are 64."""
    if callable(most):
        raise TypeError("concurrency() takes the most items at once: write @forkring.concurrency(8)")
    return _marks(_CONCURRENCY, whole("most", most, 1, MOST_ITEMS))


def _marks(name: str, value: object) -> Callable[[Handler], Handler]:
    def mark(handler: Handler) -> Handler:
        setattr(handler, name, value)
        return handler

    return mark


def takes_a_batch(target: Any) -> bool:
    """Whether a handler, or the class of one, takes a list of items."""
    return _mark(target, _BATCH) is not None


def _mark(target: Any, name: str) -> Any:
    # A class may say it of itself, and of its `__call__`.
    own = getattr(target, name, None)
    return own if own is not None else getattr(getattr(target, "__call__", None), name, None)


def worker_of(target: Any, function: Any) -> Callable[[Any], None]:
    """How a worker works that has this handler, which is named by `target` and called by `function`. Raises BadForm."""
    sort, is_async, yields = _sort(function)
    size, most = _mark(target, _BATCH), _mark(target, _CONCURRENCY)
    if size is not None:
        if sort:
            raise BadForm(f"has @forkring.batch and is {sort}: one for batches is a plain function that returns a list")
        return lambda handler: _run_batches(handler, size)
    if most is not None and not is_async:
        raise BadForm("has @forkring.concurrency and is no `async def`: a worker calls it with one item after the other")
    if is_async:
        return lambda handler: _run_async(handler, yields, most or _DEFAULT_CONCURRENCY)
    return lambda handler: _core.run(handler, yields, describe)


def _sort(function: Any) -> tuple[str, bool, bool]:
    """What it is if it is no plain function, and whether it is asynchronous and yields."""
    if inspect.isasyncgenfunction(function):
        return "an async generator", True, True
    if inspect.iscoroutinefunction(function):
        return "a coroutine function", True, False
    if inspect.isgeneratorfunction(function):
        return "a generator", False, True
    return "", False, False


# Imported when they are needed: most workers have no event loop.
def _run_async(handler: Any, yields: bool, most: int) -> None:
    from forkring import _loop

    _loop.run(handler, yields, most)


def _run_batches(handler: Any, batch: _Batch) -> None:
    from forkring import _batches

    _batches.run(handler, batch.size, batch.delay)
