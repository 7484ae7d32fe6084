"""A long run leaves nothing behind, in the workers nor in the front.

What leaks grows in each round. What is kept for reuse grows once, to the most that was ever needed at a time, and when that is
depends on who was scheduled when; so of several rounds, one without growth is enough.

`FORKRING_TEST_ITEMS=1000000` is how many items a round has.
"""

import json
import os
import re
import threading
from pathlib import Path

ITEMS = int(os.environ.get("FORKRING_TEST_ITEMS", 24_000))
ROUNDS = 6
WINDOW = 64
SIZES = [0, 10, 64, 65, 3000, 20_000, 100_000]


def run(app, count):
    """So many items; how many of them failed."""
    room = threading.Semaphore(WINDOW)
    payloads = [bytes([size % 250]) * size for size in SIZES]

    def items():
        for id in range(count):
            room.acquire()
            # 8 ways and 7 sizes, so that each meets each.
            yield app.item("flat", payloads[id % 7], id=id, metadata={"a": "1", "b": "2" * 50})

    failed = seen = 0
    for result in app.stream(items(), timeout=None):
        room.release()
        seen += 1
        failed += result.HasField("status")
        if result.id % 8 == 0:
            assert result.payload == payloads[result.id % 7]
    assert seen == count
    return failed


def has(pid):
    """What a process has, by what it is; memory of its own, in KiB."""
    folder = Path(f"/proc/{pid}")
    status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines())
    links = []
    for fd in (folder / "fd").iterdir():
        try:
            links.append(re.split(r"[\[:]", os.readlink(fd))[0])
        except OSError:
            pass
    return int(status["RssAnon"].split()[0]), (int(status["Threads"]), sorted(links))


def look(app):
    """All there is of a server, by name."""
    said = json.loads(app.call("flat", metadata={"do": "tell"}))
    assert said["pid"] in app.workers().values()
    processes = {"supervisor": app.process_id, "front": app.front(), "worker": said.pop("pid")}
    return said, {name: (pid, *has(pid)) for name, pid in processes.items()}


def test_a_long_run_leaves_nothing_behind(serve):
    app = serve("flat=flat.py:handle", quiet=False)
    run(app, 8000)
    said, before = look(app)
    growing = set(before)
    for _ in range(ROUNDS):
        assert run(app, ITEMS) == ITEMS // 4
        said_after, after = look(app)
        print(f"{ITEMS} items; {said} -> {said_after}")
        for name, (pid, memory, others) in before.items():
            pid_after, memory_after, others_after = after[name]
            print(f"{name}: {memory} KiB, {memory_after - memory} KiB more")
            assert (pid_after, others_after) == (pid, others), name
            # Half of the least object for each item.
            if memory_after - memory <= ITEMS * 8 // 1024:
                growing.discard(name)
        assert said_after["blocks"] - said["blocks"] < 100
        assert said_after["mappings"] <= said["mappings"] + 5
        if not growing:
            return
        said, before = said_after, after
    raise AssertionError(f"{growing} had more memory after each of {ROUNDS} rounds")
