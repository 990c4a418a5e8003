"""Headroom and pace together, on simulated engines: short runs, seeded, so every number is the same each time."""

from __future__ import annotations

import math
from functools import cache
from random import Random

import msgspec
import pytest

from benchmarks.batch_laws import Cap, laws
from benchmarks.batch_sim import BATCH, COMPUTED, INTERACTIVE, Simulation
from benchmarks.batch_traffic import SCENARIOS, Scenario, batch_lines, lognormal
from benchmarks.bench_batch import Task, alone_tokens_per_s, figures, flat, gather, missed

SEED = 42
SHORT = msgspec.structs.replace(SCENARIOS["L8A"], phase_s=30.0, cycles=2)
FOUR = msgspec.structs.replace(SHORT, engines=4, phase_s=20.0)
BOUND_MS = 12.0


@cache
def ran(law: str, scenario: Scenario = SHORT) -> Simulation:
    return Simulation(scenario, laws(scenario, BOUND_MS)[law](), SEED, batch_lines(SEED)).run()


def ratio(law: str, figure: str, scenario: Scenario = SHORT) -> float:
    return figures(ran(law, scenario))[figure] / figures(ran("S0", scenario))[figure]


@pytest.mark.parametrize("law", ["protect", "harvest"])
def test_interactive_requests_of_a_burst_do_not_feel_batch(law: str) -> None:
    assert ratio(law, "burst_ttft_ms_p95") <= 1.10
    assert ratio(law, "burst_itl_ms_p95") <= 1.15


def test_protect_holds_for_the_requests_between_bursts_too() -> None:
    assert ratio("protect", "all_ttft_ms_p95") <= 1.10
    assert ratio("protect", "all_itl_ms_p95") <= 1.15


def test_harvest_fills_the_time_between_bursts_and_protect_less_of_it() -> None:
    idle = {law: figures(ran(law))["idle_harvest"] for law in ("fixed-5", "protect", "harvest")}
    assert 1.5 * idle["fixed-5"] < idle["protect"] < idle["harvest"]
    assert idle["harvest"] > 12_000


def test_a_flood_is_felt() -> None:
    """So that the tests above can fail."""
    assert ratio("S1", "burst_ttft_ms_p95") > 5
    assert ratio("S1-priority", "burst_itl_ms_p95") > 2


def test_an_aborted_line_is_resumed_with_the_tokens_it_had() -> None:
    made = ran("harvest")
    again = [job for job in made.done if job.tries > 1]
    assert made.aborts > 100
    assert again
    assert any(job.done > 0 for job in again)
    assert all(job.done < job.output_tokens for job in again)
    assert len({job.number for job in made.done}) == len(made.done)


def test_tokens_add_up() -> None:
    made = ran("harvest")
    net = made.bins[:, (BATCH, INTERACTIVE)].sum()
    assert net <= made.bins[:, COMPUTED].sum()
    asked = sum(one.prompt_tokens + one.output_tokens for one in made.asked.values())
    assert made.bins[:, INTERACTIVE].sum() == asked
    done = sum(job.prompt_tokens + job.output_tokens for job in made.done)
    in_flight = [*made.jobs.values(), *made._aborted]
    begun = sum(job.prompt_tokens * job.prompt_counted + job.done for job in in_flight)
    begun += sum(line.tokens for line in made.pace.lines.values())
    assert made.bins[:, BATCH].sum() == done + begun


def test_two_runs_agree_bit_by_bit() -> None:
    again = Simulation(SHORT, laws(SHORT, BOUND_MS)["harvest"](), SEED, batch_lines(SEED)).run()
    assert (again.bins == ran("harvest").bins).all()


def test_an_operator_who_is_wrong_about_the_engine_is_corrected() -> None:
    assert ratio("harvest-wrong", "burst_itl_ms_p95") <= 1.15


def test_while_little_comes_it_goes_to_one_engine_of_four_and_a_burst_to_all() -> None:
    made = ran("protect", FOUR)
    idle = {one.endpoint for one in made.asked.values() if 50 < one.at_s < 60}
    busy = {one.endpoint for one in made.asked.values() if 62 < one.at_s < 80}
    assert idle == {"engine-0"}
    assert len(busy) == 4


def test_the_hand_over_at_an_onset_is_not_felt() -> None:
    assert ratio("protect", "burst_ttft_ms_p95", FOUR) <= 1.15
    assert ratio("protect", "all_itl_ms_p95", FOUR) <= 1.15


@pytest.mark.parametrize("law", ["S2", "S3", "S4", "S5", "S6"])
def test_the_rivals_run(law: str) -> None:
    scenario = msgspec.structs.replace(SHORT, phase_s=5.0)
    made = ran(law, scenario)
    assert all(not math.isnan(one.end_s) for one in made.asked.values())
    assert made.bins[:, BATCH].sum() > 0


def test_lines_that_miss_their_window_are_counted() -> None:
    made = Simulation(SHORT, Cap(1), SEED, batch_lines(SEED, 3000)).run()
    share = missed(made)
    assert share["job_1_missed_pct"] > 0  # what 120 s would do in 1800 s
    assert share["job_3_missed_pct"] == 0


def test_the_report_has_percents_of_batch_alone_and_ratios_to_interactive_alone() -> None:
    alone = Task(scenario=SHORT, laws=(), seed=1)
    task = Task(scenario=SHORT, laws=("harvest",), seed=1)
    found = [{"alone": {"tokens_per_s": 200.0}}, {"harvest": {"idle_harvest": 50.0, "burst_itl_p95_ratio": 1.5}}]
    report = flat(gather([alone, task], found))
    assert report["l8a_harvest_idle_harvest_pct"] == 25.0
    assert report["l8a_harvest_burst_itl_p95_worst_ratio"] == 1.5


def test_lengths_have_the_mean_that_was_asked_for() -> None:
    rng = Random(1)
    assert sum(lognormal(rng, 500, 400) for _ in range(20_000)) / 20_000 == pytest.approx(500, rel=0.02)


@pytest.mark.parametrize("count", [0, 3])
def test_a_finite_batch_ends(count: int) -> None:
    made = Simulation(SHORT, laws(SHORT)["S6"](), SEED, batch_lines(SEED, count), interactive=False, end_s=60).run()
    assert [job.number for job in sorted(made.done, key=lambda job: job.number)] == list(range(count))


def test_batch_alone_is_measured_at_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.bench_batch.ALONE", {"L8": (1, 20), "Q32": ()})
    monkeypatch.setattr("benchmarks.bench_batch.ALONE_S", (10, 30))
    assert 4_000 < alone_tokens_per_s(SHORT, SEED) < 12_000
