"""Lines with a span each: what goes out names it, so that router and engine join the batch's trace."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from batchgw.client.gateway import Gateways
from batchgw.client.requests import Call, Flight, Sender, Watch
from batchgw.records import Result
from batchgw.tracing import Attributes, Span, Tracer


class TracedSender(Sender):
    def __init__(self, gateways: Gateways, tracer: Tracer) -> None:
        super().__init__(gateways)
        self._tracer = tracer

    async def send(self, flight: Flight, watch: Watch) -> Result:
        call = flight.call
        span = self._tracer.line(call.trace, _attributes(call))
        if span.traceparent is None:
            return await super().send(flight, watch)
        flight.call = replace(call, trace=span.traceparent)
        try:
            if not span.recorded:
                return await super().send(flight, watch)
            return await self._recorded(span, flight, watch)
        finally:
            flight.call = call  # when it goes on later, that is a span of the batch's too

    async def _recorded(self, span: Span, flight: Flight, watch: Watch) -> Result:
        try:
            result = await super().send(flight, _Told(watch, span))
        except asyncio.CancelledError:
            span.end({"batch.line.cut": True, "gen_ai.usage.output_tokens": flight.tokens})
            raise
        usage = result.usage
        told = {"gen_ai.usage.input_tokens": usage.input_tokens, "gen_ai.usage.output_tokens": usage.output_tokens}
        span.end({**told, "http.request.resend_count": flight.attempt}, error="" if result.ok else "failed")
        return result


def _attributes(call: Call) -> Attributes:
    named = {"batch.id": call.batch_id, "tenant.id": call.tenant, "gen_ai.request.model": call.model}
    return {**named, "url.path": call.url, "batch.line": call.line}


class _Told:
    """Passes on what a line's watch is told, and notes its attempts in its span."""

    def __init__(self, watch: Watch, span: Span) -> None:
        self._watch, self._span = watch, span
        self._first = True

    def tokens(self, flight: Flight, count: int) -> None:
        if self._first:
            self._first = False
            self._span.event("first token", {"endpoint": flight.endpoint})
        self._watch.tokens(flight, count)

    def answered(self, flight: Flight, status: int | None, reason: str, retry_after_s: float | None) -> None:
        self._first = True
        self._span.event("attempt over", {"http.response.status_code": status or 0, "reason": reason})
        self._watch.answered(flight, status, reason, retry_after_s)
