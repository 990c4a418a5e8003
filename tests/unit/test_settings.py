"""What the settings of ``serve`` say to gRPC."""

from __future__ import annotations

import pytest

from llmd_sched.app.settings import MAX_GRPC_BYTES, ServeSettings
from llmd_sched.extproc.server import GRPC_OVERHEAD_BYTES, ServerSettings

RECEIVE, SEND = "grpc.max_receive_message_length", "grpc.max_send_message_length"


@pytest.mark.parametrize(
    ("body_bytes", "receive", "send", "expected"),
    [
        (1000, None, None, (1000 + GRPC_OVERHEAD_BYTES, -1)),
        (1000, 5000, None, (5000, -1)),
        (1000, None, 6000, (1000 + GRPC_OVERHEAD_BYTES, 6000)),
        (MAX_GRPC_BYTES, None, None, (MAX_GRPC_BYTES, -1)),
    ],
)
def test_a_message_may_be_as_long_as_a_body_needs_unless_told_otherwise(
    body_bytes: int, receive: int | None, send: int | None, expected: tuple[int, int]
) -> None:
    server = ServerSettings(max_body_bytes=body_bytes)
    options = ServeSettings(server=server, grpc_max_receive_bytes=receive, grpc_max_send_bytes=send).grpc_options
    assert (options[RECEIVE], options[SEND]) == expected
    assert options.keys() == dict(server.grpc_options).keys()
