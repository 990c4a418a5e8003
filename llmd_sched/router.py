"""The one walk of a request: choose an endpoint, follow the request, learn from its end.

    choose(request, now)         pool -> producers -> admitters -> profiles -> Decision; the endpoint is charged
    first_token(ticket, now)     the prompt has been computed there
    finish(ticket, outcome, now) exactly once; the charge is given back and the producers learn

``choose`` is one synchronous call, so a decision is atomic without a lock and the next one sees its charge. Time and
randomness are arguments; there is no clock, socket or metric here, so the simulator drives the same code.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence
from random import Random

from llmd_sched.errors import NoCandidates, NoEndpoints, NotAdmitted, NotCached
from llmd_sched.plugin import PREFILL, Admitter, Producer
from llmd_sched.pool.pool import Pool
from llmd_sched.sched.handlers import Choice, Scheduling
from llmd_sched.types import Array, Candidates, Decision, End, Endpoint, Outcome, Request, Scores, Stage, Trace

MAX_OPEN_REQUESTS = 200_000
LOST_AFTER_S = 3600.0
"""A request whose end nobody reported is given up after this long."""

IDLE_LOST_AFTER_S = 10.0
"""... and after this long when its engine, freshly read, has nothing running and nothing waiting."""

GONE_LOST_AFTER_S = 300.0
"""... and after this long when its endpoint has left the pool, where nobody reads whether it is idle."""

SAMPLE_EVERY = 16
"""Decisions of which one is made by ``sampled``."""

TRACED = (
    *("ttft_ms", "tpot_ms", "ttft_headroom_ms", "tpot_headroom_ms"),
    *("prefix_match_blocks", "prefix_total_blocks", "prefix_block_tokens", "uncached_tokens"),
)
"""Columns a decision's trace keeps."""


