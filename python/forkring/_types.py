"""What goes into the clients and comes out of them, and how it becomes a message and an error."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from forkring import _messages
from forkring._arguments import seconds, shown, text, texts, typed, whole
from forkring._codes import Code

Sendable = bytes | bytearray | memoryview | str | Any
"""What can be sent: any object with a buffer (a numpy array, for one), or text, which becomes UTF-8."""

_Items = TypeVar("_Items")

NO_CONNECTION = "NO_CONNECTION"
"""The reason of a call that never left this process."""
CONNECTION_LOST = "CONNECTION_LOST"
"""The reason of a call whose connection broke."""

# How gRPC says that a call never left this process. It fails safe: if the words change, nothing is sent twice.
_NEVER_SENT = ("failed to connect to all addresses", "DNS resolution failed", "errors resolving ")


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

    def __repr__(self) -> str:
        given = (f"{name}={shown(value)}" for name in sorted(self.__slots__) if (value := getattr(self, name)) is not None)
        return f"forkring.Work({', '.join(given)})"


class Timing(NamedTuple):
    """Where an item's time went, in seconds."""

    queued: float
    """From acceptance until a worker took the item."""
    worked: float
    """From then until the handler was done."""
    returned: float
    """From then until the server began to send the result."""


class Error(Exception):
    """Why an item, or a stream, failed.

    The client's own reasons are DEADLINE_EXCEEDED, CANCELLED, NO_CONNECTION (nothing was sent) and CONNECTION_LOST (what was
    sent may have been done). Where gRPC's own error adds something, as with the last one and where there is no reason, it is
    the `__cause__`.
    """

    # What a traceback calls it is what a program can write.
    __module__ = "forkring"

    code: Code
    reason: str
    """For programs, such as `HANDLER_FAILED`. Empty if what failed the call gave none, as a proxy or another server."""
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


def closed(what: str) -> Error:
    """Returns the error of a call whose stream or client is closed by another thread or task."""
    return Error(Code.CANCELLED, Code.CANCELLED.name, f"the {what} was closed")


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
_TARGET = re.compile(
    r"(unix|unix-abstract|vsock):.+|((dns|ipv4|ipv6|xds):.+|\[[^\[\]]+\]|[^:/\[\]]+):(?P<port>[0-9]{1,5})"
)


def target_of(target: Any) -> str:
    """Returns the address as gRPC wants it; `http://` is what the command line says too. Raises TypeError or ValueError if
    it is none."""
    allowed = "give HOST:PORT or http://HOST:PORT, with a port from 1 to 65535"
    if not isinstance(target, str):
        raise TypeError(f"{typed(target)} is not an address: {allowed}")
    address = target[len("http://") :].rstrip("/") if target.startswith("http://") else target
    found = _TARGET.fullmatch(address)
    if not found or (found["port"] and not 1 <= int(found["port"]) <= 65535):
        raise ValueError(f"`{target}` is not an address: {allowed}")
    return address


def bytes_of(payload: Sendable) -> bytes:
    """Returns the payload as a message can hold it: bytes as they are, all else copied."""
    if isinstance(payload, bytes):
        _check_size(len(payload))
        return payload
    if isinstance(payload, str):
        try:
            return payload.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a payload of text is sent as UTF-8, and this cannot be: {error.reason}, at {error.start}") from None
    try:
        view = memoryview(payload)
    except TypeError:
        raise TypeError(f"a payload is bytes, str or a buffer, not {type(payload).__name__}: {shown(payload)}") from None
    except (BufferError, ValueError) as error:
        raise ValueError(f"a payload of type {type(payload).__name__} cannot be read: {error}") from None
    if "O" in view.format:
        raise TypeError("a payload is no array of Python objects: give it a number type")
    _check_size(view.nbytes)
    return view.tobytes()


def _check_size(size: int) -> None:
    # The limit that matters is the server's; beyond this one there is no message to refuse.
    if size > _LARGEST:
        raise ValueError(f"a payload has {size} bytes: a message holds at most {_LARGEST} (2 GiB less 64 KiB)")


_LARGEST = 2**31 - 2**16


def items_of(items: _Items, of: type | tuple[type, ...] = Iterable) -> _Items:
    """Returns the items of a stream. Raises TypeError for a payload: of one that is iterable each character or byte would be
    an item."""
    if isinstance(items, (str, bytes, bytearray, memoryview, Work)):
        raise TypeError("items is an iterable of payloads: write [payload]")
    if not isinstance(items, of) and not hasattr(type(items), "__getitem__"):
        hint = "; forkring.aio.Client takes asynchronous ones" if isinstance(items, AsyncIterable) else ""
        raise TypeError(f"items is {typed(items)}: it must be an iterable of payloads{hint}")
    return items


def item_of(work: Any, index: int, pool: str, subscription: str = "") -> Any:
    """Returns the message of a `Work` or a bare payload. Raises TypeError or ValueError if a part of it cannot be sent."""
    if not isinstance(work, Work):
        return _messages.WorkItem(pool=pool, payload=bytes_of(work), id=index, subscription=subscription)
    item = _messages.WorkItem(
        pool=pool if work.pool is None else text("pool", work.pool),
        payload=bytes_of(work.payload),
        id=index if work.id is None else whole("id", work.id, 0, 2**64 - 1),
        metadata=texts("metadata", work.metadata),
        priority=whole("priority", work.priority, 0, 3),
        subscription=subscription,
    )
    timeout = seconds("timeout", work.timeout, "none")
    if timeout is not None:
        item.timeout.seconds, item.timeout.nanos = divmod(round(timeout * 1e9), 10**9)
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


def error_of(failed: Any, target: str) -> Error:
    """Returns the error of a `grpc.RpcError` of the server at `target`, to be raised `from` its `__cause__`.

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
    code, message, cause = Code[failed.code().name], failed.details() or "", None
    if not reason:
        reason, message = _own(code, message, failed, target)
        cause = failed if reason in ("", CONNECTION_LOST) else None
    error = Error(code, reason, message, traceback=traceback, retry_delay=delay)
    error.__cause__ = cause
    return error


def _own(code: Code, details: str, failed: Any, target: str) -> tuple[str, str]:
    """Returns reason and message of what did not come from a forkring server: gRPC in this process, or a proxy."""
    if code is Code.DEADLINE_EXCEEDED:
        return code.name, "the timeout of the call is over"
    if code is Code.CANCELLED:
        return code.name, next((said for begin, said in _CANCELS.items() if details.startswith(begin)), details)
    if code is not Code.UNAVAILABLE:
        return "", details
    if details.startswith(_NEVER_SENT):
        why = details.rpartition(": ")[2].rstrip("]")
        return NO_CONNECTION, f"there is no server at {target} ({why})"
    # A status that gRPC makes in this process has no metadata. A proxy's answer has some, such as `date` or `server`.
    if failed.trailing_metadata():
        return "", details
    return CONNECTION_LOST, f"the connection to {target} broke: {details}"


# gRPC's own words for what this process did.
_CANCELS = {"Channel closed": "the client was closed", "Locally cancelled": "the stream was closed"}
