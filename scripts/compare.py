"""Drives forkring and its peers with one load generator, `forkring bench`, and hands what it measured to the report.

Cases are interleaved, A B A B A B, because a virtual machine has moods that last longer than a run: a ratio is only
taken between runs that lie side by side. Started by scripts/compare, which builds what is needed. Ends only processes
that it started, also when it fails.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import compare_report

ROOT = Path(__file__).resolve().parent.parent
LISTENING = re.compile(r"listening on ([0-9.]+:[0-9]+)")
START_TIMEOUT = 60
STOP_TIMEOUT = 20


@dataclass
class Case:
    name: str  # for --only and the plots
    load: str  # options of `forkring bench`
    peers: list  # beside forkring; the first is the one that ratios are taken against


SMALL = ["tonic"]
LARGE = ["tonic", "tonic-wide"]
CASES = [
    Case("unary, 1", "--mode call --in-flight 1", SMALL),
    Case("unary, 64", "--mode call --in-flight 64", SMALL),
    Case("unary, 256", "--mode call --in-flight 256", SMALL),
    Case("stream, 1", "--mode process --in-flight 1", SMALL),
    Case("stream, 64", "--mode process --in-flight 64", SMALL),
    Case("unary 1 MiB, 1", "--mode call --in-flight 1 --payload 1m", LARGE),
    Case("unary 1 MiB, 8", "--mode call --in-flight 8 --payload 1m", LARGE),
    Case("submit, 1", "--mode submit --in-flight 1", ["post"]),
    Case("submit, 64", "--mode submit --in-flight 64", ["post"]),
    Case("submit, 1024", "--mode submit --in-flight 1024", ["post"]),
]


@dataclass
class Run:
    """One run of the load generator against one server."""

    report: dict  # what `forkring bench --json` printed
    cores: float  # how many cores the server's processes kept busy


@dataclass
class Results:
    runs: dict = field(default_factory=dict)  # (case name, server name) -> [Run]
    idle: dict = field(default_factory=dict)  # server name -> [compare_report.Process]
    faults: list = field(default_factory=list)  # what went wrong, in words


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


class Server:
    """A server that this script started, in a session of its own."""

    def __init__(self, name, command, folder):
        self.name = name
        self.address = None  # once it listens
        self.errors = folder / f"{name}.stderr"
        self.output = folder / f"{name}.stdout"
        with self.output.open("w") as out, self.errors.open("w") as err:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        self.pid = self.process.pid

    def wait_until_listening(self):
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            found = LISTENING.search(self.output.read_text())
            if found:
                self.address = found[1]
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise RuntimeError(f"{self.name} did not start: {self.last_words()}")

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
        if self.name == "forkring" and self.address and (code != 0 or left):
            return f"forkring did not drain: exit {code}, {len(left)} processes left; {self.last_words()}"
        return None

    @staticmethod
    def lives(pid, started):
        now = stat(pid)
        return now is not None and now[2] == started


class Bench:
    def __init__(self, options):
        self.options = options
        self.results = Results()
        self.forkring = str(options.release / "forkring")
        tonic = str(options.release / "examples" / "bare_tonic")
        self.commands = {
            "forkring": [
                self.forkring, "serve", "--listen", "127.0.0.1:0", "--pool", "echo:1=echo",
                "--name", f"compare-{os.getpid()}",
            ],
            "tonic": [tonic, "--listen", "127.0.0.1:0"],
            "tonic-wide": [tonic, "--listen", "127.0.0.1:0", "--wide"],
            "post": [str(options.post_python), "-B", str(ROOT / "scripts" / "post" / "main.py"), "0"],
        }

    @contextmanager
    def servers(self, names):
        """Starts the servers; stops them however the block ends."""
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            started = []
            for name in names:
                server = Server(name, self.commands[name], Path(folder))
                stack.callback(self.stop, server)
                started.append(server)
            for server in started:
                server.wait_until_listening()
            yield started

    def stop(self, server):
        fault = server.stop()
        if fault:
            self.fault(fault)

    def fault(self, text):
        self.results.faults.append(text)
        say(f"  ! {text}")

    def bench_command(self, server, load, warmup, seconds):
        return [
            self.forkring, "bench", "--json", "--addr", server.address,
            "--warmup", f"{warmup}s", "--duration", f"{seconds}s", *load.split(),
        ]

    def case(self, case):
        say(case.name)
        try:
            with self.servers([*case.peers, "forkring"]) as servers:
                for _ in range(self.options.rounds):
                    for server in servers:
                        self.round(case, server)
                        time.sleep(0.3)  # the server settles: what one run left over must not be the next one's
        except RuntimeError as error:
            self.fault(f"{case.name}: {error}")

    def round(self, case, server):
        command = self.bench_command(server, case.load, self.options.warmup, self.options.seconds)
        used, began = cpu_seconds(server.pid), time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.options.seconds + 60)
        except subprocess.TimeoutExpired:
            return self.fault(f"{case.name}, {server.name}: the load generator did not end")
        cores = (cpu_seconds(server.pid) - used) / (time.monotonic() - began)
        try:
            report = json.loads(done.stdout)
        except ValueError:
            return self.fault(f"{case.name}, {server.name}: {done.stderr.strip() or 'the load generator said nothing'}")
        for key in ["failed", "failed_in_warmup", "unanswered", "unsent", "stray"]:
            if report[key]:
                reasons = "; ".join(f"{e['count']} × {e['code']} {e['reason']}" for e in report["errors"])
                self.fault(f"{case.name}, {server.name}: {report[key]} {key} {reasons}".rstrip())
        if not report["latency_ns"]:
            return self.fault(f"{case.name}, {server.name}: nothing succeeded")
        self.results.runs.setdefault((case.name, server.name), []).append(Run(report, cores))
        p50 = report["latency_ns"]["p50"] / 1000
        say(f"  {server.name:<11} {report['items_per_s']:>10,.0f}/s   p50 {p50:>10,.1f} µs   {cores:.2f} cores")

    def idle(self, name):
        """Context switches and private memory of a server that worked, and now has a client connected and no work."""
        say(f"idle, {name}")
        mode = "process" if name == "tonic" else "submit"
        try:
            with self.servers([name]) as [server]:
                busy = self.bench_command(server, f"--mode {mode} --in-flight 64", 0, 1)
                subprocess.run(busy, capture_output=True, timeout=60)
                # One item at once and the next long after we are done: a subscriber that waits.
                waiting = self.bench_command(server, f"--mode {mode} --rate 0.001 --drain 0s", 0, 900)
                client = subprocess.Popen(waiting, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                try:
                    time.sleep(2)
                    before = {pid: context_switches(pid) for pid in sorted(tree(server.pid))}
                    time.sleep(self.options.idle)
                    after = {pid: context_switches(pid) for pid in sorted(tree(server.pid))}
                    if client.poll() is not None:
                        self.fault(f"idle, {name}: the client that was to wait ended")
                    self.results.idle[name] = [
                        compare_report.Process(role(server, pid), after[pid] - before[pid], private_bytes(pid))
                        for pid in before
                        if pid in after
                    ]
                    if before.keys() != after.keys():
                        self.fault(f"idle, {name}: processes came or went")
                finally:
                    client.kill()
                    client.wait()
        except (RuntimeError, OSError) as error:
            self.fault(f"idle, {name}: {error}")


def role(server, pid):
    """What a process is, by the name it gave itself."""
    if server.name == "post":
        return "main" if pid == server.pid else "server or worker"
    return Path(f"/proc/{pid}/comm").read_text().strip()


def say(text):
    print(text, file=sys.stderr, flush=True)


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/compare", description="Measure forkring beside bare tonic and the Python post's program.")
    parser.add_argument("--quick", action="store_true", help="short runs: to see that it works, not to quote")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each case and server [3]")
    parser.add_argument("--seconds", type=float, help="length of a run [3; with --quick 1]")
    parser.add_argument("--warmup", type=float, help="load before each run [1; with --quick 0.3]")
    parser.add_argument("--idle", type=float, help="how long to watch an idle server [10; with --quick 3]")
    only = "only cases with TEXT in their name (idle is one); prints the report unless --out says where"
    parser.add_argument("--only", metavar="TEXT", help=only)
    parser.add_argument("--out", type=Path, help="where to write the report [docs]")
    parser.add_argument("--release", type=Path, default=ROOT / "target/release", help=argparse.SUPPRESS)
    parser.add_argument("--post-python", type=Path, default=ROOT / "target/post-venv/bin/python", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name, long, short in [("seconds", 3.0, 1.0), ("warmup", 1.0, 0.3), ("idle", 10.0, 3.0)]:
        if getattr(options, name) is None:
            setattr(options, name, short if options.quick else long)
    if options.rounds < 1 or options.seconds <= 0 or options.warmup < 0 or options.idle <= 0:
        parser.error("--rounds, --seconds and --idle must be above 0, --warmup not below")
    options.command = shlex.join(["scripts/compare", *own_arguments()])
    return options


def own_arguments():
    """The arguments as the user gave them, without those that scripts/compare put first."""
    given, rest = sys.argv[1:], []
    while given:
        argument = given.pop(0)
        if argument in ("--release", "--post-python", "--out"):
            given.pop(0)
        else:
            rest.append(argument)
    return rest


def main():
    options = arguments()
    # So that a SIGTERM, too, leaves through the `finally`s that end the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wanted = options.only or ""
    cases = [case for case in CASES if wanted in case.name]
    idle = wanted in "idle"
    if not cases and not idle:
        sys.exit(f"no case has {wanted!r} in its name; there are: {'; '.join(c.name for c in CASES)}; idle")

    machine = compare_report.Machine.look()
    bench = Bench(options)
    for case in cases:
        bench.case(case)
    if idle:
        for name in ["forkring", "tonic", "post"]:
            bench.idle(name)

    report = compare_report.Report(bench.results, [case.name for case in cases], options, machine)
    if options.only and not options.out:
        print(report.markdown())
    else:
        folder = options.out or ROOT / "docs"
        for name, text in report.files().items():
            (folder / name).write_text(text)
            say(f"wrote {folder / name}")
    sys.exit(1 if bench.results.faults else 0)


if __name__ == "__main__":
    main()
