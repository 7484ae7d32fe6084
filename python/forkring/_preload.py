"""Forking workers from a process that has imported the app: `forkring serve --preload`.

A fork copies one thread. What others held or were doing stays as it was in the child, for ever; so an app whose import starts
threads, or gRPC, is refused, with who it was.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from forkring import _core
from forkring._errors import BadHandler

_TASKS = "/proc/self/task"

# Libraries whose threads have no names of their own, by what their files are called, and what keeps them from starting any.
_POOLS = {
    "openblas": "OPENBLAS_NUM_THREADS=1",
    "mkl_rt": "MKL_NUM_THREADS=1",
    "blis": "BLIS_NUM_THREADS=1",
    "libgomp": "OMP_NUM_THREADS=1",
    "libiomp": "OMP_NUM_THREADS=1",
    "libomp": "OMP_NUM_THREADS=1",
    "polars": "POLARS_MAX_THREADS=1",
}

# Which modules' imports have started threads.
_culprits: list[str] = []


def _count() -> int:
    # A folder has a link for itself, one for its name and one for each folder in it.
    return os.stat(_TASKS).st_nlink - 2


@contextlib.contextmanager
def watched_imports() -> Iterator[None]:
    """Notes which module's import it is that starts threads: the innermost one."""
    original = builtins.__import__
    under_way: list[str] = []
    seen = _count()

    def look() -> None:
        nonlocal seen
        before, seen = seen, _count()
        # If none is under way, it is the app's own code.
        if seen > before and under_way:
            _culprits.append(under_way[-1])

    def watch(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        look()
        package = (globals or {}).get("__package__") or "" if level else ""
        under_way.append(f"{package}.{name}".strip("."))
        try:
            return original(name, globals, locals, fromlist, level)
        finally:
            look()
            under_way.pop()

    builtins.__import__ = watch
    try:
        yield
    finally:
        builtins.__import__ = original


def refuse(spec: str) -> None:
    """Raises BadHandler if this process must not fork."""
    module = spec.rpartition(":")[0]
    reasons = [*_threads(module), *_grpc_objects()]
    if reasons:
        raise BadHandler(
            f"--preload cannot fork workers from `{module}`: {'; '.join(reasons)}. Make such things where each worker makes"
            " them, in a class's __init__ or with the first item, or serve without --preload"
        )


def _threads(module: str) -> list[str]:
    names = {}
    for task in os.listdir(_TASKS):
        with contextlib.suppress(OSError), open(f"{_TASKS}/{task}/comm") as comm:
            names[int(task)] = comm.read().strip()
    names.pop(os.getpid(), None)
    if not names:
        return []
    pythons = {thread.native_id: thread for thread in threading.enumerate()}
    told = []
    for number, name in names.items():
        thread = pythons.get(number)
        if thread is None:
            told.append(f"`{name}`")
        else:
            target = getattr(thread, "_target", None)
            owner = getattr(target, "__module__", None) or type(thread).__module__
            told.append(f"`{thread.name}` of {owner}")
    many = f"{len(told)} threads" if len(told) > 1 else "a thread"
    text = f"its import has started {many} ({_list(told)})"
    if _culprits:
        text += f", when it came to {_list([f'`{name}`' for name in dict.fromkeys(_culprits)])}"
    hints = [f"{variable} keeps {library} from it" for library, variable in _loaded_pools().items()]
    if hints and any(number not in pythons for number in names):
        text += f" (--worker-env {', --worker-env '.join(hints)})"
    return [text]


def _loaded_pools() -> dict[str, str]:
    with open("/proc/self/maps") as maps:
        files = {os.path.basename(line.split(maxsplit=5)[-1].strip()).lower() for line in maps if "/" in line}
    loaded = {library: hint for library, hint in _POOLS.items() if any(library in file for file in files)}
    # Who has set it knows.
    return {library: hint for library, hint in loaded.items() if hint.partition("=")[0] not in os.environ}


def _list(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _grpc_objects() -> list[str]:
    """gRPC's core is for the process that starts it, with threads or not, and its objects are what starts it."""
    kinds: tuple[type, ...] = ()
    for name in ("grpc", "grpc.aio"):
        module = sys.modules.get(name)
        found = (getattr(module, kind, None) for kind in ("Channel", "Server"))
        kinds += tuple(kind for kind in found if isinstance(kind, type))
    # Not by isinstance: that asks things what they are, and some of the app's answer by raising.
    made = {kind for kind in {type(thing) for thing in gc.get_objects()} if issubclass(kind, kinds)}
    names = sorted(f"`{kind.__module__}.{kind.__qualname__}`" for kind in made)
    return [f"its import has made a gRPC object ({_list(names)}), and gRPC does not survive a fork"] if names else []


def become_worker(nursery: _core.Nursery, spec: str) -> None:
    """Forks workers for as long as the server wants any. It returns in each of them."""
    # What is there by now is for good: a collection in a worker need not look at it, and so does not copy its pages.
    gc.collect()
    gc.freeze()
    nursery.ready()
    while True:
        nursery.wait()
        # Somebody's handlers of the fork may have started one.
        refuse(spec)
        if _is_forked(nursery):
            os.environ.update(nursery.settle_in())
            return


def _is_forked(nursery: _core.Nursery) -> bool:
    """Forks the worker that is wanted; true in the worker, once the server knows of it."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    told, tell = os.pipe()
    word, give_word = os.pipe()
    try:
        middle = os.fork()
    except OSError as error:
        for end in (told, tell, word, give_word):
            os.close(end)
        nursery.stillborn(f"fork: {error}")
        return False
    if middle == 0:
        try:
            if worker := os.fork():
                os.write(tell, str(worker).encode())
        except OSError as error:
            os.write(tell, f"fork: {error}".encode())
            worker = -1
        if worker:
            # Now the worker is the server's child.
            os._exit(0)
        for end in (told, tell, give_word):
            os.close(end)
        if not os.read(word, 1):
            # The nursery is dead, or nobody knows of us.
            os._exit(0)
        os.close(word)
        return True
    os.close(tell)
    os.close(word)
    said = os.read(told, 1000).decode()
    # The app may have chosen that children are not waited for: then this waits, too, and finds none.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(middle, 0)
    if said.isdigit():
        # It may be dead by now, which the server sees.
        with contextlib.suppress(BrokenPipeError):
            if nursery.born(int(said)):
                os.write(give_word, b"!")
    else:
        nursery.stillborn(said or "its parent died")
    os.close(told)
    os.close(give_word)
    return False
