"""The one walk of a request: choose an endpoint, follow the request, learn from its end.

    choose(request, now)         pool -> producers -> profile -> Decision; the endpoint is charged
    first_token(ticket, now)     the prompt has been computed there
    finish(ticket, outcome, now) exactly once; the charge is given back and the producers learn

``choose`` is one synchronous call, so a decision is atomic without a lock and the next one sees its charge. Time and
randomness are arguments; there is no clock, socket or metric here, so the simulator drives the same code.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence
from random import Random

from llmd_sched.errors import NoCandidates, NoEndpoints, NotCached
from llmd_sched.plugin import DEFAULT_PRODUCER, Attribute, Producer
from llmd_sched.pool.pool import Pool
from llmd_sched.sched.pipeline import Picked, Profile
from llmd_sched.types import Candidates, Decision, End, Endpoint, Outcome, Request, Scores

MAX_OPEN_REQUESTS = 200_000
LOST_AFTER_S = 3600.0
"""A request whose end nobody reported is given up after this long."""

IDLE_LOST_AFTER_S = 10.0
"""... and after this long when its engine, freshly read, has nothing running and nothing waiting."""


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
        self, pool: Pool, producers: Sequence[Producer], profile: Profile, rng: Random, *, ticket_prefix: str = ""
    ) -> None:
        self.pool = pool
        self.producers = tuple(producers)
        self.profile = profile
        self.open: dict[str, Decision] = {}
        self._guards = {p.name: _Contained(p.name) for p in producers}
        self.lost = 0
        self.on_chosen: Callable[[Endpoint], None] = lambda endpoint: None
        """Told of the endpoint of each decision, at once."""
        self._rng = rng
        self._tickets = 0
        self._ticket_prefix = ticket_prefix
        self._first_tokens: list[tuple[float, str]] = []
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
        """Raises NoCandidates when pool or subset is empty, NoneLeft when the filters leave nothing, NotCached."""
        self._infer_first_tokens(now_s)
        candidates = self.pool.candidates(subset, now_s)
        if not len(candidates):
            raise NoCandidates("failed to find endpoint candidates for serving the request")
        candidates, producers = self._produce(request, candidates, now_s)
        picked = self.profile.run(request, candidates, self._rng)
        if request.only_if_cached and not _holds_prefix(candidates, int(picked.order[0])):
            raise NotCached("no decode worker has the requested KV cache")
        decision = self._decide(request, candidates, producers, picked, now_s)
        self.open[decision.ticket] = decision
        self.on_chosen(decision.picked[0])
        for producer in producers:
            with self._contained(producer):
                producer.chosen(decision, candidates, int(picked.order[0]), now_s)
        if len(self.open) > MAX_OPEN_REQUESTS:
            self.finish(next(iter(self.open)), Outcome(end=End.LOST), now_s)
        return decision

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
        self, request: Request, candidates: Candidates, producers: list[Producer], picked: Picked, now_s: float
    ) -> Decision:
        self._tickets += 1
        best = int(picked.order[0])
        endpoints = candidates.endpoints
        predictions = (p.predicted(candidates, best) for p in producers)
        return Decision(
            ticket=f"{self._ticket_prefix}{self._tickets:x}",
            request=request,
            picked=tuple(endpoints[i] for i in picked.order),
            scores=Scores(endpoints, picked.scored, picked.scores),
            prediction=next((p for p in predictions if p is not None), None),
            explored=picked.explored,
            at_s=now_s,
        )

    def expect_first_token(self, ticket: str, at_s: float) -> None:
        """On a path that does not show the first token, assume it at this time (the predicted one)."""
        if len(self._first_tokens) < MAX_OPEN_REQUESTS:
            heapq.heappush(self._first_tokens, (at_s, ticket))

    def _infer_first_tokens(self, now_s: float) -> None:
        while self._first_tokens and self._first_tokens[0][0] <= now_s:
            self.first_token(heapq.heappop(self._first_tokens)[1], now_s)

    def first_token(self, ticket: str, now_s: float) -> None:
        if ticket in self.open:
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
            if age_s > LOST_AFTER_S or (i is not None and idle[i]):
                lost.append(ticket)
        for ticket in lost:
            self.finish(ticket, Outcome(end=End.LOST), now_s)
        return len(lost)


def _holds_prefix(candidates: Candidates, position: int) -> bool:
    """By the default producer's index, as the reference looks no further either."""
    match = candidates.columns.get(f"prefix_match_blocks/{DEFAULT_PRODUCER[Attribute.PREFIX_MATCH]}")
    return match is not None and bool(match[position] > 0)
