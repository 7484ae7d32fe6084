"""Health, reflection and HTTP/2's own pings, by the clients that come with grpcio."""

import socket
import threading

import grpc
import pytest
from forkring.v1.dispatcher_pb2 import WorkItem
from forkring.v1.dispatcher_pb2_grpc import DispatcherStub
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from harness import PATIENCE

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("service", ["", "forkring.v1.Dispatcher", "echo", "hash", "gate"])
def test_health_of_the_server_and_of_each_pool(channel, service):
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    assert health.Check(request).status == SERVING
    watch = health.Watch(request, timeout=PATIENCE)
    assert next(watch).status == SERVING
    watch.cancel()


def test_health_of_no_such_pool(channel):
    with pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="nope"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(channel):
    services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert services >= {
        "forkring.v1.Admin",
        "forkring.v1.Dispatcher",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_reflection_is_enough_for_a_call(channel):
    """As grpcurl does it: no proto file, no generated code."""
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    method = pool.FindServiceByName("forkring.v1.Dispatcher").FindMethodByName("Call")
    request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    call = channel.unary_unary(
        f"/{method.containing_service.full_name}/{method.name}", request.SerializeToString, response.FromString
    )
    assert call(request(pool="echo", id=5, payload=b"described")).payload == b"described"


class PingCounter:
    """Passes one connection on to the server and counts the pings that the server answers."""

    PING, ACK = 6, 1

    def __init__(self, address):
        host, port = address.rsplit(":", 1)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._server = socket.create_connection((host, int(port)))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.answers = threading.Semaphore(0)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        client, _ = self._listener.accept()
        threading.Thread(target=self._pass_on, args=[client], daemon=True).start()
        with client, self._server.makefile("rb") as frames:
            while len(head := frames.read(9)) == 9:
                client.sendall(head + frames.read(int.from_bytes(head[:3], "big")))
                if head[3] == self.PING and head[4] & self.ACK:
                    self.answers.release()

    def _pass_on(self, client):
        while data := client.recv(1 << 16):
            self._server.sendall(data)
        self._server.shutdown(socket.SHUT_WR)


def test_keepalive_pings_are_answered_and_do_no_harm(server, gate):
    proxy = PingCounter(server.address)
    options = [
        ("grpc.keepalive_time_ms", 50),
        ("grpc.keepalive_timeout_ms", PATIENCE * 1000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.bdp_probe", 0),
    ]
    held = gate()
    with grpc.insecure_channel(proxy.address, options=options) as channel:
        call = DispatcherStub(channel).Call.future(WorkItem(pool="gate", payload=held.payload), timeout=PATIENCE)
        held.wait_until_begun()
        # More than gRPC's own servers would take before they say ENHANCE_YOUR_CALM.
        for _ in range(3):
            assert proxy.answers.acquire(timeout=PATIENCE)
        held.open()
        assert call.result().payload == b"done\n"
