"""The examples, each as its head says that it is run."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy
import pytest
from harness import PATIENCE, ROOT
from programs import run_program

from forkring.client import Client

EXAMPLES = ROOT / "examples" / "python"


@pytest.fixture
def before(tmp_path):
    """The baseline, with work like its successor's; its address."""
    environment = {**os.environ, "WORK_DIGESTS": "100000"}
    with open(tmp_path / "log", "w+") as log:
        command = [sys.executable, "-B", str(ROOT / "scripts" / "baseline" / "main.py"), "0"]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        try:
            line = process.stdout.readline()
            assert line.startswith("listening on "), (tmp_path / "log").read_text()
            yield line.removeprefix("listening on ").strip()
        finally:
            # It does not end its children.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def test_the_baseline_gives_the_same_after_as_before(before, serve):
    after = serve("work:2=rewritten.py:work", apps=EXAMPLES)
    items = [b"item %d" % n for n in range(10)]
    answers = []
    for address in (before, after.address):
        with Client(address, pool="work") as client:
            updates = client.updates("theirs", limit=len(items), timeout=PATIENCE)
            receipt = client.submit(items, subscription="theirs")
            assert receipt.accepted == len(items)
            # The baseline's stream knows no limit, nor any end, so no more than these are asked for.
            answers.append({result.id: result.payload for _, result in zip(items, updates)})
            updates.close()
    assert answers[0] == answers[1]
    expected = b"item 7"
    for _ in range(100_000):
        expected = hashlib.sha256(expected).digest()
    assert answers[1][7] == expected


def test_work_that_keeps_the_gil(serve, tmp_path):
    app = serve("complexity:2=complexity.py:complexity", apps=EXAMPLES)
    source = b"def f(a):\n    return [b for b in a if b and a or b]\n\nasync def g():\n    while True:\n        pass\n"
    assert json.loads(app.call("complexity", source)) == [[4, "f"], [2, "g"]]
    assert app.call("complexity", b"\xff") == b"[]"
    (tmp_path / "one.py").write_bytes(source)
    (tmp_path / "two.py").write_bytes(b"def simple(): pass")
    ended = run_program("../../examples/python/complexity.py", app.address, str(tmp_path))
    assert ended.returncode == 0, ended.stdout
    said = [re.split(r" +", line.strip())[:2] for line in ended.stdout.splitlines()]
    assert said[:3] == [["4", "f"], ["2", "g"], ["1", "simple"]] and said[3][:2] == ["3", "functions"], ended.stdout


def test_a_generator_streams_a_digest_for_each_chunk_of_a_file(serve, tmp_path):
    app = serve("digests:2=digests.py:digests", apps=EXAMPLES)
    # One of several chunks, and one of less than one.
    files = [Path(sysconfig.get_path("stdlib")) / "_pydecimal.py", Path(__file__)]
    ended = run_program("../../examples/python/digests.py", app.address, *map(str, files))
    assert ended.returncode == 0, ended.stdout
    lines = [line.split(maxsplit=2) for line in ended.stdout.splitlines()]
    for file in files:
        bytes_of_it = file.read_bytes()
        chunks = [(str(at), bytes_of_it[at : at + (1 << 16)]) for at in range(0, len(bytes_of_it), 1 << 16)]
        expected = [[at, hashlib.sha256(chunk).hexdigest()] for at, chunk in [*chunks, ("all", bytes_of_it)]]
        assert [line[:2] for line in lines if line[2] == str(file)] == expected


def test_a_model_is_made_once_and_reads_arrays_in_place(serve):
    app = serve("chords:2=chords.py:Chords", apps=EXAMPLES)
    ended = run_program("../../examples/python/chords.py", app.address)
    assert ended.returncode == 0, ended.stdout
    lines = ended.stdout.splitlines()
    assert len(lines) == 24
    for line in lines:
        sent, heard = line.split(" sounds like ")
        assert heard.startswith(sent.strip() + " "), line
    few = numpy.zeros(8191, "float32").tobytes()
    assert "ValueError: 8191 samples are too few" in app.error("chords", few).details()
