"""What became of a request on the lean path: one access-log entry of Envoy -> its ticket and Outcome.

All times are Envoy's own, so its clock need not agree with ours. A request counts as sent when Envoy began to send
it upstream; the first and last body chunk were noted by the Lua filter as microseconds since the epoch, which is
what ``start_time`` is too. A chunk's time is when Envoy received it from the model server.
"""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from llmd_sched import headers as names
from llmd_sched.extproc.reply import read_outcome
from llmd_sched.types import End, Outcome
from llmd_sched.wire import accesslog_pb2

_UPSTREAM_FLAGS = (
    "no_healthy_upstream",
    "upstream_request_timeout",
    "upstream_remote_reset",
    "upstream_connection_failure",
    "upstream_connection_termination",
    "upstream_overflow",
    "no_route_found",
    "upstream_retry_limit_exceeded",
    "upstream_protocol_error",
    "no_cluster_found",
)
_ABORT_FLAGS = ("downstream_connection_termination", "local_reset", "stream_idle_timeout", "downstream_remote_reset")

_END_TYPES = (accesslog_pb2.AccessLogType.NotSet, accesslog_pb2.AccessLogType.DownstreamEnd)


def read_entry(entry: accesslog_pb2.HTTPAccessLogEntry) -> tuple[str, Outcome] | None:
    """None for a request we did not route, or an entry that is not the end of one."""
    common = entry.common_properties
    if common.access_log_type not in _END_TYPES:
        return None
    spaces = common.metadata.filter_metadata
    if names.NAMESPACE_OURS not in spaces:
        return None
    noted = spaces[names.NAMESPACE_OURS].fields
    if names.TICKET not in noted:
        return None
    start_us = common.start_time.seconds * 1e6 + common.start_time.nanos / 1e3
    sent_us = start_us + _us(common.time_to_first_upstream_tx_byte)
    marks = (names.FIRST_BODY_US, names.LAST_BODY_US)
    first_us, last_us = (noted[k].number_value if k in noted else 0.0 for k in marks)
    end_us = last_us or start_us + _us(common.duration)
    status = entry.response.response_code.value
    outcome = read_outcome(
        _end(common.response_flags, status),
        status=status,
        streamed=names.STREAMED in noted and noted[names.STREAMED].bool_value,
        first_ms=(first_us - sent_us) / 1e3 if first_us else None,
        e2e_ms=(end_us - sent_us) / 1e3,
        tail=noted[names.BODY_TAIL].string_value.encode() if names.BODY_TAIL in noted else b"",
        events=int(noted[names.BODY_EVENTS].number_value) if names.BODY_EVENTS in noted else None,
        response_bytes=entry.response.response_body_bytes,
    )
    return noted[names.TICKET].string_value, outcome


def _us(duration: Duration) -> float:
    return duration.seconds * 1e6 + duration.nanos / 1e3


def _end(flags: accesslog_pb2.ResponseFlags, status: int) -> End:
    if any(getattr(flags, f) for f in _UPSTREAM_FLAGS):
        return End.UPSTREAM_FAILED
    if status == 0 or any(getattr(flags, f) for f in _ABORT_FLAGS):
        return End.ABORTED
    return End.FINISHED
