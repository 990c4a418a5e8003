"""Which endpoint probably holds how much of a prompt in its prefix cache, guessed from where we sent prompts before.

One index maps a chained block hash to the set of endpoints holding it, as the bits of an integer, so one walk along a
prompt's hashes finds every endpoint's *contiguous* run from block 0 (an endpoint that lacks an earlier block cannot
use a later one). Each endpoint has a bound on its blocks, evicted least recently used with the tail of a prompt
first, as vLLM frees them: shared heads survive longest. A hit refreshes its blocks.
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import numpy as np

from llmd_sched.plugin import Attribute, Producer, ProducerPlugin
from llmd_sched.prefix.hashing import block_hashes
from llmd_sched.types import Array, Candidates, Decision, Endpoint, Request

MIN_BLOCK_TOKENS = 64
"""The reference's floor; hashing finer gains nothing that routing can use."""

MAX_UNCAPPED_BLOCKS = 1 << 20


class PrefixIndex:
    """Block hash -> endpoints, bounded per endpoint. Endpoints are small integers, reused after ``forget``."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._blocks: dict[int, dict[int, None]] = {}  # endpoint -> its hashes, oldest first

    def __len__(self) -> int:
        return len(self._holders)

    def size(self, endpoint: int) -> int:
        return len(self._blocks.get(endpoint, ()))

    def match(self, hashes: list[int], endpoints: int) -> dict[int, int]:
        """Of the endpoints (as bits) that hold the first block: how many leading blocks each holds."""
        lengths: dict[int, int] = {}
        alive = endpoints
        for i, h in enumerate(hashes):
            still = alive & self._holders.get(h, 0)
            if still != alive:
                if i:
                    self._close(alive & ~still, i, lengths)
                if not still:
                    return lengths
                alive = still
        if hashes:
            self._close(alive, len(hashes), lengths)
        return lengths

    @staticmethod
    def _close(bits: int, length: int, lengths: dict[int, int]) -> None:
        while bits:
            low = bits & -bits
            lengths[low.bit_length() - 1] = length
            bits ^= low

    def insert(self, hashes: list[int], endpoint: int, capacity: int) -> None:
        """Note that ``endpoint`` now holds these blocks; the oldest beyond ``capacity`` are dropped."""
        blocks = self._blocks.setdefault(endpoint, {})
        holders, bit = self._holders, 1 << endpoint
        # Tail first, so the head is the most recent and a full cache loses tails before heads.
        for h in reversed(hashes[:capacity]):
            if h in blocks:
                del blocks[h]
            else:
                holders[h] = holders.get(h, 0) | bit
            blocks[h] = None
        self._drop_oldest(endpoint, len(blocks) - capacity)

    def _drop_oldest(self, endpoint: int, count: int) -> None:
        # In one sweep: looking for a dict's first key walks over all that were deleted before it.
        blocks, holders, others = self._blocks[endpoint], self._holders, ~(1 << endpoint)
        for h in list(islice(blocks, max(0, count))):
            del blocks[h]
            left = holders[h] & others
            if left:
                holders[h] = left
            else:
                del holders[h]

    def forget(self, endpoint: int) -> None:
        """Drop all that ``endpoint`` held."""
        if endpoint in self._blocks:
            self._drop_oldest(endpoint, len(self._blocks[endpoint]))
            del self._blocks[endpoint]


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


class _Seen(NamedTuple):
    """A list of endpoints as the index knows them."""

    endpoints: list[Endpoint]
    bits: int
    position: dict[int, int]
    """Number in the index -> position in the list."""


class ApproxPrefixCache(Producer):
    """The live index. Columns: ``prefix_match_blocks``, ``prefix_total_blocks``, ``prefix_block_tokens``."""

    def __init__(self, name: str, params: ApproxPrefixCacheProducer) -> None:
        super().__init__(name)
        self.params = params
        self.index = PrefixIndex()
        self._match_column = f"prefix_match_blocks/{name}"
        self._total_column = f"prefix_total_blocks/{name}"
        self._block_column = f"prefix_block_tokens/{name}"
        self._ids: dict[tuple[str, str], int] = {}
        self._free_ids: list[int] = []
        self._last: tuple[Request, list[list[int]], int] | None = None
        self._seen: _Seen | None = None

    def endpoints_changed(self, endpoints: list[Endpoint]) -> None:
        keys = {e.server for e in endpoints}
        self._seen = None
        for key in [k for k in self._ids if k not in keys]:
            endpoint = self._ids.pop(key)
            self.index.forget(endpoint)
            self._free_ids.append(endpoint)
        for e in endpoints:
            if e.server not in self._ids:
                self._ids[e.server] = self._free_ids.pop() if self._free_ids else len(self._ids)

    def produce(self, request: Request, candidates: Candidates, now_s: float) -> dict[str, Array]:
        block_tokens = self._block_tokens(candidates)
        limit = self.params.max_blocks(block_tokens)
        root = request.target_model + request.cache_salt
        chains = [block_hashes(p, root, block_tokens, limit).tolist() for p in request.prompts]
        self._last = (request, chains, block_tokens)
        seen = self._see(candidates.endpoints)
        match = np.zeros(len(candidates.endpoints))
        for chain in chains:
            for endpoint, blocks in self.index.match(chain, seen.bits).items():
                match[seen.position[endpoint]] += blocks
        return {
            self._match_column: match,
            self._total_column: np.full(len(match), float(sum(map(len, chains)))),
            self._block_column: np.full(len(match), float(block_tokens)),
        }

    def _see(self, endpoints: list[Endpoint]) -> _Seen:
        """The numbers of these endpoints; looked up once for each list of them."""
        if self._seen is None or self._seen.endpoints is not endpoints:
            position = {self._ids[e.server]: i for i, e in enumerate(endpoints)}
            self._seen = _Seen(endpoints, sum(1 << number for number in position), position)
        return self._seen

    def chosen(self, decision: Decision, candidates: Candidates, position: int, now_s: float) -> None:
        if self._last is None or self._last[0] is not decision.request:
            return
        _, chains, block_tokens = self._last
        capacity = self._capacity_blocks(candidates, position, block_tokens)
        endpoint = self._ids[candidates.endpoints[position].server]
        for chain in chains:
            self.index.insert(chain, endpoint, capacity)

    def _block_tokens(self, candidates: Candidates) -> int:
        """One block size for the pool: the largest an engine reports, never under the floor."""
        reported = candidates.columns["block_tokens"]
        if self.params.auto_tune and len(reported) and reported.max() > 0:
            return max(MIN_BLOCK_TOKENS, int(reported.max()))
        return max(MIN_BLOCK_TOKENS, self.params.configured_block_tokens)

    def _capacity_blocks(self, candidates: Candidates, position: int, block_tokens: int) -> int:
        """The endpoint's cache in *our* blocks: an engine counts its own, smaller ones."""
        blocks, tokens = candidates.columns["cache_blocks"][position], candidates.columns["block_tokens"][position]
        if self.params.auto_tune and blocks > 0 and tokens > 0:
            return max(1, int(blocks * tokens) // block_tokens)
        return max(1, self.params.lru_capacity_per_server * 16 // block_tokens)
