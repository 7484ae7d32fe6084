"""The messages of `forkring.v1`, as classes made of the descriptors that the package carries.

There is no generated code, and the descriptors are in a pool of their own: a program that generates code from the same
proto, of any version, does not clash with this.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from forkring._core import descriptor_set

_pool = DescriptorPool()


def _message(name: str) -> Any:
    return GetMessageClass(_pool.FindMessageTypeByName(name))


def _details() -> FileDescriptorProto:
    """What is read of the details of a status: google.rpc's messages, with the fields that matter here."""
    field = FieldDescriptorProto
    shapes: dict[str, list[tuple[str, int, int, int, str]]] = {
        "Any": [
            ("type_url", 1, field.TYPE_STRING, field.LABEL_OPTIONAL, ""),
            ("value", 2, field.TYPE_BYTES, field.LABEL_OPTIONAL, ""),
        ],
        "Status": [("details", 3, field.TYPE_MESSAGE, field.LABEL_REPEATED, ".forkring.details.Any")],
        "ErrorInfo": [("reason", 1, field.TYPE_STRING, field.LABEL_OPTIONAL, "")],
        "RetryInfo": [("retry_delay", 1, field.TYPE_MESSAGE, field.LABEL_OPTIONAL, ".google.protobuf.Duration")],
        "DebugInfo": [("stack_entries", 1, field.TYPE_STRING, field.LABEL_REPEATED, "")],
    }
    file = FileDescriptorProto(
        name="forkring/details.proto",
        package="forkring.details",
        syntax="proto3",
        dependency=["google/protobuf/duration.proto"],
    )
    for name, fields in shapes.items():
        message = file.message_type.add(name=name)
        for one, number, kind, label, of in fields:
            message.field.add(name=one, number=number, type=kind, label=label, type_name=of or None)
    return file


for _file in [*FileDescriptorSet.FromString(descriptor_set()).file, _details()]:
    _pool.AddSerializedFile(_file.SerializeToString())

WorkItem = _message("forkring.v1.WorkItem")
WorkResult = _message("forkring.v1.WorkResult")
SubmitReceipt = _message("forkring.v1.SubmitReceipt")
GetUpdatesRequest = _message("forkring.v1.GetUpdatesRequest")
Duration = _message("google.protobuf.Duration")

StatusDetails = _message("forkring.details.Status")
ErrorInfo = _message("forkring.details.ErrorInfo")
RetryInfo = _message("forkring.details.RetryInfo")
DebugInfo = _message("forkring.details.DebugInfo")


class Stubs:
    """The methods of `forkring.v1.Dispatcher` on a channel of `grpc` or of `grpc.aio`."""

    __slots__ = ("call", "channel", "probe", "process", "submit", "updates")

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        result, item = WorkResult.FromString, WorkItem.SerializeToString
        path = "/forkring.v1.Dispatcher/"
        self.call = channel.unary_unary(path + "Call", item, result)
        self.submit = channel.stream_unary(path + "Submit", item, SubmitReceipt.FromString)
        self.updates = channel.unary_stream(path + "GetUpdates", GetUpdatesRequest.SerializeToString, result)
        self.process = channel.stream_stream(path + "Process", item, result)
        # Any answer to it says that there is a server, also that it has no such method.
        self.probe = channel.unary_unary("/grpc.health.v1.Health/Check")
