"""What a client is told of an exception, and who starts a server of a handler."""

from __future__ import annotations

import importlib
import os
import re
import traceback
from enum import Enum
from typing import Any, Union

from forkring._arguments import shown, typed
from forkring._codes import Code


class BadHandler(Exception):
    """A line that says what is wrong with a handler."""


class Abort(Exception):
    """Fails the item with a gRPC code, a message for people and a reason for programs.

    The code is a `forkring.Code`, a `grpc.StatusCode`, or the name or number of one, and not OK. The reason is a constant
    in UPPER_SNAKE_CASE of 3 to 63 characters, as `google.rpc.ErrorInfo` has it. An argument that is none of these raises
    a TypeError or ValueError.

    Any other exception is INTERNAL, with the reason HANDLER_RAISED and its traceback.
    """

    def __init__(self, code: Union[Code, int, str, Any], message: str = "", reason: str = "HANDLER_ABORTED") -> None:
        super().__init__(code, message, reason)
        self.code = _code(code)
        self.message = _message(message)
        self.reason = _reason(reason)

    def __str__(self) -> str:
        return f"{self.code.name} ({self.reason}): {self.message}"


def _code(code: Any) -> Code:
    # grpc.StatusCode's values are pairs of number and text.
    value = code.value if isinstance(code, Enum) else code
    number = value[0] if isinstance(code, Enum) and isinstance(value, tuple) else value
    if isinstance(number, str):
        found = Code.__members__.get(number)
    elif isinstance(number, int) and not isinstance(number, bool):
        found = next((known for known in Code if known == number), None)
    else:
        raise TypeError(_NO_CODE.format(shown(code)))
    if found is None or found is Code.OK:
        raise ValueError(_NO_CODE.format(shown(code)))
    return found


def _message(message: Any) -> str:
    if not isinstance(message, str):
        raise TypeError(f"message is {typed(message)}: it must be a str")
    return message


def _reason(reason: Any) -> str:
    if not isinstance(reason, str):
        raise TypeError(f"reason is {typed(reason)}: {_REASONS}")
    if not (3 <= len(reason) <= 63 and _REASON.fullmatch(reason)):
        raise ValueError(f"reason is {shown(reason)}: {_REASONS}")
    return reason


_NO_CODE = "{} is no code to abort with: use forkring.Code, as in Code.NOT_FOUND"
# google.rpc.ErrorInfo.reason.
_REASON = re.compile("[A-Z][A-Z0-9_]+[A-Z0-9]")
_REASONS = "a reason is 3 to 63 characters of A-Z, 0-9 and _, the first of them a letter and the last no _"

Described = tuple[int, str, str, str]
"""Code, reason, message and traceback."""


def describe(error: BaseException) -> Described:
    """What to say of it, whatever its own methods do."""
    try:
        code, *texts = _describe(error)
        # A lone surrogate, as of a file's name that is no UTF-8, is shown as Python escapes it.
        reason, message, trace = (text.encode("utf-8", "backslashreplace").decode() for text in texts)
        return code, reason, message, trace
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
