"""Servers of Python handlers."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import harness
from harness import PATIENCE

APPS = Path(__file__).resolve().parent / "apps"
FORKRING = str(Path(sys.executable).with_name("forkring"))


def run(*arguments, folder):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FORKRING_")}
    return subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL
    )


class App(harness.Server):
    """`forkring serve` with a pool for each of these handlers: `file.py:handler`, in `apps/`, with one worker.

    With `quiet` its log must be empty in the end.
    """

    def __init__(self, messages, *handlers, arguments=(), quiet=True, apps=APPS):
        self._messages = messages
        self._quiet = quiet
        self._closed = False
        pools = []
        for handler in handlers:
            name, _, spec = handler.rpartition("=")
            pools += ["--pool", f"{name or handler.rpartition(':')[2]}={apps}/{spec}"]
        # Light, so that many run at a time.
        light = ["--workers", "1", "--arena", "20MiB", "--max-message", "16MiB", "--capacity", "256", "--grace", "40s"]
        super().__init__(*light, *pools, *arguments)
        self._channel = self.channel()
        self._call = self._channel.unary_unary(
            "/forkring.v1.Dispatcher/Call",
            request_serializer=messages.WorkItem.SerializeToString,
            response_deserializer=messages.WorkResult.FromString,
        )
        self._process = self._channel.stream_stream(
            "/forkring.v1.Dispatcher/Process",
            request_serializer=messages.WorkItem.SerializeToString,
            response_deserializer=messages.WorkResult.FromString,
        )

    def item(self, pool, payload=b"", **fields):
        return self._messages.WorkItem(pool=pool, payload=payload, **fields)

    def result(self, pool, payload=b"", timeout=PATIENCE, **fields):
        """The whole WorkResult."""
        return self._call(self.item(pool, payload, **fields), timeout=timeout)

    def call(self, pool, payload=b"", **fields):
        """What the handler returned."""
        return self.result(pool, payload, **fields).payload

    def begin(self, pool, payload=b"", **fields):
        """A call that goes on meanwhile."""
        return self._call.future(self.item(pool, payload, **fields), timeout=PATIENCE)

    def stream(self, items, timeout=PATIENCE):
        return self._process(iter(items), timeout=timeout)

    def error(self, pool, payload=b"", **fields):
        """The RpcError of a call that must fail."""
        try:
            answer = self.result(pool, payload, **fields)
        except grpc.RpcError as error:
            return error
        raise AssertionError(f"it must fail, and gave {answer}")

    def workers(self):
        """Pids by name, of those that have begun."""
        return self.children(r"forkring-w\d+")

    def front(self):
        """Its pid."""
        (front,) = self.children("forkring-front").values()
        return front

    def nursery(self):
        """Its pid, once it is there."""

        def alone():
            # A worker that was just forked has its name.
            found = self.processes("forkring-n0", "[^ZX]")
            return len(found) == 1 and found[0][1]

        return until("a nursery", alone)

    def children(self, names=".*", states="[^ZX]"):
        """The supervisor's; pids by name."""
        return dict(self.processes(names, states))

    def processes(self, names, states):
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    stat = (folder / "stat").read_text()
                except OSError:
                    continue
                name, rest = re.match(r"\d+ \((.*)\) (.*)", stat, re.S).groups()
                state, parent = rest.split()[:2]
                if int(parent) == self.process_id and re.fullmatch(states, state) and re.fullmatch(names, name):
                    found.append((name, int(folder.name)))
        return found

    @property
    def process_id(self):
        return self.process.pid

    def interrupt(self):
        """As by Ctrl-C, which a terminal sends to everybody."""
        self._terminated = True
        for pid in self.workers().values():
            os.kill(pid, signal.SIGINT)
        self.process.send_signal(signal.SIGINT)

    def abandon(self):
        """It was killed, and what it left is gone."""
        self._closed = True
        self._channel.close()

    def close(self):
        if self._closed:
            return
        self._closed = True
        self._channel.close()
        self.terminate()
        try:
            code = self.process.wait(PATIENCE)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.process.stdout.close()
        log = self.log()
        assert code == 0, log
        assert [name for name in os.listdir("/dev/shm") if self.name in name] == []
        if self._quiet:
            assert log == ""


class Started:
    """A command that serves; it is drained in the end, and then `output` is what it printed beside its address."""

    def __init__(self, *command, folder, **variables):
        self.log = open(folder / "log", "w+")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FORKRING_")}
        environment.update(FORKRING_ARENA="1MiB", FORKRING_MAX_MESSAGE="512KiB", PYTHONDONTWRITEBYTECODE="1", **variables)
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        line = self.process.stdout.readline()
        self.address = line.removeprefix("listening on ").strip()
        self.folder = folder
        if not line.startswith("listening on "):
            self.process.wait()
            raise RuntimeError((folder / "log").read_text())

    def __enter__(self):
        return self

    def call(self, pool, text):
        (self.folder / "input").write_text(text)
        outcome = run(FORKRING, "call", "--addr", self.address, pool, "input", folder=self.folder)
        assert outcome.returncode == 0, outcome.stderr
        return outcome.stdout

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(PATIENCE)
            self.output = self.process.stdout.read()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.process.stdout.close()
            self.log.close()
        assert code == 0, (self.folder / "log").read_text()


def until(what, look):
    """Looks until there is what is looked for."""
    begin = time.monotonic()
    while not (found := look()):
        assert time.monotonic() - begin < PATIENCE, f"waited for {what}"
        time.sleep(0.005)
    return found
