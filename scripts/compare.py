"""Drives forkring and its peers with one load generator, `forkring bench`, and hands what it measured to the report.

Peers that do not speak `forkring.v1.Dispatcher` get the same load from `examples/peer_load.rs`.

Cases are interleaved, A B A B A B, because a virtual machine has moods that last longer than a run: a ratio is only
taken between runs that lie side by side. Started by scripts/compare, which builds what is needed. Ends only processes
that it started, also when it fails.
"""

import argparse
import json
import os
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
from compare_report import Case
from compare_servers import CORES, ROOT, WORK, Server, Starts, context_switches, cpu_seconds, private_bytes, tree

SMALL = ["tonic"]
LARGE = ["tonic", "tonic-wide"]
CASES = [
    Case("unary, 1", "call", 1, SMALL),
    Case("unary, 64", "call", 64, SMALL),
    Case("unary, 256", "call", 256, SMALL),
    Case("stream, 1", "process", 1, SMALL),
    Case("stream, 64", "process", 64, SMALL),
    Case("unary 1 MiB, 1", "call", 1, LARGE, payload=1 << 20),
    Case("unary 1 MiB, 8", "call", 8, LARGE, payload=1 << 20),
    Case("submit, 1", "submit", 1, ["baseline"]),
    Case("submit, 64", "submit", 64, ["baseline"]),
    Case("submit, 1024", "submit", 1024, ["baseline"]),
    # A Python worker; beside it the Rust worker, and what others make of Python.
    Case("python unary, 1", "call", 1, ["forkring", "triton"], subject="python", pool="echo"),
    Case("python unary, 64", "call", 64, ["forkring", "mosec", "mosec-batch", "triton"], subject="python", pool="echo"),
    Case("python stream, 64", "process", 64, ["forkring"], subject="python", pool="echo"),
    Case("python 4 MiB, 1", "call", 1, ["triton"], payload=4 << 20, subject="python", pool="increment"),
    Case("python cpu, 64", "submit", 64, ["python", "baseline-cpu", "baseline-cpu-n"], subject="python-n", pool="digests"),
]
ITEM_COST = "python item cost"


@dataclass
class Run:
    """One run of the load generator against one server."""

    report: dict  # what `forkring bench --json` printed
    cores: float  # how many cores the server's processes kept busy


@dataclass
class Results:
    runs: dict = field(default_factory=dict)  # (case name, server name) -> [Run]
    idle: dict = field(default_factory=dict)  # server name -> [compare_report.Process]
    bare: list = field(default_factory=list)  # (items/s of one process alone, of CORES processes)
    item_cost: dict = field(default_factory=dict)  # "rust", "python" -> bytes -> [µs: median, 99 %]
    faults: list = field(default_factory=list)  # what went wrong, in words


