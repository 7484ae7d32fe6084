"""Serving from Python: `forkring.serve(handle)`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Optional, Union

from forkring._core import main


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
    arguments = ["forkring", "serve", *options]
    if affinity is not None and not isinstance(affinity, str):
        affinity = ",".join(map(str, affinity))
    for option, value in (("--workers", workers), ("--listen", listen), ("--name", name), ("--affinity", affinity)):
        if value is not None:
            arguments += [option, str(value)]
    flags = (("--preload", preload), ("--reload", reload), ("--log-failures", log_failures))
    arguments += [option for option, given in flags if given]
    for variable, text in (worker_env or {}).items():
        arguments += ["--worker-env", f"{variable}={text}"]
    for handler in handlers:
        spec, attribute = _spec(handler)
        arguments += ["--pool", f"{attribute}={spec}"]
    sys.stdout.flush()
    sys.stderr.flush()
    code = main(arguments, sys.executable, "-m", "forkring")
    if code != 0:
        raise SystemExit(code)


def _spec(handler: Callable[..., Any]) -> tuple[str, str]:
    """How workers find it, and its own name."""
    attribute = getattr(handler, "__qualname__", None)
    module = getattr(handler, "__module__", None)
    if attribute is None or module is None or not attribute.replace(".", "").isidentifier():
        raise TypeError(f"{handler!r} cannot be imported by workers: a handler is a function or class of a module")
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
