"""The benchmarks' workloads and scenarios. What the live client makes of a trace is in test_workload.py."""

from __future__ import annotations

import itertools
import json
import time
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from benchmarks.workloads import (
    SCENARIOS,
    WORKLOADS,
    Conversations,
    Fixed,
    Independent,
    ItemWorkload,
    LogNormal,
    Mixed,
    Normal,
    Point,
    Scenario,
    SharedPrefix,
    Shifted,
    Uniform,
    WithSlos,
    burstgpt_csv,
    find,
    read,
    traced,
)
from benchmarks.workloads.scenarios import pool
from llmd_sched.load.traces import TraceError
from llmd_sched.load.workload import Item
from llmd_sched.sim.openai import block_hashes
from llmd_sched.sim.scenario import Arrival, Slow
from llmd_sched.sim.steptime import PRESETS

NAMED_POINTS = {
    *("b2b10", "b2b20", "b2b30", "b2b45", "A20", "A45", "B8", "B15", "C5", "C9", "D5", "D9", "code20", "code40"),
    *("code80", "reas150", "reas350", "prod2", "prod4", "sg120", "sg260", "mix20", "mix40", "hb2b7", "hB8", "hsg150"),
}

BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,0,1087,API log
118,ChatGPT,417,276,693,Conversation log
"""


def items(name: str, rate_per_s: float, duration_s: float, seed: int = 1) -> list[Item]:
    workload = WORKLOADS[name]
    assert isinstance(workload, ItemWorkload)
    return list(workload.items(rate_per_s, duration_s, seed))


def prompt(one: Arrival) -> bytes:
    (text,) = one.request.prompts
    return text


def cached_share(arrivals: Iterable[Arrival]) -> float:
    """Of the prompt blocks, those that one cache without bounds would hold."""
    seen: set[int] = set()
    hits = total = 0
    for one in arrivals:
        hashes = block_hashes(prompt(one))
        hits += sum(block in seen for block in hashes)
        total += len(hashes)
        seen.update(hashes)
    return hits / total


def sessions(asked: Iterable[Item]) -> list[list[Item]]:
    by_name: dict[str, list[Item]] = {}
    for item in asked:
        by_name.setdefault(item.session, []).append(item)
    return list(by_name.values())


# ------------------------------------------------------------------------------------------------ every workload


@pytest.mark.parametrize("name", WORKLOADS)
def test_arrivals_are_in_order_within_the_time_and_equal_for_equal_seeds(name: str) -> None:
    once, again, other = (list(WORKLOADS[name].arrivals(2.0, 60.0, seed)) for seed in (1, 1, 2))
    times_s = [one.at_s for one in once]
    assert once == again
    assert len(once) > 20
    assert times_s != [one.at_s for one in other]
    assert times_s == sorted(times_s)
    assert times_s[0] >= 0
    assert times_s[-1] < 60
    assert len({one.request.id for one in once}) == len(once)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_prompt_is_four_bytes_per_token_and_fits_the_engine_with_its_reply(name: str) -> None:
    room = 16 * PRESETS["qwen3-32b-h100x2"].kv_blocks
    for one in itertools.islice(WORKLOADS[name].arrivals(4.0, 100.0, 3), 300):
        assert len(prompt(one)) == 4 * one.request.input_tokens
        assert one.output_tokens >= 1
        assert one.request.input_tokens + one.output_tokens <= room


@pytest.mark.parametrize("name", WORKLOADS)
def test_different_seeds_share_no_text(name: str) -> None:
    firsts = [{prompt(one)[:64] for one in WORKLOADS[name].arrivals(2.0, 30.0, seed)} for seed in (1, 2)]
    assert not firsts[0] & firsts[1]


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_rate_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        next(WORKLOADS[name].arrivals(0.0, 10.0, 1))


@pytest.mark.parametrize("name", WORKLOADS)
def test_an_endless_workload_is_made_as_it_is_read(name: str) -> None:
    next(WORKLOADS[name].arrivals(1.0, 10.0, 1))
    tracemalloc.start()
    for _ in itertools.islice(WORKLOADS[name].arrivals(2.0, 1e12, 1), 100):
        pass
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 8 << 20


# ---------------------------------------------------------------------------------------------------- distributions

MEANS = [
    # name, rate, duration, prompt tokens, reply tokens; the prompt is that of a conversation's first turn
    ("A", 40, 100, 1030, 1000),
    ("B", 20, 200, 4000, 1000),
    ("C", 7, 100, 7200, 1000),
    ("D", 7, 100, 7200, 1000),
    ("b2b-saas", 10, 100, 7200, 1000),
    ("sharegpt", 120, 100, 220, 250),
    ("reasoning", 1.75, 2000, 1250, 8000),
]


@pytest.mark.parametrize(("name", "rate_per_s", "duration_s", "input_tokens", "output_tokens"), MEANS)
def test_lengths_and_rates_have_their_means(
    name: str, rate_per_s: float, duration_s: float, input_tokens: float, output_tokens: float
) -> None:
    asked = items(name, rate_per_s, duration_s)
    firsts = [turns[0] for turns in sessions(asked)]
    expected = rate_per_s * duration_s
    assert len(asked) == pytest.approx(expected, abs=3 * expected**0.5)
    assert fmean(item.input_tokens for item in firsts) == pytest.approx(input_tokens, rel=0.06)
    assert fmean(item.output_tokens for item in asked) == pytest.approx(output_tokens, rel=0.06)


def test_normal_lengths_have_their_deviations() -> None:
    asked = items("B", 40, 100)
    assert pstdev(item.prompt[1].tokens for item in asked) == pytest.approx(900, rel=0.05)
    assert pstdev(item.output_tokens for item in asked) == pytest.approx(300, rel=0.05)


@pytest.mark.parametrize(
    ("draw", "low", "high"),
    [(Normal(10, 50, 2, 30), 2, 30), (LogNormal(10, 50, 2, 30), 2, 30), (Uniform(2, 30), 2, 30), (Fixed(7), 7, 7)],
)
def test_a_length_keeps_its_limits(draw: Normal | LogNormal | Uniform | Fixed, low: int, high: int) -> None:
    asked = list(Independent(name="x", question_tokens=draw, output_tokens=draw).items(10.0, 50.0, 1))
    assert {low, high} <= {item.input_tokens for item in asked}
    assert all(low <= item.output_tokens <= high for item in asked)


@pytest.mark.parametrize("name", ["A", "sharegpt", "b2b-saas"])
def test_gaps_between_arrivals_vary_as_much_as_their_mean(name: str) -> None:
    gaps_s = [after.at_s - before.at_s for before, after in itertools.pairwise(items(name, 30, 200))]
    assert pstdev(gaps_s) == pytest.approx(fmean(gaps_s), rel=0.05)


@pytest.mark.parametrize(
    ("name", "rate_per_s", "share"),
    # A system prompt counts from its second use on: with 300 requests of 150 groups that is 57 % of the times.
    # Of A's prompts 62 blocks of 1030 tokens are shared, of B's 62 blocks of 4000.
    [("A", 20, 0.96), ("B", 5, 0.24), ("C", 5, 0.57 * 6000 / 7200), ("D", 5, 0.57 * 1000 / 7200), ("sharegpt", 9, 0)],
)
def test_as_much_of_the_prompts_is_shared_as_their_description_says(name: str, rate_per_s: float, share: float) -> None:
    assert cached_share(WORKLOADS[name].arrivals(rate_per_s, 60.0, 1)) == pytest.approx(share, abs=0.03)


def test_stages_multiply_the_rate() -> None:
    times_s = [item.at_s for item in items("production", 10, 120)]
    for stage in range(8):
        count = sum(15 * stage <= at_s < 15 * stage + 15 for at_s in times_s)
        assert count == pytest.approx(750 if stage % 2 else 150, rel=0.2)


def test_a_burst_is_ten_seconds_at_five_times_the_rate() -> None:
    times_s = [item.at_s for item in items("B-burst", 20, 100)]
    assert sum(50 <= at_s < 60 for at_s in times_s) == pytest.approx(1000, rel=0.1)
    assert sum(at_s < 50 for at_s in times_s) == pytest.approx(1000, rel=0.1)


# ---------------------------------------------------------------------------------------------------- conversations


@pytest.mark.parametrize(("name", "rate_per_s", "duration_s"), [("C", 20, 200), ("production", 4, 120)])
def test_each_turn_of_a_user_begins_with_the_one_before_and_its_reply(
    name: str, rate_per_s: float, duration_s: float
) -> None:
    pairs = [pair for turns in sessions(items(name, rate_per_s, duration_s)) for pair in itertools.pairwise(turns)]
    assert len(pairs) > 300
    workload = WORKLOADS[name]
    assert isinstance(workload, SharedPrefix)
    for before, after in pairs:
        assert after.prompt[0] == before.prompt[0]
        assert after.input_tokens > before.input_tokens + before.output_tokens
        reply_s = workload.planned_ttft_s + workload.planned_tpot_s * before.output_tokens
        assert after.at_s >= before.at_s + reply_s - 1e-9


def test_the_bytes_of_a_turn_begin_with_those_of_the_turn_before() -> None:
    two_users = SharedPrefix(
        name="x", groups=1, users=2, system_tokens=50, question_tokens=Normal(30, 9), output_tokens=Fixed(40)
    )
    first, second, *later = list(two_users.arrivals(0.5, 60.0, 1))[:6]
    assert prompt(first)[:200] == prompt(second)[:200]
    assert prompt(first)[200:232] != prompt(second)[200:232]
    for before, after in itertools.pairwise([first, *later[::2]]):
        assert prompt(after).startswith(prompt(before))
        assert len(prompt(after)) > len(prompt(before)) + 4 * 40


def test_every_user_comes_once_before_any_comes_again() -> None:
    asked = items("C", 20, 75)
    assert len(asked) > 1000
    assert len({item.session for item in asked[:750]}) == 750


def test_arrivals_wait_for_a_planned_reply_when_all_users_do() -> None:
    slow = SharedPrefix(
        name="x", groups=1, users=3, system_tokens=10, question_tokens=Fixed(5), output_tokens=Fixed(100),
        planned_ttft_s=1.0, planned_tpot_s=0.09,
    )  # fmt: skip
    times_s = [item.at_s for item in slow.items(100.0, 100.0, 1)]
    assert times_s == sorted(times_s)
    assert len(times_s) == pytest.approx(30, abs=3)


def test_a_conversation_starts_anew_when_its_context_is_full() -> None:
    short = SharedPrefix(
        name="x", groups=1, users=1, system_tokens=100, question_tokens=Fixed(50), output_tokens=Fixed(50),
        planned_tpot_s=0.0, context_tokens_max=400,
    )  # fmt: skip
    asked = sessions(short.items(1.0, 100.0, 1))
    assert len(asked) > 10
    assert [[item.input_tokens for item in turns] for turns in asked[:2]] == [[150, 250, 350]] * 2


def test_a_b2b_user_asks_the_same_question_again() -> None:
    prompts = [prompt(one) for one in WORKLOADS["b2b-saas"].arrivals(20.0, 60.0, 1)]
    assert len(prompts) > 1000
    assert prompts[750:] == prompts[: len(prompts) - 750]
    assert len(set(prompts)) == 750
    assert len({text[: 4 * 6000] for text in prompts}) == 150


def test_coding_conversations_are_as_long_as_described() -> None:
    coding = WORKLOADS["code-generation"]
    assert isinstance(coding, Conversations)
    asked = list(coding.items(coding.rate_of(60), 3000.0, 1))
    whole = [turns for turns in sessions(asked) if 500 < turns[0].at_s < 2000]
    assert len(asked) / 3000 == pytest.approx(coding.rate_of(60), rel=0.05)
    assert fmean(len(turns) for turns in whole) == pytest.approx(6, rel=0.1)
    assert fmean(turns[0].input_tokens for turns in whole) == pytest.approx(55_000 + 1500, rel=0.06)
    assert max(item.input_tokens for item in asked) <= coding.context_tokens_max
    assert len({item.prompt[0] for item in asked}) == 1


def test_a_planned_turn_comes_when_the_reply_would_have_ended_and_its_user_has_thought() -> None:
    planned = Conversations(
        name="x", shared_tokens=10, turns=Fixed(4), question_tokens=Fixed(5), output_tokens=Fixed(100),
        think_s=Fixed(7), planned_ttft_s=1.0, planned_tpot_s=0.02,
    )  # fmt: skip
    asked = list(planned.items(planned.rate_of(8), 200.0, 1))
    assert planned.cycle_s == 10
    assert len(asked) == 8 * 20
    for turns in sessions(asked):
        for before, after in itertools.pairwise(turns):
            assert after.at_s - before.at_s == pytest.approx(10)
            assert after.input_tokens == before.input_tokens + 105


def test_conversations_are_at_any_turn_when_time_begins() -> None:
    first_minute = items("code-generation", 1.3, 60)
    assert len(first_minute) == pytest.approx(78, rel=0.25)
    assert len({item.session for item in first_minute}) > 40
    later = [turns for turns in sessions(items("code-generation", 1.3, 600)) if turns[0].at_s < 60]
    assert fmean(len(turns) for turns in later) < 5, "some were under way"


# ------------------------------------------------------------------------------------------------------- combined


def test_tenants_have_their_shares_and_their_ids() -> None:
    mixed = list(WORKLOADS["mixed"].arrivals(40.0, 100.0, 1))
    for tenant, share in {"A": 0.4, "sharegpt": 0.4, "B": 0.1, "C": 0.1}.items():
        count = sum(one.request.fairness_id == tenant for one in mixed)
        assert count / len(mixed) == pytest.approx(share, rel=0.12)


def test_a_shift_changes_the_workload_half_way() -> None:
    shifted = list(WORKLOADS["shifted"].arrivals(8.0, 100.0, 1))
    assert {one.request.fairness_id for one in shifted if one.at_s < 50} == {"sharegpt"}
    assert {one.request.fairness_id for one in shifted if one.at_s >= 50} == {"B"}
    assert sum(one.at_s < 50 for one in shifted) == pytest.approx(4000, rel=0.06)


def test_half_the_requests_carry_objectives_and_are_the_same_otherwise() -> None:
    plain, mixed = (list(WORKLOADS[name].arrivals(10.0, 100.0, 1)) for name in ("B", "B-slo"))
    slos = [(one.request.ttft_slo_ms, one.request.tpot_slo_ms) for one in mixed]
    assert set(slos) == {(None, None), (500.0, 30.0)}
    assert sum(ttft is not None for ttft, _ in slos) / len(slos) == pytest.approx(0.5, abs=0.06)
    assert [(one.at_s, prompt(one)) for one in mixed] == [(one.at_s, prompt(one)) for one in plain]


def test_a_combination_that_makes_no_sense_is_refused() -> None:
    a, b = WORKLOADS["A"], WORKLOADS["B"]
    with pytest.raises(ValueError, match="names of their own"):
        Shifted(name="x", before=a, after=a)
    with pytest.raises(ValueError, match="add up to 1"):
        Mixed(name="x", parts=((a, 0.5), (b, 0.4)))
    with pytest.raises(ValueError, match="0 to 1"):
        WithSlos(name="x", of=a, share=1.5, ttft_slo_ms=1.0, tpot_slo_ms=1.0)


# --------------------------------------------------------------------------------------------------------- traces


def burstgpt(tmp_path: Path, text: str = BURSTGPT) -> Path:
    path = tmp_path / "burst.csv"
    path.write_text(text)
    return path


def azure(tmp_path: Path) -> Path:
    path = tmp_path / "azure.csv"
    rows = "".join(f"2023-11-16 18:00:{second:02}.0000000,{100 * second},{second}\n" for second in range(1, 41))
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    return path


def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "mooncake.jsonl"
    rows = [(0, 1500, [7, 8, 9]), (1000, 1100, [7, 8, 10]), (2000, 600, [11, 12])]
    made = [{"timestamp": at, "input_length": n, "output_length": 5, "hash_ids": ids} for at, n, ids in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def test_burstgpt_rows_keep_their_times_and_failed_ones_are_left_out(tmp_path: Path) -> None:
    first, second = read(burstgpt(tmp_path))
    assert (first.at_s, first.input_tokens, first.output_tokens) == (0.0, 472, 18)
    assert (second.at_s, second.input_tokens, second.output_tokens) == (113.0, 417, 276)
    assert first.prompt[0].key != second.prompt[0].key


def test_a_newer_burstgpt_file_has_more_columns(tmp_path: Path) -> None:
    newer = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens\n0.5,3,1.2,m,10,20\n"
    assert [item.input_tokens for item in read(burstgpt(tmp_path, newer))] == [10]


def test_burstgpt_speed_comes_before_the_duration(tmp_path: Path) -> None:
    assert [item.at_s for item in read(burstgpt(tmp_path), speed=2, duration_s=60)] == [0.0, 56.5]
    assert len(list(read(burstgpt(tmp_path), duration_s=60))) == 1


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (BURSTGPT.replace("Response tokens", "Replies"), 1, "no column Response tokens"),
        (BURSTGPT.replace("417,276", "many,276"), 4, "'many'"),
        (BURSTGPT.replace("417,276", "417,-1"), 4, "out of range"),
        (BURSTGPT.replace("417,276", "9999999,1"), 4, "out of range"),
        (BURSTGPT.replace("118,", "nan,"), 4, "out of range"),
        (BURSTGPT.replace("118,", "44,"), 4, "before"),
        (BURSTGPT + "200,ChatGPT\n", 5, "NoneType"),
    ],
)
def test_a_bad_burstgpt_row_is_refused_naming_file_line_and_what_is_accepted(
    tmp_path: Path, text: str, line: int, what: str
) -> None:
    path = burstgpt(tmp_path, text)
    with pytest.raises(TraceError) as error:
        list(burstgpt_csv(path))
    assert str(error.value).startswith(f"{path}, line {line}: ")
    assert what in str(error.value)
    assert "accepted is a BurstGPT trace" in str(error.value)


@pytest.mark.parametrize("make", [azure, mooncake, burstgpt])
def test_a_trace_is_paced_to_the_rate_asked_for(make, tmp_path: Path) -> None:
    workload = traced(make(tmp_path))
    asked = list(workload.items(10 * workload.native_rate_per_s, 1000.0, 1))
    native = list(read(workload.path))
    assert [item.at_s for item in asked] == pytest.approx([item.at_s / 10 for item in native])
    assert len(list(workload.arrivals(workload.native_rate_per_s, native[-1].at_s, 1))) == len(native) - 1


def test_a_clipped_prompt_keeps_the_blocks_it_shares(tmp_path: Path) -> None:
    workload = traced(mooncake(tmp_path), context_tokens_max=1030, output_tokens_max=3)
    first, second, third = workload.arrivals(workload.native_rate_per_s, 10.0, 1)
    assert [one.request.input_tokens for one in (first, second, third)] == [1030, 1030, 600]
    assert {one.output_tokens for one in (first, second, third)} == {3}
    assert prompt(first)[:4096] == prompt(second)[:4096]
    assert prompt(first)[4096:] != prompt(second)[4096:]


@pytest.mark.parametrize("text", ["", "some,thing\n1,2\n", BURSTGPT.splitlines()[0] + "\n1,m,1,1,2,x\n"])
def test_a_file_that_is_no_trace_or_spans_no_time_is_refused(tmp_path: Path, text: str) -> None:
    path = burstgpt(tmp_path, text)
    with pytest.raises(TraceError, match=r"burst\.csv.*accepted"):
        traced(path)


def test_a_missing_trace_or_a_limit_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        traced(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="at least 1 token"):
        traced(azure(tmp_path), context_tokens_max=0)


# ------------------------------------------------------------------------------------------------------ scenarios


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_makes_a_cluster_and_a_ladder(name: str) -> None:
    scenario = SCENARIOS[name]
    spec = scenario.cluster("", seed=3)
    assert spec.engines == scenario.engines
    assert len({one.endpoint.name for one in spec.engines}) == len(spec.engines) == (8 if "b2b" in name else 10)
    assert list(scenario.rates) == sorted(set(scenario.rates))
    first = next(scenario.arrivals(scenario.rates[0], seed=1))
    assert first.at_s < scenario.duration_s


def test_all_the_named_points_are_there_and_no_name_is_used_twice() -> None:
    names = [point.name for scenario in SCENARIOS.values() for point in scenario.ladder]
    assert len(set(names)) == len(names)
    assert set(names) >= NAMED_POINTS
    assert [find(name)[1].rate_per_s for name in ("b2b10", "A45", "hsg150")] == [10, 45, 150]


def test_what_is_tuned_on_is_not_what_is_reported() -> None:
    tuning = {scenario.name for scenario in SCENARIOS.values() if scenario.role == "tuning"}
    assert tuning == {"A", "C", "b2b", "code"}
    tuned_on = {SCENARIOS[name].workload.name for name in tuning}
    plain = {one.workload.name for one in SCENARIOS.values() if one.role == "report" and "unequal" not in one.name}
    assert not tuned_on & plain


def test_an_unknown_point_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'A21'.*A20"):
        find("A21")


def test_an_unequal_pool_says_what_its_engines_are_and_a_slow_engine_does_not() -> None:
    unequal = SCENARIOS["unequal-B"].engines
    kinds = [one.endpoint.labels["llm-d.ai/accelerator"] for one in unequal]
    assert kinds == ["H100"] * 5 + ["A100"] * 5
    assert unequal[-1].engine.preset.step_base_s > 1.5 * unequal[0].engine.preset.step_base_s
    slow = SCENARIOS["slow"].engines
    assert [one.slowdown for one in slow] == [2.0] + [1.0] * 9
    assert {tuple(one.endpoint.labels) for one in slow} == {()}
    assert SCENARIOS["slowing"].events == (Slow(50.0, "engine-0", 2.0),)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"ladder": ()}, "increasing"),
        ({"ladder": (Point("x", 2), Point("y", 2))}, "increasing"),
        ({"ladder": (Point("x", 0),)}, "positive"),
        ({"warm_up_s": 100.0}, "warm-up"),
        ({"events": (Slow(100.0, "engine-0", 2.0),)}, "event"),
    ],
)
def test_a_scenario_that_makes_no_sense_is_refused(fields: dict[str, object], what: str) -> None:
    usual = {"ladder": (Point("x", 1),), "engines": pool(2), "workload": WORKLOADS["A"]}
    with pytest.raises(ValueError, match=what):
        Scenario(name="x", role="report", **{**usual, **fields})


def test_making_prompts_costs_little_beside_hashing_them() -> None:
    """Relative, so that it holds on any machine: hashing a prompt's blocks is what every arm does with it anyway."""
    arrivals = list(WORKLOADS["C"].arrivals(6.0, 100.0, 1))
    began_s = time.process_time()
    for _ in WORKLOADS["C"].arrivals(6.0, 100.0, 1):
        pass
    made_s = time.process_time() - began_s
    for one in arrivals:
        block_hashes(prompt(one))
    assert made_s < 2 * (time.process_time() - began_s - made_s)
