"""Handlers that tell where they come from."""

import gc
import os
import subprocess
import sys

# Once for each process that imports this, and too much for a copy not to be seen.
BORN_IN = os.getpid()
LARGE = bytes(64 << 20)


def origin(item):
    """Where this was imported, what is frozen, who the parent is, and the environment."""
    device = os.environ.get("DEVICE", "")
    return f"{BORN_IN} {gc.get_freeze_count() > 0} {os.getppid()} {device} {os.getpid()} {LARGE[7]}"


class Made:
    """Made once per worker."""

    def __init__(self):
        self.made_in = os.getpid()

    def __call__(self, item):
        return f"{self.made_in == os.getpid()} {BORN_IN == os.getpid()}"


def begins_and_dies(item):
    """Kills its worker, which leaves a program behind that ends when the file that is named comes."""
    if item.attempt == 1:
        wait = "import os, sys\nopen(sys.argv[1]).read()"
        program = subprocess.Popen([sys.executable, "-c", wait, item.metadata["fifo"]])
        with open(item.metadata["pid"], "w") as file:
            file.write(str(program.pid))
        os.kill(os.getpid(), 9)
    return b"over"


def number(item):
    return item.payload


def limits(item):
    try:
        bytearray(300 << 20)
    except MemoryError:
        return b"limited"
    return b"not limited"


def sleeps_once(item):
    if item.attempt == 1:
        while True:
            pass
    return b"ended"
