"""Inputs of the target `segment`: each word outside of the arenas is garbage once of each kind, and then a bit of everything is
done. A fuzzer comes to most of that, but not within seconds.

    every_word.py FOLDER
"""

import pathlib
import sys

HEADER, CONTROL, ITEMS = 0, 1, 4
# As many as there are of each, or more: they are counted round.
WORDS = {HEADER: 32, CONTROL: 800, ITEMS: 256}
# As the target has them: a bit, a number added, a small number, anything.
GARBAGE = [
    bytes([0, 63]),
    bytes([1, 49, 1]),
    bytes([1, 0, 1]),
    bytes([2, 8, 2]),
    bytes([3, 0]) + bytes([0xC0, 0, 0, 0, 0, 0, 0, 0]),
    bytes([3, 0]) + bytes([0xFF] * 8),
]
OFFER, WORK, COLLECT, RELEASE, CANCEL, SWEEP, RING, END = 8, 14, 19, 23, 26, 28, 30, 31


def everything() -> bytes:
    offers = b"".join(bytes([OFFER, bits, length, 100, 9]) for bits in range(0, 16, 3) for length in (0, 2))
    work = b"".join(bytes([WORK, worker, length, 0, 1]) for worker in range(3) for length in (0, 3))
    rest = bytes([COLLECT, RELEASE, CANCEL, 3, SWEEP, 0, SWEEP, 2, RING, COLLECT, RELEASE])
    return offers + work + rest


folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for part, words in WORDS.items():
    for at in range(words):
        for kind, garbage in enumerate(GARBAGE):
            scribble = bytes([part, at >> 8, at & 255]) + garbage
            program = everything() + scribble + everything() + bytes([END, 0]) + everything() + bytes([END, 1])
            (folder / f"{part}-{at}-{kind}").write_bytes(program)
