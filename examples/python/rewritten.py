"""The baseline (grpc.aio + multiprocessing.Queue) rewritten for forkring.

`scripts/baseline` is how Python teams often write it: a `grpc.aio` server in one process, two bounded
`multiprocessing.Queue`s, a worker process for each other core, and updates that clients get by way of a loop that looks
ten times a second. With forkring:

    python rewritten.py                                       # or: forkring serve --pool work=rewritten.py:work
    forkring updates --addr 127.0.0.1:8080
    seq 100 | forkring submit work --lines --addr 127.0.0.1:8080

`submit` sends the items and `updates` prints their results: start either first, each from a shell of its own. An item
whose worker dies goes to another; in the baseline it is lost, and so is the worker.
"""

import hashlib

import forkring


def work(item):
    """Uses the CPU: a digest of a digest, many times over."""
    digest = item.payload
    for _ in range(100_000):
        digest = hashlib.sha256(digest).digest()
    return digest


if __name__ == "__main__":
    forkring.serve(work, listen="0.0.0.0:8080")
