"""All endpoints together: events of requests in, ``PoolHeadroom`` out."""

from __future__ import annotations

import math
from collections.abc import Mapping

from llmd_sched.headroom.burst import BurstDetector
from llmd_sched.headroom.law import HeadroomSettings, prefill_allowance, prefill_rate, target
from llmd_sched.headroom.load import EndpointLoad, Flight
from llmd_sched.headroom.steps import StepModel
from llmd_sched.headroom.wire import Assumed, Headroom, Mode, PoolHeadroom

MAX_FLIGHTS = 200_000
"""Requests that are followed; further ones are not counted."""

UNLEARNED = 1.5
"""The step-time bound before a burst was seen, in units of b0."""

BOUND_QUANTILE = 0.95
BOUND_SLACK = 1.08
"""Of the learned bound: a step may be that much longer still without the slowest requests being slower by more."""

BOUND_STEP = 0.01
"""Relative; the learned bound moves by this share of itself, weighted, with each look in a burst."""

SMOOTH_SHARE = 0.1
"""Weight of a new T0: its mean over some seconds is what a request gets to feel."""

CARRY_SHARE = 0.8
"""Interactive requests are put together while their steps stay within this share of the bound."""

BATCH_WITHIN_S = 60.0
"""Without batch for so long, interactive requests have all endpoints."""

SHRINK_AFTER_S = 5.0
"""Fewer endpoints must have sufficed for so long before fewer are used."""

HAND_OVER_S = 0.5
"""An endpoint that is to carry interactive requests is given this long to get rid of its batch."""


