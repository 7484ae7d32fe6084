"""`--reload`: workers are replaced when their files change."""

import itertools
import os
import queue
import signal

import pytest
from serving import until
from test_loading import SERVING, Health

APP = """
import os

import helper

def handle(item):
    if "fifo" in item.metadata:
        with open(item.metadata["fifo"]) as pipe:
            pipe.read()
    return f"{helper.NAME} {os.getpid()} {item.attempt}"
"""


ASYNC = """
import asyncio, os

import helper

async def handle(item):
    while "file" in item.metadata and not os.path.exists(item.metadata["file"]):
        await asyncio.sleep(0.002)
    await asyncio.sleep(0)
    return f"{helper.NAME} {os.getpid()} {item.attempt}"
"""

BATCH = """
import os

import forkring, helper

@forkring.batch(max_size=8)
def handle(items):
    return [f"{helper.NAME} {os.getpid()} {item.attempt}" for item in items]
"""

# Whoever was forked waits for the word that it may begin.
HOLDS = """
import os, pathlib, signal

def write(fd, data, write=os.write):
    here = pathlib.Path(__file__).parent
    if data == b"!" and (here / "hold").exists():
        (here / "hold").rename(here / "held")
        signal.pause()
    return write(fd, data)

os.write = write
"""


@pytest.fixture
def app(serve, tmp_path, request, monkeypatch):
    # Two changes in one second, to files of one size, are as good as none to what Python keeps of modules.
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    (tmp_path / "helper.py").write_text("NAME = 'first'\n")
    option = getattr(request, "param", "")
    (tmp_path / "app.py").write_text({"async": ASYNC, "batch": BATCH}.get(option, APP))
    arguments = ["--reload", "--preload"] if option == "--preload" else ["--reload"]
    return serve("handle:2=app.py:handle", apps=tmp_path, arguments=arguments, quiet=False)


def replace(path, text):
    """As editors do."""
    other = path.with_suffix(".new")
    other.write_text(text)
    other.rename(path)


def told(app, **metadata):
    name, pid, attempt = app.call("handle", metadata=metadata).decode().split()
    assert attempt == "1"
    return name, int(pid)


def answers(app, name):
    """Whether both workers do, and none of another time."""
    workers = app.workers()
    seen = {told(app) for _ in range(20)}
    return len(workers) == 2 and workers == app.workers() and {name} == {name for name, _ in seen}


@pytest.mark.parametrize("app", ["", "--preload"], indirect=True)
def test_a_change_comes_to_all_workers(app, tmp_path):
    until("the first", lambda: answers(app, "first"))
    before = set(app.workers().values())
    (tmp_path / "helper.py").write_text("NAME = 'other'\n")
    until("the second", lambda: answers(app, "other") and not before & set(app.workers().values()))
    replace(tmp_path / "helper.py", "NAME = 'third'\n")
    until("the third", lambda: answers(app, "third"))
    (tmp_path / "app.py").write_text(APP.replace("helper.NAME", "'fourth'"))
    until("the fourth", lambda: answers(app, "fourth"))
    assert app.log() == "", "no worker has died of it"


@pytest.mark.parametrize("app", ["", "--preload"], indirect=True)
def test_what_is_in_work_is_finished(app, tmp_path):
    until("both workers", lambda: answers(app, "first"))
    fifos = [str(tmp_path / f"fifo{at}") for at in range(2)]
    calls = []
    for fifo in fifos:
        os.mkfifo(fifo)
        calls.append(app.begin("handle", metadata={"fifo": fifo}))
    # They open when both workers are at it.
    pipes = [open(fifo, "w") for fifo in fifos]
    workers = app.workers()
    (tmp_path / "helper.py").write_text("NAME = 'second'\n")
    # It waits until there is another worker, which there is when one has ended its item.
    waits = app.begin("handle")
    pipes[0].close()
    first = calls[0].result().payload.decode().split()
    assert (first[0], first[2]) == ("first", "1") and int(first[1]) in workers.values()
    assert waits.result().payload.split()[2] == b"1"
    pipes[1].close()
    second = calls[1].result().payload.decode().split()
    assert (second[0], second[2]) == ("first", "1") and int(second[1]) in workers.values()
    until("the second", lambda: answers(app, "second"))
    assert app.log() == ""


