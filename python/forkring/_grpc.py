"""grpcio, in a copy that is this process's own: what makes the clients safe to fork.

gRPC's threads and the locks they held are not in a forked child, and what becomes of its core there cannot be put right
from outside. Seen with grpcio 1.85 in children of a process that had calls in other threads:

- `GRPC_ENABLE_FORK_SUPPORT=0`: every call hangs, on a new channel too, for the core's thread pool is one for all.
- not set: gRPC resets itself in the child, unless another thread is inside gRPC at the moment of the fork. With traffic
  one often is; what comes of it is luck.
- `=1`: gRPC's handlers hold the fork up for 5 seconds, or hang in the child before any code but theirs has run there.

So a new channel in the child is not enough: it takes a new core. Each process loads grpcio for itself, when it first
needs it, from a copy of the library's file: of a file that is loaded already the loader gives the state that is there.
The copy is not in `sys.modules`. A program that uses grpcio itself has its own, with its own settings, and neither
notices the other. The copy has no fork handlers, whatever the environment says, so nothing of it runs in a fork.

What a child has of its parent's copy it never touches and never frees (`own`), for that would take locks whose owners
are not there. The parent's connections stay open until the last process that has them ends. It costs a process that
makes calls 17 MB for the file and some 40 ms, once.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from forkring import _extra

# Not by an import of grpc itself, which each process does for itself.
if not _extra.is_installed():
    raise ImportError("forkring's clients need grpcio and protobuf: pip install grpcio protobuf")

_PACKAGE = "grpc"
_EXTENSION = "grpc._cython.cygrpc"
# grpc imports them if they are there, for names that we do not use; they would import the program's own grpc.
_COMPANIONS = ("grpc_tools", "grpc_health", "grpc_reflection")
_FORK_SUPPORT = "GRPC_ENABLE_FORK_SUPPORT"

# Held while a process forks, so that nothing here is half done in the child.
_lock = threading.RLock()
_copy: _Copy | None = None
_pid = os.getpid()
_generation = 0
_owned: weakref.WeakSet[Any] = weakref.WeakSet()


def lock() -> threading.RLock:
    """Whoever makes a channel holds it meanwhile."""
    return _lock


def generation() -> int:
    """Differs in each process of a family: what was made in another generation belongs to an ancestor."""
    # Also after a fork that Python did not make.
    if os.getpid() != _pid:
        _after_in_child()
    return _generation


def load() -> Any:
    """This process's `grpc`, with `grpc.aio`."""
    global _copy
    generation()
    with _lock:
        if _copy is None:
            _copy = _Copy()
        return _copy.package


def own(thing: Any) -> Any:
    """A channel or a call: if it is alive when the process forks, the child never frees it."""
    _owned.add(thing)
    return thing


def _before() -> None:
    _lock.acquire()


def _after_in_parent() -> None:
    _lock.release()


def _after_in_child() -> None:
    global _lock, _copy, _pid, _generation
    _lock = threading.RLock()
    _pid = os.getpid()
    _generation += 1
    for thing in [*_owned, *([_copy] if _copy else [])]:
        # One reference that nobody gives back. A list of ours would be emptied when the interpreter ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
    _owned.clear()
    _copy = None


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)


