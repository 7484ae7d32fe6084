"""A worker whose handler is `async def`: many items at once, on one event loop.

The loop watches the worker's bell and nothing else of ours: there is no thread and no timer, but for items with a
deadline. The bell rings only for who is armed, so the order is always the same: forget the rings so far, take what there
is to take, arm, and only then look at whatever is waited for. What comes after the look rings.
"""

from __future__ import annotations

import asyncio
import importlib
import select
import sys
from collections.abc import Callable
from typing import Any, Optional

from forkring._codes import Code
from forkring._core import Item, Worker
from forkring._end import MOMENT, end
from forkring._errors import Abort, Described, describe, format_traceback

# As long as other workers wait for room for a result.
_PATIENCE = 5.0


def run(handler: Callable[[Item], Any], yields: bool, most: int) -> None:
    """Until the server stops."""
    # It is not closed: it would wait for all tasks and threads of the handler's, however long they take.
    runner = asyncio.Runner(loop_factory=_loop_factory())
    try:
        runner.run(_Worker(handler, yields, most).run())
    except BaseException as error:
        # At once, for its items are another's: if asyncio cleaned up they would fail of being cancelled.
        print(format_traceback(error), file=sys.stderr)
        end(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
    loop = runner.get_loop()
    loop.run_until_complete(asyncio.Task(_finish(), loop=loop))


async def _finish() -> None:
    """What tasks of the handler's own are left hear that this is the end."""
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    if rest:
        done, _ = await asyncio.wait(rest, timeout=MOMENT)
        for task in done:
            if not task.cancelled() and (error := task.exception()) is not None:
                print(format_traceback(error), file=sys.stderr)


def _loop_factory() -> Optional[Callable[[], asyncio.AbstractEventLoop]]:
    try:
        factory: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
    except ImportError:
        return None
    return factory


class _Open:
    """What belongs to an item that is open."""

    __slots__ = ("is_closing", "is_told", "task", "timer")

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task
        self.timer: Optional[asyncio.TimerHandle] = None
        self.is_told = False
        # What is left of its handler is told by other means.
        self.is_closing = False

    def cancel(self) -> None:
        """Once: a handler may finish all the same."""
        if not self.is_told:
            self.is_told = True
            # Not at once: of a task that has not begun nothing would run, and the item would never end.
            self.task.get_loop().call_soon(self._cancel)

    def _cancel(self) -> None:
        if not self.is_closing:
            self.task.cancel()


class _Worker:
    def __init__(self, handler: Callable[[Item], Any], yields: bool, most: int) -> None:
        self._handler = handler
        self._outcome = self._stream if yields else self._call
        self._most = most
        self._native = Worker()
        self._open: dict[Item, _Open] = {}
        self._waiting: list[asyncio.Future[None]] = []
        self._looks_soon = False
        self._hands_full = False

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.Future[None] = self._loop.create_future()
        # Between the bell and the loop: uvloop makes what it watches non-blocking, also for those who share the bell.
        with select.epoll() as bell:
            bell.register(self._native.fileno(), select.EPOLLIN)
            self._loop.add_reader(bell.fileno(), self._look)
            try:
                self._look()
                await self._end
            finally:
                self._loop.remove_reader(bell.fileno())

    def _look(self) -> None:
        """Looks at all that the bell rings for."""
        self._looks_soon = False
        if self._end.done():
            return
        try:
            while True:
                self._native.disarm()
                while len(self._open) < self._most and (item := self._native.take()) is not None:
                    self._begin(item)
                if self._native.stopping and not self._open:
                    return self._end.set_result(None)
                self._hands_full = len(self._open) >= self._most
                if self._native.arm(not self._hands_full):
                    break
        except Exception as error:
            return self._end.set_exception(error)
        for item, open in self._open.items():
            if item.cancelled:
                open.cancel()
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.done():
                one.set_result(None)

    def _look_soon(self) -> None:
        """Once for all items that end in one turn of the loop."""
        if not self._looks_soon:
            self._looks_soon = True
            self._loop.call_soon(self._look)

    def _begin(self, item: Item) -> None:
        # Not by the loop, which the handler's module may have told to begin tasks at once: this one must know its place.
        open = self._open[item] = _Open(asyncio.Task(self._handle(item), loop=self._loop))
        if item.deadline is not None:
            self._time(item, open)

    def _time(self, item: Item, open: _Open) -> None:
        """Cancels it when its time is over, which by the loop's clock may be a little early."""
        left = item.remaining()
        if left:
            open.timer = self._loop.call_later(max(left, 0.001), self._time, item, open)
        else:
            open.cancel()

    async def _handle(self, item: Item) -> None:
        failure = None
        try:
            await self._outcome(item)
        except BaseException as error:
            failure = self._failure(item, error)
        # Not before what the handler returned or raised is gone: views of the payload may be in it.
        self._native.end(item, failure)
        open = self._open.pop(item)
        if open.timer is not None:
            open.timer.cancel()
        # Its memory is another's, if it failed; nobody rings for that.
        if self._hands_full or self._waiting or (self._native.stopping and not self._open):
            self._look_soon()

    async def _call(self, item: Item) -> None:
        await self._put(self._native.write, item, await self._handler(item), _PATIENCE)

    async def _stream(self, item: Item) -> None:
        # A client that reads them is waited for, however slow it is.
        patience = None if self._native.streams(item) else _PATIENCE
        parts = self._handler(item)
        try:
            async for part in parts:
                await self._put(self._native.send, item, part, patience)
                # Others have their turn, and a cancel is heard of.
                await asyncio.sleep(0)
        except BaseException:
            # A cancel would break off what the generator does in the end.
            self._open[item].is_closing = True
            raise
        finally:
            await parts.aclose()
        await self._put(self._native.write, item, None, patience)

    async def _put(
        self, put: Callable[[Item, Any], bool], item: Item, value: Any, patience: Optional[float]
    ) -> None:
        """Sends or writes a value, when there is credit and room."""
        if put(item, value):
            return
        # What there is of it has stepped aside, and may have been in another's way.
        self._look_soon()
        try:
            async with asyncio.timeout(patience):
                while not put(item, value):
                    rung = self._loop.create_future()
                    self._waiting.append(rung)
                    await rung
        except TimeoutError:
            message = "there is no room for the result: the worker's earlier results are not fetched (--arena)"
            raise Abort(Code.RESOURCE_EXHAUSTED, message, "RESULTS_FULL") from None

    def _failure(self, item: Item, error: BaseException) -> Described:
        open = self._open[item]
        if not (isinstance(error, asyncio.CancelledError) and open.is_told):
            return describe(error)
        if item.remaining() == 0:
            code, message = Code.DEADLINE_EXCEEDED, "the item's deadline has passed"
        else:
            code, message = Code.CANCELLED, "the item was cancelled by its client"
        return int(code), code.name, message, ""
