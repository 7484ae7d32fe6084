"""What an item costs in a worker, from its claim to its completion: not a test, but what the tests' servers make easy.

    python python/tests/item_cost.py [--rounds N] [--json]

It wants the optimised wheel. Handlers that return their payload, in Rust and in Python, 64 items in flight; the least of
several rounds' medians counts, because others use the machine.
"""

import argparse
import json
import threading

import conftest  # noqa: F401 - finds the rest
import stubs
from serving import App

ITEMS, WINDOW = 20_000, 64


def round_of(app, pool, payload):
    """Microseconds of each item in the worker."""
    room = threading.Semaphore(WINDOW)

    def items():
        for _ in range(ITEMS):
            room.acquire()
            yield app.item(pool, payload)

    times = []
    for result in app.stream(items(), timeout=None):
        room.release()
        times.append(result.timing.worked_ns / 1000)
    return sorted(times)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="microseconds, median and 99 %%, by handler and bytes")
    options = parser.parse_args()
    costs = {"rust": {}, "python": {}}
    app = App(stubs.messages(), "python=basic.py:echo", arguments=["--pool", "rust=echo"])
    try:
        for size in (64, 1024):
            for pool, of_pool in costs.items():
                rounds = [round_of(app, pool, bytes(size)) for _ in range(options.rounds)]
                at = [len(rounds[0]) // 2, len(rounds[0]) * 99 // 100]
                median, tail = of_pool[size] = [min(times[rank] for times in rounds) for rank in at]
                if not options.json:
                    print(f"{pool:>8} {size:5} bytes: median {median:6.2f} us, 99 % {tail:6.2f} us")
    finally:
        app.close()
    if options.json:
        print(json.dumps(costs))


if __name__ == "__main__":
    main()
