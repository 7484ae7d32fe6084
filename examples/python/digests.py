"""A generator: results that come while the handler still works, of real files.

    forkring serve --pool digests:2=digests.py:digests
    python digests.py HOST:PORT FILE ...

Each item is a file, and each part of its result the digest of one chunk of it, sent as soon as it is made; the last result is
the digest of the whole. With two such lists one sees which chunks of a large file differ, as rsync does. The client prints
what comes when it comes, of all files at once. If it goes away, the handler ends where it is.
"""

import hashlib
import sys

CHUNK = 1 << 16


def digests(item):
    """One for each chunk, and then that of all of them."""
    # A view of the bytes that the server received: a part of it is no copy either.
    payload = memoryview(item.payload)
    for at in range(0, len(payload), CHUNK):
        yield hashlib.sha256(payload[at : at + CHUNK]).digest()
    return hashlib.sha256(payload).digest()


def contents(paths):
    """Of each file, read when there is room for it on the stream."""
    for path in paths:
        with open(path, "rb") as file:
            yield file.read()


def main(address, paths):
    # A worker needs nothing of this.
    from forkring.client import Client

    with Client(address, pool="digests") as client:
        for result in client.process(contents(paths)):
            if result.error:
                raise result.error
            if result.partial and result.sequence == 0 and result.attempts > 1:
                print(f"a worker died of {paths[result.id]}, and another begins anew")
            place = f"{result.sequence * CHUNK:10}" if result.partial else "       all"
            print(f"{place} {result.payload.hex()} {paths[result.id]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
