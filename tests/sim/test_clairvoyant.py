"""What lanes foresee against what engines do, and what foresight is good for. All costs are powers of two, so the
times of both are exact: a step takes 1/8 s, a prompt token 1/256 s, a sequence 1/64 s, a token of context 2^-16 s."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from benchmarks import asked, scenarios
from benchmarks.clairvoyant import CONFIG, NAME, Clairvoyant, Foresight
from benchmarks.rollout import Ask, Lane
from llmd_sched.errors import ConfigError
from llmd_sched.sim.cluster import Cluster
from llmd_sched.sim.engine import Engine, EngineConfig, SimRequest
from llmd_sched.sim.scenario import Arrival, ClusterSpec, EngineSpec, Fail, Record, arrival
from llmd_sched.sim.steptime import Preset, preset
from tests.builders import CONFIG_HEAD, endpoint, prompt

PLAIN = Preset(
    model="m",
    step_base_s=1 / 8,
    prefill_token_s=1 / 256,
    attention_pair_s=2**-20,
    sequence_s=1 / 64,
    decode_context_token_s=2**-16,
    request_overhead_s=1 / 16,
    kv_blocks=400,
    max_num_batched_tokens=256,
    max_num_seqs=4,
)
SCALED = ("step_base_s", "prefill_token_s", "attention_pair_s", "sequence_s", "decode_context_token_s")
FEWEST_OPEN = CONFIG_HEAD + "plugins: [{type: active-request-scorer}, {type: max-score-picker}]\n"


def request(name: str, tokens: int, output: int, at_s: float = 0.0, hashes: Iterable[int] = ()) -> SimRequest:
    hashes = tuple(hashes)
    return SimRequest(id=name, prompt_tokens=tokens, output_tokens=output, arrival_s=at_s, block_hashes=hashes)


def engine(*requests: SimRequest, steps: int = 0, of: Preset = PLAIN) -> tuple[Engine, float]:
    """One that has taken so many steps, and when the last of them ends."""
    made, now_s = Engine(EngineConfig(preset=of)), 0.0
    for one in requests:
        made.submit(one)
    for _ in range(steps):
        step = made.step(now_s)
        now_s = step.end_s if step else made.next_ready_s or now_s
    return made, now_s


def ends(of: Engine, now_s: float) -> list[tuple[float, str]]:
    """When the engine really lets go of each request, by running it."""
    ended = []
    while True:
        step = of.step(now_s)
        if step is not None:
            now_s = step.end_s
            ended += [(now_s, name) for name in step.finished]
        elif of.next_ready_s is not None:
            now_s = of.next_ready_s
        else:
            return sorted(ended)


CROWD = (
    request("a", 100, 9, hashes=range(6)),
    request("b", 700, 1, hashes=range(43)),
    request("c", 30, 40),
    request("d", 60, 7, 1.0),
    request("e", 500, 30, 2.0, hashes=range(31)),
    request("f", 16, 5, 2.0, hashes=range(1)),
    request("g", 90, 12, 9.0),
)
"""More than may run at once, prompts longer than a step, shared beginnings, a reply of one token."""


@pytest.mark.parametrize("steps", range(0, 40, 3))
def test_a_lane_ends_each_request_exactly_when_the_engine_does(steps: int) -> None:
    real, now_s = engine(*CROWD, steps=steps)
    lane = Lane(real, now_s)
    lane.run_to(math.inf)
    assert sorted(lane.ended) == ends(real, now_s)
    assert len(lane.ended) >= 2


def test_it_does_not_matter_at_which_times_one_stops_to_look() -> None:
    whole, pieces = Lane(*engine(*CROWD)), Lane(*engine(*CROWD))
    for to_s in itertools.accumulate(itertools.repeat(0.21, 200)):
        pieces.run_to(to_s)
        assert pieces.now_s >= to_s or not pieces.requests
    whole.run_to(math.inf)
    assert pieces.ended == whole.ended


def test_a_request_placed_on_a_lane_ends_as_if_it_had_been_submitted_then() -> None:
    real, now_s = engine(*CROWD[:3], steps=4)
    late = request("late", 200, 6, now_s + 0.3, hashes=range(12))
    lane = Lane(real, now_s)
    lane.run_to(late.arrival_s)
    lane.place(Ask(late.id, late.arrival_s, late.prompt_tokens, late.output_tokens, late.block_hashes))
    lane.run_to(math.inf)
    real.submit(late)
    assert sorted(lane.ended) == ends(real, now_s)


def test_real_coefficients_and_a_slowdown_give_the_engines_times_up_to_rounding() -> None:
    of = preset("qwen3-32b-h100x2")
    crowd = [request(str(i), 1000 + 700 * i, 50 + 37 * i, i / 8) for i in range(12)]
    real, now_s = engine(*crowd, steps=5, of=of)
    slow = msgspec.structs.replace(
        of, **{name: 2 * getattr(of, name) for name in of.__struct_fields__ if name in SCALED}
    )
    lanes = [Lane(real, now_s), Lane(real, now_s, 2.0)]
    for lane in lanes:
        lane.run_to(math.inf)
    twice, _ = engine(*crowd, steps=5, of=of)
    twice._preset = slow
    for lane, truth in zip(lanes, (ends(real, now_s), ends(twice, now_s)), strict=True):
        assert [name for _, name in lane.ended] == [name for _, name in truth]
        assert [at_s for at_s, _ in lane.ended] == pytest.approx([at_s for at_s, _ in truth], rel=1e-9)


def test_a_lane_leaves_the_engine_and_the_lane_it_was_copied_from_as_they_were() -> None:
    real, now_s = engine(*CROWD, steps=6)
    first = Lane(real, now_s)
    second = first.copy()
    second.place(Ask("x", now_s, 300, 20, range(500, 518)))
    second.run_to(math.inf)
    assert first.requests
    assert not first.ended
    assert first.cached_tokens(Ask("y", now_s, 300, 1, range(500, 518))) == 0
    assert second.cached_tokens(Ask("z", now_s, 300, 1, range(500, 518))) == 18 * 16
    first.run_to(math.inf)
    assert sorted(first.ended) == ends(real, now_s)


def test_a_full_cache_delays_but_ends_everybody() -> None:
    small = msgspec.structs.replace(PLAIN, kv_blocks=40)
    crowd = [request(str(i), 250, 60) for i in range(5)]
    lane = Lane(*engine(*crowd, steps=1, of=small))
    lane.run_to(math.inf)
    wide = Lane(*engine(*crowd, steps=1))
    wide.run_to(math.inf)
    assert len(lane.ended) == len(wide.ended) == 5
    assert lane.ended[-1] > wide.ended[-1]


def spec(config: str = "", **fields: object) -> ClusterSpec:
    config_of = EngineConfig(preset=PLAIN)
    members = [EngineSpec(endpoint=endpoint(i), engine=config_of) for i in range(2)]
    return ClusterSpec(**{"config": config, "engines": members, "network_s": 2**-7, **fields})


def ask(at_s: float, name: str, blocks: int, output: int, seed: int) -> Arrival:
    return arrival(at_s, prompt(blocks, seed), output, id=name)


# "long" holds one engine for as long as the rest takes, "short" ends soon on the other. When "new" comes, both hold one
# request and look the same; who knows the lengths goes beside "short".
LENGTHS = [ask(0.0, "long", 1, 400, 1), ask(0.25, "short", 1, 40, 2), ask(3.0, "new", 1, 100, 3)]

# "head" has left its prompt of ten blocks on one engine. Nobody is there when "stranger" comes, so it is as well off
# there as elsewhere; but ten that begin like "head" are on their way.
COMING = [
    ask(0.0, "head", 10, 1, 1),
    ask(20.0, "stranger", 1, 60, 2),
    *(ask(20.25 + 0.25 * i, f"like-{i}", 10, 2, 1) for i in range(10)),
]


def where(records: Iterable[Record]) -> dict[str, str]:
    return {record.request_id: record.endpoint for record in records}


def test_it_goes_beside_the_request_that_will_end_soon() -> None:
    went = where(Clairvoyant(spec()).run(LENGTHS))
    assert went["long"] != went["short"] == went["new"]


def test_it_keeps_out_of_the_way_of_those_to_come_where_greed_does_not() -> None:
    runs = {n: Clairvoyant(spec(), Foresight(arrivals=n, copy_weight=0.0)).run(COMING) for n in (0, 16)}
    blind, ahead = where(runs[0]), where(runs[16])
    assert blind["stranger"] == blind["head"]
    assert ahead["stranger"] != ahead["head"] == ahead["like-0"]
    assert sum(r.e2e_ms for r in runs[16]) < sum(r.e2e_ms for r in runs[0])


def test_a_run_is_the_same_every_time_and_ends_all_requests_whatever_engine_dies() -> None:
    events = [Fail(3.0, "e0")]
    crowd = [ask(i / 4, str(i), 1 + i % 5, 3 + 7 * (i % 4), i % 3) for i in range(30)]
    first, second = (Clairvoyant(spec(events=events, seed=5), Foresight(arrivals=8)).run(crowd) for _ in range(2))
    assert msgspec.msgpack.encode(first) == msgspec.msgpack.encode(second)
    assert len(first) == 30
    assert {record.endpoint for record in first if record.arrival_s > 3.0} == {"e1"}


def test_with_every_engine_dead_the_router_chooses_and_the_request_fails() -> None:
    events = [Fail(1.0, "e0"), Fail(1.0, "e1")]
    (record,) = Clairvoyant(spec(events=events)).run([ask(2.0, "late", 1, 5, 0)])
    assert record.status == 503


def test_on_a_small_crowd_it_is_better_than_the_fewest_open_requests() -> None:
    crowd = [ask(i / 2, str(i), 1 + 3 * (i % 3), 2 + 40 * (i % 5 == 0) + i % 7, i % 4) for i in range(40)]
    ours, least = Clairvoyant(spec(), Foresight(arrivals=8)).run(crowd), Cluster(spec(FEWEST_OPEN)).run(crowd)
    assert sum(r.e2e_ms for r in ours) < 0.9 * sum(r.e2e_ms for r in least)


def test_it_is_an_arm_by_its_name_that_is_no_file_and_not_among_all(tmp_path: Path) -> None:
    assert asked.arm_texts([NAME, "random"])[NAME] == CONFIG
    assert NAME not in asked.known_arms()
    other = tmp_path / f"{NAME}.yaml"
    other.write_text(FEWEST_OPEN)
    with pytest.raises(ConfigError, match=r"has the name clairvoyant: .*clairvoyant\.yaml needs another"):
        asked.arm_texts([str(other)])


def test_as_an_arm_it_is_measured_like_any_other() -> None:
    flags = ["--scenario", "D5", "--arms", NAME, "--seeds", "1", "--duration", "2", "--warm-up", "0"]
    (task,) = scenarios.plan(scenarios.arguments().parse_args(flags))
    run = scenarios.measure(task)
    assert not run.error
    arrivals = task.scenario.workload.arrivals(task.step.rate_per_s, 2.0, task.seed)
    records = Clairvoyant(task.scenario.cluster("", seed=task.seed)).run(arrivals)
    assert run.figures["e2e_mean_ms"] == pytest.approx(sum(r.e2e_ms for r in records) / len(records))
