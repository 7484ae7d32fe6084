"""What goes into the clients and comes out of them, and how it becomes a message and an error."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from forkring import _messages
from forkring._codes import Code

Sendable = bytes | bytearray | memoryview | str | Any
"""What can be sent: any object with a buffer (a numpy array, for one), or text, which becomes UTF-8."""

_Items = TypeVar("_Items")

# Of the client itself, if the caller's options do not say otherwise.
DEFAULTS = (
    # The server's own limit is what should bind.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A server that restarts is back within a second, not after a minute's pause.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Each client its own connection: what one closes is not another's.
    ("grpc.use_local_subchannel_pool", 1),
)

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0
# How gRPC says that a call never left this process. It fails safe: if the words change, nothing is sent twice.
_NEVER_SENT = ("failed to connect to all addresses", "DNS resolution failed")


class Work:
    """An item for `submit` and `process` that is more than its payload.

    What is not given: `id` is the item's place among all, from 0; `pool` is the client's.
    """

    __module__ = "forkring"
    __slots__ = ("id", "metadata", "payload", "pool", "priority", "timeout")

    def __init__(
        self,
        payload: Sendable,
        *,
        id: int | None = None,
        pool: str | None = None,
        metadata: Mapping[str, str] | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> None:
        self.payload = payload
        self.id = id
        self.pool = pool
        self.metadata = metadata
        self.priority = priority
        self.timeout = timeout


class Timing(NamedTuple):
    """Where an item's time went, in seconds."""

    queued: float
    """From acceptance until a worker took the item."""
    worked: float
    """From then until the handler was done."""
    returned: float
    """From then until the server began to send the result."""


class Error(Exception):
    """Why an item, or a stream, failed. If the server did not say so itself, gRPC's own error is the `__cause__`."""

    # What a traceback calls it is what a program can write.
    __module__ = "forkring"

    code: Code
    reason: str
    """For programs, such as `HANDLER_FAILED`. Empty if it is not from the server."""
    message: str
    traceback: str
    """Where in the handler, if it said."""
    retry_delay: float | None
    """The server took nothing, and it helps to try again after so many seconds; `None`: it did not say so."""

    def __init__(
        self, code: Code, reason: str, message: str, *, traceback: str = "", retry_delay: float | None = None
    ) -> None:
        super().__init__(code, reason, message)
        self.code = code
        self.reason = reason
        self.message = message
        self.traceback = traceback
        self.retry_delay = retry_delay
        if traceback:
            # Shown below the message where nobody catches it.
            self.add_note(traceback)

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason not in ("", self.code.name) else ""
        return f"{self.code.name}{reason}: {self.message}" if self.message else f"{self.code.name}{reason}"


class ForkError(Error):
    """A stream of another process was used."""

    __module__ = "forkring.client"

    def __init__(self, pid: int) -> None:
        message = f"this stream belongs to process {pid}; open a new one after fork, this is process {os.getpid()}"
        super().__init__(Code.FAILED_PRECONDITION, "FORKED", message)

    def __reduce__(self) -> Any:
        return Error, (self.code, self.reason, self.message)


class Result(NamedTuple):
    """The outcome of one item."""

    id: int
    payload: bytes
    """What the handler wrote; empty if it failed."""
    error: Error | None
    timing: Timing
    attempts: int
    """How many times the item was given to a worker: 1 unless a worker died of it."""
    worker: int
    """The number of the worker that completed it."""
    partial: bool = False
    """Of `process` only: there is more to come of the item, and this is what its handler sent so far."""
    sequence: int = 0
    """How many partial results came before. If it begins anew, with `attempts` higher, a worker died: forget those."""

    @property
    def ok(self) -> bool:
        """Whether the handler succeeded."""
        return self.error is None


class Rejection(NamedTuple):
    """A submitted item that was refused. It has no result."""

    id: int
    error: Error


class Receipt(NamedTuple):
    """What became of a `submit`."""

    accepted: int
    """Items that are in shared memory: each of them will have a result."""
    rejected: int
    rejections: tuple[Rejection, ...]
    """The first of the rejected, up to 32."""


# HOST:PORT, or one of gRPC's own names. With no port, gRPC would dial 443.
_TARGET = re.compile(r"(unix|unix-abstract|vsock):.+|((dns|ipv4|ipv6|xds):.+|\[[^\[\]]+\]|[^:/\[\]]+):[0-9]{1,5}")


