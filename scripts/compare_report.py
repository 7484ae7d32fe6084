"""What scripts/compare measured, as docs/benchmarks.md and two plots."""

import os
import platform
import statistics
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import compare_plot
from compare_servers import CORES

BASELINE = "baseline (grpc.aio + multiprocessing.Queue)"
# As compare.py and its cases call them -> as the reader sees them.
SERVERS = {
    "forkring": "forkring",
    "tonic": "bare tonic",
    "tonic-wide": "bare tonic, wide",
    "baseline": BASELINE,
    "python": "forkring, a Python worker",
    "python-n": f"forkring, {CORES} Python workers",
    "mosec": "mosec",
    "mosec-batch": "mosec, batches",
    "triton": "Triton",
    "baseline-cpu": BASELINE,
    "baseline-cpu-n": f"the same, {CORES} workers",
}


@dataclass
class Case:
    name: str  # for --only and the plots
    mode: str  # of `forkring bench`
    in_flight: int
    peers: list  # what the subject is measured beside
    payload: int = 64
    subject: str = "forkring"
    pool: str = ""

    @property
    def is_python(self):
        return self.name.startswith("python")


@dataclass
class Target:
    text: str
    case: str
    metric: str  # items_per_s or p50
    peer: str
    bound: float
    at_least: bool

    def met(self, ratio):
        return ratio >= self.bound if self.at_least else ratio <= self.bound


TARGETS = [
    Target("unary, 64 in flight: items/s ≥ 0.75 × bare tonic", "unary, 64", "items_per_s", "tonic", 0.75, True),
    Target("unary alone: p50 ≤ 1.0 × bare tonic", "unary, 1", "p50", "tonic", 1.0, False),
    Target("one `Process` stream, one at a time: p50 ≤ 0.7 × bare tonic", "stream, 1", "p50", "tonic", 0.7, False),
    Target("`Submit`/`GetUpdates`, 64: items/s ≥ 20 × the baseline", "submit, 64", "items_per_s", "baseline", 20, True),
    Target("`Submit`/`GetUpdates`, 1024: items/s ≥ 20 × the baseline", "submit, 1024", "items_per_s", "baseline", 20, True),
    Target("`Submit`/`GetUpdates` alone: p50 ≤ 1/300 of the baseline", "submit, 1", "p50", "baseline", 1 / 300, False),
    Target("1 MiB unary alone: items/s ≥ 1.5 × bare tonic on defaults", "unary 1 MiB, 1", "items_per_s", "tonic", 1.5, True),
    Target("1 MiB unary, 8: items/s ≥ 1.5 × bare tonic on defaults", "unary 1 MiB, 8", "items_per_s", "tonic", 1.5, True),
    Target("a Python worker, unary, 64: items/s ≥ 0.6 × the Rust worker", "python unary, 64", "items_per_s", "forkring", 0.6, True),
    Target("a Python worker, one stream, 64: items/s ≥ 0.6 × the Rust worker", "python stream, 64", "items_per_s", "forkring", 0.6, True),
    Target("a Python worker, unary, 64: items/s ≥ 8 × mosec", "python unary, 64", "items_per_s", "mosec", 8, True),
    Target("a Python worker, unary alone: p50 ≤ 0.5 × Triton", "python unary, 1", "p50", "triton", 0.5, False),
    Target("a Python worker, unary, 64: items/s ≥ 3 × Triton", "python unary, 64", "items_per_s", "triton", 3, True),
    Target("4 MiB through NumPy, alone: items/s ≥ 2 × Triton", "python 4 MiB, 1", "items_per_s", "triton", 2, True),
    Target(f"{CORES} CPU-bound Python workers: items/s ≥ {0.95 * CORES:g} × one", "python cpu, 64", "items_per_s", "python", 0.95 * CORES, True),
]
ITEM_COST_US = 3.0  # of 64 bytes, in Python
WORKER_BYTES = 5e6
FRONT_BYTES = 20e6


