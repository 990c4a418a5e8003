"""Spreads prompts that nobody has in cache: to the endpoint whose last such prompt is longest ago."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from llmd_sched.plugin import Attribute, Producer, Reads, Scorer, Stateful, reads
from llmd_sched.types import Array, Candidates, Decision, Endpoint, Request

DEFAULT_SIZE = 1024
PREFILL = "prefill"
"""The profile that is known by its name to pick who computes the prompt, as in the reference."""

NEUTRAL = 0.5


class NoHitLruScorer(Scorer, Stateful, frozen=True):
    """Cold prompts, of which no candidate holds a block, go where the last cold one is longest ago.

    Over n candidates 1 - rank / (n - 1): first those that never had a cold prompt, in their order, then the others
    from least to most recent; one alone scores 1. Any other prompt scores 0.5 everywhere. ``lruSize`` endpoints are
    remembered (0 or less = 1024). ``prefixPluginType`` and ``prefixPluginName`` are accepted and unused.
    """

    lru_size: int = DEFAULT_SIZE
    prefix_match_info_producer_name: str = ""
    prefix_plugin_type: str = ""
    prefix_plugin_name: str = ""

    def reads(self) -> tuple[Reads, ...]:
        return (reads(Attribute.PREFIX_MATCH, self.prefix_match_info_producer_name),)

    def open(self, name: str) -> NoHitLru:
        return NoHitLru(name, self)


class NoHitLru(Producer):
    """The live side. Ranks are among the candidates: the reference's are among all endpoints, so that with prefill and
    decode endpoints in one pool most of them score 0 alike."""

    def __init__(self, name: str, params: NoHitLruScorer) -> None:
        super().__init__(name)
        self._size = params.lru_size if params.lru_size > 0 else DEFAULT_SIZE
        self._match_column = f"prefix_match_blocks/{params.reads()[0].producer}"
        self._used: OrderedDict[str, None] = OrderedDict()
        """Identities of endpoints, the most recent last."""
        self._cold: Request | None = None
        """The request scored last, if it was cold."""

    def endpoints_changed(self, endpoints: list[Endpoint]) -> None:
        members = {e.key for e in endpoints}
        self._used = OrderedDict((key, None) for key in self._used if key in members)

    def score(self, request: Request, candidates: Candidates) -> Array:
        match = candidates.get(self._match_column)
        if match is not None and match.any():
            self._cold = None
            return np.full(len(candidates), NEUTRAL)
        self._cold = request
        return 1.0 - self._ranks(candidates) / max(1, len(candidates) - 1)

    def _ranks(self, candidates: Candidates) -> Array:
        """0 is the next to get a cold prompt."""
        at = {candidates.endpoints[i].key: place for place, i in enumerate(candidates.index.tolist())}
        fresh = [place for key, place in at.items() if key not in self._used]
        ranks = np.empty(len(candidates))
        ranks[fresh + [at[key] for key in self._used if key in at]] = np.arange(float(len(candidates)))
        return ranks

    def chosen(self, decision: Decision, candidates: Candidates, position: int, now_s: float) -> None:
        if self._cold is not decision.request:
            return
        self._cold = None
        for endpoint in (decision.picked[0], *(s.picked[0] for s in decision.stages if s.profile == PREFILL)):
            self._used[endpoint.key] = None
            self._used.move_to_end(endpoint.key)
            if len(self._used) > self._size:
                self._used.popitem(last=False)
