"""What the tests share: a real `forkring serve`, items that run until they are told to end, statuses taken apart.

Nothing here sleeps: a test waits for an event, and PATIENCE only bounds how long a broken server can hold it up.
"""

import itertools
import os
import select
import subprocess
import tempfile
from pathlib import Path

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

ROOT = Path(__file__).resolve().parents[3]
BINARY = os.environ.get("FORKRING_BIN") or ROOT / "target" / "debug" / "forkring"
PATIENCE = 60  # seconds

# The program of a Gate's pool: it says that it has begun, and its result is the line that it is then given.
GATE = """exec:sh -c 'read path; exec 3>"$path.alive"; echo >&3; exec head -n 1 "$path.line"'"""

# A client's own limit of 4 MiB is not what is tested here.
ANY_SIZE = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

_serial = itertools.count()


class Server:
    """A `forkring serve` of its own; leaving it drains it, and checks that it leaves nothing behind."""

    def __init__(self, *arguments):
        self.name = f"clients-{os.getpid()}-{next(_serial):03}"
        self._terminated = False
        self._log = tempfile.TemporaryFile()
        # The kernel ends it if this process dies; settings of the machine's owner are not its own.
        listen = [] if "--listen" in arguments else ["--listen", "127.0.0.1:0"]
        command = [BINARY, "serve", "--name", self.name, *listen, "--parent", str(os.getpid())]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FORKRING_")}
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**environment, "FORKRING_LOG": "warn"},
        )
        line = self.process.stdout.readline()
        if not line.startswith("listening on "):
            self.process.wait()
            raise RuntimeError(f"the server did not start: {self.log()}")
        self.address = line.removeprefix("listening on ").strip()

    def log(self):
        # Not by seek and read: its place in the file is the server's, too.
        file = self._log.fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode()

    def channel(self, *options, **named):
        return grpc.insecure_channel(self.address, options=[*ANY_SIZE, *options], **named)

    def aio_channel(self, *options):
        return grpc.aio.insecure_channel(self.address, options=[*ANY_SIZE, *options])

    def terminate(self):
        """Begins the drain; a second signal would cut it short."""
        if not self._terminated:
            self._terminated = True
            self.process.terminate()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.terminate()
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self.process.stdout.close()
        if kind is None:
            assert code == 0, self.log()
            # Nothing went wrong that is worth a warning.
            assert self.log() == ""
            assert [name for name in os.listdir("/dev/shm") if self.name in name] == []


class Gate:
    """An item of a pool that runs GATE: it is known when it begins and ends, and it ends when it is told."""

    def __init__(self, folder):
        self.path = Path(folder) / f"gate-{next(_serial)}"
        for end in ("alive", "line"):
            os.mkfifo(f"{self.path}.{end}")
        self._alive = os.open(f"{self.path}.alive", os.O_RDONLY | os.O_NONBLOCK)
        # Read and write: so it opens at once, and what is written waits for its reader.
        self._line = os.open(f"{self.path}.line", os.O_RDWR)

    @property
    def payload(self):
        return f"{self.path}\n".encode()

    def wait_until_begun(self):
        assert self._poll(select.POLLIN), "the item has not begun"
        os.read(self._alive, 1)

    def has_begun(self):
        return self._poll(select.POLLIN, 0)

    def open(self, result=b"done"):
        """Ends the item; its result is a line."""
        os.write(self._line, result + b"\n")

    def wait_until_killed(self):
        assert self._poll(0), "the item still runs"

    def _poll(self, events, seconds=PATIENCE):
        poll = select.poll()
        poll.register(self._alive, events)
        return bool(poll.poll(seconds * 1000))

    def close(self):
        os.close(self._alive)
        os.close(self._line)


def error_of(failed):
    """Code, reason and message of a failed call, in the rich form, which must agree with the plain one."""
    status = rpc_status.from_call(failed)
    assert status is not None, f"{failed.code()} has no details: {failed.details()}"
    assert (status.code, status.message) == (failed.code().value[0], failed.details())
    info = detail_of(status, error_details_pb2.ErrorInfo)
    assert info.domain == "forkring"
    return failed.code().name, info.reason, status.message


def detail_of(status, kind):
    """The status' one detail of that kind."""
    (packed,) = [detail for detail in status.details if detail.Is(kind.DESCRIPTOR)]
    detail = kind()
    packed.Unpack(detail)
    return detail