class HeadroomBoard:
    """One pool. ``look`` is to be called ten times a second, and when ``mode`` changed."""

    def __init__(self, settings: HeadroomSettings) -> None:
        settings.check()
        self.settings = settings
        self.detector = BurstDetector()
        self.loads: dict[str, EndpointLoad] = {}
        self.learned_s: float | None = None
        """The quantile of T0 in bursts; None before one, and where the operator gave a bound."""
        self.version = 0
        self._step_s = 0.0
        """T0 of the busiest endpoint in bursts, smoothed."""
        self._flights: dict[str, tuple[EndpointLoad, Flight]] = {}
        self._interactive = 0
        self._carriers: dict[str, float] = {}
        """Since when."""
        self._enough_s = -math.inf
        """When as many as there are were needed last."""
        self._burst_s = -math.inf
        """When there was a burst last."""
        self._batch_s = -math.inf
        """When there was batch last."""

    @property
    def mode(self) -> Mode:
        return "burst" if self.detector.on else "idle"

    def endpoints_changed(self, endpoints: Mapping[str, tuple[StepModel, int]]) -> None:
        """Name -> prior step model and KV cache in tokens. Those that stay keep what was learned."""
        self.loads = {
            name: self.loads.get(name) or EndpointLoad(model, kv_tokens)
            for name, (model, kv_tokens) in endpoints.items()
        }
        self._carriers = {name: at_s for name, at_s in self._carriers.items() if name in self.loads}

    def engine_has(self, endpoint: str, requests: float, now_s: float) -> None:
        """Optional: what the engine itself says it holds, waiting ones included."""
        load = self.loads.get(endpoint)
        if load is not None:
            load.engine_has(requests, now_s)

    def arrived(
        self,
        ticket: str,
        endpoint: str,
        prompt_tokens: int,
        now_s: float,
        *,
        batch: bool = False,
        cached_tokens: int = 0,
    ) -> None:
        """Sent to ``endpoint``; ``batch`` says that its priority is negative."""
        load = self.loads.get(endpoint)
        if load is None or ticket in self._flights or len(self._flights) >= MAX_FLIGHTS:
            return
        if not batch:
            self.detector.arrived(now_s, self._interactive)
            self._interactive += 1
        flight = Flight(prompt_tokens, max(prompt_tokens - cached_tokens, 0), batch)
        self._flights[ticket] = load, flight
        load.advance(now_s)
        load.arrived(flight)

    def first_token(self, ticket: str, now_s: float) -> None:
        """The first token came out, or is assumed to have."""
        known = self._flights.get(ticket)
        if known is not None:
            load, flight = known
            load.advance(now_s)
            load.first_token(flight, now_s)

    def first_token_due_s(self, ticket: str) -> float:
        """How long it takes to compute its prompt and those that were there before, from now; 0 when not known."""
        known = self._flights.get(ticket)
        return known[0].prefill_s() if known is not None else 0.0

    def tokens(self, ticket: str, count: int, now_s: float) -> None:
        """``count`` further tokens since the last report. Optional: it only calibrates sooner."""
        known = self._flights.get(ticket)
        if known is not None:
            load, flight = known
            load.advance(now_s)
            load.tokens(flight, count, now_s)

    def finished(
        self, ticket: str, now_s: float, output_tokens: int | None = None, decode_s: float | None = None
    ) -> None:
        """Ended, however; ``output_tokens`` where it ended well, ``decode_s`` where it was measured how long those
        after the first took: else the reports of the first token and of the end are believed."""
        known = self._flights.pop(ticket, None)
        if known is not None:
            load, flight = known
            load.advance(now_s)
            load.ended(flight, output_tokens, now_s, decode_s)
            self._interactive -= not flight.batch

    def look(self, now_s: float) -> PoolHeadroom:
        """The headroom now."""
        self.detector.look(now_s, self._interactive)
        for load in self.loads.values():
            load.advance(now_s)
        self._learn_bound()
        self._choose_carriers(now_s)
        self.version += 1
        endpoints = tuple(self._headroom(name, load) for name, load in self.loads.items())
        carriers = self._ready(endpoints, now_s)
        return PoolHeadroom(version=self.version, mode=self.mode, carriers=carriers, endpoints=endpoints)

    def _bound_s(self, load: EndpointLoad) -> float:
        if self.settings.itl_ms is not None:
            return self.settings.itl_ms / 1e3
        return UNLEARNED * load.model.base_s if self.learned_s is None else BOUND_SLACK * self.learned_s

    def _learn_bound(self) -> None:
        """A quantile of T0 in bursts, by stochastic approximation."""
        if self.settings.itl_ms is not None or not self.detector.on or not self._interactive:
            return
        step_s = max(load.step_without_batch_s() for load in self.loads.values())
        self._step_s += (step_s - self._step_s) * (SMOOTH_SHARE if self._step_s else 1)
        learned_s = self.learned_s if self.learned_s is not None else self._step_s
        above = self._step_s > learned_s
        self.learned_s = learned_s * (1 + BOUND_STEP * (above - (1 - BOUND_QUANTILE)))

    def _budget_s(self, name: str, load: EndpointLoad) -> float:
        bound_s = self._bound_s(load)
        if self.detector.on:
            relative_s = (1 + self.settings.burst_share) * load.step_without_batch_s()
            return relative_s if self.settings.mode == "harvest" else min(relative_s, bound_s)
        free = name not in self._carriers and not load.interactive.running and not load.unseen
        return math.inf if self.settings.mode == "harvest" or free else bound_s

    def _headroom(self, name: str, load: EndpointLoad) -> Headroom:
        budget_s, model = self._budget_s(name, load), load.model
        running, context_tokens = load.without_batch()
        return Headroom(
            endpoint=name,
            mode=self.mode,
            n_star=target(load, budget_s, self.settings.kv_share),
            prefill_tokens=prefill_allowance(self.settings, self.detector.on, budget_s),
            prefill_tokens_per_s=prefill_rate(load, budget_s),
            step_budget_ms=None if budget_s == math.inf else budget_s * 1e3,
            batch_running=load.batch.running,
            assumed=Assumed(
                arrivals_per_s=load.arrivals_per_s,
                prompt_tokens_per_s=load.prompt_tokens_per_s,
                running=running,
                context_tokens=context_tokens,
                step_ms=load.step_without_batch_s() * 1e3,
                base_ms=model.base_s * 1e3,
                prefill_token_ms=model.prefill_token_s * 1e3,
                sequence_ms=model.sequence_s * 1e3,
                context_token_ms=model.context_token_s * 1e3,
            ),
        )

    def _choose_carriers(self, now_s: float) -> None:
        """More at once when they are needed; fewer after a while, or as a burst runs out."""
        names = list(self.loads)
        if any(load.batch.running for load in self.loads.values()):
            self._batch_s = now_s
        together = self.settings.consolidate and now_s - self._batch_s < BATCH_WITHIN_S
        needed = self._needed() if together and not self.detector.on else len(names)
        if self.detector.on:
            self._burst_s = now_s
        if needed >= len(self._carriers):
            self._enough_s = now_s
        elif now_s - self._enough_s < SHRINK_AFTER_S <= now_s - self._burst_s:
            return
        self._carriers = {name: self._carriers.get(name, now_s) for name in names[:needed]}

    def _needed(self) -> int:
        """The least number of endpoints on which all interactive requests together stay within the bound."""
        loads = list(self.loads.values())
        sums = [load.without_batch() for load in loads]
        running, context_tokens = sum(one for one, _ in sums), sum(other for _, other in sums)
        share = sum(load.prefill_share for load in loads)
        for count, load in enumerate(loads, 1):
            step_s = load.model.base_s + load.model.load_s(running / count, context_tokens / count)
            left = 1 - share / count
            if left > 0 and step_s / left <= CARRY_SHARE * self._bound_s(load):
                return count
        return len(loads)

    def _ready(self, endpoints: tuple[Headroom, ...], now_s: float) -> tuple[str, ...]:
        """The carriers that are rid of their batch; all of them when none is."""
        ready = tuple(
            one.endpoint
            for one in endpoints
            if one.endpoint in self._carriers
            and (one.batch_running <= 1.1 * one.n_star + 2 or now_s - self._carriers[one.endpoint] >= HAND_OVER_S)
        )
        return ready or tuple(self._carriers) or tuple(self.loads)
