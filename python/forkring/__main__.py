"""The command `forkring`."""

import sys

from forkring._core import main as _main
from forkring._interrupts import end_at_interrupts


def main() -> int:
    # Python's own handler only notes a Ctrl-C, for bytecode that does not run here.
    end_at_interrupts()
    return _main(["forkring", *sys.argv[1:]], sys.executable, *_starts())


def _starts() -> list[str]:
    """Returns the interpreter's arguments that come before the command's own: a script's path, or `-m forkring`."""
    own = len(sys.argv) - 1
    # An interpreter that is embedded in another program has no arguments of its own.
    return sys.orig_argv[1 : len(sys.orig_argv) - own] or ["-m", "forkring"]


if __name__ == "__main__":
    sys.exit(main())