class _Copy:
    """The package `grpc`, imported beside `sys.modules`.

    Its modules see an `__import__` of their own, by which `grpc` and what is below it is this copy, also in an import
    that a function of it does later. All else they import as usual.
    """

    def __init__(self) -> None:
        self._modules: dict[str, types.ModuleType] = {}
        self._builtins = {**vars(builtins), "__import__": self._import}
        self._sys = _Sys(self._modules)
        said = os.environ.get(_FORK_SUPPORT)
        # gRPC reads it when it is imported and when it is first used, and never again.
        os.environ[_FORK_SUPPORT] = "0"
        try:
            self.package: Any = self._module(_PACKAGE)
            # Nobody listens there, and nobody connects: a channel does so at the first call.
            self._first = own(self.package.insecure_channel("127.0.0.1:1"))
        finally:
            if said is None:
                del os.environ[_FORK_SUPPORT]
            else:
                os.environ[_FORK_SUPPORT] = said

    def _import(
        self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> types.ModuleType:
        if level:
            name = importlib.util.resolve_name("." * level + name, globals["__package__"])
        root = name.partition(".")[0]
        if root in _COMPANIONS:
            raise ModuleNotFoundError(f"No module named {root!r}", name=root)
        if name == "sys":
            return self._sys
        if root != _PACKAGE:
            return builtins.__import__(name, globals, locals, fromlist, 0)
        module = self._module(name)
        if not fromlist:
            return self._modules[_PACKAGE]
        for part in fromlist:
            if part != "*" and not hasattr(module, part) and hasattr(module, "__path__"):
                self._module(f"{name}.{part}")
        return module

    def _module(self, name: str) -> types.ModuleType:
        if name in self._modules:
            return self._modules[name]
        above, _, last = name.rpartition(".")
        parent = self._module(above) if above else None
        if name in self._modules:  # its parent has imported it
            return self._modules[name]
        spec = self._spec(name, parent)
        module = importlib.util.module_from_spec(spec)
        module.__dict__["__builtins__"] = self._builtins
        self._modules[name] = module
        if parent is not None:
            # Before it runs: modules of a package import each other in circles.
            setattr(parent, last, module)
        assert spec.loader is not None
        if name == _EXTENSION:
            # Waits for a program's own import of grpc, and makes one wait that begins now.
            with importlib._bootstrap._ModuleLockManager(_PACKAGE), self._visible():  # type: ignore[attr-defined]
                spec.loader.exec_module(module)
        else:
            spec.loader.exec_module(module)
        return module

    @contextlib.contextmanager
    def _visible(self) -> Iterator[None]:
        """While the extension module starts, `sys.modules` has the copy in it: compiled code imports from nowhere else.

        These are some milliseconds. What they show is put back, so that a program's own grpc is what it was.
        """
        before = _ours()
        finder = _Finder(self._module)
        for name in before:
            del sys.modules[name]
        sys.modules.update(self._modules)
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
            for name in _ours():
                del sys.modules[name]
            sys.modules.update(before)

    @staticmethod
    def _spec(name: str, parent: types.ModuleType | None) -> importlib.machinery.ModuleSpec:
        if parent is None:
            spec = importlib.util.find_spec(name)
        else:
            spec = importlib.machinery.PathFinder.find_spec(name, parent.__path__)
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name == _EXTENSION:
            assert spec.origin is not None
            path = _copy_of(spec.origin)
            loader = importlib.machinery.ExtensionFileLoader(name, path)
            copied = importlib.util.spec_from_file_location(name, path, loader=loader)
            assert copied is not None
            return copied
        return spec


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers imports of `grpc` by the copy's modules."""

    def __init__(self, module: Callable[[str], types.ModuleType]) -> None:
        self._module = module

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if _is_ours(name) else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return self._module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """It has been already."""


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] == _PACKAGE


def _ours() -> dict[str, types.ModuleType]:
    return {name: module for name, module in [*sys.modules.items()] if _is_ours(name)}


class _Sys(types.ModuleType):
    """`sys` for the copy: grpc enters modules of its own into `sys.modules`, where they are not to be."""

    def __init__(self, modules: dict[str, types.ModuleType]) -> None:
        super().__init__("sys")
        self.modules = modules

    def __getattr__(self, name: str) -> Any:
        return getattr(sys, name)


def _copy_of(path: str) -> str:
    """A copy of a file in memory, under a path that no ancestor has loaded a library by."""
    # Not closed: it is the file of a library that stays loaded.
    copy = os.memfd_create("forkring-grpc")
    with open(path, "rb") as original:
        rest = os.fstat(original.fileno()).st_size
        while rest > 0:
            rest -= os.sendfile(copy, original.fileno(), None, rest)
    # The loader also compares names, and a file descriptor's number may come again.
    return f"/proc/self/fd/{'./' * _generation}{copy}"
