"""Workers are killed again and again, and every item comes back once."""

import collections
import hashlib
import os
import random
import signal
import threading

import pytest
from harness import PATIENCE
from serving import until

WORKERS, ITEMS, KILLS, WINDOW, KILL_EVERY = 4, 10_000, 20, 256, 0.05


class Killer(threading.Thread):
    """Kills one of an app's workers, any one, every so often."""

    def __init__(self, app, chance):
        super().__init__()
        self._app = app
        self._chance = chance
        self._end = threading.Event()
        self._killed = set()

    @property
    def kills(self):
        return len(self._killed)

    def run(self):
        while not self._end.wait(KILL_EVERY):
            # The name is one that a worker gives itself, so it has started: one that is killed sooner would never come to
            # work. And on a busy machine one that was killed may take a while to die.
            alive = [worker for worker in self._app.workers().items() if worker[1] not in self._killed]
            if alive:
                self._kill(*self._chance.choice(alive))

    def _kill(self, name, pid):
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            # It is still the one that was meant, and this is a hold on it.
            if self._app.workers().get(name) == pid:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                self._killed.add(pid)
        except ProcessLookupError:
            pass
        finally:
            os.close(pidfd)

    def end(self):
        self._end.set()
        self.join()


def payload(id):
    """In the item's record, in one page, in several."""
    return id.to_bytes(8, "big") * (1, 8, 9, 500, 4000)[id % 5]


def digest(id):
    return hashlib.sha256(payload(id)).digest()


@pytest.mark.parametrize("options", [[], ["--preload"]], ids=["fresh", "forked"])
def test_nothing_is_lost_and_nothing_doubled_while_workers_are_killed(serve, tmp_path, monkeypatch, options):
    journal = tmp_path / "journal"
    journal.touch()
    monkeypatch.setenv("JOURNAL", str(journal))
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    app = serve(f"work:{WORKERS}=storm.py:work", arguments=["--max-attempts", "255", *options], quiet=False)
    until("all workers", lambda: len(app.workers()) == WORKERS)
    killer = Killer(app, random.Random(seed))
    room = threading.Semaphore(WINDOW)
    results = {}
    retried = 0
    sent = 0

    def items():
        nonlocal sent
        # However fast the machine is: so many workers were killed, and some of them had items.
        while sent < ITEMS or killer.kills < KILLS or retried == 0:
            assert room.acquire(timeout=PATIENCE), "the server stands still"
            yield app.item("work", payload(sent), id=sent)
            sent += 1

    killer.start()
    try:
        for result in app.stream(items(), timeout=5 * PATIENCE):
            room.release()
            assert result.id not in results, f"{result.id} came twice"
            assert not result.HasField("status"), result.status
            assert result.payload == digest(result.id)
            results[result.id] = result.attempts
            retried += result.attempts > 1
    finally:
        killer.end()

    print(f"{sent} items, {killer.kills} kills, {retried} items retried")
    assert sorted(results) == list(range(sent))
    # What the workers say agrees: no attempt ran twice, the last one is that of the result, and each one more has its death.
    began = collections.Counter(tuple(map(int, line.split())) for line in journal.read_text().splitlines())
    assert set(began.values()) == {1}
    last = {}
    for id, attempt in began:
        last[id] = max(attempt, last.get(id, 0))
    assert last == results
    assert sum(attempt - 1 for attempt in results.values()) <= killer.kills
    # And so does the server, in the end.
    until("a line for each death", lambda: app.log().count(") died: ") == killer.kills)
