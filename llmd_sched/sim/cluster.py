"""A cluster in virtual time: engines as step machines behind the very router that serves.

    arrival -> flow gate, if on -> Router.choose -> engine -> first token, end -> Router.finish -> Sample -> trainer

All that happens is an entry of one heap, in the order of time, then kind (``_Order``), then age, and all randomness
is seeded. So a run is a function of the spec and the arrivals, and two runs agree bit by bit.

What a real system adds is constants here: ``network_s`` each way between router and engine, ``report_delay_s`` until
the access log tells the end of a request. The router itself takes no time; clients are as near as it is.
"""

from __future__ import annotations

import enum
import heapq
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import count
from random import Random
from typing import Any, assert_never

from llmd_sched.catalog import Resolved, build_router, resolve
from llmd_sched.config import load
from llmd_sched.errors import RequestError
from llmd_sched.flow.controller import FlowControl
from llmd_sched.flow.dispatch import Dispatcher
from llmd_sched.flow.saturation import SaturationDetector
from llmd_sched.pool.pool import Load, Pool
from llmd_sched.predict.producer import PredictedLatency
from llmd_sched.sim.engine import Engine, Refusal, SimRequest, Step
from llmd_sched.sim.flight import Flight, outcome_of, record_of
from llmd_sched.sim.gate import VirtualGate
from llmd_sched.sim.kvcache import BLOCK_TOKENS
from llmd_sched.sim.openai import block_hashes
from llmd_sched.sim.scenario import (
    Arrival,
    ClusterSpec,
    EngineSpec,
    Event,
    Fail,
    Join,
    Leave,
    Record,
    Slow,
)
from llmd_sched.types import Decision, End, Endpoint, Outcome

REAP_EVERY_S = 1.0
"""As ``app`` does."""

_STATUS_OF = {Refusal.TOO_LONG: 400, Refusal.QUEUE_FULL: 503}
"""What the simulated server answers."""


class _Order(enum.IntEnum):
    """Of things at the same time: what has happened comes before what is decided upon it."""

    STEP = enum.auto()
    REPORT = enum.auto()
    EVENT = enum.auto()
    SCRAPE = enum.auto()
    TRAINER = enum.auto()
    REAP = enum.auto()
    DEADLINE = enum.auto()
    ARRIVAL = enum.auto()


class _Server:
    """An engine, the requests it holds by ticket, and its fate."""

    __slots__ = ("alive", "awake", "due_s", "endpoint", "engine", "flights", "listed", "rng", "slowdown", "spec")

    def __init__(self, spec: EngineSpec, seed: int) -> None:
        name = spec.endpoint.name
        self.spec = spec
        self.endpoint = spec.endpoint
        self.engine = Engine(spec.engine, Random(f"{seed} noise of {name}"))
        self.rng = Random(f"{seed} stalls of {name}")
        self.slowdown = spec.slowdown
        self.flights: dict[str, Flight] = {}
        self.alive = True
        self.listed = True
        """By discovery."""
        self.awake = False
        """A step is under way, or one is due."""
        self.due_s = 0.0
        """When the next step begins; holds while awake."""

    def end_s(self, step: Step) -> float:
        """When the step really ends; the engine itself knows nothing of slowdowns and stalls."""
        duration_s = step.duration_s * self.slowdown
        if self.spec.stall_every_s < math.inf:
            stalls = self.rng.random() < -math.expm1(-duration_s / self.spec.stall_every_s)
            duration_s += self.spec.stall_s * stalls
        return step.start_s + duration_s

    def read(self) -> Load | None:
        """What its metrics page says; None when it refuses connections."""
        if not self.alive:
            return None
        return Load(
            waiting=float(self.engine.waiting),
            running=float(self.engine.running),
            kv_usage=self.engine.kv_usage,
            block_tokens=float(BLOCK_TOKENS),
            cache_blocks=float(self.spec.engine.preset.kv_blocks),
        )


