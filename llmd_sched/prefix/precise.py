"""Which endpoint holds how much of a prompt in its KV cache, known from the events the engines publish.

Prompts must be token ids, as a ``token-producer`` with a render backend makes them; text matches nothing. Nothing here
touches a socket: a subscriber hands in numbered batches, ``announce`` and then ``receive`` for each.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np

from llmd_sched.config import duration_s
from llmd_sched.plugin import PREFILL, Attribute, Producer, ProducerPlugin
from llmd_sched.prefix import precise_config
from llmd_sched.prefix.blockindex import BlockIndex, Runs
from llmd_sched.prefix.blocks import NO_EXTRAS, tokens_of
from llmd_sched.prefix.events import Batch, decode
from llmd_sched.prefix.feed import DEFAULT_TIER, Engine, Feed
from llmd_sched.prefix.precise_config import Indexer, KvEvents, TokenProcessor
from llmd_sched.types import Array, Candidates, Decision, Endpoint, Request

SPECULATIVE = "speculative (routed)"
"""Name of a tier no engine uses."""

MAX_SPECULATIONS = 1 << 16
GONE = -1
ROUNDING = 1e-6

_RANK = re.compile(r"-rank-(\d{1,4})$")

Server = tuple[str, str]
"""``Endpoint.server``."""


class PrecisePrefixCacheProducer(ProducerPlugin, frozen=True):
    """Prefix matches from the KV events of vLLM or SGLang, over ZMQ.

    ``tokenProcessorConfig``: tokens in a block, and how blocks are hashed. ``indexerConfig``: how many blocks may be
    known (``inMemoryConfig`` by number, ``costAwareMemoryConfig`` by bytes) and what a block is worth by the medium it
    is on (``kvCacheBackendConfigs``). ``kvEventsConfig``: connect to every endpoint's ``socketPort`` plus its rank, or
    let engines connect to ``zmqEndpoint``; with ``replaySocketPort`` what was missed is asked for.
    ``speculativeIndexing``: for ``speculativeTTL`` count a routed prompt as cached where it was sent.
    """

    provides = Attribute.PREFIX_MATCH

    token_processor_config: TokenProcessor = TokenProcessor()
    indexer_config: Indexer = Indexer()
    kv_events_config: KvEvents = KvEvents()
    speculative_indexing: bool = False
    speculative_ttl: str = msgspec.field(default="2s", name="speculativeTTL")

    def check(self) -> None:
        precise_config.check(
            self.token_processor_config, self.indexer_config, self.kv_events_config, self.speculative_ttl
        )

    def open(self, name: str) -> PrecisePrefixCache:
        return PrecisePrefixCache(name, self)


class Publisher:
    """One engine's numbered batches. Live ones never go back unless the engine has started anew."""

    __slots__ = ("applied", "fingerprint", "heard", "live", "model", "server")

    def __init__(self, server: Server) -> None:
        self.server = server
        self.model = ""
        """From the topic; empty until one has come."""
        self.live = self.applied = -1
        """Number of the last batch that came by itself, and of the last that was applied, replayed ones too."""
        self.fingerprint = 0
        """Of the payload last applied."""
        self.heard = False

    def reset(self) -> None:
        """It starts from 0 again."""
        self.live = self.applied = -1


class _Asked(NamedTuple):
    """The last request, until it is known where it goes."""

    request: Request
    chains: list[list[int]]
    runs: list[Runs]


