"""What a client is told of an exception, and who starts a server of a handler."""

from __future__ import annotations

import importlib
import os
import traceback
from typing import Any, Union

from forkring._codes import Code


class BadHandler(Exception):
    """A line that says what is wrong with a handler."""


class Abort(Exception):
    """Fails the item with a gRPC code, a message for people and a reason for programs.

    The code is a `forkring.Code`, a `grpc.StatusCode`, or the name or number of one; the reason a constant in
    UPPER_SNAKE_CASE. Any other exception is INTERNAL, with the reason HANDLER_RAISED and its traceback.
    """

    def __init__(self, code: Union[Code, int, str, Any], message: str = "", reason: str = "HANDLER_ABORTED") -> None:
        super().__init__(code, message, reason)
        self.code = _code(code)
        self.message = message
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.code.name} ({self.reason}): {self.message}"


def _code(code: Any) -> Code:
    if isinstance(code, str):
        found = Code.__members__.get(code)
    else:
        # grpc.StatusCode's values are pairs of number and text.
        value = getattr(code, "value", code)
        number = value[0] if isinstance(value, tuple) else value
        found = Code(number) if number in Code._value2member_map_ else None
    if found is None or found is Code.OK:
        raise ValueError(f"{code!r} is no code to abort with: use forkring.Code, as in Code.NOT_FOUND")
    return found


Described = tuple[int, str, str, str]
"""Code, reason, message and traceback."""


def describe(error: BaseException) -> Described:
    """What to say of it, whatever its own methods do."""
    try:
        return _describe(error)
    except BaseException as second:
        message = f"the handler raised an exception, and describing it raised {type(second).__name__}"
        return int(Code.INTERNAL), "HANDLER_RAISED", message, ""


def _describe(error: BaseException) -> Described:
    if isinstance(error, Abort):
        return int(error.code), str(error.reason), str(error.message), ""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    text = str(error)
    return int(Code.INTERNAL), "HANDLER_RAISED", f"{name}: {text}" if text else name, format_traceback(error)


_HERE = os.path.dirname(__file__) + os.sep
_IMPORT = os.path.dirname(importlib.__file__) + os.sep


def _is_ours(filename: str) -> bool:
    return filename.startswith((_HERE, _IMPORT, "<frozen importlib", "<frozen runpy"))


def format_traceback(error: BaseException) -> str:
    """As Python prints it, without the frames of this package and of the import system around the user's."""
    shown = traceback.TracebackException.from_exception(error)
    for end in (0, -1):
        while shown.stack and _is_ours(shown.stack[end].filename):
            shown.stack.pop(end)
    return "".join(shown.format()).rstrip("\n")
