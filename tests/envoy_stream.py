"""ext_proc streams over gRPC, as Envoy holds them, and its access log."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from grpc import aio

from llmd_sched.extproc.server import ACCESS_LOG, EXT_PROC
from llmd_sched.wire import accesslog_pb2, als_pb2
from tests.messages import Message, Reply

PATIENCE_S = 10.0
"""How long anything may take before a test gives up. Nothing waits that long unless it is broken."""

CHANNEL_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]

T = TypeVar("T")


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not what():
            await asyncio.sleep(0.01)


async def soon(what: Awaitable[T]) -> T:
    return await asyncio.wait_for(what, PATIENCE_S)


class Stream:
    """One ext_proc stream, as Envoy holds it."""

    def __init__(self, channel: aio.Channel) -> None:
        method = channel.stream_stream(f"/{EXT_PROC}/Process", Message.SerializeToString, Reply.FromString)
        self.call = method(timeout=PATIENCE_S)

    async def send(self, *messages: Message) -> None:
        for message in messages:
            await self.call.write(message)

    async def replies(self, count: int) -> list[Reply]:
        got: list[Reply] = []
        while len(got) < count:
            reply = await self.call.read()
            assert reply is not aio.EOF, f"the server closed after {len(got)} of {count} replies"
            got.append(reply)
        return got

    async def ask(self, *messages: Message, count: int) -> list[Reply]:
        await self.send(*messages)
        return await self.replies(count)

    async def rest(self) -> list[Reply]:
        """Say that nothing follows; everything that still comes."""
        await self.call.done_writing()
        return await self.to_the_end()

    async def to_the_end(self) -> list[Reply]:
        """Everything that comes until the server closes."""
        got = []
        while (reply := await self.call.read()) is not aio.EOF:
            got.append(reply)
        return got


async def exchange(channel: aio.Channel, *messages: Message) -> list[Reply]:
    """All replies to a whole stream of messages. The server may close before it has read them all."""
    stream = Stream(channel)
    try:
        await stream.send(*messages)
        return await stream.rest()
    except asyncio.InvalidStateError:
        return await stream.to_the_end()


async def access_log(channel: aio.Channel, *entries: accesslog_pb2.HTTPAccessLogEntry) -> None:
    call = channel.stream_unary(
        f"/{ACCESS_LOG}/StreamAccessLogs",
        als_pb2.StreamAccessLogsMessage.SerializeToString,
        als_pb2.StreamAccessLogsResponse.FromString,
    )
    batch = als_pb2.StreamAccessLogsMessage()
    batch.http_logs.log_entry.extend(entries)
    await call([batch], timeout=PATIENCE_S)