@pytest.mark.parametrize("app", ["async"], indirect=True)
def test_what_is_open_on_an_event_loop_is_finished(app, tmp_path):
    until("both workers", lambda: answers(app, "first"))
    workers = app.workers()
    file = tmp_path / "opened"
    calls = [app.begin("handle", metadata={"file": str(file)}) for _ in range(10)]
    (tmp_path / "helper.py").write_text("NAME = 'second'\n")
    # As many as one worker had of them hold it up; the other is replaced, or is about to be.
    assert told(app)[1]
    file.touch()
    for call in calls:
        name, pid, attempt = call.result().payload.decode().split()
        assert attempt == "1" and (name == "second" or int(pid) in workers.values())
    until("the second", lambda: answers(app, "second"))
    assert app.log() == ""


@pytest.mark.parametrize("app", ["", "--preload", "async", "batch"], indirect=True)
def test_no_item_is_lost_or_tried_again(app, tmp_path):
    items, results = queue.SimpleQueue(), {}
    numbers = itertools.count()
    stream = app.stream(iter(items.get, None))

    def pump(count):
        for _ in range(count):
            items.put(app.item("handle", id=next(numbers)))
        for _ in range(count):
            result = next(stream)
            assert result.id not in results and not result.HasField("status") and result.attempts == 1, result
            results[result.id] = result.payload.split()[0]
        return set(list(results.values())[-count:])

    for at in range(5):
        name = f"v{at}"
        # At once, for a worker may be importing it.
        replace(tmp_path / "helper.py", f"NAME = '{name}'\n")
        until(name, lambda: pump(200) == {name.encode()})  # noqa: B023 - it is called at once
    items.put(None)
    assert list(stream) == [] and len(results) == next(numbers)
    assert app.log() == ""


@pytest.mark.parametrize("app", ["", "--preload"], indirect=True)
@pytest.mark.parametrize(
    "broken, says, mended_by",
    [
        ("def (:\n", "SyntaxError", ("helper.py", "NAME = 'second'\n")),
        ("import math\nNAME = 1 / 0\n", "ZeroDivisionError: division by zero", ("helper.py", "NAME = 'second'\n")),
        ("from missing import NAME\n", "No module named 'missing'", ("missing.py", "NAME = 'second'\n")),
    ],
)
def test_what_cannot_be_imported_is_not_taken(app, tmp_path, broken, says, mended_by):
    until("both workers", lambda: answers(app, "first"))
    workers = app.workers()
    (tmp_path / "helper.py").write_text(broken)
    until("the traceback", lambda: "cannot be imported" in app.log())
    assert says in app.log() and 'helper.py"' in app.log()
    assert answers(app, "first") and app.workers() == workers
    with app.channel() as channel:
        assert Health(channel).of("handle") == SERVING
    file, text = mended_by
    (tmp_path / file).write_text(text)
    until("the second", lambda: answers(app, "second"))
    assert app.log().count("cannot be imported") == 1


@pytest.mark.parametrize("app", ["--preload"], indirect=True)
def test_who_is_born_of_what_has_changed_has_not_died(app, tmp_path):
    (tmp_path / "app.py").write_text(APP + HOLDS)
    (tmp_path / "helper.py").write_text("NAME = 'second'\n")
    until("the second", lambda: answers(app, "second"))
    (tmp_path / "hold").touch()
    os.kill(told(app)[1], signal.SIGKILL)
    until("one that waits for its word", (tmp_path / "held").exists)
    (tmp_path / "helper.py").write_text("NAME = 'third'\n")
    until("the third", lambda: answers(app, "third"))
    assert app.log().count(") died: ") == 1, "whom the test has killed"


def test_a_class_that_cannot_be_made_waits_for_the_next_change(serve, tmp_path):
    """Its import is in order, so it is taken; what it lacks shows only in the worker."""
    made = "class Model:\n    def __init__(self): {0}\n    def __call__(self, item): return '{1}'\n"
    (tmp_path / "app.py").write_text(made.format("pass", "first"))
    app = serve("Model:2=app.py:Model", apps=tmp_path, arguments=["--reload"], quiet=False)
    assert app.call("Model") == b"first"
    # Or the other would still import what is written next.
    until("both workers", lambda: len(app.workers()) == 2)
    (tmp_path / "app.py").write_text(made.format("1 / 0", "second"))
    until("the traceback", lambda: "ZeroDivisionError" in app.log())
    # The other worker is not sent away.
    assert app.call("Model") == b"first"
    (tmp_path / "app.py").write_text(made.format("pass", "third"))
    until("the third", lambda: {app.call("Model") for _ in range(20)} == {b"third"})
