"""Looks at arguments and says what is wrong with one: its name, the given value and type, and what is allowed."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, Optional

_LONGEST = 100

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = _LONGEST

LONGEST_TIME = 315_576_000_000.0
"""The most seconds that `google.protobuf.Duration` holds: about 10,000 years."""


def shown(value: Any) -> str:
    """Returns the value as an error shows it: shortened, and on one line whatever its `__repr__` does."""
    try:
        text = " ".join(_repr.repr(value).split())
    except BaseException:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST + 2 else f"{text[:_LONGEST]}..."


def typed(value: Any) -> str:
    """Returns the value and its type as an error shows them."""
    return f"{shown(value)}, of type {type(value).__name__}"


def whole(name: str, value: Any, least: int, most: int) -> int:
    """Returns an integer of this range. Raises TypeError or ValueError if the value is none."""
    allowed = f"it must be an integer from {least} to {most}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {typed(value)}: {allowed}") from None
    if not least <= number <= most:
        raise ValueError(f"{name} is {shown(number)}: {allowed}")
    return number


def seconds(name: str, value: Any, default: str = "") -> Optional[float]:
    """Returns a time in seconds; None for None and for infinity. Raises TypeError or ValueError if the value is none.

    `default` says what None means, if it is allowed.
    """
    if value is None and default:
        return None
    allowed = f"it must be a number of seconds from 0 to {LONGEST_TIME:.0f}, or math.inf"
    allowed += f"; None: {default}" if default else ""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {typed(value)}: {allowed}")
    try:
        number = float(value)
    except OverflowError:
        number = math.nan
    if number == math.inf:
        return None
    if not 0 <= number <= LONGEST_TIME:
        raise ValueError(f"{name} is {shown(value)}: {allowed}")
    return number


def text(name: str, value: Any) -> str:
    """Returns text that can be sent. Raises TypeError or ValueError if the value is none."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {typed(value)}: it must be a str")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {shown(value)}: it must be Unicode text, with no lone surrogates") from None
    return value


def flag(name: str, value: Any) -> bool:
    """Returns True or False. Raises TypeError if the value is neither."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {typed(value)}: it must be True or False")
    return value


def texts(name: str, value: Any) -> dict[str, str]:
    """Returns a mapping of text to text; an empty one for None. Raises TypeError or ValueError if the value is none."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {typed(value)}: it must be a mapping of str to str")
    return {text(f"a key of {name}", key): text(f"{name}[{shown(key)}]", one) for key, one in value.items()}


def listed(name: str, value: Any, of: str) -> list[Any]:
    """Returns the elements of an iterable that is no text. Raises TypeError if the value is none."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {typed(value)}: it must be a list of {of}")
    return list(value)
