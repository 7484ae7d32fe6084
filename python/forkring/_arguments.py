"""Looks at arguments and says what is wrong with one: its name, the given value and type, and what is allowed."""

from __future__ import annotations

import reprlib
from typing import Any

_LONGEST = 100

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = _LONGEST


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
