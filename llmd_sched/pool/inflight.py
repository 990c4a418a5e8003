"""What we ourselves have sent and not yet seen come back, per endpoint, live between scrapes."""

from __future__ import annotations

import numpy as np

from llmd_sched.plugin import Attribute, Producer, ProducerPlugin, Reads, reads
from llmd_sched.types import Array, Candidates, Decision, Endpoint, Outcome, Request

MAX_OPEN = 200_000
"""Open requests followed at once; beyond it the oldest are let go, so a lost end can never pile up."""


class InFlightLoadProducer(ProducerPlugin, frozen=True):
    """Requests and prompt tokens in flight per endpoint, and what of this request each endpoint lacks.

    A request is charged the tokens its endpoint does not hold in cache until its first token, then only as a request.
    ``addEstimatedOutputTokens``: also charge ``round(outputRatio * input)`` tokens, at most what the client allows and
    ``maxEstimatedOutputTokens``, and hold the whole charge to the end.
    """

    provides = Attribute.INFLIGHT_LOAD

    add_estimated_output_tokens: bool = False
    output_ratio: float = 1.5
    max_estimated_output_tokens: int | None = None
    prefix_match_info_producer_name: str = ""
    sync_cross_replica_state: bool = True

    def check(self) -> None:
        if not 0 <= self.output_ratio < float("inf"):
            raise ValueError("outputRatio must be 0 or more")
        if self.max_estimated_output_tokens is not None and self.max_estimated_output_tokens < 0:
            raise ValueError("maxEstimatedOutputTokens must be 0 or more")

    def reads(self) -> tuple[Reads, ...]:
        return (reads(Attribute.PREFIX_MATCH, self.prefix_match_info_producer_name, required=False),)

    def open(self, name: str) -> InFlightLoad:
        return InFlightLoad(name, self)


class _Counter:
    """One endpoint's load. A request gives back to the object it was charged to, whatever became of the endpoint."""

    __slots__ = ("charged_tokens", "prefill_tokens", "requests", "resident_tokens")

    def __init__(self) -> None:
        self.requests = 0
        self.charged_tokens = 0.0
        self.prefill_tokens = 0.0
        self.resident_tokens = 0.0


class _Open:
    __slots__ = ("charged_tokens", "counter", "input_tokens", "prefilling", "uncached_tokens")

    def __init__(self, counter: _Counter, charged_tokens: float, uncached_tokens: float, input_tokens: float) -> None:
        self.counter = counter
        self.charged_tokens = charged_tokens
        self.uncached_tokens = uncached_tokens
        self.input_tokens = input_tokens
        self.prefilling = True


class InFlightLoad(Producer):
    """The live counters.

    Columns: ``inflight_requests`` and ``inflight_tokens`` (the reference's pair), ``uncached_tokens`` of this request,
    and two of ours: ``inflight_prefill_tokens`` (uncached prompt tokens without a first token yet) and
    ``resident_tokens`` (prompt tokens of the requests now in decode).
    """

    def __init__(self, name: str, params: InFlightLoadProducer) -> None:
        super().__init__(name)
        self.params = params
        self._prefix = reads(Attribute.PREFIX_MATCH, params.prefix_match_info_producer_name).producer
        self._counters: dict[tuple[str, str], _Counter] = {}
        self._open: dict[str, _Open] = {}

    def endpoints_changed(self, endpoints: list[Endpoint]) -> None:
        self._counters = {e.server: self._counters.get(e.server) or _Counter() for e in endpoints}

    def produce(self, request: Request, candidates: Candidates, now_s: float) -> dict[str, Array]:
        counters = [self._counters[e.server] for e in candidates.endpoints]
        load = np.array(
            [(c.requests, c.charged_tokens, c.prefill_tokens, c.resident_tokens) for c in counters], dtype=np.float64
        )
        return {
            f"inflight_requests/{self.name}": load[:, 0],
            f"inflight_tokens/{self.name}": load[:, 1],
            f"inflight_prefill_tokens/{self.name}": load[:, 2],
            f"resident_tokens/{self.name}": load[:, 3],
            f"uncached_tokens/{self.name}": self._uncached_tokens(request, candidates),
        }

    def _uncached_tokens(self, request: Request, candidates: Candidates) -> Array:
        """max(0, total - match) * block + what lies beyond the indexed part, never more than the prompt."""
        match = candidates.columns.get(f"prefix_match_blocks/{self._prefix}")
        if match is None:
            return np.full(len(candidates.endpoints), float(request.input_tokens))
        total = candidates.columns[f"prefix_total_blocks/{self._prefix}"]
        block_tokens = candidates.columns[f"prefix_block_tokens/{self._prefix}"]
        missing = np.maximum(0.0, total - match) * block_tokens
        beyond = np.maximum(0.0, request.input_tokens - total * block_tokens)
        return np.minimum(missing + beyond, float(request.input_tokens))

    def chosen(self, decision: Decision, candidates: Candidates, position: int, now_s: float) -> None:
        counter = self._counters[candidates.endpoints[position].server]
        uncached = float(candidates.columns[f"uncached_tokens/{self.name}"][position])
        one = _Open(counter, uncached + self._output_tokens(decision.request), uncached, decision.request.input_tokens)
        counter.requests += 1
        counter.charged_tokens += one.charged_tokens
        counter.prefill_tokens += uncached
        self._open[decision.ticket] = one
        if len(self._open) > MAX_OPEN:
            self._close(next(iter(self._open)))

    def _output_tokens(self, request: Request) -> float:
        if not self.params.add_estimated_output_tokens:
            return 0.0
        caps = (request.max_output_tokens, self.params.max_estimated_output_tokens)
        estimate = round(request.input_tokens * self.params.output_ratio)
        return float(min([estimate, *(max(0, cap) for cap in caps if cap is not None)]))

    def first_token(self, ticket: str, now_s: float) -> None:
        one = self._open.get(ticket)
        if one is None or not one.prefilling:
            return
        one.prefilling = False
        one.counter.prefill_tokens -= one.uncached_tokens
        one.counter.resident_tokens += one.input_tokens
        if not self.params.add_estimated_output_tokens:
            one.counter.charged_tokens -= one.charged_tokens
            one.charged_tokens = 0.0

    def finished(self, ticket: str, outcome: Outcome, now_s: float) -> None:
        if ticket in self._open:
            self._close(ticket)

    def _close(self, ticket: str) -> None:
        self.first_token(ticket, 0.0)
        one = self._open.pop(ticket)
        one.counter.requests -= 1
        one.counter.resident_tokens -= one.input_tokens
        one.counter.charged_tokens -= one.charged_tokens
