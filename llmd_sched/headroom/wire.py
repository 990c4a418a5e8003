"""What the scheduler tells batchgw. As JSON; ``batchgw.pace`` has the same structs, and a test compares the bytes."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

Mode: TypeAlias = Literal["idle", "burst"]


class Assumed(msgspec.Struct, frozen=True, kw_only=True):
    """What a headroom was computed from. Load is what there would be without batch."""

    arrivals_per_s: float
    """lambda, of interactive requests."""
    prompt_tokens_per_s: float
    """psi, of interactive requests."""
    running: float
    """N0, interactive requests."""
    context_tokens: float
    """C0, of these together."""
    step_ms: float
    """T0: a step without batch."""
    base_ms: float
    """b0 of a step's time, calibrated; the three below likewise."""
    prefill_token_ms: float
    """b1."""
    sequence_ms: float
    """b2."""
    context_token_ms: float
    """k."""


class Headroom(msgspec.Struct, frozen=True, kw_only=True):
    """Of one endpoint."""

    endpoint: str
    mode: Mode
    n_star: int
    """Batch requests that may be in flight."""
    prefill_tokens: int
    """Batch prompt tokens that may wait for their first token together; one prompt always may."""
    prefill_tokens_per_s: float | None
    """At which batch prompts may be sent; None = no bound. Keeps the mean step within T_b while batch fills up."""
    step_budget_ms: float | None
    """T_b: what a step may take; None = no bound."""
    batch_running: int
    """Batch requests in flight, as the scheduler knows them."""
    assumed: Assumed


class PoolHeadroom(msgspec.Struct, frozen=True, kw_only=True):
    """Of all endpoints, at one moment."""

    version: int
    """Grows by one with each."""
    mode: Mode
    carriers: tuple[str, ...]
    """Endpoints to which interactive requests go now; the others are free for batch."""
    endpoints: tuple[Headroom, ...]