class Bench:
    def __init__(self, options):
        self.options = options
        self.results = Results()
        self.forkring = str(options.release / "forkring")
        self.starts = Starts(options)

    @contextmanager
    def servers(self, names):
        """Starts the servers; stops them however the block ends."""
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            started = []
            for name in names:
                server = Server(name, self.starts.of(name), Path(folder))
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

    def load_command(self, server, case):
        """What loads the server."""
        size = f"--in-flight {case.in_flight} --payload {case.payload}"
        if server.start.load == "bench":
            load = f"--mode {case.mode} {size}" + (f" --pool {case.pool}" if case.pool else "")
            return self.bench_command(server, load, self.options.warmup, self.options.seconds)
        target = "inference" if server.start.load == "http" else case.pool
        return [
            str(self.options.release / "examples" / "peer_load"), server.start.load, f"{server.address}/{target}",
            "--warmup", str(self.options.warmup), "--duration", str(self.options.seconds), *size.split(),
        ]

    def case(self, case):
        say(case.name)
        peers = [peer for peer in case.peers if peer != "triton" or self.options.triton]
        try:
            with self.servers([*peers, case.subject]) as servers:
                for _ in range(self.options.rounds):
                    for server in servers:
                        self.round(case, server)
                        time.sleep(0.3)  # the server settles: what one run left over must not be the next one's
                    if case.subject == "python-n":
                        self.results.bare.append((self.bare(1), self.bare(CORES)))
        except RuntimeError as error:
            self.fault(f"{case.name}: {error}")

    def bare(self, count):
        """CPU-bound items a second of so many processes with no server around them: what the machine gives."""
        command = [str(self.options.python), "-B", str(ROOT / "scripts" / "compare_app.py"), str(self.options.seconds)]
        environment = {**os.environ, **WORK}
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(count)]
        try:
            rate = sum(float(process.communicate(timeout=self.options.seconds + 60)[0]) for process in processes)
        except (ValueError, subprocess.TimeoutExpired) as error:
            raise RuntimeError(f"the processes with no server: {error}") from None
        finally:
            for process in processes:
                process.kill()
                process.wait()
        say(f"  {f'{count} bare':<11} {rate:>10,.0f}/s")
        return rate

    def item_cost(self):
        """What an item costs in the worker, from claim to completion."""
        say(ITEM_COST)
        script = ROOT / "python" / "tests" / "item_cost.py"
        command = [str(self.options.python), "-B", str(script), "--json", "--rounds", str(self.options.rounds)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            self.results.item_cost = json.loads(done.stdout)
        except subprocess.TimeoutExpired:
            return self.fault(f"{ITEM_COST}: it did not end")
        except ValueError:
            return self.fault(f"{ITEM_COST}: {done.stderr.strip()[-300:] or 'it printed nothing'}")
        say(f"  {self.results.item_cost}")

    def round(self, case, server):
        command = self.load_command(server, case)
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
    if server.name == "baseline":
        return "main" if pid == server.pid else "server or worker"
    return Path(f"/proc/{pid}/comm").read_text().strip()


def say(text):
    print(text, file=sys.stderr, flush=True)


# What scripts/compare builds and installs, and says where.
FROM_THE_SHELL = {
    "--release": "release",
    "--baseline-python": "baseline-venv/bin/python",
    "--python": "python-venv/bin/python",
    "--mosec-python": "peers-venv/bin/python",
    "--triton-folder": "triton",
}


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/compare", description="Measure forkring beside its peers.")
    parser.add_argument("--quick", action="store_true", help="short runs: to see that it works, not to quote")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each case and server [3]")
    parser.add_argument("--seconds", type=float, help="length of a run [3; with --quick 1]")
    parser.add_argument("--warmup", type=float, help="load before each run [1; with --quick 0.3]")
    parser.add_argument("--idle", type=float, help="how long to watch an idle server [10; with --quick 3]")
    only = "only cases with TEXT in their name (idle is one); prints the report unless --out says where"
    parser.add_argument("--only", metavar="TEXT", help=only)
    parser.add_argument("--triton", action="store_true", help="beside Triton's Python backend, too (a download of 55 MB)")
    parser.add_argument("--out", type=Path, help="where to write the report [docs]")
    for name, default in FROM_THE_SHELL.items():
        # Not resolved: a virtual environment's Python is a link.
        parser.add_argument(name, type=lambda path: Path(path).absolute(), default=ROOT / "target" / default, help=argparse.SUPPRESS)
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
        if argument in FROM_THE_SHELL or argument == "--out":
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
    idle, item_cost = wanted in "idle", wanted in ITEM_COST
    if not cases and not idle and not item_cost:
        sys.exit(f"no case has {wanted!r} in its name; there are: {'; '.join(c.name for c in CASES)}; {ITEM_COST}; idle")

    machine = compare_report.Machine.look()
    bench = Bench(options)
    for case in cases:
        bench.case(case)
    if item_cost:
        bench.item_cost()
    if idle:
        for name in ["forkring", "tonic", "baseline"]:
            bench.idle(name)

    report = compare_report.Report(bench.results, cases, options, machine)
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
