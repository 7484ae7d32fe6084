"""The messages of `forkring.v1` for grpcio, compiled into a folder that goes with the process."""

import importlib.util
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2]


def messages():
    """By their file, for their package has the name of ours."""
    includes = Path(protoc.__file__).parent / "_proto"
    with tempfile.TemporaryDirectory() as out:
        arguments = [f"-I{ROOT / 'proto'}", f"-I{includes}", f"--python_out={out}"]
        if protoc.main(["protoc", *arguments, "forkring/v1/dispatcher.proto"]) != 0:
            raise RuntimeError("cannot compile forkring/v1/dispatcher.proto")
        spec = importlib.util.spec_from_file_location("dispatcher_pb2", f"{out}/forkring/v1/dispatcher_pb2.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module
