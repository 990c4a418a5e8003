"""The arms of the routing benchmark: each routes a small cluster, and does there what it is named for."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest

from llmd_sched.sim.cluster import Cluster
from llmd_sched.sim.engine import EngineConfig
from llmd_sched.sim.scenario import Arrival, ClusterSpec, EngineSpec, Record, arrival
from llmd_sched.sim.steptime import Preset
from llmd_sched.types import End
from tests.builders import endpoint, prompt

ARMS = {path.stem: path for path in sorted((Path(__file__).resolve().parents[2] / "configs" / "arms").glob("*.yaml"))}
RIVALS = (
    *("round-robin", "random", "least-request", "power-of-two"),
    *("load-prefix-111", "load-prefix-322", "legacy-blend-3222"),
    *("affinity-token-load", "affinity-active-request", "dynamo-cost", "sglang-cache-aware"),
    "llmd-predicted-latency",
)
STICKY = RIVALS[4:]

ENGINE = EngineConfig(
    preset=Preset(
        model="m",
        step_base_s=0.01,
        prefill_token_s=50e-6,
        attention_pair_s=0.0,
        sequence_s=1e-4,
        decode_context_token_s=0.0,
        request_overhead_s=0.005,
        kv_blocks=1024,
        max_num_batched_tokens=1024,
        max_num_seqs=16,
    )
)
"""Its cache holds 16,384 tokens, not the 20,480 of all groups' prefixes."""

GROUPS, PREFIX_BLOCKS, COUNT = 20, 16, 240


def arrivals(seed: int = 0) -> list[Arrival]:
    """Prompts of 20 groups that share 1,024 tokens each, with 64 of their own; about 20 a second, 5 to an engine."""
    rng, at_s, made = Random(f"{seed} arms"), 0.0, []
    prefixes = [prompt(PREFIX_BLOCKS, seed=i) for i in range(GROUPS)]
    for i in range(COUNT):
        at_s += rng.expovariate(20.0)
        text = rng.choice(prefixes) + prompt(1, seed=1000 + i)
        made.append(arrival(at_s, text, rng.randint(5, 60), id=str(i)))
    return made


@cache
def run(arm: str, seed: int = 0) -> tuple[Record, ...]:
    engines = [EngineSpec(endpoint=endpoint(i), engine=ENGINE) for i in range(4)]
    spec = ClusterSpec(config=ARMS[arm].read_text(), engines=engines, path="duplex", seed=seed)
    return tuple(Cluster(spec).run(arrivals(seed)))


def hit_rate(records: tuple[Record, ...]) -> float:
    return sum(r.cached_tokens for r in records) / sum(r.input_tokens for r in records)


def spread(records: tuple[Record, ...]) -> float:
    """Standard deviation over the engines of their open requests, the mean over all moments of an arrival."""
    there = []
    for one in records:
        open_then = Counter(r.endpoint for r in records if 0 <= one.arrival_s - r.arrival_s < r.e2e_ms / 1e3)
        there.append(np.std([open_then[f"e{i}"] for i in range(4)]))
    return float(np.mean(there))


every_arm = pytest.mark.parametrize("arm", ARMS)


def test_every_rival_has_an_arm() -> None:
    assert set(RIVALS) <= set(ARMS)


@every_arm
def test_an_arm_serves_every_request_to_its_end(arm: str) -> None:
    records = run(arm)
    assert sorted(int(r.request_id) for r in records) == list(range(COUNT))
    assert {(r.end, r.status) for r in records} == {(End.FINISHED, 200)}
    assert {r.endpoint for r in records} == {f"e{i}" for i in range(4)}


@every_arm
def test_an_arm_decides_the_same_with_the_same_seed(arm: str) -> None:
    again = run.__wrapped__(arm)
    assert msgspec.msgpack.encode(again) == msgspec.msgpack.encode(run(arm))


def test_turns_are_even() -> None:
    assert set(Counter(r.endpoint for r in run("round-robin")).values()) == {COUNT // 4}


@pytest.mark.parametrize("arm", STICKY)
def test_an_arm_that_looks_at_prefixes_finds_more_of_them_cached_than_taking_turns(arm: str) -> None:
    assert hit_rate(run(arm)) > hit_rate(run("round-robin")) + 0.1


@pytest.mark.parametrize("arm", ["power-of-two", "least-request"])
def test_an_arm_that_looks_at_load_balances_better_than_at_random(arm: str) -> None:
    for seed in range(3):
        assert spread(run(arm, seed)) < 0.8 * spread(run("random", seed))