@dataclass
class Process:
    """A server's process while idle."""

    role: str
    switches: int
    private: int


@dataclass
class Machine:
    text: str
    load: float

    @staticmethod
    def look():
        cpuinfo = Path("/proc/cpuinfo").read_text()
        fields = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
        fields = {name.strip(): value.strip() for name, value in fields.items()}
        virtual = "virtual, " if "hypervisor" in fields.get("flags", "").split() else ""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        rustc = subprocess.run(["rustc", "--version"], capture_output=True, text=True).stdout.split()
        text = (
            f"{fields.get('model name', platform.machine())}, {virtual}{len(os.sched_getaffinity(0))} cores, "
            f"{memory:.0f} GiB, Linux {platform.release()}, {' '.join(rustc[:2])}, "
            f"Python {platform.python_version()}"
        )
        return Machine(text, os.getloadavg()[0])


def metric(run, name):
    return run.report["items_per_s"] if name == "items_per_s" else run.report["latency_ns"][name]


def time_text(nanos):
    for unit, size in [("s", 1e9), ("ms", 1e6), ("µs", 1e3)]:
        if nanos >= size:
            value = nanos / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{nanos:.0f} ns"


def tick_text(nanos):
    value, unit = time_text(nanos).split()
    return f"{float(value):g} {unit}"


def ratio_text(ratio):
    if ratio < 0.05:
        return f"1/{1 / ratio:.0f}"
    return f"{ratio:.{2 if ratio < 10 else 0}f} ×"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


