"""What a simulated cluster is made of, what happens to it, and what it leaves: values without behaviour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmd_sched.pool.pool import STALE_AFTER_S
from llmd_sched.predict.inline import InlineTrainer
from llmd_sched.predict.model import Model
from llmd_sched.sim.engine import EngineConfig
from llmd_sched.sim.openai import TOKEN_BYTES
from llmd_sched.types import Endpoint, Request, Sample


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One engine and what discovery knows of it. Step noise is ``engine.noise_sigma``."""

    endpoint: Endpoint
    """Its name must be unique in the cluster."""
    engine: EngineConfig
    slowdown: float = 1.0
    """Every step takes this many times as long, at least 1, for a reason that nothing shows."""
    stall_every_s: float = math.inf
    """Mean busy time between two stalls, which come at random."""
    stall_s: float = 1.0
    """How much longer a step takes in which the engine stalls."""

    def __post_init__(self) -> None:
        _check_slowdown(self.slowdown)
        if not self.stall_every_s > 0 or not self.stall_s >= 0:
            raise ValueError(
                f"stall_every_s must be positive and stall_s 0 or more, not {self.stall_every_s}, {self.stall_s}"
            )


class Join(msgspec.Struct, frozen=True):
    """A new engine, empty; or one that had failed or left, restarted."""

    at_s: float
    spec: EngineSpec


class Leave(msgspec.Struct, frozen=True):
    """Discovery no longer lists the engine; what it holds is served to the end."""

    at_s: float
    name: str


class Fail(msgspec.Struct, frozen=True):
    """The engine dies, and its requests with it. It stays listed, and refuses connections, until a ``Leave``."""

    at_s: float
    name: str


class Slow(msgspec.Struct, frozen=True):
    """The hidden slowdown changes, from the engine's next step on; 1 is the preset's speed."""

    at_s: float
    name: str
    slowdown: float

    def __post_init__(self) -> None:
        _check_slowdown(self.slowdown)


Event: TypeAlias = Join | Leave | Fail | Slow


class Trainer(Protocol):
    """What the cluster needs of an ``InlineTrainer``."""

    classes: tuple[str, ...]
    """Set before each ``tick``."""

    def add(self, sample: Sample) -> None: ...

    def tick(self, now_s: float) -> Model | None: ...


class ClusterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated, apart from the arrivals."""

    config: str
    """The EndpointPickerConfig, as YAML."""
    engines: Sequence[EngineSpec]
    events: Sequence[Event] = ()
    """In any order; those after the last request's end do not happen."""
    path: Literal["lean", "duplex"] = "lean"
    """Duplex: the router sees the first token. Lean: it assumes it at the predicted time."""
    seed: int = 0
    network_s: float = 0.0005
    """One way between router and engine. What the server adds before scheduling is in the engine's preset."""
    report_delay_s: float = 0.05
    """Lean path: from the end of a reply to its access-log entry, at most Envoy's flush interval."""
    scrape_interval_s: float = 0.05
    scrape_delay_s: float = 0.0
    """From the moment the gauges are read to the moment the pool knows."""
    stale_after_s: float = STALE_AFTER_S
    trainer: Callable[[Model], Trainer] | None = InlineTrainer
    """Makes the trainer of each latency producer from its first model; None trains nothing."""
    trainer_interval_s: float = 0.25
    """How often the trainer looks whether a fit is due."""
    publish_delay_s: float = 0.2
    """From the begin of a fit to its model's first prediction."""

    def __post_init__(self) -> None:
        if not self.scrape_interval_s > 0 or not self.trainer_interval_s > 0:
            raise ValueError("scrape_interval_s and trainer_interval_s must be positive")
        if min(self.network_s, self.report_delay_s, self.scrape_delay_s, self.publish_delay_s) < 0:
            raise ValueError("network_s, report_delay_s, scrape_delay_s and publish_delay_s must be 0 or more")
        joins = sorted((e for e in self.events if isinstance(e, Join)), key=lambda join: -join.at_s)
        since_s = {join.spec.endpoint.name: join.at_s for join in joins}
        since_s |= {one.endpoint.name: 0.0 for one in self.engines}
        for event in self.events:
            if not isinstance(event, Join) and not since_s.get(event.name, math.inf) <= event.at_s:
                raise ValueError(f"there is no engine of this name then: {event}")


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """One request reaching the router. ``request`` is all that the router may know of it."""

    at_s: float
    request: Request
    output_tokens: int


def arrival(at_s: float, prompt: bytes, output_tokens: int, *, streaming: bool = True, **fields: Any) -> Arrival:
    """An arrival with this prompt: text, or token ids as little-endian uint32. Either way four bytes are one token.

    ``fields`` are further ones of ``Request``; ``max_output_tokens`` tells the router how long the reply may get.
    """
    tokens = -(-len(prompt) // TOKEN_BYTES)
    made = {"id": "", "prompts": (prompt,), "input_tokens": tokens, "size_bytes": len(prompt), "streaming": streaming}
    return Arrival(at_s=at_s, request=Request(**{**made, **fields}), output_tokens=output_tokens)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one request. A time that was not predicted, or not measured, is NaN."""

    request_id: str
    arrival_s: float
    endpoint: str
    """Name; empty when the router refused the request."""
    model_version: int
    """Of the prediction; -1 without one."""
    predicted_ttft_ms: float
    predicted_tpot_ms: float
    queue_wait_ms: float = 0.0
    """In the router, before it chose an endpoint: part of TTFT and E2E, and of no prediction."""
    ttft_ms: float
    """From arrival; as the router learns it, so only of streamed replies."""
    tpot_ms: float
    e2e_ms: float
    end: str
    """An ``End``, or "refused" by the router."""
    status: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    """0 unless the reply is complete."""


def columns(records: Sequence[Record]) -> dict[str, NDArray[Any]]:
    """The records' fields as arrays, each (len(records),)."""
    return {name: np.array([getattr(r, name) for r in records]) for name in Record.__struct_fields__}


def _check_slowdown(slowdown: float) -> None:
    if not 1 <= slowdown < math.inf:
        raise ValueError(f"a slowdown is a factor of at least 1, not {slowdown}")
