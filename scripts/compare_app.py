"""The Python handlers that scripts/compare measures, and their work with no server around it.

    compare_app.py SECONDS      prints how many items of `digests` a process alone does in a second
"""

import hashlib
import os
import sys
import time

import numpy

DIGESTS = int(os.environ["WORK_DIGESTS"])


def echo(item):
    return item.payload


def increment(item):
    """An array in, an array out, where they lie."""
    numbers = item.numpy("uint8")
    out = numpy.frombuffer(item.reply(numbers.nbytes), dtype="uint8")
    numpy.add(numbers, 1, out=out)
    return out


def digests(item):
    return digest(item.payload)


def digest(value):
    """As the baseline's worker does."""
    for _ in range(DIGESTS):
        value = hashlib.sha256(value).digest()
    return value


if __name__ == "__main__":
    begin = time.monotonic()
    count = 0
    while (elapsed := time.monotonic() - begin) < float(sys.argv[1]):
        digest(bytes(64))
        count += 1
    print(count / elapsed)
