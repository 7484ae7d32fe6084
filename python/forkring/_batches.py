"""A worker whose handler takes many items at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Optional

from forkring._codes import Code
from forkring._core import Item, Worker
from forkring._errors import Abort, Described, describe


def run(handler: Callable[[list[Item]], Any], size: int, delay: float) -> None:
    """Until the server stops."""
    worker = Worker()
    while items := worker.gather(size, delay):
        failures: list[Optional[Described]]
        try:
            failures = _handle(worker, handler, items)
        except BaseException as error:
            failures = [describe(error)] * len(items)
        # Not before what the handler returned or raised is gone: views of payloads may be in it.
        for item, failure in zip(items, failures):
            worker.end(item, failure)


def _handle(worker: Worker, handler: Callable[[list[Item]], Any], items: list[Item]) -> list[Optional[Described]]:
    """What each item failed of, if it did; the results of the others are written."""
    # A list of its own: it may take items out of it.
    returned = handler(list(items))
    if isinstance(returned, (str, bytes, bytearray, memoryview, dict)) or not isinstance(returned, Iterable):
        raise _bad(f"`{type(returned).__name__}`", items)
    results = list(returned)
    if len(results) != len(items):
        raise _bad(f"{len(results)} results", items)
    return [_settle(worker, item, result) for item, result in zip(items, results)]


def _settle(worker: Worker, item: Item, result: Any) -> Optional[Described]:
    if isinstance(result, BaseException):
        return describe(result)
    try:
        worker.write(item, result, True)
    except Exception as error:
        return describe(error)
    return None


def _bad(what: str, items: list[Item]) -> Abort:
    message = f"the handler returned {what} for a batch of {len(items)}: return a list with a result for each item"
    return Abort(Code.INTERNAL, message, "BAD_RESULT")
