"""What the package has: its names, its version."""

import importlib.metadata
import pydoc
import subprocess
import sys

import grpc
import pytest
from harness import PATIENCE
from serving import FORKRING, run

import forkring

CLIENTS = {"Client", "Error", "Work", "aio", "client"}


def test_dir_lists_what_there_is():
    names = dir(forkring)
    assert names == sorted(set(names))
    assert CLIENTS | set(forkring.__all__) | {"__version__"} <= set(names)
    for name in names:
        getattr(forkring, name)
    assert forkring.__all__ == sorted(forkring.__all__)


def test_without_grpcio_the_clients_are_not_listed_and_help_works(tmp_path):
    program = """
        import sys
        class Nothing:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name == "grpc":
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Nothing)
        import inspect, forkring
        names = dir(forkring)
        assert set(forkring.__all__) <= set(names), names
        assert not {"Client", "Error", "Work", "aio", "client"} & set(names), names
        inspect.getmembers(forkring)
    """
    outcome = run(sys.executable, "-c", "\n".join(line[8:] for line in program.splitlines()), folder=tmp_path)
    assert outcome.returncode == 0, outcome.stderr


def test_the_version_is_the_commands_and_the_wheels():
    assert forkring.__version__ == importlib.metadata.version("forkring")
    command = subprocess.run([FORKRING, "--version"], capture_output=True, text=True, timeout=PATIENCE)
    assert command.stdout == f"forkring {forkring.__version__}\n"
    assert forkring.__version__ in pydoc.plain(pydoc.render_doc(forkring))
