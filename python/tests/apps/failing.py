"""Handlers that fail, each in its own way."""

import ctypes
import os
import signal
import sys

import grpc

import forkring


class OutOfStock(Exception):
    pass


class Silent(Exception):
    def __str__(self):
        raise RuntimeError("not even that")


def deeper(what):
    raise OutOfStock(what)


def ways(item):
    """Fails as the payload says; the worker lives on."""
    match bytes(item.payload).decode():
        case "value":
            raise ValueError("that is no number")
        case "own":
            deeper("of shoes")
        case "bare":
            raise KeyError
        case "chained":
            try:
                {}["x"]
            except KeyError as error:
                raise RuntimeError("while looking") from error
        case "exit":
            sys.exit(3)
        case "interrupt":
            raise KeyboardInterrupt
        case "memory":
            return bytearray(1 << 60)
        case "silent":
            raise Silent
        case "recursion":
            return recurse(0)
        case "long":
            raise ValueError("ä" * 5000)
        case "abort":
            raise forkring.Abort(forkring.Code.NOT_FOUND, "there is no row 7", "NO_SUCH_ROW")
        case "abort-name":
            raise forkring.Abort("OUT_OF_RANGE", "too far")
        case "abort-grpc":
            raise forkring.Abort(grpc.StatusCode.UNAUTHENTICATED, "who?")
        case "abort-ok":
            raise forkring.Abort(0, "fine")
        case "large":
            return item.reply(17 << 20)
        case "larger":
            return bytes(17 << 20)
        case way:
            return f"{way} {os.getpid()}"


def recurse(depth):
    return recurse(depth + 1) + 1


def deaths(item):
    """Dies as the metadata says, so many times."""
    if item.attempt <= int(item.metadata.get("times", 9)):
        match item.metadata["way"]:
            case "exit":
                os._exit(3)
            case "segfault":
                ctypes.string_at(0)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
    return f"attempt {item.attempt}"


class Unmade:
    """Works only from the second time it is made on."""

    def __init__(self):
        marker = os.environ["MARKER"]
        if not os.path.exists(marker):
            open(marker, "w").close()
            raise RuntimeError("the model is not there yet")

    def __call__(self, item):
        return b"made"


def loop(item):
    """Never ends, unless it has been tried before."""
    while item.attempt == 1 or item.payload == b"ever":
        pass
    return f"attempt {item.attempt}"


async def async_loop(item):
    return loop(item)


@forkring.batch(max_size=2)
def batch_loop(items):
    return [loop(item) for item in items]


def hog(item):
    """Takes so many bytes."""
    return str(len(bytearray(int(bytes(item.payload)))))


class Unmakeable:
    def __init__(self):
        raise RuntimeError("the model is broken")

    def __call__(self, item):
        return b"never"


class MadeAsTold:
    """Fails to be made of what the file in the environment says, unless it says nothing."""

    def __init__(self):
        with open(os.environ["MARKER"]) as file:
            why = file.read()
        if why:
            raise RuntimeError(f"{why} ({object()!r})")

    def __call__(self, item):
        return str(os.getpid())
