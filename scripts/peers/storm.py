"""The same storm for forkring and for others: clients send items one by one while workers are killed.

Each item takes a worker 20 ms. Every 500 ms one worker, chosen at random, gets SIGKILL. Counted at the client, by id:
answered, answered twice, failed with an error, and not answered within the patience; and the longest time without any
answer. Ends only processes that it started. Started by scripts/peers/run, which makes the environment.
"""

import argparse
import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
import httpx

ROOT = Path(__file__).resolve().parents[2]
WORK = 0.02
KILL_EVERY = 0.5
CLIENTS = 8
PATIENCE = 5.0
START_TIMEOUT = 30
STOP_TIMEOUT = 5


def compile_proto(folder):
    from grpc_tools import protoc

    includes = Path(protoc.__file__).parent / "_proto"
    sources = [f"-I{source}" for source in (ROOT / "proto", ROOT / "scripts/peers/triton_storm", includes)]
    arguments = [*sources, f"--python_out={folder}", f"--grpc_python_out={folder}"]
    if protoc.main(["protoc", *arguments, "forkring/v1/dispatcher.proto", "infer.proto"]) != 0:
        sys.exit("cannot compile the clients' protocols")
    sys.path.insert(0, folder)


def processes():
    """pid -> (parent, command line), of all that live."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    name = (entry / "comm").read_text().strip()
                    found[int(entry.name)] = (int(fields[1]), f"{name} {command}")
            except OSError:
                pass
    return found


def descendants(root):
    """(pid, command line) of all processes below one."""
    all_of_them = processes()
    below, frontier = [], [root]
    while frontier:
        parent = frontier.pop()
        children = [pid for pid, (of, _) in all_of_them.items() if of == parent]
        below += [(pid, all_of_them[pid][1]) for pid in children]
        frontier += children
    return below


def semaphores():
    return set(Path("/dev/shm").glob("sem.mp-*"))


class Peer:
    """A server under test. `answers` is called with each id that comes back."""

    def __init__(self, name, command, is_worker, env=None):
        self.name, self.is_worker = name, is_worker
        self.before = semaphores()
        environment = {**os.environ, "WORK_SECONDS": str(WORK), **(env or {})}
        # A session of its own, so that all of it can be ended.
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=self.log, start_new_session=True
        )

    def listening(self):
        line = self.process.stdout.readline().decode()
        match = re.search(r"listening on (\S+)", line)
        if not match:
            sys.exit(f"{self.name} did not start: {line!r}")
        return match[1]

    def workers(self):
        return sorted(pid for pid, command in descendants(self.process.pid) if self.is_worker(command))

    def stop(self):
        # Asked first, so that it tidies up behind itself.
        below = [pid for pid, _ in descendants(self.process.pid)]
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            pass
        left = {pid for pid, _ in descendants(self.process.pid)} | {pid for pid in below if pid in processes()}
        for pid in [*left, self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()
        # What multiprocessing leaves behind of workers that were killed.
        for semaphore in semaphores() - self.before:
            semaphore.unlink(missing_ok=True)


class Forkring(Peer):
    def __init__(self, binary):
        name = f"storm-{os.getpid()}"
        command = [binary, "serve", "--fresh", "--name", name, "--listen", "127.0.0.1:0", "--pool", "work:2=sleep:20ms"]
        super().__init__("forkring", command, lambda command: command.startswith("forkring-w"))
        self.segment = Path(f"/dev/shm/forkring-{name}")

    async def connect(self):
        from forkring.v1 import dispatcher_pb2, dispatcher_pb2_grpc

        self.messages = dispatcher_pb2
        self.channel = grpc.aio.insecure_channel(self.listening())
        self.stub = dispatcher_pb2_grpc.DispatcherStub(self.channel)

    async def send(self, number):
        answer = await self.stub.Call(self.messages.WorkItem(pool="work", id=number), timeout=PATIENCE)
        return [answer.id]

    def stop(self):
        super().stop()
        self.segment.unlink(missing_ok=True)


class Baseline(Peer):
    """A server of grpc.aio and multiprocessing.Queue: what is sent comes back on another stream, or not at all."""

    def __init__(self):
        # Its first child is the gRPC server, all others are workers.
        name = "baseline (grpc.aio + multiprocessing.Queue)"
        super().__init__(name, [sys.executable, "scripts/baseline/main.py", "0"], lambda command: True)
        self.waiting = {}

    def workers(self):
        return super().workers()[1:]

    async def connect(self):
        from forkring.v1 import dispatcher_pb2, dispatcher_pb2_grpc

        self.messages = dispatcher_pb2
        self.channel = grpc.aio.insecure_channel(self.listening())
        self.stub = dispatcher_pb2_grpc.DispatcherStub(self.channel)
        self.updates = asyncio.create_task(self.follow())

    def stop(self):
        self.updates.cancel()
        super().stop()

    async def follow(self):
        async for update in self.stub.GetUpdates(self.messages.GetUpdatesRequest()):
            waiting = self.waiting.get(update.id)
            if waiting:
                waiting.put_nowait(update.id)

    async def send(self, number):
        answer = self.waiting[number] = asyncio.Queue()
        item = self.messages.WorkItem(id=number, payload=b"x")
        await self.stub.Submit(iter([item]), timeout=PATIENCE)
        return [await asyncio.wait_for(answer.get(), PATIENCE)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Triton(Peer):
    def __init__(self, folder):
        server = folder / "pytriton" / "tritonserver"
        self.port, self.prefix = free_port(), f"storm-{os.getpid()}"
        command = [
            server / "bin" / "tritonserver", f"--model-repository={ROOT}/scripts/peers/triton_storm",
            f"--backend-directory={server}/backends", "--allow-http=false", "--allow-metrics=false",
            "--grpc-address=127.0.0.1", f"--grpc-port={self.port}",
            f"--backend-config=python,shm-region-prefix-name={self.prefix}",
        ]
        env = {"PACKAGES": str(folder)}
        super().__init__("Triton's Python backend", command, lambda command: "python_backend_stub" in command, env)

    async def connect(self):
        import infer_pb2
        import infer_pb2_grpc

        self.messages = infer_pb2
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.port}")
        self.stub = infer_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                await self.send(0)
                return
            except grpc.aio.AioRpcError as error:
                if time.monotonic() > deadline:
                    sys.exit(f"Triton did not start: {error.details()}")
                await asyncio.sleep(0.2)

    async def send(self, number):
        tensor = self.messages.ModelInferRequest.InferInputTensor(name="INPUT", datatype="UINT8", shape=[1])
        request = self.messages.ModelInferRequest(
            model_name="work", id=str(number), inputs=[tensor], raw_input_contents=[b"x"]
        )
        answer = await self.stub.ModelInfer(request, timeout=PATIENCE)
        return [int(answer.id)]

    def stop(self):
        super().stop()
        for left in Path("/dev/shm").glob(f"{self.prefix}*"):
            left.unlink(missing_ok=True)


class Mosec(Peer):
    def __init__(self):
        self.port = free_port()
        command = [sys.executable, "scripts/peers/mosec_worker.py", "--port", str(self.port), "--timeout", "5000"]
        super().__init__("mosec", command, lambda command: "spawn_main" in command)

    async def connect(self):
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE)
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                (await self.client.post("/inference", content=b"0")).raise_for_status()
                return
            except httpx.HTTPError as error:
                if time.monotonic() > deadline:
                    sys.exit(f"mosec did not start: {error!r}")
                await asyncio.sleep(0.2)

    async def send(self, number):
        answer = await self.client.post("/inference", content=str(number).encode())
        answer.raise_for_status()
        return [int(answer.content)]


async def storm(peer, seconds, dice):
    """Sends, kills and counts."""
    count = dict(sent=0, answered=0, twice=0, failed=0, silent=0, kills=0)
    seen, longest, last = set(), 0.0, time.monotonic()
    end = time.monotonic() + seconds

    async def client():
        nonlocal longest, last
        while time.monotonic() < end:
            count["sent"] += 1
            number = count["sent"]
            try:
                for answer in await peer.send(number):
                    count["twice" if answer in seen else "answered"] += 1
                    seen.add(answer)
                    now = time.monotonic()
                    longest, last = max(longest, now - last), now
            except (TimeoutError, httpx.TimeoutException):
                count["silent"] += 1
            except grpc.aio.AioRpcError as error:
                silent = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
                count["silent" if silent else "failed"] += 1
            except (httpx.HTTPError, ValueError):
                count["failed"] += 1
                # A server that is gone refuses at once.
                await asyncio.sleep(WORK)

    async def killer():
        while time.monotonic() + KILL_EVERY < end:
            await asyncio.sleep(KILL_EVERY)
            workers = peer.workers()
            if workers:
                os.kill(dice.choice(workers), signal.SIGKILL)
                count["kills"] += 1

    await asyncio.gather(killer(), *(client() for _ in range(CLIENTS)))
    longest = max(longest, time.monotonic() - last)
    return {**count, "longest": longest}


async def run(arguments):
    rows = []
    peers = [lambda: Forkring(arguments.forkring), Mosec, Baseline]
    if arguments.triton:
        peers.append(lambda: Triton(arguments.triton_folder))
    for make in peers:
        peer = make()
        try:
            await peer.connect()
            result = await storm(peer, arguments.seconds, random.Random(arguments.seed))
        finally:
            peer.stop()
        rows.append((peer.name, result))
        print(f"{peer.name}: {result}", file=sys.stderr)
    print("| | kills | sent | answered | twice | failed with an error | no answer in 5 s | longest gap |")
    print("|---|---|---|---|---|---|---|---|")
    for name, r in rows:
        print(
            f"| {name} | {r['kills']} | {r['sent']} | {r['answered']} | {r['twice']} | {r['failed']} "
            f"| {r['silent']} | {r['longest']:.2f} s |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forkring", required=True, help="the binary")
    parser.add_argument("--triton", action="store_true", help="Triton, too: a large download")
    parser.add_argument("--triton-folder", type=lambda path: Path(path).resolve(), help="where its wheel was unpacked")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compile_proto(folder)
        asyncio.run(run(arguments))


if __name__ == "__main__":
    main()
