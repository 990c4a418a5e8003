"""The rules of other routers, to be measured against: each as its project documents it, on what our producers know."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from random import Random

import numpy as np
from numpy.typing import NDArray

from llmd_sched.plugin import Attribute, Picker, Producer, Reads, Scorer, Stateful, reads
from llmd_sched.sched.scorers import lower_is_better, prefix_share
from llmd_sched.types import Array, Candidates, Decision, Endpoint, Outcome, Request

TOKEN_BYTES = 4
"""Of a prompt, as everywhere (``Request.prompts``)."""


class RoundRobinScorer(Scorer, Stateful, frozen=True):
    """Endpoints take turns, in the order of their identities.

    Over n candidates 1 - i / n for the i-th after the endpoint that was picked last, whichever picked it.
    """

    def open(self, name: str) -> RoundRobin:
        return RoundRobin(name)


class RoundRobin(Producer):
    """The live side. It knows the last one by its identity, so the turn survives joins, leaves and subsets."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._last = ""

    def score(self, request: Request, candidates: Candidates) -> Array:
        keys = [candidates.endpoints[i].key for i in candidates.index.tolist()]
        turns = sorted(range(len(keys)), key=lambda place: (keys[place] <= self._last, keys[place]))
        scores = np.empty(len(keys))
        scores[turns] = 1.0 - np.arange(len(keys)) / len(keys)
        return scores

    def chosen(self, decision: Decision, candidates: Candidates, position: int, now_s: float) -> None:
        self._last = decision.picked[0].key


class PowerOfTwoPicker(Picker, frozen=True):
    """The better of two at random, the first drawn if they are equal; then the rest at random.

    "The power of two choices" (Mitzenmacher, 2001): nearly the balance of asking all, without the herd that follows
    a stale best.
    """

    def order(self, scores: Array, rng: Random) -> NDArray[np.intp]:
        order = rng.sample(range(len(scores)), len(scores))
        if len(order) > 1 and scores[order[1]] > scores[order[0]]:
            order[:2] = order[1::-1]
        return np.array(order, dtype=np.intp)


class DynamoCostScorer(Scorer, Stateful, frozen=True):
    """The least cost in KV blocks, as the KV router of NVIDIA Dynamo counts it.

    cost = ``prefillLoadScale`` x max(0, prompt blocks in prefill there + the prompt's - ``overlapCredit`` x cached)
         + blocks in use there, this request's included

    From its "Router Design" and "Configuration and Tuning" pages; what is cached on the device counts 1 there. Blocks
    in use are those of the prompts of all our open requests, one that several share counted once, and no generated
    ones (``router_track_output_blocks`` is off by default). Scores are (max - cost) / (max - min): with
    ``max-score-picker`` that is its temperature 0. A block is ``blockSizeTokens``.
    """

    prefill_load_scale: float = 1.0
    overlap_credit: float = 1.0
    block_size_tokens: int = 64
    prefix_match_info_producer_name: str = ""
    in_flight_load_producer_name: str = ""

    def check(self) -> None:
        if not 0 <= self.prefill_load_scale < math.inf:
            raise ValueError("prefillLoadScale must be a finite number, 0 or more")
        if not 0 <= self.overlap_credit <= 1:
            raise ValueError("overlapCredit must be between 0 and 1")
        if self.block_size_tokens < 1:
            raise ValueError("blockSizeTokens must be at least 1")

    def reads(self) -> tuple[Reads, ...]:
        return (
            reads(Attribute.PREFIX_MATCH, self.prefix_match_info_producer_name),
            reads(Attribute.INFLIGHT_LOAD, self.in_flight_load_producer_name),
        )

    def open(self, name: str) -> DynamoCost:
        return DynamoCost(name, self)


class DynamoCost(Producer):
    """The live side. Column: ``decode_blocks``, those in use if the request were sent there. It holds the blocks of
    the requests the router has open, and no others."""

    def __init__(self, name: str, params: DynamoCostScorer) -> None:
        super().__init__(name)
        self.params = params
        self._prefix, self._in_flight = (need.producer for need in params.reads())
        self._in_use: dict[tuple[str, str], Counter[int]] = {}
        """Server -> block -> how many open requests share it."""
        self._open: dict[str, tuple[Counter[int], list[int]]] = {}
        self._asked: list[int] = []
        """Blocks of the request being decided."""

    def endpoints_changed(self, endpoints: list[Endpoint]) -> None:
        self._in_use = {e.server: self._in_use.get(e.server, Counter()) for e in endpoints}

    def produce(self, request: Request, candidates: Candidates, now_s: float) -> dict[str, Array]:
        asked = self._asked = prompt_chain(request, self.params.block_size_tokens)
        there = [self._in_use[e.server] for e in candidates.endpoints]
        blocks = [len(used) + len(asked) - _shared(asked, used) for used in there]
        return {f"decode_blocks/{self.name}": np.array(blocks, dtype=np.float64)}

    def score(self, request: Request, candidates: Candidates) -> Array:
        decode_blocks = candidates.get(f"decode_blocks/{self.name}")
        if decode_blocks is None:
            return np.ones(len(candidates))
        params, to_prefill = self.params, self._prefill_tokens(request, candidates)
        return lower_is_better(params.prefill_load_scale * to_prefill / params.block_size_tokens + decode_blocks)

    def _prefill_tokens(self, request: Request, candidates: Candidates) -> Array:
        """What there would be to compute; without information nothing is in flight, nothing cached."""
        tokens = np.full(len(candidates), float(request.input_tokens))
        match = candidates.get(f"prefix_match_blocks/{self._prefix}")
        if match is not None:
            cached = match * candidates.column(f"prefix_block_tokens/{self._prefix}")
            tokens -= self.params.overlap_credit * np.minimum(cached, request.input_tokens)
        in_flight = candidates.get(f"inflight_prefill_tokens/{self._in_flight}")
        prefill: Array = np.maximum(tokens if in_flight is None else tokens + in_flight, 0.0)
        return prefill

    def chosen(self, decision: Decision, candidates: Candidates, position: int, now_s: float) -> None:
        used = self._in_use[decision.picked[0].server]
        used.update(self._asked)
        self._open[decision.ticket] = used, self._asked

    def finished(self, ticket: str, outcome: Outcome, now_s: float) -> None:
        used, blocks = self._open.pop(ticket, (Counter[int](), []))
        used.subtract(blocks)
        for block in blocks:
            if used[block] <= 0:
                del used[block]


