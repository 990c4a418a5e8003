"""The scenarios: which workload meets which engines at which rates, and what a point of a load ladder is called.

Workloads follow llm-d's posts on predicted latency (A to D, production-like), token-aware routing (code-generation,
reasoning, b2b-saas) and the catalog of inference-perf; where those leave a choice, the comment beside it says which was
made. ``tuning`` scenarios are those that policies may be tuned on; what is reported are the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import msgspec

from benchmarks.workloads.combined import Mixed, Shifted, WithSlos
from benchmarks.workloads.draws import Fixed, LogNormal, Normal, Uniform
from benchmarks.workloads.shapes import Conversations, Independent, SharedPrefix, Workload
from llmd_sched.sim.engine import EngineConfig
from llmd_sched.sim.scenario import Arrival, ClusterSpec, EngineSpec, Event, Slow
from llmd_sched.sim.steptime import PRESETS, Preset
from llmd_sched.types import Endpoint

NOISE_SIGMA = 0.05

# Qwen3-32B on two A100-80GB, derived and not measured. Weight and KV reads by memory bandwidth (3.35 to 2.039 TB/s);
# prefill and attention in the ratio 2.5 of the fits published for llama-3.1-8b on both cards (47.8 to 19 us per token).
H100 = PRESETS["qwen3-32b-h100x2"]
A100 = msgspec.structs.replace(
    H100,
    step_base_s=H100.step_base_s * 3.35 / 2.039,
    prefill_token_s=H100.prefill_token_s * 2.5,
    attention_pair_s=H100.attention_pair_s * 2.5,
    decode_context_token_s=H100.decode_context_token_s * 3.35 / 2.039,
)


class Point(NamedTuple):
    """One step of a load ladder, by the name that results are quoted under."""

    name: str
    rate_per_s: float


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A workload, the engines that serve it, what happens to them, and the loads at which to look."""

    name: str
    role: Literal["tuning", "report"]
    workload: Workload
    engines: tuple[EngineSpec, ...]
    events: tuple[Event, ...] = ()
    ladder: tuple[Point, ...]
    duration_s: float = 100.0
    """Of arrivals, at each point."""
    warm_up_s: float = 20.0
    """Requests that arrive before it load the engines but are not counted."""

    def __post_init__(self) -> None:
        if not self.rates or self.rates[0] <= 0 or any(low >= high for low, high in itertools.pairwise(self.rates)):
            raise ValueError(f"{self.name}: the ladder's rates must be positive and increasing, not {self.rates}")
        if not 0 <= self.warm_up_s < self.duration_s:
            raise ValueError(f"{self.name}: the warm-up must be 0 or more and less than {self.duration_s:g} s")
        if any(not 0 <= event.at_s < self.duration_s for event in self.events):
            raise ValueError(f"{self.name}: an event must come within the {self.duration_s:g} s of arrivals")

    @property
    def rates(self) -> tuple[float, ...]:
        """Requests per second, from the lowest up."""
        return tuple(point.rate_per_s for point in self.ladder)

    def cluster(self, config: str, **settings: Any) -> ClusterSpec:
        """What to simulate: ``config`` is the EndpointPickerConfig as YAML, ``settings`` further fields of the spec."""
        return ClusterSpec(config=config, engines=self.engines, events=self.events, **settings)

    def arrivals(self, rate_per_s: float, seed: int) -> Iterator[Arrival]:
        return self.workload.arrivals(rate_per_s, self.duration_s, seed)


def find(name: str) -> tuple[Scenario, Point]:
    """The point of that name and its scenario; ValueError lists the known ones."""
    points = {point.name: (scenario, point) for scenario in SCENARIOS.values() for point in scenario.ladder}
    if name not in points:
        raise ValueError(f"unknown point {name!r}; known: {', '.join(points)}")
    return points[name]


def pool(size: int, preset: Preset = H100) -> tuple[EngineSpec, ...]:
    """Equal engines, which nothing tells apart."""
    return tuple(_engine(number, preset, {}) for number in range(size))


