"""When a call is tried again, and how long it waits for a server that is not there."""

from __future__ import annotations

import logging
import random
import time
from typing import Any, NamedTuple

from forkring._arguments import flag, listed, seconds, text, typed, whole
from forkring._codes import Code
from forkring._types import CONNECTION_LOST, NO_CONNECTION, Error, target_of

_log = logging.getLogger("forkring")

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0
# gRPC itself connects again every 100 ms or so.
_LOOKS_AGAIN = 0.05
_SAYS_SO_AFTER = 1.0
# How long gRPC lets one attempt to connect take by itself.
_LONGEST_CONNECT = 20.0


class Settings(NamedTuple):
    """The arguments that a client was made with."""

    target: str
    pool: str
    retries: int
    idempotent: bool
    connect_timeout: float | None
    options: tuple[tuple[str, Any], ...]

    def channel_options(self) -> list[tuple[str, Any]]:
        """Returns the arguments of gRPC's channel; those of the caller come last and so win."""
        longest = min(max(self.connect_timeout or _LONGEST_CONNECT, 1.0), _LONGEST_CONNECT)
        return [
            # The server's own limit is what should bind.
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            # A server that starts is found at once, not after gRPC's pauses of up to two minutes. 100 is its least.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 100),
            # In spite of its name this is how long one attempt may take.
            ("grpc.min_reconnect_backoff_ms", round(1000 * longest)),
            # Each client its own connection: what one closes is not another's.
            ("grpc.use_local_subchannel_pool", 1),
            *self.options,
        ]


def settings_of(
    target: Any, pool: Any, retries: Any, idempotent: Any, connect_timeout: Any, options: Any
) -> Settings:
    """Looks at the arguments of a client. Raises TypeError or ValueError if one is wrong."""
    return Settings(
        target_of(target),
        text("pool", pool),
        whole("retries", retries, 0, 2**63 - 1),
        flag("idempotent", idempotent),
        seconds("connect_timeout", connect_timeout, "as long as it takes"),
        tuple(_option(one) for one in listed("options", options, "pairs of gRPC's channel arguments")),
    )


def _option(option: Any) -> tuple[str, Any]:
    if not (isinstance(option, (tuple, list)) and len(option) == 2):
        raise TypeError(f"an element of options is {typed(option)}: it must be a pair of a name and a value")
    name, value = text("a name in options", option[0]), option[1]
    if isinstance(value, (str, bytes)):
        return name, value
    return name, int(value) if isinstance(value, bool) else whole(f"options: {name}", value, -(2**31), 2**31 - 1)


class Outage:
    """The outage of a server that a client cannot reach. Threads share it; at worst two of them log the same line."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._began: float | None = None
        self._is_told = False

    def lasts(self, error: Error) -> None:
        """Notes that the server could not be reached. After a while that is logged, once."""
        # Another thread may end the outage at any moment, so `_began` is read only once.
        now, began = time.monotonic(), self._began
        if began is None:
            self._began, self._is_told = now, False
        elif not self._is_told and now - began >= _SAYS_SO_AFTER:
            self._is_told = True
            _log.warning("%s; waiting for one", error.message)

    def ends(self) -> None:
        """Notes that the server was reached."""
        began, was_told = self._began, self._is_told
        if began is not None:
            self._began = None
            if was_told:
                _log.info("there is a server at %s now", self._target)


class Attempts:
    """When a call may be tried again. One object serves one call.

    Only what was certainly not accepted is tried again: what gRPC could not send at all, for as long as the client waits for
    its server, and what the server refused with a hint when to come back, as often as the client says. A connection that broke
    may have carried the item to a worker: only an idempotent item is sent again then.
    """

    def __init__(self, settings: Settings, outage: Outage, timeout: float | None) -> None:
        now = time.monotonic()
        self._settings = settings
        self._outage = outage
        self._end = None if timeout is None else now + timeout
        self._gives_up = None if settings.connect_timeout is None else now + settings.connect_timeout
        self._made = 0

    def left(self) -> float | None:
        """Returns the seconds that the next attempt may take, as gRPC takes them."""
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        # Beyond its range, which is 292 years, gRPC counts from the past.
        return max(left, 0.0) if left < 1e9 else None

    def pause(self, error: Error) -> float | None:
        """Returns for how long to wait before the next attempt; None if there is none."""
        if error.reason == NO_CONNECTION:
            self._outage.lasts(error)
            return self._in_time(_LOOKS_AGAIN, self._end, self._gives_up)
        self._outage.ends()
        return self._in_time(self._hint(error), self._end)

    def _hint(self, error: Error) -> float | None:
        hint = error.retry_delay
        if hint is None and self._settings.idempotent and error.code is Code.UNAVAILABLE:
            hint = _FIRST_PAUSE if error.reason in ("", CONNECTION_LOST) else None
        if hint is None or self._made >= self._settings.retries:
            return None
        # Beyond this it is the longest pause anyway.
        pause = min(hint * 2.0 ** min(self._made, 64), max(hint, _LONGEST_PAUSE))
        self._made += 1
        return pause

    @staticmethod
    def _in_time(pause: float | None, *ends: float | None) -> float | None:
        if pause is None:
            return None
        # Clients that were refused together are not to come back together.
        pause *= random.uniform(1, 1.5)
        after = time.monotonic() + pause
        return None if any(end is not None and after >= end for end in ends) else pause