class Report:
    def __init__(self, results, cases, options, machine):
        self.results, self.options, self.machine = results, options, machine
        self.cases = {case.name: case for case in cases}

    def files(self):
        files = {"benchmarks.md": self.markdown()}
        if self.plotted():
            files["benchmarks-latency.svg"] = self.latency_plot()
            files["benchmarks-throughput.svg"] = self.throughput_plot()
        return files

    # --- numbers

    def median(self, case, server, name):
        return statistics.median(metric(run, name) for run in self.results.runs[case, server])

    def ratio(self, case, peer, name):
        """(ratio of the medians, least, greatest ratio of a round), or None where one was not measured."""
        subject = self.cases[case].subject
        ours, theirs = self.results.runs.get((case, subject)), self.results.runs.get((case, peer))
        if not ours or not theirs or not self.median(case, peer, name):
            return None
        of_rounds = [metric(a, name) / metric(b, name) for a, b in zip(ours, theirs) if metric(b, name)]
        return self.median(case, subject, name) / self.median(case, peer, name), min(of_rounds), max(of_rounds)

    def servers(self, case):
        """Of those that were measured the subject, and then the others."""
        subject = self.cases[case].subject
        return sorted((server for server in SERVERS if (case, server) in self.results.runs), key=lambda server: server != subject)

    def plotted(self):
        """The cases of the plots, which are of the Rust worker."""
        return [name for name, case in self.cases.items() if not case.is_python and self.servers(name)]

    # --- text

    def markdown(self):
        options = self.options
        parts = [
            "# Benchmarks\n",
            f"Written by `{options.command}` on {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC; do not edit.\n",
            f"Machine: {self.machine.text}. {self.quiet()}\n",
            f"Each case: {options.rounds} rounds of {options.seconds:g} s after {options.warmup:g} s of warm-up for each server in "
            "turn (A, B, A, B …), client and servers on the same cores. A ratio is that of the medians; in brackets the "
            "least and the greatest ratio of a round. Digits are this machine's on this day, ratios are what to look at.\n",
        ]
        if self.results.faults:
            parts.append("**What went wrong:**\n")
            parts.append("".join(f"- {fault}\n" for fault in self.results.faults))
        targets = self.targets()
        if targets:
            parts += ["## Targets\n", table(["target", "measured", "over the rounds", ""], targets)]
        ours = [name for name, case in self.cases.items() if not case.is_python]
        python = [name for name, case in self.cases.items() if case.is_python]
        if any(self.servers(name) for name in ours):
            parts += ["## Side by side\n", self.who(), self.measured(ours)]
            if self.plotted() and (not options.only or options.out):
                parts.append("![Latency](benchmarks-latency.svg)\n\n![Throughput](benchmarks-throughput.svg)\n")
        if any(self.servers(name) for name in python):
            parts += ["## Python\n", self.who_python(), self.measured(python)]
        if self.results.bare:
            parts.append(self.bare())
        if self.results.item_cost:
            parts.append(self.item_cost())
        if self.results.idle:
            parts += ["## Idle\n", self.idle()]
        return "\n".join(parts)

    def quiet(self):
        load, cores = self.machine.load, len(os.sched_getaffinity(0))
        busy = "**not quiet: measure again**" if load > 0.25 * cores else "quiet"
        return f"Load before the start: {load:.2f} ({busy})."

    def who(self):
        return (
            "*forkring* has one `echo` worker: every item crosses to another process and back. *Bare tonic* "
            "(`examples/bare_tonic.rs`) answers from the handler, on tonic's default settings; *wide* is the same with larger "
            "windows and frames. *Baseline* (`scripts/baseline`) is a server of grpc.aio, two `multiprocessing.Queue`s and worker "
            "processes. The load generator, `forkring bench`, is the same for all. Payload 64 B unless said otherwise; the number "
            "is how many items are in flight on one connection; *cores* is what the server's processes kept busy.\n"
        )

    def who_python(self):
        triton = (
            "*Triton* is its server with its Python backend, one instance of a model, from the wheel of `nvidia-pytriton`."
            if self.options.triton
            else "Triton was not measured; `--triton` does it."
        )
        return (
            "Each is one worker process and handles one item at a time unless said otherwise; *forkring* has the Rust worker, `echo`. "
            "*mosec* is HTTP: its load has the shape of `forkring bench`'s, but over as many HTTP/1.1 connections as items are in "
            f"flight (`examples/peer_load.rs`); *batches* has its worker take up to 64 items at a time. {triton} *4 MiB* is an array in "
            "and one more than each element out. *cpu* is some ten milliseconds of Python's `hashlib` for each item, submitted, "
            "the same in all; the baseline has a worker less than the machine has cores, unless said otherwise.\n"
        )

    def bare(self):
        """What the machine gives to more processes."""
        one, all_of_them = (statistics.median(rates) for rates in zip(*self.results.bare))
        return (
            f"The same CPU-bound work in processes with no server around them: one does {one:,.0f} items/s, {CORES} do "
            f"{all_of_them:,.0f}, which is {all_of_them / one:.2f} ×.\n"
        )

    def item_cost(self):
        rows = [
            [f"{size} B", {"rust": "Rust", "python": "Python"}[handler], f"{median:.2f} µs", f"{tail:.2f} µs"]
            for handler, sizes in self.results.item_cost.items()
            for size, (median, tail) in sizes.items()
        ]
        text = (
            "What an item costs in the worker, from its claim to its completion, with a handler that returns its input; 64 in "
            "flight, the least of several rounds (`python/tests/item_cost.py`):\n\n"
        )
        return text + table(["payload", "handler", "median", "99 %"], rows)

    def measured(self, cases):
        rows = []
        for case in cases:
            servers = self.servers(case)
            for server in servers:
                runs = self.results.runs[case, server]
                rates = [metric(run, "items_per_s") for run in runs]
                rows.append([
                    case if server == servers[0] else "",
                    SERVERS[server],
                    f"{statistics.median(rates):,.0f} ({min(rates):,.0f}–{max(rates):,.0f})",
                    *(time_text(self.median(case, server, name)) for name in ["p50", "p99", "p99.9"]),
                    f"{statistics.median(run.cores for run in runs):.2f}",
                    *(["", ""] if server == self.cases[case].subject else [self.beside(case, server, name) for name in ["items_per_s", "p50"]]),
                ])
        head = ["case", "server", "items/s", "p50", "p99", "p99.9", "cores", "first / this: items/s", "p50"]
        return table(head, rows)

    def beside(self, case, peer, name):
        ratio = self.ratio(case, peer, name)
        return ratio_text(ratio[0]) if ratio else "not measured"

    def targets(self):
        rows = []
        for target in TARGETS:
            if target.case not in self.cases or (target.peer == "triton" and not self.options.triton):
                continue
            ratio = self.ratio(target.case, target.peer, target.metric)
            if ratio is None:
                rows.append([target.text, "not measured", "", "FAIL"])
                continue
            of_medians, least, greatest = ratio
            spread = f"[{ratio_text(least)} … {ratio_text(greatest)}]"
            rows.append([target.text, ratio_text(of_medians), spread, verdict(target.met(of_medians))])
        return rows + self.item_cost_targets() + self.idle_targets()

    def item_cost_targets(self):
        if not self.results.item_cost:
            return []
        median, _ = self.results.item_cost["python"]["64"]
        text = f"an item in a Python worker, claim to completion: ≤ {ITEM_COST_US:g} µs"
        return [[text, f"{median:.2f} µs", "", verdict(median <= ITEM_COST_US)]]

    def idle_targets(self):
        processes = self.results.idle.get("forkring", [])
        if not processes:
            return []
        fronts = [p.private for p in processes if "front" in p.role]
        workers = [p.private for p in processes if "forkring-w" in p.role]
        switches = sum(p.switches for p in processes)
        seconds = f"{self.options.idle:g} s"
        return [
            [f"idle, subscriber connected: 0 context switches in {seconds}", str(switches), "", verdict(switches == 0)],
            self.memory_target("private memory of a worker ≤ 5 MB", workers, WORKER_BYTES),
            self.memory_target("private memory of the front ≤ 20 MB", fronts, FRONT_BYTES),
        ]

    @staticmethod
    def memory_target(text, sizes, bound):
        if not sizes:
            return [text, "no such process", "", "FAIL"]
        return [text, f"{max(sizes) / 1e6:.1f} MB", "", verdict(max(sizes) <= bound)]

    def idle(self):
        text = (
            f"Each server worked for a second, then had a client connected and nothing to do (forkring and the baseline: a "
            f"subscriber; bare tonic: an open stream). Context switches of all threads over {self.options.idle:g} s; private memory "
            "is `Private_Clean` + `Private_Dirty` of `smaps_rollup`.\n\n"
        )
        rows = [
            [SERVERS[server], p.role, str(p.switches), f"{p.private / 1e6:.1f} MB"]
            for server, processes in self.results.idle.items()
            for p in processes
        ]
        return text + table(["server", "process", "context switches", "private memory"], rows)

    # --- plots

    def latency_plot(self):
        def point(case, server):
            p50, p99 = (self.median(case, server, name) for name in ["p50", "p99"])
            return compare_plot.Point(SERVERS[server], p50, p50, p99, time_text(p50))

        return self.plot("Latency: p50 (dot) to p99 (end of the line); further left is better", tick_text, point)

    def throughput_plot(self):
        def point(case, server):
            rates = [metric(run, "items_per_s") for run in self.results.runs[case, server]]
            middle = statistics.median(rates)
            return compare_plot.Point(SERVERS[server], middle, min(rates), max(rates), f"{middle:,.0f}/s")

        return self.plot("Items per second: median of the rounds, and their range; further right is better", "{:,.0f}".format, point)

    def plot(self, title, tick, point):
        rows = [(case, [point(case, server) for server in self.servers(case)]) for case in self.plotted()]
        return compare_plot.dots(title, tick, list(SERVERS.values()), rows)


def verdict(met):
    return "pass" if met else "**FAIL**"
