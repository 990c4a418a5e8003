"""Which endpoint probably holds how much of a prompt in its prefix cache, guessed from where we sent prompts before.

Each endpoint has its own bounded set of chained block hashes (``HeldBlocks``), so a match is its *contiguous* run from
block 0: an endpoint that lacks an earlier block cannot use a later one. The least recently used go first, and of a
prompt the tail, as vLLM frees them: shared heads survive longest. A hit refreshes its blocks. Where the reply is seen,
what the next turn of a conversation will begin with is known as soon as this one ends.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from llmd_sched.plugin import PREFILL, Attribute, Producer, ProducerPlugin
from llmd_sched.prefix import approx_index
from llmd_sched.prefix.approx_index import Chains, Crowd, HeldBlocks, chains
from llmd_sched.prefix.hashing import BYTES_PER_TOKEN, Hashes, block_hashes, continued
from llmd_sched.prefix.reuse import WorkingSet
from llmd_sched.types import Array, Candidates, Decision, Endpoint, Outcome, Request

MIN_BLOCK_TOKENS = 64
"""The reference's floor; hashing finer gains nothing that routing can use."""

MAX_UNCAPPED_BLOCKS = 1 << 20

MAX_OPEN = 20_000
"""Requests whose reply may still be learnt; beyond it the oldest one's is not."""

WARM_UP_PROMPT = bytes(MIN_BLOCK_TOKENS * BYTES_PER_TOKEN)


class ApproxPrefixCacheProducer(ProducerPlugin, frozen=True):
    """Prefix matches from an approximate index of what was routed where.

    ``autoTune``: take block size and cache size from the engine's metrics. ``blockSizeTokens`` and
    ``lruCapacityPerServer`` (blocks of an engine's 16 tokens) stand in without them. ``maxPrefixTokensToMatch``: longer
    prompts are compared up to here; 0 means ``maxPrefixBlocksToMatch`` decides.
    """

    provides = Attribute.PREFIX_MATCH

    auto_tune: bool = True
    block_size_tokens: int = 16
    block_size: int | None = None
    """Deprecated name of ``blockSizeTokens``."""
    max_prefix_tokens_to_match: int = 131072
    max_prefix_blocks_to_match: int = 2048
    lru_capacity_per_server: int = 31250

    def check(self) -> None:
        if self.max_prefix_tokens_to_match < 0:
            raise ValueError("maxPrefixTokensToMatch must be 0 or more")
        if self.max_prefix_blocks_to_match < 0:
            raise ValueError("maxPrefixBlocksToMatch must be 0 or more")
        if not self.auto_tune and self.configured_block_tokens <= 0:
            raise ValueError("blockSizeTokens must be positive when autoTune is false")
        if self.lru_capacity_per_server <= 0:
            raise ValueError("lruCapacityPerServer must be positive")

    @property
    def configured_block_tokens(self) -> int:
        if self.block_size is not None and self.block_size_tokens == 16:
            return self.block_size
        return self.block_size_tokens

    def max_blocks(self, block_tokens: int) -> int:
        if self.max_prefix_tokens_to_match:
            return self.max_prefix_tokens_to_match // block_tokens
        return self.max_prefix_blocks_to_match or MAX_UNCAPPED_BLOCKS

    def open(self, name: str) -> ApproxPrefixCache:
        return ApproxPrefixCache(name, self)


class _Asked(NamedTuple):
    """The request looked up last, hashed."""

    request: Request
    block_tokens: int
    limit: int
    chains: Chains


class _Open(NamedTuple):
    """A request under way whose reply, added to its prompt, can be learnt."""

    request: Request
    block_tokens: int
    limit: int
    full: Hashes
    """Of its prompt's full blocks."""
    server: tuple[str, str]
    capacity: int


