"""What a fork does to gRPC's Python client, and that it does nothing to forkring's.

    python fork_pitfall.py [HOST:PORT]

A process uses a client in two threads and forks four children meanwhile; each child makes 20 calls. That is done with
plain grpcio and the channel of the parent, with plain grpcio and a new channel in each child, which is the usual
advice, and with a `forkring.Client` that was made before the fork; each for the three settings of
GRPC_ENABLE_FORK_SUPPORT. A child that is not done after five seconds counts as hung and is killed; a `forkring.Client` has
thirty, for it must be fine on a busy machine as well.

It needs a server with a pool `echo`; without an address it starts one: `forkring serve --pool echo=echo`.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time

CHILDREN, CALLS = 4, 20
BOUNDS = {"inherited": 5.0, "new": 5.0, "forkring": 30.0}
CLIENTS = {"inherited": "grpcio, inherited channel", "new": "grpcio, new channel", "forkring": "forkring.Client"}
SETTINGS = {"": "not set", "0": "0", "1": "1"}


class Grpcio:
    """Plain grpcio, with the smallest of messages: a WorkItem whose pool is `echo` and whose payload is `hello`."""

    def __init__(self, address):
        import grpc

        channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._call = channel.unary_unary("/forkring.v1.Dispatcher/Call")

    def call(self):
        assert b"hello" in self._call(b"\x0a\x04echo\x12\x05hello", timeout=BOUNDS["new"])


class Forkring:
    def __init__(self, address):
        from forkring.client import Client

        self._client = Client(address, pool="echo")

    def call(self):
        assert self._client.call(b"hello", timeout=BOUNDS["forkring"]).payload == b"hello"


def child(kind, address, client):
    if kind == "new":
        # The old one is not closed: its threads are not here to do it.
        client = Grpcio(address)
    for _ in range(CALLS):
        client.call()


def experiment(kind, address):
    """One row of the table, in a process of its own, because it may not be of use afterwards."""
    client = Forkring(address) if kind == "forkring" else Grpcio(address)
    client.call()
    ended = threading.Event()
    failed = []

    def traffic():
        while not ended.is_set():
            try:
                client.call()
            except Exception as error:
                failed.append(error)
                return

    threads = [threading.Thread(target=traffic, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    pids = []
    for _ in range(CHILDREN):
        pid = os.fork()
        if pid == 0:
            try:
                child(kind, address, client)
                os._exit(0)
            except BaseException:
                os._exit(1)
        pids.append(pid)
    end = time.monotonic() + BOUNDS[kind]
    outcomes = [outcome(pid, end) for pid in pids]
    ended.set()
    for thread in threads:
        thread.join(BOUNDS[kind])
    try:
        client.call()
        parent = "broken" if failed else "fine"
    except Exception:
        parent = "broken"
    counts = ", ".join(f"{outcomes.count(each)} {each}" for each in ("fine", "failed", "hung") if each in outcomes)
    print(f"children: {counts}; parent: {parent}", flush=True)
    # Not by the interpreter's end, which may hang as well.
    os._exit(0)


def outcome(pid, end):
    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    hung = not poll.poll(max(0, end - time.monotonic()) * 1000)
    if hung:
        os.kill(pid, signal.SIGKILL)
    os.close(pidfd)
    _, status = os.waitpid(pid, 0)
    return "hung" if hung else "failed" if status else "fine"


def table(address):
    for setting, said in SETTINGS.items():
        for kind, name in CLIENTS.items():
            environment = {key: value for key, value in os.environ.items() if key != "GRPC_ENABLE_FORK_SUPPORT"}
            if setting:
                environment["GRPC_ENABLE_FORK_SUPPORT"] = setting
            command = [sys.executable, "-W", "ignore", __file__, "--experiment", kind, address]
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
            try:
                row = process.communicate(timeout=8 * BOUNDS[kind])[0].strip()
            except subprocess.TimeoutExpired:
                row = "the parent hung"
            finally:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                process.wait()
            print(f"GRPC_ENABLE_FORK_SUPPORT {said:8}| {name:26}| {row or 'the parent died'}", flush=True)


def main(arguments):
    if arguments[:1] == ["--experiment"]:
        experiment(*arguments[1:])
    if arguments:
        return table(arguments[0])
    pid = str(os.getpid())
    command = ["forkring", "serve", "--name", f"pitfall-{pid}", "--listen", "127.0.0.1:0", "--pool", "echo=echo"]
    command += ["--parent", pid]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            table(server.stdout.readline().removeprefix("listening on ").strip())
        finally:
            server.terminate()


if __name__ == "__main__":
    main(sys.argv[1:])
