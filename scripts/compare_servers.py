"""The servers that scripts/compare measures: how each is started, when it is ready, and how it is ended.

Ends only processes that it started, also when it fails.
"""

import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LISTENING = re.compile(r"listening on ([0-9.]+:[0-9]+)")
TRITON_LISTENING = re.compile(r"Started GRPCInferenceService at ([0-9.]+:[0-9]+)")
START_TIMEOUT = 60
STOP_TIMEOUT = 20
CORES = len(os.sched_getaffinity(0))
# What an item of CPU-bound work is, some ten milliseconds: to the baseline's worker, and to compare_app.py.
WORK = {"WORK_DIGESTS": "20000"}


# --- processes: read from /proc


def stat(pid):
    """(parent, ticks of CPU, start time), or None when there is no such process or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    if fields[0] in "ZX":
        return None
    return int(fields[1]), int(fields[11]) + int(fields[12]), int(fields[19])


def tree(root):
    """The process and all its descendants, as {pid: (parent, ticks, start time)}."""
    everyone = {int(entry): stat(entry) for entry in os.listdir("/proc") if entry.isdigit()}
    found, todo = {}, [root]
    while todo:
        pid = todo.pop()
        if everyone.get(pid):
            found[pid] = everyone[pid]
            todo += [child for child, of in everyone.items() if of and of[0] == pid]
    return found


def cpu_seconds(root):
    return sum(ticks for _, ticks, _ in tree(root).values()) / os.sysconf("SC_CLK_TCK")


def context_switches(pid):
    """Of all threads, voluntary or not."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += sum(int(n) for n in re.findall(r"ctxt_switches:\s+(\d+)", (task / "status").read_text()))
    return total


def private_bytes(pid):
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(n) for n in re.findall(r"Private_(?:Clean|Dirty):\s+(\d+) kB", rollup))


# --- servers


@dataclass
class Start:
    """How a server is started, and how it is loaded."""

    command: list
    environment: dict = field(default_factory=dict)
    load: str = "bench"  # bench; or what `peer_load` is to speak
    # What it prints with its address once it listens; None: it is asked at this port.
    listening: re.Pattern | None = LISTENING
    port: int = 0
    leaves: str = ""  # what it may leave in /dev/shm when it is killed


class Starts:
    """How each server is started, by name."""

    def __init__(self, options):
        self.options = options

    def of(self, name):
        return getattr(self, name.replace("-", "_"))()

    def forkring(self):
        return self._forkring(self.options.release / "forkring", "echo:1=echo")

    def python(self):
        return self._python("echo:1", "increment:1", "digests:1")

    def python_n(self):
        return self._python(f"digests:{CORES}")

    def tonic(self, *more):
        return Start([self.options.release / "examples" / "bare_tonic", "--listen", "127.0.0.1:0", *more])

    def tonic_wide(self):
        return self.tonic("--wide")

    def baseline(self, **environment):
        command = [self.options.baseline_python, "-B", ROOT / "scripts" / "baseline" / "main.py", "0"]
        return Start(command, environment)

    def baseline_cpu(self):
        return self.baseline(**WORK)

    def baseline_cpu_n(self):
        # One of them is the server.
        return self.baseline(**WORK, PROCESSES=str(CORES + 1))

    def mosec(self, batch=1):
        port = free_port()
        command = [self.options.mosec_python, "-B", ROOT / "scripts" / "peers" / "mosec_worker.py"]
        command += ["--address", "127.0.0.1", "--port", str(port), "--timeout", "60000"]
        return Start(command, {"WORKERS": "1", "BATCH": str(batch)}, "http", None, port)

    def mosec_batch(self):
        return self.mosec(64)

    def triton(self):
        server = self.options.triton_folder / "pytriton" / "tritonserver"
        prefix = f"compare-{os.getpid()}"
        command = [
            server / "bin" / "tritonserver", f"--model-repository={ROOT}/scripts/peers/triton",
            f"--backend-directory={server}/backends", "--allow-http=false", "--allow-metrics=false",
            "--grpc-address=127.0.0.1", f"--grpc-port={free_port()}",
            f"--backend-config=python,shm-region-prefix-name={prefix}",
            # As much as it will need, so that it does not grow while it is measured.
            f"--backend-config=python,shm-default-byte-size={64 << 20}",
        ]
        packages = str(self.options.triton_folder)
        return Start(command, {"PACKAGES": packages}, "triton", TRITON_LISTENING, leaves=f"{prefix}*")

    def _python(self, *pools):
        pools = [f"{pool}={ROOT}/scripts/compare_app.py:{pool.partition(':')[0]}" for pool in pools]
        return self._forkring(self.options.python.with_name("forkring"), *pools)

    def _forkring(self, program, *pools):
        name = f"compare-{os.getpid()}-{program.parent.name}-{len(pools)}"
        command = [program, "serve", "--listen", "127.0.0.1:0", "--name", name]
        return Start(command + [part for pool in pools for part in ("--pool", pool)], WORK)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server that this script started, in a session of its own."""

    def __init__(self, name, start, folder):
        self.name = name
        self.start = start
        self.address = None  # once it listens
        self.errors = folder / f"{name}.stderr"
        self.output = folder / f"{name}.stdout"
        with self.output.open("w") as out, self.errors.open("w") as err:
            self.process = subprocess.Popen(
                [str(part) for part in start.command], stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=folder,
                env={**os.environ, **start.environment}, start_new_session=True,
            )
        self.pid = self.process.pid

    def wait_until_listening(self):
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            self.address = self.look()
            if self.address:
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise RuntimeError(f"{self.name} did not start: {self.last_words()}")

    def look(self):
        """Its address, if it is ready."""
        if self.start.listening:
            found = self.start.listening.search(self.output.read_text() + self.errors.read_text())
            return found and found[1]
        address = f"127.0.0.1:{self.start.port}"
        try:
            with urllib.request.urlopen(f"http://{address}/inference", b"x", timeout=START_TIMEOUT):
                return address
        except OSError:
            return None

    def last_words(self):
        lines = (self.errors.read_text() + self.output.read_text()).strip().splitlines()
        return " | ".join(lines[-3:]) or "it printed nothing"

    def stop(self):
        """SIGTERM, then SIGKILL for what is left of it. Returns what was not as it should be."""
        family = tree(self.pid)
        if self.process.poll() is None:
            self.process.terminate()
        try:
            code = self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            code = f"SIGTERM ignored for {STOP_TIMEOUT} s"
        deadline = time.monotonic() + 1
        while left := [pid for pid, (_, _, started) in family.items() if self.lives(pid, started)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()
        if self.start.leaves:
            for file in Path("/dev/shm").glob(self.start.leaves):
                file.unlink(missing_ok=True)
        ours = self.name in ("forkring", "python", "python-n")
        if ours and self.address and (code != 0 or left):
            return f"{self.name} did not drain: exit {code}, {len(left)} processes left; {self.last_words()}"
        return None

    @staticmethod
    def lives(pid, started):
        now = stat(pid)
        return now is not None and now[2] == started