class PrecisePrefixCache(Producer):
    """The live index.

    Columns: ``prefix_match_blocks`` (as the reference: weighted by tier, cut to a whole number),
    ``prefix_cached_blocks`` (the same blocks unweighted, what token counts must be made of), ``prefix_total_blocks``
    (full blocks of the prompt) and ``prefix_block_tokens``.
    """

    def __init__(self, name: str, params: PrecisePrefixCacheProducer) -> None:
        super().__init__(name)
        self.params = params
        self.keys = params.token_processor_config.keys
        weights = dict(params.indexer_config.weights)
        weights[SPECULATIVE] = weights.get(DEFAULT_TIER, 1.0)
        self.index = BlockIndex(params.indexer_config.kv_block_index_config.size, weights)
        self.feed = Feed(self.index, self.keys)
        self.lookups = self.hit_blocks = 0
        """Requests looked up, and the sum of the longest match of each, in blocks."""
        self.timer: Callable[[], float] = lambda: 0.0
        self.on_lookup: Callable[[float], None] = lambda took_s: None
        """Told of the time of each lookup, by ``timer``."""
        self._engines: dict[Server, Engine] = {}
        self._free_numbers: list[int] = []
        self._names: dict[str, Server | None] = {}
        self._speculations: deque[tuple[float, Engine, list[int]]] = deque()
        self._ttl_s = duration_s(params.speculative_ttl)
        self._last: _Asked | None = None
        self._seen: tuple[list[Endpoint], list[int]] | None = None

    def endpoints_changed(self, endpoints: list[Endpoint]) -> None:
        servers = {e.server for e in endpoints}
        self._seen = self._last = None
        for server in [s for s in self._engines if s not in servers]:
            engine = self._engines.pop(server)
            self.feed.clear(engine)
            self._free_numbers.append(engine.number)
            engine.number = GONE
        for e in endpoints:
            if e.server not in self._engines:
                number = self._free_numbers.pop() if self._free_numbers else len(self._engines)
                self._engines[e.server] = Engine(number)
        self._names = _names(endpoints)

    def produce(self, request: Request, candidates: Candidates, now_s: float) -> dict[str, Array]:
        began_s = self.timer()
        self._expire(now_s)
        root = self.keys.root(request.target_model)
        extras = {0: (request.cache_salt,)} if request.cache_salt else NO_EXTRAS
        chains = [self.keys.chain(tokens_of(prompt), root, extras) for prompt in request.prompts]
        count = len(self._engines) + len(self._free_numbers)
        runs = [self.index.match(chain, count) for chain in chains]
        self._last = _Asked(request, chains, runs)
        numbers = self._numbers(candidates.endpoints)
        cached = sum((run.blocks for run in runs), np.zeros(count))[numbers]
        weighted = sum((run.weighted for run in runs), np.zeros(count))[numbers]
        self._note_lookup(cached, began_s)
        n = len(numbers)
        return {
            f"prefix_match_blocks/{self.name}": np.floor(weighted + ROUNDING),
            f"prefix_cached_blocks/{self.name}": cached,
            f"prefix_total_blocks/{self.name}": np.full(n, float(sum(map(len, chains)))),
            f"prefix_block_tokens/{self.name}": np.full(n, float(self.keys.block_tokens)),
        }

    def _note_lookup(self, cached: Array, began_s: float) -> None:
        self.lookups += 1
        self.hit_blocks += int(cached.max(initial=0.0))
        self.on_lookup(self.timer() - began_s)

    def _numbers(self, endpoints: list[Endpoint]) -> list[int]:
        """Of these endpoints in the index; looked up once for each list of them."""
        if self._seen is None or self._seen[0] is not endpoints:
            self._seen = endpoints, [self._engines[e.server].number for e in endpoints]
        return self._seen[1]

    def chosen(self, decision: Decision, candidates: Candidates, position: int, now_s: float) -> None:
        last = self._last
        if not self.params.speculative_indexing or last is None or last.request is not decision.request:
            return
        prefills = [stage.position for stage in decision.stages if stage.profile == PREFILL]
        for at in {position, *prefills}:
            self._speculate(self._engines[candidates.endpoints[at].server], last, now_s)

    def _speculate(self, engine: Engine, asked: _Asked, now_s: float) -> None:
        """What the endpoint lacks of the prompt it will soon have."""
        for chain, runs in zip(asked.chains, asked.runs, strict=True):
            missing = chain[int(runs.blocks[engine.number]) :]
            if missing and self.index.add(engine.number, SPECULATIVE, missing):
                self._speculations.append((now_s + self._ttl_s, engine, missing))
        while len(self._speculations) > MAX_SPECULATIONS:
            self._end_oldest()

    def _expire(self, now_s: float) -> None:
        while self._speculations and self._speculations[0][0] <= now_s:
            self._end_oldest()

    def _end_oldest(self) -> None:
        _, engine, keys = self._speculations.popleft()
        self.index.remove(engine.number, SPECULATIVE, keys)

    def engine_restarted(self, endpoint: Endpoint) -> None:
        """Its cache is empty now."""
        engine = self._engines.get(endpoint.server)
        if engine is not None:
            self.feed.counts.restarts += 1
            self.feed.clear(engine)

    def announce(self, publisher: Publisher, topic: bytes, number: int) -> int | None:
        """A batch came by itself. Returns the first number that is missing before it, None when nothing is.

        A number that is not higher than the last one's means a new engine, whose cache is empty.
        """
        publisher.model = _model(topic) or publisher.model
        if number <= publisher.live:
            self.restarted(publisher)
        publisher.live = number
        first = publisher.applied + 1
        return first if first < number else None

    def restarted(self, publisher: Publisher) -> None:
        """The engine started anew, and counts from 0."""
        publisher.reset()
        self.feed.counts.restarts += 1
        engine = self._engines.get(publisher.server)
        if engine is not None:
            self.feed.clear(engine)

    def receive(self, publisher: Publisher, number: int, payload: bytes, batch: Batch | None = None) -> int:
        """Apply a batch, live or replayed, unless it was. Returns about how many blocks it was about.

        ``batch``: the payload, if it is decoded already.
        """
        counts = self.feed.counts
        if number <= publisher.applied:
            counts.repeated_batches += 1
            return 0
        missed = number - publisher.applied - 1
        if missed and publisher.heard:  # what was before we listened is no gap
            counts.gaps += 1
            counts.missed_batches += missed
        publisher.applied, publisher.heard, publisher.fingerprint = number, True, hash(payload)
        batch = batch or decode(payload)
        if batch is None:
            counts.malformed_batches += 1
            return 0
        return self._apply(publisher, batch)

    def _apply(self, publisher: Publisher, batch: Batch) -> int:
        engine = self._engines.get(publisher.server)
        if engine is None or not publisher.model:
            self.feed.counts.unknown_endpoints += 1
            return 0
        return self.feed.apply(engine, publisher.model, batch)

    def server(self, topic: bytes, rank: int) -> Server | None:
        """Whose topic it is; None when nobody's.

        It may name an endpoint by ``ip:port`` or name, and by the address or the pod's name alone if one endpoint has
        it, or one of that rank.
        """
        parts = topic.split(b"@", 2)
        pod = parts[1].decode(errors="replace") if len(parts) == 3 else ""
        return self._names.get(pod) or self._names.get(f"{pod}-rank-{rank}")


def rank_of(endpoint: Endpoint) -> int:
    """Data-parallel rank by the name discovery gives the ports of one pod; 0 for others."""
    found = _RANK.search(endpoint.name)
    return int(found[1]) if found else 0


def _model(topic: bytes) -> str:
    """Of ``kv@<pod>@<model>``; empty when the topic is another."""
    parts = topic.split(b"@", 2)
    return parts[2].decode(errors="replace") if len(parts) == 3 else ""


def _names(endpoints: list[Endpoint]) -> dict[str, Server | None]:
    """What a topic may call an endpoint; None for what several are called."""
    found: dict[str, Server | None] = {}
    for e in endpoints:
        ranked = f"{e.address}-rank-{rank_of(e)}"
        for name in {e.hostport, f"{e.address}:{e.port}", e.key, e.name, e.address, ranked}:
            found[name] = None if name in found else e.server
    return found
