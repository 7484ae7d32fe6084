"""A server of Python handlers."""

import os
import re
import signal
import time
from pathlib import Path

import grpc
import harness
from harness import PATIENCE

APPS = Path(__file__).resolve().parent / "apps"


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
        """Pids by name."""
        children = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    stat = (folder / "stat").read_text()
                except OSError:
                    continue
                name, rest = re.match(r"\d+ \((.*)\) (.*)", stat, re.S).groups()
                state, parent = rest.split()[:2]
                if int(parent) == self.process_id and state not in "ZX" and re.fullmatch(r"forkring-w\d+", name):
                    children[name] = int(folder.name)
        return children

    @property
    def process_id(self):
        return self.process.pid

    def interrupt(self):
        """As by Ctrl-C, which a terminal sends to everybody."""
        self._terminated = True
        for pid in self.workers().values():
            os.kill(pid, signal.SIGINT)
        self.process.send_signal(signal.SIGINT)

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


def until(what, look):
    """Looks until there is what is looked for."""
    begin = time.monotonic()
    while not (found := look()):
        assert time.monotonic() - begin < PATIENCE, f"waited for {what}"
        time.sleep(0.005)
    return found
