"""A worker: `python -m forkring._worker [--check [--files]] [--preload] HANDLER`.

With `--check` it only looks whether the handler can be a worker's; the server asks before it takes its port. With `--files`
it then tells on stdout what it imported. With `--preload` it is no worker but forks them, once the handler is imported. A
handler is `module:attribute` or `file.py:attribute`.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import io
import os
import signal
import sys
from types import ModuleType
from typing import Any, Callable

from forkring import _core, _files, _preload
from forkring._arguments import typed
from forkring._end import end, leave
from forkring._errors import BadHandler, format_traceback
from forkring._failures import Failures
from forkring._forms import BadForm, takes_a_batch, worker_of


def load(spec: str) -> Any:
    """The object that is named; raises BadHandler, or whatever the module raises."""
    where, _, path = spec.rpartition(":")
    # As `python app.py` and `python -m app` have it, whatever PYTHONSAFEPATH says.
    folder = os.path.dirname(os.path.abspath(where)) if where.endswith(".py") else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    target: Any = load_file(where) if where.endswith(".py") else load_module(where)
    seen = where
    for name in path.split("."):
        try:
            target = getattr(target, name)
        except AttributeError:
            public = [other for other in dir(target) if not other.startswith("_")]
            close = difflib.get_close_matches(name, public, n=1)
            hint = f": did you mean `{close[0]}`?" if close else ""
            raise BadHandler(f"`{seen}` has no `{name}`{hint}") from None
        seen = f"{seen}.{name}"
    return target


def load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only if it is this one, or a package that it is in; what is missing deeper down has a traceback that says where.
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise BadHandler(f"there is no module `{error.name}` in {os.getcwd()} nor where Python looks") from None
        raise


def load_file(path: str) -> ModuleType:
    name = os.path.splitext(os.path.basename(path))[0]
    loader = importlib.util.spec_from_file_location(name, os.path.abspath(path))
    if loader is None or loader.loader is None or not os.path.isfile(path):
        raise BadHandler(f"there is no file {path}")
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module
    loader.loader.exec_module(module)
    return module


def handler_of(target: Any, spec: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """How to make the worker's handler of what was named, and how to work with it. Raises BadHandler."""
    if not callable(target):
        raise BadHandler(f"`{spec}` is {typed(target)}: a handler is a function or class")
    argument = "the list of items" if takes_a_batch(target) else "the item"
    if inspect.isclass(target):
        call = target.__dict__.get("__call__") or getattr(target, "__call__", None)
        if not inspect.isfunction(call):
            raise BadHandler(f"the class `{spec}` has no `def __call__(self, item)`")
        takes(target, (), f"`{spec}` is made once per worker, with no arguments")
        takes(call, (None, None), f"`{spec}` is called with one argument, {argument}")
        return target, worker(target, call, spec)
    takes(target, (None,), f"`{spec}` is called with one argument, {argument}")
    # An object is called by its class's method.
    is_function = inspect.isroutine(target) or isinstance(target, functools.partial)
    function = target if is_function else target.__call__
    return (lambda: target), worker(target, function, spec)


def worker(target: Any, function: Any, spec: str) -> Callable[[Any], None]:
    try:
        return worker_of(target, function)
    except BadForm as error:
        raise BadHandler(f"`{spec}` {error}") from None


def takes(function: Any, arguments: tuple[Any, ...], what: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # Not all that is written in C tells.
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        name = getattr(function, "__name__", "it")
        raise BadHandler(f"{what}, but it is `{name}{signature}`") from None


def take_signals() -> None:
    """SIGTERM and SIGINT go to the whole process group, but only the supervisor decides: it lets workers finish.

    They come blocked. Programs that the handler starts should get them, so they are unblocked here and do nothing, unless
    the handler's module has its own use for them.
    """
    ours: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    for number, default in ours.items():
        # `_interrupts` has taken Python's own handler away.
        if signal.getsignal(number) in (default, signal.SIG_DFL):
            signal.signal(number, _ignore)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ours)

    def give_back() -> None:
        for number, default in ours.items():
            if signal.getsignal(number) is _ignore:
                signal.signal(number, default)

    os.register_at_fork(after_in_child=give_back)


def _ignore(*_: object) -> None:
    """Not SIG_IGN, which a program that is started would inherit."""


def main(arguments: list[str]) -> int:
    *options, spec = arguments
    check, preload = "--check" in options, "--preload" in options
    tell = _files.teller() if "--files" in options else _files.nobody
    nursery = None
    failures = Failures()
    if check:
        # It comes held back; now it ends the process without a word.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    else:
        # Before the module is imported, which may start programs: they would keep the server's name.
        if preload:
            nursery = _core.Nursery()
        else:
            _core.inherit()
    try:
        with _preload.watched_imports() if preload else contextlib.nullcontext():
            target = load(spec)
        make, work = handler_of(target, spec)
        if preload:
            _preload.refuse(spec)
        if check:
            tell(None)
            return 0
        if nursery is not None:
            _preload.become_worker(nursery, spec)
        take_signals()
        # What a handler prints is a server's log: it should not wait until there is more.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)
        handler = make()
    except BadHandler as error:
        print(failures.told(f"forkring: {error}"), file=sys.stderr)
        tell(error)
        return 2
    except BaseException as error:
        # All of it is the user's.
        print(failures.told(format_traceback(error)), file=sys.stderr)
        tell(error)
        return 2
    failures.forget()
    if nursery is not None:
        nursery.hand_over()
    try:
        work(handler)
    except BaseException as error:
        print(format_traceback(error), file=sys.stderr)
        return 1
    leave()


if __name__ == "__main__":
    end(main(sys.argv[1:]))
