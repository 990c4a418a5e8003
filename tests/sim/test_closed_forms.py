"""The step machine against formulas that hold for any coefficients: times of lone requests, a queue, the cache."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec
import pytest

from llmd_sched.sim.engine import Engine, EngineConfig, Policy, SimRequest, Step
from llmd_sched.sim.kvcache import BLOCK_TOKENS
from llmd_sched.sim.steptime import PRESETS, Preset

LLAMA = PRESETS["llama-3-8b-h100"]


class Times:
    """First token, last token and cached tokens of each request, and the steps, of one run to the end."""

    def __init__(self, machine: Engine, requests: Iterable[SimRequest]) -> None:
        self.first_s: dict[str, float] = {}
        self.last_s: dict[str, float] = {}
        self.cached_tokens: dict[str, int] = {}
        self.steps: list[Step] = []
        for request in requests:
            assert machine.submit(request) is None
        now_s = machine.next_ready_s
        while now_s is not None:
            step = machine.step(now_s)
            if step is not None:
                self._add(step)
            now_s = step.end_s if step is not None else machine.next_ready_s

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        self.first_s |= dict.fromkeys(step.first, step.end_s)
        self.last_s |= dict.fromkeys(step.finished, step.end_s)
        self.cached_tokens |= dict(step.admitted)

    @property
    def preempted(self) -> list[str]:
        return [name for step in self.steps for name in step.preempted]


def run(preset: Preset, *requests: SimRequest, policy: Policy = Policy.FCFS) -> Times:
    return Times(Engine(EngineConfig(preset=preset, policy=policy, max_waiting=100_000)), requests)


def ask(
    name: object, prompt: int, output: int = 1, at_s: float = 0.0, hashes: Sequence[int] = (), priority: int = 0
) -> SimRequest:
    return SimRequest(
        id=str(name),
        prompt_tokens=prompt,
        output_tokens=output,
        arrival_s=at_s,
        block_hashes=hashes,
        priority=priority,
    )


@pytest.mark.parametrize("prompt_tokens", [1, 17, 8191, 8192, 8193, 50_000, 160_000])
@pytest.mark.parametrize("name", PRESETS)
def test_chunks_cost_a_base_each_and_attention_adds_up_to_half_the_square(name: str, prompt_tokens: int) -> None:
    # Σ pᵢ(ctxᵢ + pᵢ/2) telescopes to P²/2 however the prompt is cut.
    p = PRESETS[name]
    chunks = -(-prompt_tokens // p.max_num_batched_tokens)
    ttft_s = (
        p.request_overhead_s
        + chunks * (p.step_base_s + p.sequence_s)
        + p.prefill_token_s * prompt_tokens
        + p.attention_pair_s * prompt_tokens**2 / 2
    )
    assert run(p, ask("a", prompt_tokens)).first_s["a"] == pytest.approx(ttft_s, rel=1e-9)


@pytest.mark.parametrize("streams", [1, 2, 40])
@pytest.mark.parametrize("name", PRESETS)
def test_time_per_token_is_the_step_at_the_mean_context(name: str, streams: int) -> None:
    p, prompt_tokens, output_tokens = PRESETS[name], 96, 200
    times = run(p, *(ask(i, prompt_tokens, output_tokens) for i in range(streams)))
    # Decode steps find P, P + 1, ... P + O - 2 tokens of context.
    context_tokens = prompt_tokens + (output_tokens - 2) / 2
    tpot_s = p.step_base_s + streams * (p.sequence_s + p.decode_context_token_s * context_tokens)
    for i in map(str, range(streams)):
        assert (times.last_s[i] - times.first_s[i]) / (output_tokens - 1) == pytest.approx(tpot_s, rel=1e-9)


def one_at_a_time(load: float, count: int) -> tuple[float, list[SimRequest], Times]:
    """Service time, requests and times of a server of one sequence and one token each: M/D/1 at this utilization."""
    p = msgspec.structs.replace(LLAMA, max_num_seqs=1)
    service_s = p.step_s(500, 500 * 250, 1, 0)
    rng, at_s, requests = random.Random(7), 0.0, []
    for i in range(count):
        at_s += rng.expovariate(load / service_s)
        requests.append(ask(i, 500, at_s=at_s))
    return service_s, requests, run(p, *requests)


@pytest.mark.parametrize("load", [0.2, 0.5, 0.8])
def test_one_at_a_time_is_an_m_d_1_queue(load: float) -> None:
    service_s, requests, times = one_at_a_time(load, 8000)
    fixed_s = LLAMA.request_overhead_s + service_s
    wait_s = sum(times.first_s[r.id] - r.arrival_s - fixed_s for r in requests) / len(requests)
    # Pollaczek and Khinchine; the tolerance is for 8,000 arrivals.
    assert wait_s == pytest.approx(service_s * load / (2 * (1 - load)), rel=0.1)


def test_one_at_a_time_every_wait_follows_from_the_one_before() -> None:
    service_s, requests, times = one_at_a_time(0.8, 2000)
    waits_s = [times.first_s[r.id] - r.arrival_s - LLAMA.request_overhead_s - service_s for r in requests]
    assert waits_s[0] == pytest.approx(0, abs=1e-9)
    for (before, wait_s), (after, next_wait_s) in pairwise(zip(requests, waits_s, strict=True)):  # Lindley
        gap_s = after.arrival_s - before.arrival_s
        assert next_wait_s == pytest.approx(max(0.0, wait_s + service_s - gap_s), abs=1e-9)


def test_at_low_load_a_second_sequence_takes_the_wait_away_but_for_the_step_in_flight() -> None:
    # With room for all, who arrives waits for the rest of the step in flight, and never for a second one.
    service_s, requests, alone = one_at_a_time(0.3, 2000)
    together = run(LLAMA, *requests)

    def mean_s(times: Times) -> float:
        return sum(times.first_s[r.id] - r.arrival_s for r in requests) / len(requests)

    assert LLAMA.request_overhead_s + service_s < mean_s(together) < mean_s(alone)


@pytest.mark.parametrize(
    ("prompt_tokens", "shared_blocks", "cached_tokens"),
    [(160, 0, 0), (160, 1, 16), (160, 9, 144), (160, 10, 144), (161, 10, 160), (175, 10, 160), (17, 1, 16), (16, 1, 0)],
)
def test_a_hit_saves_its_tokens_and_its_part_of_the_attention(
    prompt_tokens: int, shared_blocks: int, cached_tokens: int
) -> None:
    # Full blocks from the start, and never the prompt's last token. (P - h)(h + (P - h)/2) = (P² - h²)/2.
    known = list(range(prompt_tokens // BLOCK_TOKENS))
    other = [*known[:shared_blocks], *(1000 + i for i in known[shared_blocks:])]
    times = run(LLAMA, ask("cold", prompt_tokens, hashes=known), ask("warm", prompt_tokens, at_s=60.0, hashes=other))
    saved_s = LLAMA.prefill_token_s * cached_tokens + LLAMA.attention_pair_s * cached_tokens**2 / 2
    assert times.cached_tokens == {"cold": 0, "warm": cached_tokens}
    assert times.first_s["cold"] - (times.first_s["warm"] - 60.0) == pytest.approx(saved_s, abs=1e-12)


SMALL = msgspec.structs.replace(LLAMA, kv_blocks=12)


def _blocks(name: str) -> list[int]:
    return [ord(name), ord(name) + 1000]


@pytest.mark.parametrize(("name", "queued_before"), [("b", 0), ("c", 3), ("d", 6), ("a", 9)])
@pytest.mark.parametrize("taken", range(13))
def test_eviction_goes_by_last_use_and_within_a_sequence_from_its_end(
    name: str, queued_before: int, taken: int
) -> None:
    # a, b, c, d fill the cache with two full blocks and a third begun, each; then a is used again. So the free queue
    # is b's third, second and first block, then c's, d's and a's. Somebody takes so many of them.
    used = [ask(f"use {i}", 33, at_s=10.0 * i, hashes=_blocks(n)) for i, n in enumerate("abcda")]
    taker = [ask("taker", 16 * taken - 1, at_s=100.0)] if taken else []
    times = run(SMALL, *used, *taker, ask("probe", 33, at_s=200.0, hashes=_blocks(name)))
    gone = taken - queued_before
    assert times.cached_tokens["use 4"] == 32
    assert times.cached_tokens["probe"] == (32 if gone < 2 else 16 if gone == 2 else 0)


def test_fcfs_preempts_the_newest_first_and_the_oldest_of_the_preempted_returns_first() -> None:
    # Five prompts of one full block in five blocks: at the first decode each wants a second one.
    p = msgspec.structs.replace(LLAMA, kv_blocks=5)
    times = run(p, *(ask(name, 16, 16) for name in "abcde"))
    assert times.preempted[:3] == ["e", "d", "c"]
    assert list(times.last_s) == ["a", "b", "c", "d", "e"]


def test_by_priority_the_least_urgent_goes_first_and_among_equals_the_latest() -> None:
    p = msgspec.structs.replace(LLAMA, kv_blocks=5)
    urgency = {"a": 2, "b": 0, "c": 1, "d": 2, "e": 1}
    times = run(p, *(ask(n, 16, 16, priority=u) for n, u in urgency.items()), policy=Policy.PRIORITY)
    assert times.preempted[:3] == ["d", "a", "e"]
    assert list(times.last_s)[:2] == ["b", "c"]


def test_a_preempted_request_costs_its_tokens_again_less_what_is_left_of_its_blocks() -> None:
    # Two blocks each are full when "b" loses them. "a" takes the one never used and, 16 tokens later, the second of
    # "b", which is free before the first: of 33 known tokens 16 are found again.
    p = msgspec.structs.replace(LLAMA, kv_blocks=5)
    for output, left_tokens in ((16, 1), (20, 17)):
        times = run(p, ask("a", 32, output), ask("b", 32, 20))
        back = next(step for step in times.steps if step.start_s >= times.last_s["a"])
        assert times.preempted == ["b"]
        assert (back.tokens, back.scheduled_tokens) == (["b"], left_tokens)
