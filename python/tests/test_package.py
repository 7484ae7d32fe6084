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


@pytest.mark.parametrize(
    "code",
    [forkring.Code.NOT_FOUND, 5, "NOT_FOUND", grpc.StatusCode.NOT_FOUND],
    ids=lambda code: type(code).__name__,
)
def test_what_an_abort_takes(code):
    for reason in ["NO_SUCH_ROW", "ABC", "A1_2", "X" * 63]:
        abort = forkring.Abort(code, "there is no row 7", reason)
        assert (abort.code, abort.message, abort.reason) == (forkring.Code.NOT_FOUND, "there is no row 7", reason)
    assert str(forkring.Abort(code)) == "NOT_FOUND (HANDLER_ABORTED): "


REASONS = "a reason is 3 to 63 characters of A-Z, 0-9 and _, the first of them a letter and the last no _"


@pytest.mark.parametrize(
    "arguments, kind, says",
    [
        ((0,), ValueError, "0 is no code to abort with: use forkring.Code, as in Code.NOT_FOUND"),
        ((forkring.Code.OK,), ValueError, "<Code.OK: 0> is no code to abort with"),
        ((17,), ValueError, "17 is no code to abort with"),
        ((-1,), ValueError, "-1 is no code to abort with"),
        ((2**70,), ValueError, "1180591620717411303424 is no code"),
        (("not_found",), ValueError, "'not_found' is no code"),
        (("OK",), ValueError, "'OK' is no code"),
        ((grpc.StatusCode.OK,), ValueError, "is no code to abort with"),
        ((5.0,), TypeError, "5.0 is no code to abort with: use forkring.Code"),
        ((True,), TypeError, "True is no code"),
        ((None,), TypeError, "None is no code"),
        (([],), TypeError, "[] is no code"),
        (((5, "not found"),), TypeError, "(5, 'not found') is no code"),
        ((5, 7), TypeError, "message is 7, of type int: it must be a str"),
        ((5, None), TypeError, "message is None, of type NoneType: it must be a str"),
        ((5, b"x"), TypeError, "message is b'x', of type bytes: it must be a str"),
        ((5, "x", 7), TypeError, f"reason is 7, of type int: {REASONS}"),
        ((5, "x", None), TypeError, f"reason is None, of type NoneType: {REASONS}"),
        ((5, "x", ""), ValueError, f"reason is '': {REASONS}"),
        ((5, "x", "no good"), ValueError, f"reason is 'no good': {REASONS}"),
        ((5, "x", "no_such_row"), ValueError, "reason is 'no_such_row'"),
        ((5, "x", "AB"), ValueError, "reason is 'AB'"),
        ((5, "x", "_AB"), ValueError, "reason is '_AB'"),
        ((5, "x", "1AB"), ValueError, "reason is '1AB'"),
        ((5, "x", "AB_"), ValueError, "reason is 'AB_'"),
        ((5, "x", "ABC\n"), ValueError, r"reason is 'ABC\n'"),
        ((5, "x", "GRÖSSE"), ValueError, "reason is 'GRÖSSE'"),
        ((5, "x", "X" * 64), ValueError, f"reason is '{'X' * 64}'"),
        ((5, "x", "X" * 100000), ValueError, "reason is 'XXX"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_an_abort_refuses(arguments, kind, says):
    with pytest.raises(kind) as caught:
        forkring.Abort(*arguments)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 500, "the value is shown in short"
