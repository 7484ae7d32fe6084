"""The effect of Ctrl-C on the processes of a server.

This imports nothing that takes time, for until it has run Python's own handler shows a Ctrl-C as a traceback.
"""

import _signal  # type: ignore[import-not-found]
import sys


def end_at_interrupts() -> None:
    """Lets a Ctrl-C end this process at once and without a word."""
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


def is_command() -> bool:
    """Returns whether this process is `python -m forkring` or one of its programs, before these have begun."""
    # While Python looks for the module, this is in the place of its path.
    if sys.argv[:1] != ["-m"]:
        return False
    named = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)]
    return named.removeprefix("-m").split(".")[0] == "forkring"


if is_command():
    end_at_interrupts()
