"""Deciders: whether a stage of a request is done on another endpoint than decode."""

from __future__ import annotations

from llmd_sched.plugin import Attribute, Plugin, Reads, reads
from llmd_sched.types import Candidates, Request


class Decider(Plugin, frozen=True):
    """Base of the deciders."""

    def disaggregates(self, request: Request, candidates: Candidates, position: int) -> bool:
        """``position`` is the decode endpoint's row of the columns."""
        raise NotImplementedError


class PrefixBasedPdDecider(Decider, frozen=True):
    """Prefill elsewhere when the decode endpoint lacks at least ``nonCachedTokens`` of a prompt that is at least
    ``promptTokens`` and ``nonCachedTokens`` long. ``nonCachedTokens`` 0: never."""

    non_cached_tokens: int = 0
    prompt_tokens: int = 0
    prefix_match_info_producer_name: str = ""

    def check(self) -> None:
        if self.non_cached_tokens < 0 or self.prompt_tokens < 0:
            raise ValueError("nonCachedTokens and promptTokens must be 0 or more")

    def reads(self) -> tuple[Reads, ...]:
        return (reads(Attribute.PREFIX_MATCH, self.prefix_match_info_producer_name),)

    def disaggregates(self, request: Request, candidates: Candidates, position: int) -> bool:
        tokens = request.input_tokens
        if not self.non_cached_tokens or tokens < max(self.non_cached_tokens, self.prompt_tokens):
            return False
        return tokens - self._cached_tokens(candidates, position) >= self.non_cached_tokens

    def _cached_tokens(self, candidates: Candidates, position: int) -> float:
        name = self.reads()[0].producer
        columns = candidates.columns
        blocks = columns.get(f"prefix_cached_blocks/{name}", columns.get(f"prefix_match_blocks/{name}"))
        return 0.0 if blocks is None else float(blocks[position] * columns[f"prefix_block_tokens/{name}"][position])


class AlwaysDisaggPdDecider(Decider, frozen=True):
    """Prefill is always done elsewhere."""

    def disaggregates(self, request: Request, candidates: Candidates, position: int) -> bool:
        return True


class AlwaysDisaggMultimodalDecider(Decider, frozen=True):
    """Encoding is done elsewhere for a prompt with any image, video or sound."""

    def disaggregates(self, request: Request, candidates: Candidates, position: int) -> bool:
        return request.media > 0


DECIDERS: dict[str, type[Decider]] = {
    "prefix-based-pd-decider": PrefixBasedPdDecider,
    "always-disagg-pd-decider": AlwaysDisaggPdDecider,
    "always-disagg-multimodal-decider": AlwaysDisaggMultimodalDecider,
}