class _Contained:
    """Around a producer's hook: what blows up is counted, and takes neither the request nor other producers down."""

    __slots__ = ("errors", "last_error", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.errors = 0
        self.last_error = ""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self.errors += 1
        self.last_error = f"{type(error).__name__}: {error}"
        return True


class Router:
    """Composed by ``catalog.build_router``; owns the requests that are open."""

    def __init__(
        self,
        pool: Pool,
        producers: Sequence[Producer],
        scheduling: Scheduling,
        rng: Random,
        *,
        admitters: Sequence[Admitter] = (),
        ticket_prefix: str = "",
    ) -> None:
        self.pool = pool
        self.producers = tuple(producers)
        self.scheduling = scheduling
        self.sampled: Scheduling | None = None
        """Makes one in SAMPLE_EVERY decisions instead: the same, timed."""
        self.admitters = tuple(admitters)
        self.open: dict[str, Decision] = {}
        self._guards = {p.name: _Contained(p.name) for p in producers}
        self.lost = 0
        self.on_chosen: Callable[[Endpoint], None] = lambda endpoint: None
        """Told of each endpoint of a decision, at once."""
        self.on_finished: Callable[[Decision, Outcome], None] = lambda decision, outcome: None
        """Told that a request has ended and its charge was given back: there is room for another."""
        self._rng = rng
        self._tickets = 0
        self._ticket_prefix = ticket_prefix
        self._first_tokens: list[tuple[float, str]] = []
        self._traced = tuple(f"{column}/{p.name}" for p in producers for column in TRACED)
        self._reply_headers = tuple(p for p in producers if type(p).reply_headers is not Producer.reply_headers)
        pool.on_change.append(self._endpoints_changed)
        self._endpoints_changed(pool.endpoints)

    def _endpoints_changed(self, endpoints: list[Endpoint]) -> None:
        for producer in self.producers:
            producer.endpoints_changed(endpoints)

    @property
    def producer_errors(self) -> dict[str, int]:
        """How often a hook of each producer failed."""
        return {name: guard.errors for name, guard in self._guards.items()}

    @property
    def last_producer_error(self) -> str:
        """``name: what``, of a producer that failed; empty while none has."""
        return next((f"{name}: {g.last_error}" for name, g in self._guards.items() if g.errors), "")

    def choose(self, request: Request, subset: Collection[str] | None, now_s: float) -> Decision:
        """Raises NoCandidates when pool or subset is empty, NotAdmitted, NoneLeft when the filters leave nothing,
        NotCached."""
        self._infer_first_tokens(now_s)
        candidates = self.pool.candidates(subset, now_s)
        if not len(candidates):
            raise NoCandidates("failed to find endpoint candidates for serving the request")
        candidates, producers = self._produce(request, candidates, now_s)
        for one in self.admitters:
            if refusal := one.refusal(request, candidates, self._rng):
                raise NotAdmitted(f"request cannot be admitted: {refusal}")
        choice = self._scheduling().run(request, candidates, self._rng)
        position = int(choice.picked.order[0])
        if request.only_if_cached and not _holds_prefix(candidates, position):
            raise NotCached("no decode worker has the requested KV cache")
        decision = self._decide(request, candidates, producers, choice, now_s)
        self.open[decision.ticket] = decision
        self._tell_chosen(decision, candidates, producers, position, now_s)
        if len(self.open) > MAX_OPEN_REQUESTS:
            self.finish(next(iter(self.open)), Outcome(end=End.LOST), now_s)
        return decision

    def _scheduling(self) -> Scheduling:
        sampled = self.sampled if self._tickets % SAMPLE_EVERY == 0 else None
        return sampled or self.scheduling

    def _tell_chosen(
        self, decision: Decision, candidates: Candidates, producers: list[Producer], position: int, now_s: float
    ) -> None:
        self.on_chosen(decision.picked[0])
        for stage in decision.stages:
            self.on_chosen(stage.picked[0])
        for producer in producers:
            with self._contained(producer):
                producer.chosen(decision, candidates, position, now_s)

    def load(self, now_s: float) -> Candidates:
        """The whole pool and what is in flight there, as saturation detectors look at it."""
        candidates = self.pool.candidates(None, now_s)
        columns: dict[str, Array] = {}
        for producer in self.producers:
            columns |= producer.load(candidates, now_s)
        return candidates.with_columns(columns)

    def choose_any(self, subset: Collection[str] | None, now_s: float) -> Endpoint:
        """For a request without a body: any reachable endpoint of the subset. Raises NoEndpoints."""
        candidates = self.pool.candidates(subset, now_s)
        if not len(candidates):
            raise NoEndpoints("no pods available in datastore")
        return candidates.endpoints[self._rng.randrange(len(candidates))]

    def _produce(self, request: Request, candidates: Candidates, now_s: float) -> tuple[Candidates, list[Producer]]:
        """A producer that fails takes no request down: its columns are absent, and it does not follow the request."""
        worked = []
        for producer in self.producers:
            with self._contained(producer):
                candidates = candidates.with_columns(producer.produce(request, candidates, now_s))
                worked.append(producer)
        return candidates, worked

    def _contained(self, producer: Producer) -> _Contained:
        return self._guards[producer.name]

    def _decide(
        self, request: Request, candidates: Candidates, producers: list[Producer], choice: Choice, now_s: float
    ) -> Decision:
        self._tickets += 1
        picked, endpoints, columns = choice.picked, candidates.endpoints, candidates.columns
        best = int(picked.order[0])
        stages = [Stage(n, tuple(endpoints[i] for i in p.order), int(p.order[0])) for n, p in choice.beside.items()]
        positions = {choice.profile: best} | {s.profile: s.position for s in stages}
        predictions = (p.predicted(candidates, best, positions.get(PREFILL)) for p in producers)
        return Decision(
            ticket=f"{self._ticket_prefix}{self._tickets:x}",
            request=request,
            picked=tuple(endpoints[i] for i in picked.order),
            profile=choice.profile,
            stages=tuple(stages),
            elsewhere=choice.destination,
            headers=choice.headers,
            reply_headers=self._headers_for_reply(request, candidates, positions),
            scores=Scores(endpoints, picked.scored, picked.scores),
            prediction=next((p for p in predictions if p is not None), None),
            explored=picked.explored,
            trace=Trace(endpoints, {n: columns[n] for n in self._traced if n in columns}, picked.verdicts, best),
            at_s=now_s,
        )

    def _headers_for_reply(self, request: Request, candidates: Candidates, positions: dict[str, int]) -> dict[str, str]:
        headers: dict[str, str] = {}
        for producer in self._reply_headers:
            with self._contained(producer):
                headers.update(producer.reply_headers(request, candidates, positions))
        return headers

    def assume_first_token(self, decision: Decision) -> None:
        """On a path that does not show the first token, assume it when it is predicted, or else when the producers
        that follow the request think it is due."""
        if decision.prediction is not None:
            due_ms = decision.prediction.ttft_ms
        else:
            due_ms = max((p.first_token_due_ms(decision.ticket) for p in self.producers), default=0.0)
        if due_ms and len(self._first_tokens) < MAX_OPEN_REQUESTS:
            heapq.heappush(self._first_tokens, (decision.at_s + due_ms / 1e3, decision.ticket))

    def _infer_first_tokens(self, now_s: float) -> None:
        while self._first_tokens and self._first_tokens[0][0] <= now_s:
            ticket = heapq.heappop(self._first_tokens)[1]
            if ticket in self.open:
                self._tell_first_token(ticket, now_s)

    def first_token(self, ticket: str, now_s: float) -> None:
        """It was seen."""
        decision = self.open.get(ticket)
        if decision is None:
            return
        self._tell_first_token(ticket, now_s)
        for producer in self.producers:
            with self._contained(producer):
                producer.first_token_seen(ticket, 1e3 * (now_s - decision.at_s), now_s)

    def _tell_first_token(self, ticket: str, now_s: float) -> None:
        for producer in self.producers:
            with self._contained(producer):
                producer.first_token(ticket, now_s)

    def finish(self, ticket: str, outcome: Outcome, now_s: float) -> Decision | None:
        """The decision the outcome belongs to; None when it is not open (already finished, or not ours)."""
        decision = self.open.pop(ticket, None)
        if decision is None:
            return None
        if outcome.end is End.LOST:
            self.lost += 1
        for producer in self.producers:
            with self._contained(producer):
                producer.finished(ticket, outcome, now_s)
        self.on_finished(decision, outcome)
        return decision

    def reap(self, now_s: float) -> int:
        """Give up requests whose end was lost; returns how many. Call about once a second.

        ``open`` is in order of dispatch, so only its old head is looked at.
        """
        columns = self.pool.columns(now_s)
        fresh = self.pool.fresh(now_s)
        idle = fresh & (columns["waiting"] + columns["running"] == 0)
        lost = []
        for ticket, decision in self.open.items():
            age_s = now_s - decision.at_s
            if age_s < IDLE_LOST_AFTER_S:
                break
            i = self.pool.position(decision.picked[0].key)
            if age_s > (GONE_LOST_AFTER_S if i is None else LOST_AFTER_S) or (i is not None and idle[i]):
                lost.append(ticket)
        for ticket in lost:
            self.finish(ticket, Outcome(end=End.LOST), now_s)
        return len(lost)


def _holds_prefix(candidates: Candidates, position: int) -> bool:
    """By any index there is."""
    matches = (values for name, values in candidates.columns.items() if name.startswith("prefix_match_blocks/"))
    return any(match[position] > 0 for match in matches)