def unequal_pool(size: int) -> tuple[EngineSpec, ...]:
    """Half H100, half A100, and labelled so."""
    kinds = [("H100", H100)] * (size - size // 2) + [("A100", A100)] * (size // 2)
    return tuple(_engine(i, preset, {"llm-d.ai/accelerator": kind}) for i, (kind, preset) in enumerate(kinds))


def slow_first(engines: tuple[EngineSpec, ...], slowdown: float = 2.0) -> tuple[EngineSpec, ...]:
    """The first engine takes ``slowdown`` times as long, and nothing says so."""
    return (msgspec.structs.replace(engines[0], slowdown=slowdown), *engines[1:])


def _engine(number: int, preset: Preset, labels: dict[str, str]) -> EngineSpec:
    endpoint = Endpoint(f"engine-{number}", f"10.0.0.{number + 1}", 8000, labels=labels)
    return EngineSpec(endpoint=endpoint, engine=EngineConfig(preset=preset, noise_sigma=NOISE_SIGMA))


_THOUSAND = Normal(1000, 300)

A = SharedPrefix(
    name="A", groups=6, users=1000, system_tokens=1000, question_tokens=Normal(30, 9), output_tokens=_THOUSAND
)
B = SharedPrefix(
    name="B", groups=6, users=1000, system_tokens=1000, question_tokens=Normal(3000, 900), output_tokens=_THOUSAND
)
C = SharedPrefix(
    name="C", groups=150, users=5, system_tokens=6000, question_tokens=Normal(1200, 360), output_tokens=_THOUSAND
)
D = SharedPrefix(
    name="D", groups=150, users=5, system_tokens=1000, question_tokens=Normal(6200, 1860), output_tokens=_THOUSAND
)
B2B_SAAS = SharedPrefix(
    name="b2b-saas",
    groups=150,
    users=5,
    system_tokens=6000,
    question_tokens=Fixed(1200),
    output_tokens=Fixed(1000),
    multi_turn=False,
)
# The data set is not at hand. Log-normal with means near the usual filtered sample's; no shared prefix at all.
SHAREGPT = Independent(
    name="sharegpt", question_tokens=LogNormal(220, 300, 4, 4096), output_tokens=LogNormal(250, 250, 4, 2048)
)
# The post gives means, deviations and maxima, no family; the deviations rule out a normal. Eight stages, 1 and 5 times
# the rate in turn; 15 s each. 300 users are ours.
PRODUCTION = SharedPrefix(
    name="production",
    groups=6,
    users=50,
    system_tokens=1000,
    question_tokens=LogNormal(729, 13_550, 1, 131_072),
    output_tokens=LogNormal(300, 2213, 1, 8192),
    stages=tuple((15.0 * stage, 5.0 if stage % 2 else 1.0) for stage in range(8)),
)
# As in the post: 3,000 shared tokens, together 10,000 to 100,000 with a mean of 55,000. The think time's deviation is
# not given; it is the mean here. A reply is planned at what the unloaded cluster needs.
CODE = Conversations(
    name="code-generation",
    shared_tokens=3000,
    own_tokens=Uniform(7000, 97_000),
    turns=Normal(6, 3.5, 2, 20),
    question_tokens=LogNormal(1500, 1200, 100, 10_000),
    output_tokens=LogNormal(800, 600, 50, 4000),
    think_s=LogNormal(45, 45, 1, 300),
    planned_ttft_s=1.5,
    planned_tpot_s=0.02,
)
# Planned at 25 ms per token: between what 150 and what 350 at a time take on ten engines.
REASONING = Conversations(
    name="reasoning",
    shared_tokens=250,
    question_tokens=LogNormal(1000, 800, 1, 16_000),
    output_tokens=LogNormal(8000, 6500, 500, 32_000),
    planned_ttft_s=0.2,
    planned_tpot_s=0.025,
)
# The composition is ours: short prompts by number, long ones by tokens.
MIXED = Mixed(name="mixed", parts=((A, 0.4), (SHAREGPT, 0.4), (B, 0.1), (C, 0.1)))
SHIFTED = Shifted(name="shifted", before=SHAREGPT, after=B, before_factor=10.0)
BURST = msgspec.structs.replace(B, name="B-burst", stages=((0.0, 1.0), (50.0, 5.0), (60.0, 1.0)))
SLO_MIX = WithSlos(name="B-slo", of=B, ttft_slo_ms=500.0, tpot_slo_ms=30.0)

WORKLOADS: dict[str, Workload] = {
    one.name: one
    for one in (A, B, C, D, B2B_SAAS, SHAREGPT, PRODUCTION, CODE, REASONING, MIXED, SHIFTED, BURST, SLO_MIX)
}


def _steps(name: str, *rates_per_s: float) -> tuple[Point, ...]:
    """Points named after their rates."""
    return tuple(Point(f"{name}{rate:g}", rate) for rate in rates_per_s)


def _users(workload: Conversations, name: str, *counts: int) -> tuple[Point, ...]:
    """Points at which so many users have a conversation at a time, named after them."""
    return tuple(Point(f"{name}{count}", workload.rate_of(count)) for count in counts)


def _tuning(name: str, workload: Workload, ladder: tuple[Point, ...], **fields: Any) -> Scenario:
    return Scenario(role="tuning", name=name, workload=workload, ladder=ladder, **{"engines": pool(10), **fields})


def _report(name: str, workload: Workload, ladder: tuple[Point, ...], **fields: Any) -> Scenario:
    return Scenario(role="report", name=name, workload=workload, ladder=ladder, **{"engines": pool(10), **fields})


_LIST = (
    # Eight engines are saturated from about 12 requests/s on, so the higher steps are bursts and no steady states.
    _tuning("b2b", B2B_SAAS, _steps("b2b", 10, 20, 30, 45), engines=pool(8), duration_s=60.0, warm_up_s=12.0),
    _tuning("A", A, _steps("A", 20, 45)),
    _report("B", B, _steps("B", 8, 15)),
    _tuning("C", C, _steps("C", 5, 9)),
    _report("D", D, _steps("D", 5, 9)),
    # Longer than a user's cycle each: the caches are empty at first, whatever the users have behind them.
    _tuning("code", CODE, _users(CODE, "code", 20, 40, 80), duration_s=300.0, warm_up_s=100.0),
    _report("reasoning", REASONING, _users(REASONING, "reas", 150, 350), duration_s=500.0, warm_up_s=200.0),
    # The rate is that of the low stages.
    _report("production", PRODUCTION, _steps("prod", 2, 4), duration_s=120.0, warm_up_s=30.0),
    # On the pool of the other scenarios, not on the post's eight single H100.
    _report("sharegpt", SHAREGPT, _steps("sg", 120, 260)),
    _report("mixed", MIXED, _steps("mix", 20, 40)),
    _report("unequal-b2b", B2B_SAAS, _steps("hb2b", 7), engines=unequal_pool(8)),
    _report("unequal-B", B, _steps("hB", 8), engines=unequal_pool(10)),
    _report("unequal-sharegpt", SHAREGPT, _steps("hsg", 150), engines=unequal_pool(10)),
    _report("slow", B, _steps("slowB", 8, 15), engines=slow_first(pool(10))),
    _report("slowing", B, _steps("slowingB", 8, 15), events=(Slow(50.0, "engine-0", 2.0),)),
    # The rate is B's, in the second half.
    _report("shifted", SHIFTED, _steps("shift", 4, 8), duration_s=200.0),
    _report("burst", BURST, _steps("burstB", 4, 8)),
    _report("slo", SLO_MIX, _steps("sloB", 8, 15, 20)),
)
SCENARIOS: dict[str, Scenario] = {one.name: one for one in _LIST}
