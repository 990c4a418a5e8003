"""Engines in virtual time under interactive and batch traffic, with batchgw's own pace between them.

    arrival -> router (fewest interactive requests among the carriers) -> engine -> first token, end -> law
    law -> PoolHeadroom, ``news_delay_s`` later -> Pace -> aborts and starts

A law (``benchmarks.batch_laws``) is all that differs between contenders.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count, islice
from random import Random
from typing import Any, Protocol

import msgspec
import numpy as np

from batchgw.pace import LOOK_AHEAD, FixedCap, Pace, PoolHeadroom, Waiting
from benchmarks.batch_traffic import Scenario
from llmd_sched.sim.engine import Engine, Policy, SimRequest, Step

TICK_S = 0.1
NEWS_DELAY_S = 0.05


class Law(Protocol):
    """Who decides how much batch there may be."""

    policy: Policy
    router_limit: float
    """Requests in flight per engine at which the router holds everything back, interactive first in line."""
    refuse_limit: float
    """... at which it refuses batch."""
    plain: bool
    """Batch looks like any other request to the engine."""

    def arrived(self, ticket: str, endpoint: str, prompt_tokens: int, now_s: float, *, batch: bool) -> bool:
        """True when there is news that cannot wait."""
        ...

    def first_token(self, ticket: str, now_s: float) -> None: ...

    def finished(self, ticket: str, now_s: float, output_tokens: int | None) -> None: ...

    def refused(self, endpoint: str, now_s: float) -> None: ...

    def carriers(self) -> tuple[str, ...]: ...

    def look(self, servers: list[Server], now_s: float) -> PoolHeadroom: ...


class Job:
    """A batch line: what is left of it, and when it was done."""

    __slots__ = ("done", "done_s", "number", "output_tokens", "prompt_counted", "prompt_tokens", "tries")

    def __init__(self, number: int, prompt_tokens: int, output_tokens: int) -> None:
        self.number = number
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.done = 0
        """Tokens kept from attempts that were aborted."""
        self.tries = 0
        self.prompt_counted = False
        self.done_s: float | None = None


class Asked(msgspec.Struct):
    """An interactive request and what became of it."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    endpoint: str = ""
    first_s: float = math.nan
    end_s: float = math.nan


class Server:
    """One engine."""

    __slots__ = ("awake", "batch", "engine", "held", "interactive", "name")

    def __init__(self, name: str, engine: Engine) -> None:
        self.name = name
        self.engine = engine
        self.awake = False
        self.interactive = 0
        """In flight."""
        self.batch = 0
        self.held: tuple[deque[SimRequest], deque[SimRequest]] = deque(), deque()
        """In the router: interactive, batch."""