def prompt_chain(request: Request, block_tokens: int) -> list[int]:
    """One number for each full block of the prompt, the same only where all before it is the same too.

    Several prompts count as one text. Numbers differ from process to process, as Python's ``hash`` does; only whether
    they are equal matters.
    """
    text, width = b"".join(request.prompts), TOKEN_BYTES * block_tokens
    chain, before = [], hash((request.target_model, request.cache_salt))
    for end in range(width, len(text) + 1, width):
        before = hash((before, text[end - width : end]))
        chain.append(before)
    return chain


def _shared(chain: list[int], used: Counter[int]) -> int:
    """How many of the chain's blocks are in use. If one is, so are all before it: whoever uses it uses them."""
    return bisect_left(chain, True, key=lambda block: block not in used)


class SglangCacheAwareScorer(Scorer, Stateful, frozen=True):
    """Where most of the prompt was sent before, until load is uneven: SGLang's ``cache_aware`` policy.

    Uneven is max - min > ``balanceAbsThreshold`` and max > ``balanceRelThreshold`` x min of our open requests: then
    the fewest. Else the longest match, if it is more than ``cacheThreshold`` of the prompt; else the smallest tree,
    which is the least text ever sent there and not matched, up to ``maxTreeSize`` characters. From the page of its
    model gateway. Its trees forget only beyond that size: give the prefix index as much room, autoTune off.
    """

    cache_threshold: float = 0.3
    balance_abs_threshold: float = 64
    balance_rel_threshold: float = 1.5
    max_tree_size: int = 67_108_864
    prefix_match_info_producer_name: str = ""
    in_flight_load_producer_name: str = ""

    def check(self) -> None:
        if not 0 <= self.cache_threshold <= 1:
            raise ValueError("cacheThreshold must be between 0 and 1")
        if not 0 <= self.balance_abs_threshold < math.inf:
            raise ValueError("balanceAbsThreshold must be a finite number of requests, 0 or more")
        if not 1 <= self.balance_rel_threshold < math.inf:
            raise ValueError("balanceRelThreshold must be a finite factor of at least 1")
        if self.max_tree_size < 1:
            raise ValueError("maxTreeSize must be at least 1")

    def reads(self) -> tuple[Reads, ...]:
        return (
            reads(Attribute.PREFIX_MATCH, self.prefix_match_info_producer_name),
            reads(Attribute.INFLIGHT_LOAD, self.in_flight_load_producer_name),
        )

    def open(self, name: str) -> SglangCacheAware:
        return SglangCacheAware(name, self)


class SglangCacheAware(Producer):
    """The live side: the size of each endpoint's tree."""

    def __init__(self, name: str, params: SglangCacheAwareScorer) -> None:
        super().__init__(name)
        self.params = params
        self._prefix, self._in_flight = (need.producer for need in params.reads())
        self._tree_bytes: dict[tuple[str, str], float] = {}

    def endpoints_changed(self, endpoints: list[Endpoint]) -> None:
        self._tree_bytes = {e.server: self._tree_bytes.get(e.server, 0.0) for e in endpoints}

    def score(self, request: Request, candidates: Candidates) -> Array:
        requests = candidates.get(f"inflight_requests/{self._in_flight}")
        if requests is not None and self._uneven(requests):
            return lower_is_better(requests)
        share = prefix_share(candidates, self._prefix)
        if share.max() > self.params.cache_threshold:
            return share
        trees = [self._tree_bytes[candidates.endpoints[i].server] for i in candidates.index.tolist()]
        return lower_is_better(np.array(trees))

    def _uneven(self, requests: Array) -> bool:
        least, most = requests.min(), requests.max()
        apart = most - least > self.params.balance_abs_threshold
        return bool(apart and most > self.params.balance_rel_threshold * least)

    def chosen(self, decision: Decision, candidates: Candidates, position: int, now_s: float) -> None:
        lacking = candidates.columns.get(f"uncached_tokens/{self._in_flight}")
        tokens = decision.request.input_tokens if lacking is None else lacking[position]
        server = decision.picked[0].server
        self._tree_bytes[server] = min(
            self._tree_bytes[server] + TOKEN_BYTES * float(tokens), float(self.params.max_tree_size)
        )
