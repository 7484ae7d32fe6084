"""Handlers that succeed."""

import array
import hashlib
import json
import os
import threading
import time

import numpy

import forkring


def digest(item):
    return hashlib.sha256(item.payload).digest()


def echo(item):
    return item.payload


def facts(item):
    metadata = item.metadata
    assert item.metadata is metadata
    return json.dumps(
        {
            "id": item.id,
            "attempt": item.attempt,
            "deadline": item.deadline,
            "remaining": item.remaining(),
            "cancelled": item.cancelled,
            "metadata": metadata,
            "pool": item.pool,
            "len": len(item.payload),
            "repr": repr(item) + repr(item.payload),
            "first": item.payload[0],
            "slice": bytes(item.payload[1:3]).decode(),
            "equal": item.payload == bytes(item.payload) and item.payload != b"",
            "same": item.payload is item.payload,
            "type": isinstance(item, forkring.Item) and isinstance(item.payload, forkring.Payload),
        }
    )


def returns(item):
    """What is returned, by name."""
    strided = numpy.arange(12, dtype=numpy.int32).reshape(3, 4)
    return {
        b"none": None,
        b"bytes": b"bytes",
        b"str": "sträng",
        b"bytearray": bytearray(b"bytearray"),
        b"memoryview": memoryview(b"--memoryview--")[2:-2],
        b"reversed": memoryview(b"abc")[::-1],
        b"array": array.array("H", [1, 2]),
        b"numpy": strided,
        b"columns": strided[:, 1],
        b"empty": b"",
        b"int": 7,
        b"list": [b"a"],
        b"objects": numpy.array([object()]),
        b"surrogate": "\ud800",
    }[bytes(item.payload)]


class Counter:
    """Made once per worker."""

    made = 0

    def __init__(self):
        Counter.made += 1
        self.items = 0

    def __call__(self, item):
        self.items += 1
        return f"{os.getpid()} {Counter.made} {self.items}"


def mapping_of(address):
    """The file that is mapped at an address, and where in it that is."""
    for line in open("/proc/self/maps"):
        bounds, _, offset, _, _, *name = line.split()
        first, last = (int(bound, 16) for bound in bounds.split("-"))
        if first <= address < last:
            return " ".join(name), int(offset, 16) + address - first
    return "nowhere", 0


def places(item):
    """Where payload, array and reply are."""
    matrix = item.numpy("float32", (-1, 2))
    payload = numpy.frombuffer(item.payload, dtype="uint8").__array_interface__["data"]
    reply = item.reply(matrix.nbytes)
    filled = numpy.frombuffer(reply, dtype="float32")
    try:
        matrix[0, 0] = 1
        writable = True
    except ValueError:
        writable = False
    return json.dumps(
        {
            "same": payload[0] == matrix.__array_interface__["data"][0],
            "payload": mapping_of(payload[0])[0],
            "reply": mapping_of(filled.__array_interface__["data"][0])[0],
            "read_only": payload[1] and not writable,
            "zero": not filled.any(),
        }
    )


def double(item):
    """Numpy in, numpy out, with no copy."""
    numbers = item.numpy("int64")
    out = numpy.frombuffer(item.reply(numbers.nbytes), dtype="int64")
    numpy.multiply(numbers, 2, out=out)
    return out


def marked(item):
    """One more than each number, and in place of the first two where in the segment both arrays are."""
    numbers = item.numpy("uint64")
    out = numpy.frombuffer(item.reply(numbers.nbytes), dtype="uint64")
    numpy.add(numbers, 1, out=out)
    out[:2] = [mapping_of(array.__array_interface__["data"][0])[1] for array in (numbers, out)]
    return out


def reply(item):
    """What is made of a reply, by name."""
    words = item.metadata
    out = item.reply(int(words["len"]))
    view = memoryview(out)
    view[:3] = b"abc"
    view[-3:] = b"xyz"
    match words["return"]:
        case "none":
            return None
        case "reply":
            return out
        case "view":
            return view
        case "start":
            return view[:5]
        case "end":
            return view[-5:]
        case "other":
            return b"other"
        case "larger":
            return bytes(view) + b"more"
        case "again":
            return item.reply(1)



def gate(item):
    """Says in a file that it began, and waits until it may go on."""
    path = bytes(item.payload).decode()
    with open(path + ".alive", "w") as alive:
        alive.write("x")
        alive.flush()
        with open(path + ".line") as line:
            return f"{line.readline().strip()} {item.attempt}"


def thread(item):
    """Other threads run while an item is waited for and handled."""
    seen = []
    other = threading.Thread(target=lambda: seen.append(bytes(item.payload)))
    other.start()
    other.join()
    return seen[0]


def signals(item):
    """How the signals are of this process, and of one that it starts."""
    import signal
    import subprocess

    program = "import signal; print(signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    import sys

    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    pid = os.fork()
    if pid == 0:
        os._exit(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)
    forked = os.waitpid(pid, 0)[1]
    return json.dumps({"blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "child": child, "forked": forked})


def inherited(item):
    """What a program that a worker starts has of the worker's."""
    import subprocess

    return subprocess.run(["sh", "-c", "ls -l /proc/$$/fd"], capture_output=True, check=True).stdout




def family(item):
    """What of an item a child has that this forks, and then the item as it was."""
    import multiprocessing

    reply, view = item.reply(len(item.payload)), memoryview(bytes(item.payload))
    payload, seen = item.payload, {}
    uses = {
        "bytes": lambda: bytes(payload),
        "view": lambda: memoryview(payload),
        "first": lambda: payload[0],
        "equal": lambda: payload == b"x",
        "cancelled": lambda: item.cancelled,
        "remaining": item.remaining,
        "reply": lambda: memoryview(reply),
        "again": lambda: item.reply(10),
    }
    for name in item.metadata["ways"].split():
        seen[name] = in_child(uses[name])
    # What is safe, as before.
    seen["safe"] = in_child(lambda: (item.id, item.metadata["ways"][:5], len(payload), repr(payload), bytes(view)[:3]))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        seen["given"] = pool.apply(len, [bytes(payload)])
    memoryview(reply)[:] = payload
    seen["here"] = [item.id, item.payload == bytes(payload), bytes(reply) == bytes(payload), os.getpid()]
    return json.dumps(seen)


def in_child(use):
    """What it gives in a fork of this process, or raises; or how that died."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = repr(use())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitpid(pid, 0)[1]
    return said or f"died of {status}"


def patient(item):
    """Goes on until nobody wants it any more."""
    with open(item.metadata["journal"], "a") as journal:
        print(f"began {item.cancelled}", file=journal, flush=True)
        while not item.cancelled:
            time.sleep(0.001)
        print(f"cancelled {item.remaining()}", file=journal, flush=True)


def decorated(handler):
    """A plain decorator, whatever it is for."""

    def wrapper(item):
        return handler(item)

    return wrapper


@decorated
async def hidden_coroutine(item):
    return b"x"


@decorated
def hidden_generator(item):
    yield b"x"


@decorated
async def hidden_async_generator(item):
    yield b"x"


def open_files(item):
    """Returns the worker's open descriptors, those that a program inherits, and the environment."""
    folder = "/proc/self/fd"
    seen = []
    for number in os.listdir(folder):
        try:
            seen.append(f"{os.readlink(f'{folder}/{number}')} {os.get_inheritable(int(number))}")
        except OSError:
            pass
    return "\n".join([*seen, *os.environ])
