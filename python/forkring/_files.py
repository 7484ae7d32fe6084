"""Which files an app is made of: `forkring serve --reload`."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from typing import Optional


def nobody(error: Optional[BaseException]) -> None:
    """Tells nobody."""


def teller() -> Callable[[Optional[BaseException]], None]:
    """Takes stdout for what tells the files, a line each; what is printed goes to stderr. With an error, those that it comes
    from are among them."""
    sys.stdout.flush()
    out = os.dup(1)
    os.dup2(2, 1)

    def tell(error: Optional[BaseException]) -> None:
        with open(out, "wb", closefd=True) as lines:
            for file in sorted(_files(error)):
                lines.write(os.fsencode(file) + b"\n")

    return tell


def _files(error: Optional[BaseException]) -> set[str]:
    paths = sysconfig.get_paths()
    others = {paths[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    others |= {site.getusersitepackages(), *site.getsitepackages(), os.path.dirname(__file__)}
    installed = tuple(os.path.join(os.path.abspath(folder), "") for folder in others)
    found = {os.path.abspath(file) for file in _imported() if file} | {os.path.abspath(file) for file in _named(error)}
    return {file for file in found if not file.startswith(installed) and "\n" not in file and os.path.isfile(file)}


def _imported() -> Iterator[Optional[str]]:
    # Anything may be there, and some of it pretends to have every attribute.
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        yield file if isinstance(file, str) else None


def _named(error: Optional[BaseException]) -> Iterator[str]:
    while error is not None:
        if isinstance(error, SyntaxError) and error.filename:
            yield error.filename
        for frame in traceback.extract_tb(error.__traceback__):
            yield frame.filename
        error = error.__cause__ or error.__context__
