"""How a worker leaves: always by `os._exit`, for Python's own end waits for all threads, and those are the app's."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn

MOMENT = 2.0
"""What the app has left running gets to finish, in seconds."""


def end(code: int) -> NoReturn:
    """Ends the process, whatever threads there are."""
    # What Python itself runs behind its wait for them.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def leave() -> NoReturn:
    """Ends a worker that has done its work. Says which threads Python would have waited for."""
    pool = sys.modules.get("concurrent.futures.thread")
    if pool is not None:
        # Sends the threads of executors home. It waits for those that are at work, so that is for a thread.
        sends = threading.Thread(target=pool._python_exit, daemon=True)
        sends.start()
        sends.join(MOMENT)
    here = threading.current_thread()
    left = [f"`{thread.name}`" for thread in threading.enumerate() if not (thread.daemon or thread is here)]
    if left:
        print(f"forkring: the worker ends, and with it what its app left running: {', '.join(left)}", file=sys.stderr)
    end(0)