def target_of(target: str) -> str:
    """The address as gRPC wants it; `http://` is what the command line says too. Raises ValueError if it is none."""
    address = target[len("http://") :].rstrip("/") if target.startswith("http://") else target
    if not _TARGET.fullmatch(address):
        raise ValueError(f"`{target}` is not an address: give HOST:PORT or http://HOST:PORT")
    return address


def bytes_of(payload: Sendable) -> bytes:
    """The payload as a message can hold it: bytes as they are, all else copied."""
    if isinstance(payload, bytes):
        return payload
    if isinstance(payload, str):
        return payload.encode()
    try:
        view = memoryview(payload)
    except TypeError:
        raise TypeError(f"a payload is bytes, str or a buffer, not {type(payload).__name__}") from None
    if "O" in view.format:
        raise TypeError("a payload is no array of Python objects: give it a number type")
    return view.tobytes()


def items_of(items: _Items) -> _Items:
    """The items of a stream, unless they are a payload: of one that is iterable each character or byte would be an item."""
    if isinstance(items, (str, bytes, bytearray, memoryview, Work)):
        raise TypeError("items is an iterable of payloads: write [payload]")
    return items


def item_of(work: Any, index: int, pool: str, subscription: str = "") -> Any:
    """The message of a `Work` or a bare payload."""
    if not isinstance(work, Work):
        work = Work(work)
    item = _messages.WorkItem(
        pool=pool if work.pool is None else work.pool,
        payload=bytes_of(work.payload),
        id=index if work.id is None else work.id,
        metadata=work.metadata or {},
        priority=work.priority,
        subscription=subscription,
    )
    if work.timeout is not None:
        item.timeout.seconds, item.timeout.nanos = divmod(round(work.timeout * 1e9), 10**9)
    return item


def result_of(message: Any) -> Result:
    timing = message.timing
    return Result(
        id=message.id,
        payload=message.payload,
        error=_error_of_status(message.status) if message.HasField("status") and message.status.code else None,
        timing=Timing(timing.queued_ns / 1e9, timing.worked_ns / 1e9, timing.returned_ns / 1e9),
        attempts=message.attempts,
        worker=message.worker,
        partial=message.partial,
        sequence=message.sequence,
    )


def receipt_of(message: Any) -> Receipt:
    rejections = tuple(Rejection(one.id, _error_of_status(one.status)) for one in message.rejections)
    return Receipt(message.accepted, message.rejected, rejections)


def _code(number: int) -> Code:
    try:
        return Code(number)
    except ValueError:
        return Code.UNKNOWN


def _error_of_status(status: Any) -> Error:
    return Error(_code(status.code), status.reason, status.message, traceback=status.traceback)


def error_of(failed: Any) -> Error:
    """The error of a `grpc.RpcError`, to be raised `from` its `__cause__`.

    That is gRPC's own where it adds something. Of what the server said it would only bury the message.
    """
    reason, traceback, delay = "", "", None
    for key, value in failed.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in _messages.StatusDetails.FromString(value).details:
                kind = detail.type_url.rpartition("/")[2]
                if kind == "google.rpc.ErrorInfo":
                    reason = _messages.ErrorInfo.FromString(detail.value).reason
                elif kind == "google.rpc.RetryInfo":
                    pause = _messages.RetryInfo.FromString(detail.value).retry_delay
                    delay = pause.seconds + pause.nanos / 1e9
                elif kind == "google.rpc.DebugInfo":
                    traceback = "\n".join(_messages.DebugInfo.FromString(detail.value).stack_entries)
    error = Error(Code[failed.code().name], reason, failed.details() or "", traceback=traceback, retry_delay=delay)
    error.__cause__ = None if reason else failed
    return error


class Retries:
    """When a call may be tried again. One object serves one call.

    Only what was certainly not accepted is tried again: what the server refused with a hint when to come back, and what
    gRPC could not even send. A connection that broke may have carried the item to a worker: only an idempotent item is
    sent again then.
    """

    def __init__(self, most: int, idempotent: bool) -> None:
        self._most = most
        self._idempotent = idempotent
        self._made = 0

    def pause(self, error: Error) -> float | None:
        """For how long to wait before the next attempt; `None`: there is none."""
        hint = error.retry_delay
        if hint is None and error.code is Code.UNAVAILABLE and not error.reason:
            if self._idempotent or error.message.startswith(_NEVER_SENT):
                hint = _FIRST_PAUSE
        if hint is None or self._made >= self._most:
            return None
        pause = min(hint * 2.0**self._made, max(hint, _LONGEST_PAUSE))
        self._made += 1
        # Clients that were refused together are not to come back together.
        return pause * random.uniform(1, 1.5)
