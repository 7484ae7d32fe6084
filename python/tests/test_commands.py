"""Every subcommand, run from the installed wheel by `forkring` and by `python -m forkring`."""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
from serving import FORKRING, Started, run

APP = """
import os

def shout(item):
    return bytes(item.payload).upper()

def dies(item):
    os._exit(3)
"""
SUBCOMMANDS = ["serve", "call", "submit", "updates", "dead", "demo", "doctor", "bench"]


@pytest.fixture(params=[[FORKRING], [sys.executable, "-m", "forkring"]], ids=["script", "module"])
def command(request):
    return request.param


@pytest.fixture
def server(command, tmp_path):
    (tmp_path / "app.py").write_text(APP)
    pools = ["--pool", "shout:1=app:shout", "--pool", "dies:1=app:dies", "--pool", "hash:1=sha256"]
    own = ["--listen", "127.0.0.1:0", "--name", f"commands-{os.getpid()}", "--max-attempts", "1"]
    with Started(*command, "serve", *pools, *own, folder=tmp_path) as server:
        yield server


def done(*arguments, folder, code=0):
    outcome = run(*arguments, folder=folder)
    assert outcome.returncode == code, outcome.stdout + outcome.stderr
    return outcome


def test_demo_hashes_a_small_folder(command, tmp_path):
    # A file that Python would run if the demo's server were started as `python serve`.
    (tmp_path / "serve").write_text("raise SystemExit('this is not the server')\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(3):
        (folder / f"file {number}").write_text(f"file {number}" * number)
    arguments = ["demo", "folder", "--workers", "1", "--max-message", "1MiB", "--json"]
    outcome = done(*command, *arguments, folder=tmp_path)
    report = json.loads(outcome.stdout)
    assert report["matched"] == 3 and outcome.stderr == "", outcome
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("forkring-demo-")]


def test_the_script_runs_the_demo_beside_a_folder_of_its_own_name(tmp_path):
    # `python -m` looks for packages in the current folder first; the script does not, and neither may its demo.
    (tmp_path / "forkring").mkdir()
    (tmp_path / "forkring" / "__init__.py").write_text("raise SystemExit('this is another forkring')\n")
    outcome = done(FORKRING, "demo", "forkring", "--workers", "1", "--max-message", "1MiB", "--json", folder=tmp_path)
    assert json.loads(outcome.stdout)["matched"] == 1


def test_call_submit_and_updates(command, server, tmp_path):
    (tmp_path / "one").write_text("one")
    addr = ["--addr", server.address]
    assert done(*command, "call", "shout", "one", *addr, folder=tmp_path).stdout == "ONE"
    submitted = done(*command, "submit", "hash", "one", *addr, folder=tmp_path)
    assert "1" in submitted.stdout + submitted.stderr
    updates = done(*command, "updates", "--limit", "1", *addr, folder=tmp_path)
    assert hashlib.sha256(b"one").hexdigest() in updates.stdout


def test_dead_letters(command, server, tmp_path):
    (tmp_path / "one").write_text("one")
    addr = ["--addr", server.address]
    failed = done(*command, "call", "dies", "one", *addr, folder=tmp_path, code=1)
    assert "WORKER_CRASHED" in failed.stderr
    listed = done(*command, "dead", "list", *addr, folder=tmp_path)
    (number,) = re.findall(r"^\s*(\d+)\s.*dies", listed.stdout, re.MULTILINE)
    assert "dies" in done(*command, "dead", "show", number, *addr, folder=tmp_path).stdout
    done(*command, "dead", "drop", number, *addr, folder=tmp_path)
    assert "dies" not in done(*command, "dead", "list", *addr, folder=tmp_path).stdout


def test_bench(command, server, tmp_path):
    arguments = ["bench", "--addr", server.address, "--pool", "hash", "--count", "50", "--in-flight", "4", "--json"]
    report = json.loads(done(*command, *arguments, folder=tmp_path).stdout)
    assert (report["items"], report["failed"]) == (50, 0), report


def test_doctor(command, tmp_path):
    outcome = run(*command, "doctor", "--json", folder=tmp_path)
    # What it finds is the machine's; that it looks is the command's.
    assert outcome.returncode in (0, 1) and outcome.stderr.count("\n") <= 1, outcome
    assert json.loads(outcome.stdout)["checks"]


def test_help_and_version(command, tmp_path):
    helped = done(*command, "help", folder=tmp_path).stdout
    for name in SUBCOMMANDS:
        assert name in helped
        assert f"forkring {name}" in done(*command, "help", name, folder=tmp_path).stdout
    assert done(*command, "--version", folder=tmp_path).stdout.startswith("forkring ")
    refused = done(*command, "no-such-command", folder=tmp_path, code=2)
    assert "no-such-command" in refused.stderr and "Traceback" not in refused.stderr


def test_the_package_is_not_the_sources():
    import forkring

    assert Path(forkring.__file__).is_relative_to(sys.prefix), "these tests are for the wheel as it is installed"
