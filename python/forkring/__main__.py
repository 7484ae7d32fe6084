"""The command `forkring`."""

import signal
import sys

from forkring._core import main as _main


def main() -> int:
    # Python's own handler only notes a Ctrl-C, for bytecode that does not run here.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return _main(["forkring", *sys.argv[1:]], sys.executable)


if __name__ == "__main__":
    sys.exit(main())
