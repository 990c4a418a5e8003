"""The board as a plugin: the router tells it of requests, and it tells whoever asks how much batch there may be.

Costs a request about 20 us. On a data path that does not show the first token the router's assumption stands for it,
and where nobody counts the tokens of replies the step times are not calibrated: then the prior step model is believed.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from llmd_sched.headroom.board import HeadroomBoard
from llmd_sched.headroom.law import HeadroomSettings
from llmd_sched.headroom.steps import StepModel
from llmd_sched.headroom.wire import PoolHeadroom
from llmd_sched.plugin import PREFILL, Attribute, Producer, ProducerPlugin, Reads, reads
from llmd_sched.types import Array, Candidates, Decision, End, Endpoint, Outcome, Request

LOOK_S = 0.1
LATE_LOOK_S = 1.5 * LOOK_S
"""Nobody else has looked for so long: the next request does."""

STALE_AFTER_S = 2.0
"""What an engine told longer ago says nothing of what it holds."""

UNREAD_KV_TOKENS = 100_000
"""Of an engine that has not said how large its KV cache is."""

NOTHING = PoolHeadroom(version=0, mode="idle", carriers=(), endpoints=())


class BatchHeadroomProducer(HeadroomSettings, ProducerPlugin, frozen=True):
    """Says how much batch each endpoint can take while interactive requests keep their pace; ``GET /v1/headroom``.

    Requests of negative priority are batch. ``mode: protect`` keeps the time between tokens within ``itlMs``
    milliseconds for everybody (without it, within what bursts have without batch); ``harvest`` fills the engines
    between bursts. ``burstShare``: how much longer a step may take in a burst. ``kvShare`` of the KV cache may hold
    batch. ``burstPrefillTokens``, ``idlePrefillTokens``, ``freePrefillTokens``: batch prompt tokens that may wait for
    their first token in a burst, between bursts, and where steps are not bounded. ``consolidate: false`` does not put
    interactive requests together on few endpoints when there are few.

    A step is first taken to cost ``stepBaseMs`` + ``prefillTokenUs`` per prompt token + ``sequenceUs`` per sequence +
    ``contextTokenNs`` per token of context; all but the prompt's part are then calibrated, within factors of 0.3 to 3.
    ``kvTokens``: size of the KV cache where engines do not tell it.
    """

    provides = Attribute.HEADROOM

    step_base_ms: float = 7.0
    prefill_token_us: float = 20.0
    sequence_us: float = 25.0
    context_token_ns: float = 55.0
    kv_tokens: int | None = None
    in_flight_load_producer_name: str = ""

    def check(self) -> None:
        super().check()
        coefficients = (self.prefill_token_us, self.sequence_us, self.context_token_ns)
        if not self.step_base_ms > 0 or not min(coefficients) >= 0:
            raise ValueError("stepBaseMs must be above 0; prefillTokenUs, sequenceUs and contextTokenNs 0 or more")
        if self.kv_tokens is not None and self.kv_tokens < 1:
            raise ValueError(f"kvTokens must be at least 1, not {self.kv_tokens}")

    def reads(self) -> tuple[Reads, ...]:
        return (reads(Attribute.INFLIGHT_LOAD, self.in_flight_load_producer_name, required=False),)

    @property
    def step(self) -> StepModel:
        return StepModel(
            base_s=self.step_base_ms * 1e-3,
            prefill_token_s=self.prefill_token_us * 1e-6,
            sequence_s=self.sequence_us * 1e-6,
            context_token_s=self.context_token_ns * 1e-9,
        )

    def open(self, name: str) -> BatchHeadroom:
        return BatchHeadroom(name, self)


class BatchHeadroom(Producer):
    """The live side. Columns: ``batch_room`` (batch requests that may still be sent there) and ``carrier`` (1 where
    interactive requests go now).

    ``news`` is the latest word; whoever is in ``on_news`` is told each new one, at the very arrival that begins a
    burst. Endpoints are named by their ``ip:port``.
    """

    def __init__(self, name: str, params: BatchHeadroomProducer) -> None:
        super().__init__(name)
        self.params = params
        self.board = HeadroomBoard(params)
        self.news = NOTHING
        self.on_news: list[Callable[[PoolHeadroom], None]] = []
        self._uncached = f"uncached_tokens/{params.reads()[0].producer}"
        self._members: list[Endpoint] = []
        self._rows: dict[str, int] = {}
        self._reachable: frozenset[str] | None = None
        """None = all of them."""
        self._room: Array = np.zeros(0)
        self._carries: Array = np.ones(0)
        self._batch: dict[str, str] = {}
        """Ticket of a batch request -> its endpoint."""
        self._looked_s = -np.inf

    def endpoints_changed(self, endpoints: list[Endpoint]) -> None:
        before, step = self.board.loads, self.params.step
        known = {e.hostport: before[e.hostport].kv_tokens for e in endpoints if e.hostport in before}
        unread = self.params.kv_tokens or UNREAD_KV_TOKENS
        self.board.endpoints_changed({e.hostport: (step, known.get(e.hostport, unread)) for e in endpoints})
        self._members = endpoints
        self._rows = {e.hostport: i for i, e in enumerate(endpoints)}
        self._room, self._carries = np.zeros(len(endpoints)), np.ones(len(endpoints))
        self._looked_s = -np.inf

    def look(self, candidates: Candidates, now_s: float) -> None:
        """To be called every LOOK_S with the whole pool, those left out that cannot be reached."""
        everybody = len(candidates) == len(self._members)
        self._reachable = None if everybody else frozenset(e.hostport for e in candidates.endpoints)
        self._look(candidates, now_s)

    def _look(self, candidates: Candidates, now_s: float) -> None:
        self._read_engines(candidates, now_s)
        self._publish(now_s)

    def _read_engines(self, candidates: Candidates, now_s: float) -> None:
        """The size of their KV cache, and what they hold beyond what we sent."""
        requests = (candidates.column("waiting") + candidates.column("running")).tolist()
        kv_tokens = (candidates.column("block_tokens") * candidates.column("cache_blocks")).tolist()
        fresh = (candidates.column("metrics_age_s") <= STALE_AFTER_S).tolist()
        for row, i in enumerate(candidates.index.tolist()):
            endpoint = candidates.endpoints[i].hostport
            if fresh[row]:
                self.board.engine_has(endpoint, requests[row], now_s)
            if kv_tokens[row] > 0 and self.params.kv_tokens is None:
                self.board.loads[endpoint].kv_tokens = int(kv_tokens[row])

    def _publish(self, now_s: float) -> None:
        self._looked_s = now_s
        self.news = news = self._of_reachable(self.board.look(now_s))
        self._room[:], self._carries[:] = 0.0, 0.0
        for one in news.endpoints:
            self._room[self._rows[one.endpoint]] = one.n_star - one.batch_running
        for endpoint in news.carriers:
            self._carries[self._rows[endpoint]] = 1.0
        for tell in self.on_news:
            tell(news)

    def _of_reachable(self, news: PoolHeadroom) -> PoolHeadroom:
        up = self._reachable
        if up is None:
            return news
        return msgspec.structs.replace(
            news,
            carriers=tuple(name for name in news.carriers if name in up),
            endpoints=tuple(one for one in news.endpoints if one.endpoint in up),
        )

    def produce(self, request: Request, candidates: Candidates, now_s: float) -> dict[str, Array]:
        if now_s - self._looked_s >= LATE_LOOK_S:
            self._look(candidates, now_s)
        room, carries = self._room, self._carries
        if candidates.endpoints is not self._members:
            rows = [self._rows[e.hostport] for e in candidates.endpoints]
            return {f"batch_room/{self.name}": room[rows], f"carrier/{self.name}": carries[rows]}
        return {f"batch_room/{self.name}": room.copy(), f"carrier/{self.name}": carries.copy()}

    def chosen(self, decision: Decision, candidates: Candidates, position: int, now_s: float) -> None:
        """The endpoint that decodes is charged; a prompt computed elsewhere costs it nothing."""
        asked, endpoint = decision.request, candidates.endpoints[position].hostport
        batch = asked.priority < 0
        uncached = candidates.columns.get(self._uncached)
        computed = asked.input_tokens if uncached is None else int(uncached[position])
        if any(stage.profile == PREFILL and stage.position != position for stage in decision.stages):
            computed = 0
        before = self.board.mode
        self.board.arrived(
            decision.ticket,
            endpoint,
            asked.input_tokens,
            now_s,
            batch=batch,
            cached_tokens=asked.input_tokens - computed,
        )
        if batch:
            self._batch[decision.ticket] = endpoint
            self._room[self._rows[endpoint]] -= 1
        if self.board.mode != before:
            self._publish(now_s)

    def first_token_due_ms(self, ticket: str) -> float:
        """A step over all prompts that wait there, and one more that was under way."""
        return 1e3 * self.board.first_token_due_s(ticket)

    def first_token(self, ticket: str, now_s: float) -> None:
        self.board.first_token(ticket, now_s)

    def finished(self, ticket: str, outcome: Outcome, now_s: float) -> None:
        tokens = outcome.output_tokens if outcome.end is End.FINISHED and outcome.status == 200 else None
        decode_s = outcome.tpot_ms * (tokens - 1) / 1e3 if tokens and outcome.tpot_ms is not None else None
        self.board.finished(ticket, now_s, tokens or None, decode_s)
        endpoint = self._batch.pop(ticket, None)
        if endpoint is not None and endpoint in self._rows:
            self._room[self._rows[endpoint]] += 1

    def state(self) -> dict[str, object]:
        news = self.news
        return {
            "mode": news.mode,
            "version": news.version,
            "carriers": list(news.carriers),
            "endpoints": {one.endpoint: {"n_star": one.n_star, "batch": one.batch_running} for one in news.endpoints},
        }
