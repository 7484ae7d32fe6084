"""Workers that are to end, and an app that has left something running."""

import pytest
from serving import until

LEFT = "forkring: the worker ends, and with it what its app left running: "


@pytest.mark.parametrize("handler", ["plain", "batch", "loop"])
def test_a_drain_does_not_wait_for_threads_of_the_app(serve, handler):
    app = serve(f"ending.py:{handler}", quiet=False)
    assert app.call(handler, b"x") == b"x"
    app.close()
    (line,) = app.log().splitlines()
    left = line.removeprefix(LEFT).split(", ")
    assert left[0] == "`feeder`"
    # Of those of executors only one that is at work.
    assert len(left) == 1 + (handler == "loop"), line


def test_a_reload_does_not_wait_for_threads_of_the_app(serve, tmp_path, monkeypatch):
    # Two changes in one second, to files of one size, are as good as none to what Python keeps of modules.
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    source = (
        "import threading\nthreading.Thread(target=threading.Event().wait, name='feeder').start()\n"
        "def handle(item): return '{0}'\n"
    )
    (tmp_path / "app.py").write_text(source.format("first"))
    app = serve("handle:2=app.py:handle", apps=tmp_path, arguments=["--reload"], quiet=False)
    assert app.call("handle") == b"first"
    (tmp_path / "app.py").write_text(source.format("second"))
    until("both to be replaced", lambda: app.log().count(f"{LEFT}`feeder`") == 2)
    assert {app.call("handle") for _ in range(20)} == {b"second"}


def test_tasks_of_the_app_hear_of_the_end(serve):
    app = serve("ending.py:orderly", quiet=False)
    app.call("orderly", b"x")
    app.close()
    assert "ValueError: at the very end" in app.log()
