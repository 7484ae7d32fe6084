"""Pools whose workers still import what they need."""

import os

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from harness import PATIENCE

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    def __init__(self, channel):
        self._stub = health_pb2_grpc.HealthStub(channel)

    def of(self, pool):
        return self._stub.Check(health_pb2.HealthCheckRequest(service=pool), timeout=PATIENCE).status

    def wait(self, pool, wanted):
        watch = self._stub.Watch(health_pb2.HealthCheckRequest(service=pool), timeout=PATIENCE)
        for told in watch:
            if told.status == wanted:
                watch.cancel()
                return
        raise AssertionError(f"{pool} never was {wanted}")


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A pipe that workers read when they import the app."""
    path = str(tmp_path / "load")
    os.mkfifo(path)
    monkeypatch.setenv("LOAD", path)

    def let_on(text):
        # It opens when there is a reader.
        with open(path, "w") as pipe:
            pipe.write(text)

    return let_on


def test_a_pool_does_not_serve_before_a_worker_has_imported_the_app(serve, load):
    app = serve("loading.py:handle", "basic.py:echo", quiet=False)
    with app.channel() as channel:
        health = Health(channel)
        # The front has told of both by then.
        health.wait("echo", SERVING)
        assert health.of("handle") == NOT_SERVING
        assert health.of("") == SERVING
        call = app.begin("handle")
        load("first")
        assert call.result(PATIENCE).payload == b"first", "it waited"
        health.wait("handle", SERVING)

        # The next worker takes as long.
        os.kill(app.workers()["forkring-w0"], 9)
        health.wait("handle", NOT_SERVING)
        call = app.begin("handle")
        assert health.of("handle") == NOT_SERVING
        load("second")
        assert call.result(PATIENCE).payload == b"second"
        health.wait("handle", SERVING)
