"""A request of the simulated cluster on its way, and what the router and the reader of records are told of it."""

from __future__ import annotations

import math

from llmd_sched.sim.scenario import Arrival, Record
from llmd_sched.types import Decision, End, Outcome, Prediction

_NOT_PREDICTED = Prediction(row=(), ttft_ms=math.nan, tpot_ms=math.nan, model_version=-1)


class Flight:
    """A request on its way through an engine."""

    __slots__ = ("arrival", "cached_tokens", "decision", "first_s")

    def __init__(self, arrival: Arrival, decision: Decision) -> None:
        self.arrival = arrival
        self.decision = decision
        self.cached_tokens = 0
        self.first_s: float | None = None
        """When the first token reached the router."""


def outcome_of(flight: Flight, end: End, status: int, now_s: float) -> Outcome:
    """As either path reads it off a reply; token counts come with ``usage``, at the end of a complete one."""
    asked, sent_s = flight.arrival.request, flight.decision.at_s
    streamed = asked.streaming and status == 200
    complete = end is End.FINISHED and status == 200
    return Outcome(
        end=end,
        status=status,
        ttft_ms=(flight.first_s - sent_s) * 1e3 if streamed and flight.first_s is not None else None,
        e2e_ms=(now_s - sent_s) * 1e3,
        prompt_tokens=asked.input_tokens if complete else None,
        cached_tokens=flight.cached_tokens if complete else None,
        output_tokens=flight.arrival.output_tokens if complete else None,
        streamed=streamed,
    )


def record_of(one: Arrival, flight: Flight | None, outcome: Outcome) -> Record:
    """``flight`` is None when the router refused."""
    prediction = (flight and flight.decision.prediction) or _NOT_PREDICTED
    waited_ms = (flight.decision.at_s - one.at_s) * 1e3 if flight else 0.0
    return Record(
        request_id=one.request.id,
        arrival_s=one.at_s,
        endpoint=flight.decision.picked[0].name if flight else "",
        model_version=prediction.model_version,
        predicted_ttft_ms=prediction.ttft_ms,
        predicted_tpot_ms=prediction.tpot_ms,
        queue_wait_ms=waited_ms,
        ttft_ms=waited_ms + _known(outcome.ttft_ms),
        tpot_ms=_known(outcome.tpot_ms),
        e2e_ms=waited_ms + _known(outcome.e2e_ms),
        end=outcome.end.value if flight else "refused",
        status=outcome.status,
        input_tokens=one.request.input_tokens,
        cached_tokens=flight.cached_tokens if flight else 0,
        output_tokens=outcome.output_tokens or 0,
    )


def _known(value_ms: float | None) -> float:
    return math.nan if value_ms is None else value_ms
