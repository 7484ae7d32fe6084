"""The baseline: a grpc.aio server, two bounded multiprocessing queues, and workers on the other cores.

Usage: python main.py [PORT]     (default 8080; 0 takes a free port and prints it)

It speaks Submit and GetUpdates of forkring.v1.Dispatcher, so that `forkring bench --mode submit` drives it.
"""

import multiprocessing
import os
import sys
import tempfile
from multiprocessing import Queue
from pathlib import Path

MAX_SIZE = 10000
PROTO = Path(__file__).resolve().parents[2] / "proto"


def generate(folder):
    """Compiles the project's proto into the folder and makes it importable."""
    from grpc_tools import protoc

    includes = Path(protoc.__file__).parent / "_proto"
    arguments = [f"-I{PROTO}", f"-I{includes}", f"--python_out={folder}", f"--grpc_python_out={folder}"]
    if protoc.main(["protoc", *arguments, "forkring/v1/dispatcher.proto"]) != 0:
        sys.exit(f"cannot compile {PROTO}/forkring/v1/dispatcher.proto")
    # A package of its own, which comes before one that is installed under its name.
    for package in ("forkring", "forkring/v1"):
        Path(folder, package, "__init__.py").touch()
    sys.path.insert(0, folder)


def main():
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8080
    with tempfile.TemporaryDirectory() as folder:
        generate(folder)
        from server import serve
        from worker import worker

    # The program counts on fork, which is no longer every Python's default.
    multiprocessing.set_start_method("fork")
    work_queue = Queue(maxsize=MAX_SIZE)
    update_queue = Queue(maxsize=MAX_SIZE)
    # A machine with one core still needs a worker. $PROCESSES is how many there are instead, the server among them.
    process_count = int(os.environ.get("PROCESSES", max(2, multiprocessing.cpu_count())))
    processes = []
    for i in range(process_count):
        p = multiprocessing.Process(
            target=serve if i == 0 else worker,
            args=(work_queue, update_queue, port),
        )
        # marking the process as daemon means it cannot spawn child
        # processes, and it will be killed when the parent process ends
        p.daemon = True
        p.start()
        processes.append(p)

    # block until all processes have ended
    for p in processes:
        p.join()


if __name__ == "__main__":
    main()
