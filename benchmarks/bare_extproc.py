"""The least an ext_proc server in Python can do: grpc.aio, and the same answer to every request.

What this costs is gRPC's, the interpreter's and the machine's of the moment; the rest is ours.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from typing import Any

import uvloop
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from llmd_sched.extproc.messages import ProcessingResponse, decision_metadata
from llmd_sched.extproc.server import EXT_PROC, handlers
from llmd_sched.wire import als_pb2, ext_proc_pb2


class Bare:
    def __init__(self, destination: str) -> None:
        metadata = decision_metadata(destination, None, emit_scores=False)
        self._answer = ProcessingResponse(request_body=ext_proc_pb2.BodyResponse(), dynamic_metadata=metadata)

    async def process(self, _: AsyncIterator[Any], context: aio.ServicerContext[Any, Any]) -> None:
        if await context.read() is not aio.EOF:
            await context.write(self._answer)

    async def access_logs(
        self, messages: AsyncIterator[Any], context: aio.ServicerContext[Any, Any]
    ) -> als_pb2.StreamAccessLogsResponse:
        async for _ in messages:
            pass
        return als_pb2.StreamAccessLogsResponse()


async def serve(port: int, destination: str) -> None:
    server, bare, health = aio.server(), Bare(destination), HealthServicer()
    server.add_generic_rpc_handlers(handlers(bare.process, bare.access_logs))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    await health.set(EXT_PROC, health_pb2.HealthCheckResponse.SERVING)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("port", type=int)
    p.add_argument("destination", metavar="IP:PORT")
    args = p.parse_args()
    uvloop.run(serve(args.port, args.destination))


if __name__ == "__main__":
    main()
