"""The baseline's gRPC server: one process, one event loop, a queue to the workers and a queue back.

Written as such servers often are: the blocking `put` and `get` in coroutines, MessageToDict on each item, the updates
loop that looks at the queue ten times a second, one queue of updates for all subscribers. Its messages are those of
forkring.v1, so that one load generator serves both.
"""

import asyncio
import base64

import grpc
from google.protobuf.json_format import MessageToDict

from forkring.v1 import dispatcher_pb2, dispatcher_pb2_grpc


def turn_into_grpc_message(update):
    return dispatcher_pb2.WorkResult(id=int(update["id"]), payload=base64.b64decode(update["payload"]))


class DispatcherServicer(dispatcher_pb2_grpc.DispatcherServicer):
    def __init__(self, work_queue, update_queue):
        self.work_queue = work_queue
        self.update_queue = update_queue

    async def Submit(self, request, context):
        accepted = 0
        try:
            async for item in request:
                self.work_queue.put(MessageToDict(item))
                accepted += 1
        except Exception:
            pass
        finally:
            return dispatcher_pb2.SubmitReceipt(accepted=accepted)

    async def GetUpdates(self, request, context):
        while True:
            try:
                while not self.update_queue.empty():
                    update = self.update_queue.get()
                    yield turn_into_grpc_message(update)
            except Exception:
                pass
            finally:
                # add delay so we don't use the whole CPU while queue is empty
                await asyncio.sleep(0.1)


def serve(work_queue, update_queue, port):
    async def run_server():
        server = grpc.aio.server()
        dispatcher_pb2_grpc.add_DispatcherServicer_to_server(DispatcherServicer(work_queue, update_queue), server)
        bound = server.add_insecure_port(f"[::]:{port}")
        await server.start()
        print(f"listening on 127.0.0.1:{bound}", flush=True)
        await server.wait_for_termination()

    asyncio.run(run_server())