class Cluster:
    """One run. ConfigError for a bad configuration, ValueError for two engines of one name."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.now_s = 0.0
        self.records: list[Record] = []
        """Of the requests that have ended, in the order in which the router learned it."""
        self.pool = Pool(spec.stale_after_s)
        resolved = resolve(load(spec.config), allow_experimental=True)
        self.router = build_router(resolved, self.pool, Random(f"{spec.seed} router"))
        self.producers = [p for p in self.router.producers if isinstance(p, PredictedLatency)]
        self.trainers = [(p, spec.trainer(p.model)) for p in self.producers if spec.trainer is not None]
        for producer, trainer in self.trainers:
            producer.on_sample = trainer.add
        self._servers: dict[str, _Server] = {}
        self._heap: list[tuple[float, int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serials = count()
        self._arrivals: Iterator[Arrival] = iter(())
        self._gate = self._flow_gate(resolved)
        self._due_s = math.inf
        """When the gate is looked at again."""
        self._open = 0
        """Requests without a record, the one that arrives next included."""
        for one in spec.engines:
            self._join(one)
        for event in spec.events:
            self._at(event.at_s, _Order.EVENT, self._happen, event)
        self._every(spec.scrape_interval_s, _Order.SCRAPE, self._scrape)
        self._every(spec.trainer_interval_s, _Order.TRAINER, self._train)
        self._every(REAP_EVERY_S, _Order.REAP, self._reap)

    def run(self, arrivals: Iterable[Arrival]) -> list[Record]:
        """Until all have ended; returns ``records``. ``arrivals`` come in the order of ``at_s``, and are read as time
        passes, one ahead. ValueError when one lies in the past; RuntimeError when a producer failed, which the router
        survives and a measurement does not."""
        self._arrivals = iter(arrivals)
        self._expect_arrival()
        while self._open:
            self.now_s, _, _, act, arguments = heapq.heappop(self._heap)
            act(*arguments)
        self._reap()
        return self.records

    def _at(self, at_s: float, order: _Order, act: Callable[..., Any], *arguments: Any) -> None:
        if not at_s >= self.now_s:
            raise ValueError(f"nothing can be planned for {at_s} s when it is {self.now_s} s")
        heapq.heappush(self._heap, (at_s, order, next(self._serials), act, arguments))

    def _every(self, interval_s: float, order: _Order, act: Callable[[], None], rounds: int = 0) -> None:
        act()
        self._at((rounds + 1) * interval_s, order, self._every, interval_s, order, act, rounds + 1)

    def _expect_arrival(self) -> None:
        one = next(self._arrivals, None)
        if one is not None:
            self._open += 1
            self._at(one.at_s, _Order.ARRIVAL, self._arrive, one)

    def _flow_gate(self, resolved: Resolved) -> VirtualGate | None:
        settings = resolved.flow_settings()
        if settings is None:
            return None
        detector = resolved.kind(SaturationDetector)[resolved.detector]
        gate = VirtualGate(
            Dispatcher(FlowControl(settings, self.now_s), detector, self.router.load), self._dispatch, self._refuse
        )
        self.router.on_finished = lambda decision, outcome: gate.finished(decision, outcome, self.now_s)
        return gate

    def _arrive(self, one: Arrival) -> None:
        self._expect_arrival()
        if self._gate is None:
            self._dispatch(one)
        else:
            self._gate.arrive(one, self.now_s)
            self._await_deadline()

    def _drain(self) -> None:
        """Something changed that may let requests go."""
        if self._gate is not None:
            self._gate.drain(self.now_s)
            self._await_deadline()

    def _await_deadline(self) -> None:
        if self._gate is not None and self._gate.due_s < self._due_s:
            self._due_s = self._gate.due_s
            self._at(self._due_s, _Order.DEADLINE, self._deadline)

    def _deadline(self) -> None:
        self._due_s = math.inf
        self._drain()

    def _dispatch(self, one: Arrival) -> Decision | None:
        """Where it goes; None when the router refused it."""
        try:
            decision = self.router.choose(one.request, self.subset(one), self.now_s)
        except RequestError as error:
            self._refuse(one, error)
            return None
        if self.spec.path == "lean":
            self.router.assume_first_token(decision)
        self._send(Flight(one, decision))
        return decision

    def _refuse(self, one: Arrival, error: RequestError) -> None:
        self._close(record_of(one, None, Outcome(end=End.FINISHED, status=error.status)))

    def subset(self, one: Arrival) -> Collection[str] | None:
        """``host:port`` of the engines among which the router is to choose for this arrival, None for all: for
        subclasses that know more than a router may."""
        return None

    def _send(self, flight: Flight) -> None:
        server, asked = self._servers[flight.decision.picked[0].name], flight.arrival.request
        reached_s = self.now_s + self.spec.network_s
        if not server.alive:
            self._end(flight, End.UPSTREAM_FAILED, 503, reached_s)
            return
        sent = SimRequest(
            id=flight.decision.ticket,
            prompt_tokens=asked.input_tokens,
            output_tokens=flight.arrival.output_tokens,
            arrival_s=reached_s,
            block_hashes=block_hashes(b"".join(asked.prompts), asked.cache_salt),
        )
        refusal = server.engine.submit(sent)
        if refusal is not None:
            self._end(flight, End.FINISHED, _STATUS_OF[refusal], reached_s)
            return
        server.flights[sent.id] = flight
        if not server.awake:
            self._wait(server)

    def _wait(self, server: _Server) -> None:
        """For the next request that is still being tokenised, if there is one."""
        ready_s = server.engine.next_ready_s
        server.awake = ready_s is not None
        if ready_s is not None:
            self._due(server, ready_s)

    def _due(self, server: _Server, at_s: float, *ended: Step) -> None:
        server.due_s = at_s
        self._at(at_s, _Order.STEP, self._advance, server, *ended)

    def _advance(self, server: _Server, ended: Step | None = None) -> None:
        """The step under way, if there was one, has ended: its tokens come out and the next begins."""
        if not server.alive:
            return
        if ended is not None:
            self._emit(server, ended)
        step = server.engine.step(self.now_s)
        if step is None:
            self._wait(server)
        else:
            self._due(server, server.end_s(step), step)

    def _emit(self, server: _Server, step: Step) -> None:
        flights = server.flights
        for ticket, cached_tokens in step.admitted:
            flights[ticket].cached_tokens = cached_tokens
        for ticket in step.first:
            self._first_token(flights[ticket])
        for ticket in step.finished:
            self._end(flights.pop(ticket), End.FINISHED, 200, self.now_s)

    def _first_token(self, flight: Flight) -> None:
        flight.first_s = self.now_s + self.spec.network_s
        if self.spec.path == "duplex" and flight.arrival.request.streaming:
            ticket, first_s = flight.decision.ticket, flight.first_s
            self._at(first_s, _Order.REPORT, self.router.first_token, ticket, first_s)

    def _end(self, flight: Flight, end: End, status: int, at_s: float) -> None:
        """The engine is done with the request ``at_s``; the router learns it later."""
        seen_s = at_s + self.spec.network_s
        delay_s = self.spec.report_delay_s if self.spec.path == "lean" else 0.0
        outcome = outcome_of(flight, end, status, seen_s)
        self._at(seen_s + delay_s, _Order.REPORT, self._report, flight, outcome)

    def _report(self, flight: Flight, outcome: Outcome) -> None:
        self.router.finish(flight.decision.ticket, outcome, self.now_s)
        self._close(record_of(flight.arrival, flight, outcome))
        self._drain()

    def _close(self, record: Record) -> None:
        self.records.append(record)
        self._open -= 1

    def _happen(self, event: Event) -> None:
        match event:
            case Join(spec=spec):
                self._join(spec)
            case Leave(name=name):
                self._servers[name].listed = False
                self._list()
            case Fail(name=name):
                self._fail(self._servers[name])
            case Slow(name=name, slowdown=slowdown):
                self._servers[name].slowdown = slowdown
            case _:
                assert_never(event)
        self._drain()

    def _join(self, spec: EngineSpec) -> None:
        before = self._servers.get(spec.endpoint.name)
        if before is not None and before.alive and before.listed:
            raise ValueError(f"there are two engines named {spec.endpoint.name!r}")
        self._servers[spec.endpoint.name] = _Server(spec, self.spec.seed)
        self._list()

    def _list(self) -> None:
        self.pool.apply(server.endpoint for server in self._servers.values() if server.listed)

    def _fail(self, server: _Server) -> None:
        server.alive = False
        for flight in server.flights.values():
            # The headers of a stream come before its first token, as with vLLM.
            self._end(flight, End.UPSTREAM_FAILED, 200 if flight.arrival.request.streaming else 503, self.now_s)
        server.flights.clear()

    def _scrape(self) -> None:
        pages = [(server.endpoint, server.read()) for server in self._servers.values() if server.listed]
        self._at(self.now_s + self.spec.scrape_delay_s, _Order.SCRAPE, self._learn, pages)

    def _learn(self, pages: list[tuple[Endpoint, Load | None]]) -> None:
        for endpoint, page in pages:
            if page is None:
                self.pool.record_failure(endpoint)
            else:
                self.pool.record(endpoint, page, self.now_s)
        self._drain()

    def _train(self) -> None:
        for producer, trainer in self.trainers:
            trainer.classes = producer.classes.names
            model = trainer.tick(self.now_s)
            if model is not None:
                self._at(self.now_s + self.spec.publish_delay_s, _Order.TRAINER, producer.publish, model)

    def _reap(self) -> None:
        if self.router.last_producer_error:
            raise RuntimeError(f"a producer failed at or before {self.now_s} s: {self.router.last_producer_error}")
        self.router.reap(self.now_s)
        for producer in self.producers:
            producer.ledger.expire(self.now_s)
