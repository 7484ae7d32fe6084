"""Serving from Python: `forkring.serve(handle)`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Optional, Union

from forkring._arguments import flag, listed, shown, text, texts, whole
from forkring._core import main

MOST_WORKERS = 1024
"""Of a server."""
MOST_CPUS = 1024


def serve(
    *handlers: Callable[..., Any],
    workers: Optional[int] = None,
    listen: Optional[str] = None,
    name: Optional[str] = None,
    worker_env: Optional[Mapping[str, str]] = None,
    affinity: Union[str, Iterable[int], None] = None,
    preload: bool = False,
    reload: bool = False,
    log_failures: bool = False,
    options: tuple[str, ...] = (),
) -> None:
    """Serves until SIGTERM or Ctrl-C, each handler in a pool of its own name.

    A handler is a function or class at the top of a module: workers are fresh processes that import it. In a script, call
    this under `if __name__ == "__main__":`, and before anything that starts threads. `worker_env` are environment
    variables of workers; in a value `{worker}` is the worker's number in its pool, and `{slot}` its number over all pools.
    `affinity` is "auto" or the CPUs that are dealt out to all workers in turn. With `preload` the handlers are imported once,
    and the workers forked from there; with `reload` workers are replaced when a file changes that they were imported from.
    With `log_failures` items that failed are lines of the server's log, at most ten a second. `options` are more of
    `forkring serve`'s. What is wrong is said on stderr, and is a SystemExit.
    """
    if not handlers:
        raise TypeError("serve() takes at least one handler")
    arguments = ["forkring", "serve", *(text("an element of options", one) for one in listed("options", options, "str"))]
    if workers is not None:
        arguments.append(f"--workers={whole('workers', workers, 1, MOST_WORKERS)}")
    for option, value in (("listen", listen), ("name", name)):
        if value is not None:
            arguments.append(f"--{option}={text(option, value)}")
    if affinity is not None:
        arguments.append(f"--affinity={_cpus(affinity)}")
    flags = (("preload", preload), ("reload", reload), ("log_failures", log_failures))
    arguments += [f"--{option.replace('_', '-')}" for option, given in flags if flag(option, given)]
    arguments += [f"--worker-env={variable}={value}" for variable, value in _variables(worker_env)]
    for handler in handlers:
        spec, attribute = _spec(handler)
        arguments += ["--pool", f"{attribute}={spec}"]
    sys.stdout.flush()
    sys.stderr.flush()
    code = main(arguments, sys.executable, "-m", "forkring")
    if code != 0:
        raise SystemExit(code)


def _variables(worker_env: Any) -> Iterable[tuple[str, str]]:
    for name, value in texts("worker_env", worker_env).items():
        if not name or set(name) & set("=\n\0"):
            raise ValueError(f"worker_env has {shown(name)}: the name of a variable is not empty and has no `=` and no line break")
        if set(value) & set("\n\0"):
            raise ValueError(f"worker_env[{shown(name)}] is {shown(value)}: it must have no line break")
        yield name, value


def _cpus(affinity: Any) -> str:
    if isinstance(affinity, str):
        return text("affinity", affinity)
    cpus = listed("affinity", affinity, 'CPU numbers, or "auto"')
    return ",".join(str(whole("a CPU of affinity", cpu, 0, MOST_CPUS - 1)) for cpu in cpus)


def _spec(handler: Callable[..., Any]) -> tuple[str, str]:
    """How workers find it, and its own name."""
    attribute = getattr(handler, "__qualname__", None)
    module = getattr(handler, "__module__", None)
    if attribute is None or module is None or not attribute.replace(".", "").isidentifier():
        raise TypeError(f"{shown(handler)} cannot be imported by workers: a handler is a function or class of a module")
    if module == "__main__":
        main_module = sys.modules["__main__"]
        imported_as, file = getattr(main_module, "__spec__", None), getattr(main_module, "__file__", None)
        if imported_as is not None:
            module = imported_as.name
        elif file:
            module = os.path.abspath(file)
        else:
            raise TypeError(f"`{attribute}` cannot be imported by workers: put it in a file")
    return f"{module}:{attribute}", attribute.rpartition(".")[2]