class ApproxPrefixCache(Producer):
    """The live index. Columns: ``prefix_match_blocks``, ``prefix_total_blocks``, ``prefix_block_tokens``; in
    detail also ``prefix_pressure``: the working set of reused blocks over what the endpoint holds at most."""

    def __init__(self, name: str, params: ApproxPrefixCacheProducer) -> None:
        super().__init__(name)
        self.params = params
        self.held: dict[tuple[str, str], HeldBlocks] = {}
        """What each server of the pool holds."""
        self._match_column = f"prefix_match_blocks/{name}"
        self._total_column = f"prefix_total_blocks/{name}"
        self._block_column = f"prefix_block_tokens/{name}"
        self._pressure_column = f"prefix_pressure/{name}"
        self.working_set = WorkingSet()
        self._last: _Asked | None = None
        self._open: dict[str, _Open] = {}
        self._seen: tuple[list[Endpoint], Crowd] = ([], Crowd([]))

    def endpoints_changed(self, endpoints: list[Endpoint]) -> None:
        self._seen = ([], Crowd([]))
        self.held = {e.server: self.held.get(e.server) or HeldBlocks() for e in endpoints}

    def produce(self, request: Request, candidates: Candidates, now_s: float) -> dict[str, Array]:
        asked = self._last = self._hashed(request, self._block_tokens(candidates))
        count = len(candidates.endpoints)
        match = self._see(candidates.endpoints).match(asked.chains)
        columns = {
            self._match_column: match,
            self._total_column: np.full(count, float(len(asked.chains.hashes))),
            self._block_column: np.full(count, float(asked.block_tokens)),
        }
        if self.detailed:
            capacities = self._capacities(candidates, asked.block_tokens)
            columns[self._pressure_column] = self.working_set.blocks / capacities
        return columns

    def _hashed(self, request: Request, block_tokens: int) -> _Asked:
        """A request that was looked up last, and waited or was tried again since, is not hashed twice."""
        last = self._last
        if last is not None and last.request is request and last.block_tokens == block_tokens:
            return last
        limit = self.params.max_blocks(block_tokens)
        root = _root(request)
        hashed = chains([block_hashes(p, root, block_tokens, limit) for p in request.prompts])
        return _Asked(request, block_tokens, limit, hashed)

    def _see(self, endpoints: list[Endpoint]) -> Crowd:
        """What these endpoints hold; looked up once for each list of them."""
        if self._seen[0] is not endpoints:
            self._seen = (endpoints, Crowd([self.held[e.server] for e in endpoints]))
        return self._seen[1]

    def chosen(self, decision: Decision, candidates: Candidates, position: int, now_s: float) -> None:
        asked = self._last
        if asked is None or asked.request is not decision.request:
            return
        if self.detailed:
            self.working_set.asked(asked.chains.hashes, now_s)
        server = candidates.endpoints[position].server
        capacity = self._capacity_blocks(candidates, position, asked.block_tokens)
        self.held[server].insert(asked.chains, capacity)
        for stage in decision.stages:
            if stage.profile == PREFILL:
                held = self.held[stage.picked[0].server]
                held.insert(asked.chains, self._capacity_blocks(candidates, stage.position, asked.block_tokens))
        self._follow(decision.ticket, asked, server, capacity)

    def _follow(self, ticket: str, asked: _Asked, server: tuple[str, str], capacity: int) -> None:
        request, block_tokens, limit, (hashes, _) = asked
        if len(request.prompts) != 1:
            return
        full = len(request.prompts[0]) // (block_tokens * BYTES_PER_TOKEN)
        if full < limit:  # else what follows is not compared anyway
            self._open[ticket] = _Open(request, block_tokens, limit, hashes[:full], server, capacity)
            if len(self._open) > MAX_OPEN:
                del self._open[next(iter(self._open))]

    def learn_reply(self, ticket: str, said: bytes) -> None:
        """``said`` follows the prompt of this request in the next turn's: its endpoint holds that too now.

        To be called before ``finished``. ``said`` is spelled as the parser will spell it in the next prompt (for an
        OpenAI chat the role, then the text). A prefix of it is fine, and no more than that is certain.
        """
        open_ = self._open.pop(ticket, None)
        if open_ is None or open_.server not in self.held:
            return
        request, block_tokens, limit, full, server, capacity = open_
        begun = request.prompts[0][len(full) * block_tokens * BYTES_PER_TOKEN :]
        hashes = continued(full, begun + said, _root(request), block_tokens, limit)
        self.held[server].insert(chains([hashes]), capacity)

    def finished(self, ticket: str, outcome: Outcome, now_s: float) -> None:
        self._open.pop(ticket, None)

    def state(self) -> dict[str, object]:
        blocks = {key: len(held) for (key, _), held in self.held.items()}
        return {"open": len(self._open), "reused_blocks": self.working_set.blocks, "blocks": blocks}

    def _block_tokens(self, candidates: Candidates) -> int:
        """One block size for the pool: the largest an engine reports, never under the floor."""
        reported = candidates.columns["block_tokens"]
        if self.params.auto_tune and len(reported) and reported.max() > 0:
            return max(MIN_BLOCK_TOKENS, int(reported.max()))
        return max(MIN_BLOCK_TOKENS, self.params.configured_block_tokens)

    def _capacity_blocks(self, candidates: Candidates, position: int, block_tokens: int) -> int:
        """One endpoint's cache in *our* blocks: an engine counts its own, smaller ones."""
        blocks, tokens = candidates.columns["cache_blocks"][position], candidates.columns["block_tokens"][position]
        if self.params.auto_tune and blocks > 0 and tokens > 0:
            return max(1, int(blocks * tokens) // block_tokens)
        return max(1, self.params.lru_capacity_per_server * 16 // block_tokens)

    def _capacities(self, candidates: Candidates, block_tokens: int) -> Array:
        """The same of all endpoints, (n,)."""
        default = float(self.params.lru_capacity_per_server * 16)
        tokens = candidates.columns["cache_blocks"] * candidates.columns["block_tokens"]
        known = tokens if self.params.auto_tune else np.zeros(len(tokens))
        return np.asarray(np.maximum(1.0, np.where(known > 0, known, default) // block_tokens))


def _root(request: Request) -> str:
    return request.target_model + request.cache_salt


def warm_up() -> None:
    """Compile the kernels, or load them, now rather than during the first request."""
    hashes = block_hashes(WARM_UP_PROMPT, "", MIN_BLOCK_TOKENS, 1)
    continued(hashes, WARM_UP_PROMPT, "", MIN_BLOCK_TOKENS, 2)
    approx_index.warm_up()
