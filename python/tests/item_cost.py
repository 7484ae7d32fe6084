"""What an item costs in a worker, from its claim to its completion: not a test, but what the tests' servers make easy.

    python python/tests/item_cost.py

It wants the optimised wheel. Handlers that return their payload, in Rust and in Python, 64 items in flight; the least of
several rounds' medians counts, because others use the machine.
"""

import conftest  # noqa: F401 - finds the rest
import stubs
from serving import App

ROUNDS, ITEMS, WINDOW = 10, 20_000, 64


def round_of(app, pool, payload):
    """Microseconds of each item in the worker."""
    import threading

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
    app = App(stubs.messages(), "python=basic.py:echo", arguments=["--pool", "rust=echo"])
    try:
        for size in (64, 1024):
            for pool in ("rust", "python"):
                rounds = [round_of(app, pool, bytes(size)) for _ in range(ROUNDS)]
                median = min(times[len(times) // 2] for times in rounds)
                tail = min(times[len(times) * 99 // 100] for times in rounds)
                print(f"{pool:>8} {size:5} bytes: median {median:6.2f} us, 99 % {tail:6.2f} us")
    finally:
        app.close()


if __name__ == "__main__":
    main()
