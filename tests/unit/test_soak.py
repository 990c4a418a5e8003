"""The soak's pure parts: what it does to endpoints, and whom it blames for a failed request."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.soak import _total
from benchmarks.soak_engines import Load
from benchmarks.soak_plan import (
    CALM_S,
    FEWEST_WELL,
    FIRST_S,
    FREEZE_S,
    FROZEN_AFTER_S,
    JOIN_S,
    KINDS,
    KNOWN_AFTER_S,
    LEFT_AFTER_S,
    MOST,
    RESTART_S,
    Life,
    Step,
    Told,
    account,
    items,
    plan,
)
from benchmarks.soak_report import Sample, memory, slope_per_min
from llmd_sched.load.report import Result
from llmd_sched.pool.scrape import PageReader
from llmd_sched.router import IDLE_LOST_AFTER_S

MEMBERS = 8
BEGAN_S = 1000.0


def steps(seed: int = 1, seconds: float = 600.0, every_s: float = 2.0) -> list[Step]:
    return plan(seed, seconds, MEMBERS, every_s)


def test_the_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    assert steps(1) == steps(1)
    assert steps(1) != steps(2)


@pytest.mark.parametrize("seed", range(5))
def test_a_plan_has_steps_of_every_kind_in_order_and_leaves_the_end_alone(seed: int) -> None:
    found = steps(seed)
    assert {step.kind for step in found} == set(KINDS)
    times_s = [step.at_s for step in found]
    assert times_s == sorted(times_s)
    assert times_s[0] > FIRST_S
    assert times_s[-1] < 600.0 - CALM_S
    assert all(step.for_s < CALM_S for step in found)


def test_a_run_shorter_than_its_calm_ends_has_no_steps() -> None:
    assert steps(seconds=FIRST_S + CALM_S) == []


@pytest.mark.parametrize("seed", range(5))
def test_an_endpoint_is_let_alone_until_what_happens_to_it_is_over(seed: int) -> None:
    busy_until_s = dict.fromkeys(range(MEMBERS), 0.0)
    for step in steps(seed, every_s=0.5):
        if step.kind == "join":
            assert step.endpoint not in busy_until_s, "a new endpoint has a new number"
            busy_until_s[step.endpoint] = step.at_s + JOIN_S
        else:
            assert busy_until_s[step.endpoint] <= step.at_s
            after_s = RESTART_S if step.kind == "kill" else math.inf if step.kind == "leave" else 0.0
            busy_until_s[step.endpoint] = step.at_s + step.for_s + after_s


@pytest.mark.parametrize("seed", range(5))
def test_enough_endpoints_are_well_and_never_too_many_are_members(seed: int) -> None:
    busy_until_s = dict.fromkeys(range(MEMBERS), 0.0)
    for step in steps(seed, every_s=0.5):
        if step.kind == "leave":
            del busy_until_s[step.endpoint]
        else:
            busy_until_s[step.endpoint] = step.at_s + step.for_s + (step.kind == "join")
        assert len(busy_until_s) <= MOST
        assert sum(until_s <= step.at_s for until_s in busy_until_s.values()) >= FEWEST_WELL


def test_a_freeze_is_shorter_than_the_age_at_which_the_router_gives_up_a_request() -> None:
    assert FREEZE_S[1] < IDLE_LOST_AFTER_S


def test_the_workload_is_evenly_spaced_and_mixed() -> None:
    found = list(items(1, rate_per_s=50.0, seconds=4.0))
    assert [one.at_s for one in found] == pytest.approx([i / 50 for i in range(200)])
    tokens = sorted(one.input_tokens for one in found)
    assert 30 <= tokens[0] < 60
    assert 4000 < tokens[-1] <= 8000
    assert len({one.body("stub") for one in found}) == 200
    assert len({one.prompt[0].key for one in found}) == 20


def result(request_id: str, sent_s: float, e2e_s: float, error: str | None = None) -> Result:
    fields: dict[str, Any] = {"session": "s", "schedule_delay_s": 0.0, "input_tokens": 1, "output_tokens": 1}
    times = {"at_s": sent_s, "sent_s": sent_s, "e2e_s": e2e_s}
    return Result(request_id=request_id, streaming=True, error=error, **times, **fields)


def told(request_id: str, chosen_s: float, ended_s: float, destination: str = "a:1") -> Told:
    """Times from BEGAN_S."""
    return Told(BEGAN_S + ended_s, request_id, destination, "finished", 200, ended_s - chosen_s)


def down(*spans: tuple[float, float], left_s: float = math.inf) -> list[Life]:
    dead = [(BEGAN_S + began_s, BEGAN_S + end_s) for began_s, end_s in spans]
    return [Life("a", "a:1", left_s=BEGAN_S + left_s, down=dead), Life("b", "b:1")]


@pytest.mark.parametrize(
    ("chosen_s", "ended_s", "blamed"),
    [
        (9.0, 9.9, "endpoint was alive: truncated"),
        (9.0, 10.1, None),
        (10.1, 10.2, None),
        (10.0 + KNOWN_AFTER_S + 0.1, 12.0, "endpoint known to be dead: truncated"),
        (15.1, 15.2, "endpoint was alive: truncated"),
    ],
    ids=["before it was killed", "while it was there", "before it was known", "after it was known", "back again"],
)
def test_a_failed_request_is_ours_unless_its_endpoint_had_just_been_killed(
    chosen_s: float, ended_s: float, blamed: str | None
) -> None:
    one = result("r", chosen_s, ended_s - chosen_s, "truncated")
    found = account([one], [told("r", chosen_s, ended_s)], down((10.0, 15.0)), BEGAN_S)
    assert dict(found.lost) == ({blamed: 1} if blamed else {})
    assert found.on_killed == (blamed is None)
    assert found.completed == 0
    assert len(found.examples) == len(found.lost_at_s) == (blamed is not None)


def test_a_failure_on_an_endpoint_that_was_not_the_killed_one_is_ours() -> None:
    found = account([result("r", 10.0, 1.0, "timeout")], [told("r", 10.0, 11.0, "b:1")], down((10.0, 15.0)), BEGAN_S)
    assert dict(found.lost) == {"endpoint was alive: timeout": 1}


def test_a_failure_the_scheduler_never_heard_of_is_ours() -> None:
    found = account([result("r", 10.0, 1.0, "timeout")], [], down((10.0, 15.0)), BEGAN_S)
    assert dict(found.lost) == {"no outcome: timeout": 1}
    assert found.untold == 1


def test_success_counts_whatever_happened_to_the_endpoint_and_a_missing_outcome_is_told_apart() -> None:
    results = [result("r", 10.0, 1.0), result("s", 10.0, 1.0)]
    found = account(results, [told("r", 10.0, 11.0)], down((10.5, 15.0)), BEGAN_S)
    assert (found.completed, found.lost.total(), found.untold) == (2, 0, 1)


def test_an_outcome_reported_twice_is_counted() -> None:
    found = account([result("r", 1.0, 1.0)], [told("r", 1.0, 2.0)] * 2, down(), BEGAN_S)
    assert (found.told_twice, found.ends["finished"]) == (1, 2)


@pytest.mark.parametrize(("after_s", "late"), [(LEFT_AFTER_S - 0.1, 0), (LEFT_AFTER_S + 0.1, 1)])
def test_a_request_sent_to_an_endpoint_that_has_long_left_is_counted(after_s: float, late: int) -> None:
    chosen_s = 20.0 + after_s
    one = told("r", chosen_s, chosen_s + 1.0)
    assert account([result("r", chosen_s, 1.0)], [one], down(left_s=20.0), BEGAN_S).to_left == late


@pytest.mark.parametrize(
    ("chosen_s", "stale"), [(20.0 + FROZEN_AFTER_S - 0.1, 0), (20.1 + FROZEN_AFTER_S, 1), (25.1, 0)]
)
def test_a_request_sent_to_a_frozen_endpoint_is_counted_once_that_could_be_seen(chosen_s: float, stale: int) -> None:
    life = Life("a", "a:1", frozen=[(BEGAN_S + 20.0, BEGAN_S + 25.0)])
    one = told("r", chosen_s, chosen_s + 5.0)
    assert account([result("r", chosen_s, 5.0)], [one], [life], BEGAN_S).to_frozen == stale


@pytest.mark.parametrize(
    ("samples", "slope"),
    [([], 0.0), ([(1.0, 5.0)], 0.0), ([(0.0, 1.0), (30.0, 2.0), (60.0, 3.0)], 2.0), ([(0.0, 1.0), (60.0, 1.0)], 0.0)],
)
def test_a_slope_is_told_per_minute(samples: list[tuple[float, float]], slope: float) -> None:
    assert slope_per_min(samples) == pytest.approx(slope)


def test_memory_is_compared_after_the_first_minute_and_before_the_load_ends() -> None:
    samples = [Sample(s, 100.0 + 10.0 * (s >= 60), 50.0, s / 60) for s in (0.0, 30.0, 60.0, 120.0, 180.0, 190.0)]
    found = memory(samples, 180.0)
    assert (found["scheduler_rss_settled_mib"], found["scheduler_rss_slope_mib_per_min"]) == (110.0, 0.0)
    assert (found["envoy_rss_settled_mib"], found["envoy_rss_end_mib"], found["envoy_rss_max_mib"]) == (1.0, 3.0, 3.0)
    assert found["envoy_rss_slope_mib_per_min"] == pytest.approx(1.0)


def test_a_metric_is_summed_over_its_labels_and_not_over_names_that_begin_alike() -> None:
    lines = ["# TYPE a gauge", 'a{x="1"} 2.0', 'a{x="2 3"} 3.0', "a_total 7.0", "ab 9.0"]
    assert _total(lines, "a") == 5.0
    assert _total(lines, "none") == 0.0


def test_an_engines_page_tells_what_runs_there() -> None:
    load = Load(delay_s=0.005)
    load.running = 4
    head, _, page = load.reply().partition(b"\r\n\r\n")
    assert f"content-length: {len(page)}".encode() in head
    read = PageReader().read(page, now_s=0.0)
    assert (read.running, read.waiting, read.kv_usage) == (4.0, 0.0, 0.125)