class Simulation:
    """One run of one scenario under one law. ``bins`` has a row per second, see ``COLUMNS``."""

    def __init__(
        self,
        scenario: Scenario,
        law: Law,
        seed: int,
        lines: Iterator[tuple[int, int]],
        *,
        interactive: bool = True,
        news_delay_s: float = NEWS_DELAY_S,
        end_s: float | None = None,
    ) -> None:
        self.scenario = scenario
        self.law = law
        self.end_s = end_s if end_s is not None else scenario.end_s
        self.news_delay_s = news_delay_s
        self.pace = Pace(FixedCap(lines=0))  # as the worker's pacer: nothing before it has heard
        self.now_s = 0.0
        self.asked: dict[str, Asked] = {}
        self.jobs: dict[str, Job] = {}
        """In flight."""
        self.done: list[Job] = []
        self.aborts = 0
        self.servers = [
            Server(f"engine-{n}", Engine(scenario.engine(law.policy), Random(f"{seed} noise {n}")))
            for n in range(scenario.engines)
        ]
        self.bins = np.zeros((math.ceil(self.end_s) + 1, len(COLUMNS)))
        self._by_name = {server.name: server for server in self.servers}
        self._open = 0
        self._lines = enumerate(lines)
        self._fresh: deque[Job] = deque()
        self._aborted: deque[Job] = deque()
        self._arrivals = scenario.arrivals(seed) if interactive else iter(())
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serials = count()
        self._starting = False

    def run(self) -> Simulation:
        self._expect()
        self._at(0.0, self._tick)
        while self._heap:
            self.now_s, _, act, arguments = heapq.heappop(self._heap)
            if self.now_s >= self.end_s and not self._open:
                break
            act(*arguments)
        return self

    def _at(self, at_s: float, act: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._heap, (at_s, next(self._serials), act, arguments))

    # ------------------------------------------------------------------------------------------------- interactive

    def _expect(self) -> None:
        one = next(self._arrivals, None)
        if one is not None:
            self._open += 1
            self._at(one[0], self._arrive, Asked(*one))

    def _arrive(self, asked: Asked) -> None:
        self._expect()
        ticket = f"i{len(self.asked)}"
        self.asked[ticket] = asked
        names = self.law.carriers()
        among = [self._by_name[name] for name in names] if names else self.servers
        server = min(among, key=lambda one: one.interactive)
        server.interactive += 1
        asked.endpoint = server.name
        self._route(server, SimRequest(
            id=ticket,
            prompt_tokens=asked.prompt_tokens,
            output_tokens=asked.output_tokens,
            arrival_s=self.now_s,
        ))  # fmt: skip
        if self.law.arrived(ticket, server.name, asked.prompt_tokens, self.now_s, batch=False):
            self._look()

    def _route(self, server: Server, request: SimRequest, batch: bool = False) -> None:
        if self.law.router_limit < math.inf:
            server.held[batch].append(request)
            self._release(server)
        else:
            self._submit(server, request)

    def _release(self, server: Server) -> None:
        """Strict priority, and nothing passes while the engine is saturated."""
        for queue in server.held:
            while queue and self._in_engine(server) < self.law.router_limit:
                held = queue.popleft()
                self._submit(server, msgspec.structs.replace(held, arrival_s=self.now_s))

    def _in_engine(self, server: Server) -> int:
        return server.interactive + server.batch - len(server.held[0]) - len(server.held[1])

    def _submit(self, server: Server, request: SimRequest) -> None:
        if server.engine.submit(request) is not None:
            raise RuntimeError(f"the engine refused {request}")
        if not server.awake:
            self._wake(server)

    # ------------------------------------------------------------------------------------------------------ engines

    def _wake(self, server: Server) -> None:
        ready_s = server.engine.next_ready_s
        server.awake = ready_s is not None
        if ready_s is not None:
            self._at(max(ready_s, self.now_s), self._advance, server, None)

    def _advance(self, server: Server, ended: Step | None) -> None:
        if ended is not None:
            self._emit(server, ended)
        step = server.engine.step(self.now_s)
        if step is None:
            self._wake(server)
        else:
            self._at(step.end_s, self._advance, server, step)

    def _emit(self, server: Server, step: Step) -> None:
        bins = self.bins[min(int(self.now_s), len(self.bins) - 1)]
        bins[BATCH] += sum(map(self.pace.lines.__contains__, step.tokens))
        bins[INTERACTIVE] += sum(map(self.asked.__contains__, step.tokens))
        bins[COMPUTED] += step.scheduled_tokens
        self.pace.produced(step.tokens)
        for ticket in step.first:
            self._first(ticket, bins)
        for ticket in step.finished:
            self._finish(server, ticket, bins)
        if step.finished or step.first:
            self._release(server)
            self._start()

    def _first(self, ticket: str, bins: Any) -> None:
        job, asked = self.jobs.get(ticket), self.asked.get(ticket)
        if asked is not None:
            asked.first_s = self.now_s
            bins[INTERACTIVE] += asked.prompt_tokens
        elif job is None:
            return
        elif not job.prompt_counted:
            job.prompt_counted = True
            bins[BATCH] += job.prompt_tokens
        self.law.first_token(ticket, self.now_s)

    def _finish(self, server: Server, ticket: str, bins: Any) -> None:
        asked, job = self.asked.get(ticket), self.jobs.pop(ticket, None)
        if asked is not None:
            asked.end_s = self.now_s
            server.interactive -= 1
            self._open -= 1
            self.law.finished(ticket, self.now_s, asked.output_tokens)
        elif job is not None:
            server.batch -= 1
            self.pace.ended(ticket)
            self.law.finished(ticket, self.now_s, job.output_tokens - job.done)
            job.done_s = self.now_s
            self.done.append(job)
            bins[LINES] += 1

    # -------------------------------------------------------------------------------------------------------- batch

    def _tick(self) -> None:
        self._look()
        self._at(self.now_s + TICK_S, self._tick)

    def _look(self) -> None:
        self._at(self.now_s + self.news_delay_s, self._hear, self.law.look(self.servers, self.now_s))

    def _hear(self, news: PoolHeadroom) -> None:
        self.pace.hear(news, self.now_s)
        for ticket in self.pace.aborts(self.now_s):
            self._abort(ticket)
        self._start()

    def _abort(self, ticket: str) -> None:
        line, job = self.pace.ended(ticket), self.jobs.pop(ticket)
        assert line is not None
        server = self._by_name[line.endpoint]
        server.engine.abort(ticket)
        server.batch -= 1
        self.aborts += 1
        self.law.finished(ticket, self.now_s, None)
        job.done += line.tokens
        self._aborted.appendleft(job)

    def _start(self) -> None:
        starts = self.pace.starts(self._offer(), self.now_s)
        aborted = min(len(self._aborted), LOOK_AHEAD)
        for start in sorted(starts, key=lambda one: -one.position):
            queue, at = (self._aborted, 0) if start.position < aborted else (self._fresh, aborted)
            job = queue[start.position - at]
            del queue[start.position - at]
            self._send(job, start.endpoint)
        if len(starts) >= LOOK_AHEAD:
            self._start()

    def _offer(self) -> list[Waiting]:
        """Aborted lines first; as many of either kind as are looked at."""
        while len(self._fresh) < LOOK_AHEAD and (line := next(self._lines, None)) is not None:
            self._fresh.append(Job(line[0], *line[1]))
        offered = [*islice(self._aborted, LOOK_AHEAD), *islice(self._fresh, LOOK_AHEAD)]
        return [Waiting(job.prompt_tokens + job.done, job.tries > 0) for job in offered]

    def _send(self, job: Job, endpoint: str) -> None:
        server = self._by_name[endpoint]
        if self._in_engine(server) >= self.law.refuse_limit:
            (self._aborted if job.tries else self._fresh).appendleft(job)
            self.law.refused(endpoint, self.now_s)
            return
        job.tries += 1
        ticket, prompt_tokens = f"b{job.number}.{job.tries}", job.prompt_tokens + job.done
        self.jobs[ticket] = job
        self.pace.started(ticket, endpoint, prompt_tokens)
        server.batch += 1
        self.law.arrived(ticket, endpoint, prompt_tokens, self.now_s, batch=True)
        self._route(server, SimRequest(
            id=ticket,
            prompt_tokens=prompt_tokens,
            output_tokens=max(job.output_tokens - job.done, 1),
            arrival_s=self.now_s,
            priority=0 if self.law.plain else 1,
        ), batch=not self.law.plain)  # fmt: skip


COLUMNS = ("batch", "interactive", "computed", "lines")
BATCH, INTERACTIVE, COMPUTED, LINES = range(4)
"""Tokens of batch, net of what was computed twice; of interactive requests; all computed; lines finished."""
