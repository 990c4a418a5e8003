"""The law: from an endpoint's load and a step-time budget to the number of batch requests it may hold."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from llmd_sched.headroom.load import EndpointLoad

MAX_SLOWER = 4.0
"""Steps that many times as long hold so many times as many interactive requests; more is not extrapolated."""


class HeadroomSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """How much interactive requests may feel. ``check`` raises ValueError with what is accepted.

    ``protect`` keeps every step within ``itlMs``, in bursts and between them. ``harvest`` fills the engines between
    bursts, where the few users there are wait longer for each token.
    """

    mode: Literal["protect", "harvest"] = "protect"
    itl_ms: float | None = None
    """The bound on the time between tokens; None learns what the busiest time looks like without batch."""
    burst_share: float = 0.12
    """How much longer a step may take in a burst, as a share."""
    kv_share: float = 0.85
    """Of the KV cache that batch may fill; more is lost to preemption."""
    burst_prefill_tokens: int = 400
    """Batch prompt tokens that may wait for their first token together; one prompt always may."""
    idle_prefill_tokens: int = 1024
    """... between bursts, where a step is bounded."""
    free_prefill_tokens: int = 8192
    """... where it is not: what was aborted is back the sooner."""
    consolidate: bool = True
    """Send interactive requests to few endpoints while these hold them, and leave the others to batch."""

    def check(self) -> None:
        if self.itl_ms is not None and not 0 < self.itl_ms < math.inf:
            raise ValueError(f"itlMs must be a positive number of milliseconds, not {self.itl_ms}")
        if not 0 <= self.burst_share <= 1:
            raise ValueError(f"burstShare must be 0 to 1, not {self.burst_share}")
        if not 0 < self.kv_share <= 1:
            raise ValueError(f"kvShare must be above 0 and at most 1, not {self.kv_share}")
        if min(self.burst_prefill_tokens, self.idle_prefill_tokens, self.free_prefill_tokens) < 0:
            raise ValueError("burstPrefillTokens, idlePrefillTokens and freePrefillTokens must be 0 or more")


def target(load: EndpointLoad, budget_s: float, kv_share: float) -> int:
    """n*: batch requests that fill a step up to ``budget_s`` (inf = whatever the KV cache holds).

    What prompts leave of the budget, less b0 and the interactive load at that pace, over what one more costs.
    """
    most = kv_share * load.kv_tokens / load.batch_context_tokens
    if budget_s == math.inf:
        return int(most)
    alone_s = load.step_without_batch_s()
    slower = min(max(budget_s / alone_s, 1.0), MAX_SLOWER)
    interactive_s = load.model.load_s(*load.without_batch()) * slower
    left_s = budget_s * (1 - load.prefill_share) - load.model.base_s - interactive_s
    return int(min(max(left_s / load.batch_sequence_s, 0.0), most))


def prefill_allowance(settings: HeadroomSettings, bursting: bool, budget_s: float) -> int:
    """Batch prompt tokens that may be outstanding."""
    if bursting:
        return settings.burst_prefill_tokens
    return settings.free_prefill_tokens if budget_s == math.inf else settings.idle_prefill_tokens


def prefill_rate(load: EndpointLoad, budget_s: float) -> float | None:
    """Batch prompt tokens per second that fill a mean step up to ``budget_s`` beside what decodes now.

    With n* in flight it is what these drag along; below n*, where batch is filled up, it is more. None = no bound.
    """
    if budget_s == math.inf:
        return None
    running, context_tokens = load.decoding()
    left_s = budget_s * (1 - load.prefill_share) - load.model.base_s - load.model.load_s(running, context_tokens)
    return max(left_s, 0.0) / (budget_s * load.model.prefill_token_s) if load.model.prefill_token_s else None
