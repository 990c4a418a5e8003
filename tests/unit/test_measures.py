"""Figures of one run by hand-made records, and what arms come to over rates and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from benchmarks import comparison, measures
from benchmarks.comparison import Estimate, Ladder, Step
from benchmarks.measures import Sheet, Window
from llmd_sched.sim.scenario import Record

WINDOW = Window(10.0, 20.0)
NAN = math.nan


def record(arrival_s: float = 12.0, **changes: object) -> Record:
    """A reply of 11 tokens in 2.2 s, the first after 0.2 s: TPOT and NTPOT 200 ms."""
    made: dict[str, object] = {
        "request_id": f"r{arrival_s:g}",
        "arrival_s": arrival_s,
        "endpoint": "a",
        "model_version": -1,
        "predicted_ttft_ms": NAN,
        "predicted_tpot_ms": NAN,
        "ttft_ms": 200.0,
        "tpot_ms": 200.0,
        "e2e_ms": 2200.0,
        "end": "finished",
        "status": 200,
        "input_tokens": 100,
        "cached_tokens": 25,
        "output_tokens": 11,
    }
    return Record(**{**made, **changes})  # type: ignore[arg-type]


REFUSED = {"endpoint": "", "ttft_ms": NAN, "tpot_ms": NAN, "e2e_ms": NAN, "end": "refused", "status": 429}


def figures(*records: Record, limits: Mapping[str, float] | None = None, own: Mapping | None = None) -> dict:
    return measures.figures(Sheet(records, WINDOW, limits, own), ["a", "b"])


def test_latencies_are_of_those_that_arrive_in_the_window_however_late_their_reply() -> None:
    found = figures(record(9.9, ttft_ms=1.0), record(10.0), record(19.9, e2e_ms=60_000.0), record(20.0, ttft_ms=1.0))
    assert found["measured_requests"] == 2
    assert found["ttft_mean_ms"] == 200
    assert found["e2e_mean_ms"] == pytest.approx((2200 + 60_000) / 2)


def test_rates_are_of_what_ends_in_the_window_whenever_it_arrived() -> None:
    found = figures(record(9.0), record(12.0), record(19.0))
    assert found["served_requests_per_s"] == pytest.approx(0.2), "the last one ends after the window"
    assert found["input_tokens_per_s"] == pytest.approx(20.0)
    assert found["output_tokens_per_s"] == pytest.approx(2.2)
    assert found["offered_requests_per_s"] == pytest.approx(0.2), "the first one came before it"


def test_ntpot_is_the_whole_time_per_token() -> None:
    assert figures(record())["ntpot_mean_ms"] == pytest.approx(200.0)
    assert figures(record(output_tokens=1, tpot_ms=NAN))["ntpot_mean_ms"] == pytest.approx(2200.0)


def test_percentiles_interpolate_between_neighbours() -> None:
    found = figures(*(record(10 + i / 1000, ttft_ms=float(i)) for i in range(11)))
    assert (found["ttft_p50_ms"], found["ttft_p90_ms"]) == (5.0, 9.0)
    assert found["ttft_p95_ms"] == pytest.approx(9.5)
    assert found["ttft_p99_ms"] == pytest.approx(9.9)


@pytest.mark.parametrize(
    "failure",
    [REFUSED, {"end": "upstream-failed"}, {"status": 503, "ttft_ms": NAN, "tpot_ms": NAN}],
    ids=["refused", "broken off", "error status"],
)
def test_a_request_that_fails_is_counted_and_lends_no_figure_its_times(failure: dict[str, object]) -> None:
    found = figures(record(), record(13.0, **{"ttft_ms": 1e6, **failure}))
    assert (found["measured_requests"], found["failed_requests"]) == (1, 1)
    assert found["ttft_mean_ms"] == 200
    assert found["goodput_pct"] == 50


@pytest.mark.parametrize(
    ("changes", "good"),
    [
        ({}, True),
        ({"ttft_ms": 300.0}, True),
        ({"ttft_ms": 300.1}, False),
        ({"tpot_ms": 250.1}, False),
        ({"tpot_ms": NAN}, True),
        (REFUSED, False),
    ],
)
def test_a_good_request_is_answered_and_keeps_every_limit_it_can_break(changes: dict[str, object], good: bool) -> None:
    found = figures(record(**changes), limits={"ttft_ms": 300.0, "tpot_ms": 250.0})  # type: ignore[arg-type]
    assert found["goodput_pct"] == (100 if good else 0)


def test_a_request_is_held_to_the_limits_it_carries_before_the_common_ones() -> None:
    own = {"r12": {"ttft_ms": 100.0}, "r13": {"ttft_ms": 1000.0}}
    two = (record(12.0), record(13.0, ttft_ms=900.0))
    assert figures(*two, limits={"ttft_ms": 300.0}, own=own)["goodput_pct"] == 50
    assert figures(*two, limits={"ttft_ms": 300.0, "tpot_ms": 1.0}, own=own)["goodput_pct"] == 0
    assert figures(*two, own=own)["goodput_pct"] == 50


def in_turn(gap_s: float, growth: float) -> list[Record]:
    """Arrivals from 0 to 20 s; the one at t takes 3 s and ``growth`` times t."""
    return [record(i * gap_s, e2e_ms=1e3 * (3 + growth * i * gap_s)) for i in range(round(20 / gap_s))]


@pytest.mark.parametrize("growth", [0.0, 0.5, 1.0])
def test_keeping_up_is_the_rate_served_over_the_rate_offered(growth: float) -> None:
    found = figures(*in_turn(0.01, growth))
    assert found["kept_up_pct"] == pytest.approx(100 / (1 + growth), rel=0.1)


def test_a_steady_state_keeps_up_though_its_replies_take_longer_than_the_warm_up() -> None:
    steady = [record(i / 100, e2e_ms=15_000.0) for i in range(2000)]
    found = figures(*steady)
    assert found["kept_up_pct"] == pytest.approx(100, abs=0.2)
    assert found["served_requests_per_s"] == pytest.approx(50, abs=0.2), "half of what arrives"


def test_hit_rate_is_by_tokens_and_not_by_requests() -> None:
    found = figures(record(), record(13.0, input_tokens=900, cached_tokens=225 + 250))
    assert found["hit_rate_pct"] == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("served_by", "ratio"), [("ab", 1.0), ("aab", 4 / 3), ("aa", 2.0), ("aabc", 1.5)], ids=lambda value: str(value)
)
def test_imbalance_is_the_busiest_endpoint_over_the_mean_of_all_idle_and_unexpected_ones_too(
    served_by: str, ratio: float
) -> None:
    records = [record(12 + i, endpoint=name) for i, name in enumerate(served_by)]
    assert figures(*records)["imbalance_ratio"] == pytest.approx(ratio)


def test_imbalance_weighs_a_request_by_its_time() -> None:
    assert figures(record(), record(13.0, endpoint="b", e2e_ms=6600.0))["imbalance_ratio"] == pytest.approx(1.5)


def test_prediction_error_is_of_the_predicted_requests_after_warm_up() -> None:
    early = record(2.0, predicted_ttft_ms=9e9)
    found = figures(early, record(predicted_ttft_ms=180.0), record(13.0, predicted_ttft_ms=240.0), record(14.0))
    assert found["ttft_mape_pct"] == pytest.approx(15.0)
    assert "tpot_mape_pct" not in found, "nothing predicted it"


def test_nothing_measured_gives_counts_and_no_times() -> None:
    found = figures()
    assert found["measured_requests"] == found["served_requests_per_s"] == 0
    assert not [name for name in found if name.startswith(("ttft", "e2e", "hit", "imbalance", "goodput_pct"))]
    assert measures.lifecycle_report(Sheet([], WINDOW), 1.0)["successes"]["latency"]["request_latency"] is None


def test_every_figure_is_finite_and_its_name_ends_in_a_unit() -> None:
    found = figures(record(predicted_ttft_ms=1.0, predicted_tpot_ms=1.0), record(13.0, **REFUSED))
    assert all(map(math.isfinite, found.values()))
    assert {name.rpartition("_")[2] for name in found} == {"ms", "pct", "ratio", "requests", "s"}


def test_a_timeline_has_the_means_of_each_stretch_warm_up_included() -> None:
    rows = [record(1.0, predicted_ttft_ms=100.0), record(4.0, predicted_ttft_ms=300.0, ttft_ms=400.0)]
    rows += [record(7.0), record(12.0, predicted_ttft_ms=50.0)]
    assert measures.timeline(rows, "ttft") == [(0.0, 200.0, 300.0, 2), (10.0, 50.0, 200.0, 1)]
    assert measures.timeline(rows, "tpot") == []


def test_the_report_has_inference_perfs_shape_in_seconds() -> None:
    records = [record(9.0), record(10.0), record(15.0), record(14.0, **REFUSED)]
    report = measures.lifecycle_report(Sheet(records, WINDOW, {"ttft_ms": 1.0}), 0.5, delays_s=[0.0, 0.2, 0.1])
    assert report["benchmark_time_seconds"] == pytest.approx(7.2)
    assert {k: v for k, v in report["load_summary"].items() if k != "schedule_delay"} == {
        "count": 3,
        "send_duration": 5.0,
        "requested_rate": 0.5,
        "achieved_rate": pytest.approx(0.6),
    }
    assert report["load_summary"]["schedule_delay"]["max"] == 0.2
    latency = report["successes"]["latency"]
    assert latency["time_to_first_token"]["median"] == pytest.approx(0.2)
    assert set(latency["request_latency"]) == {
        "mean", "min", "p0.1", "p1", "p5", "p10", "p25", "median", "p75", "p90", "p95", "p99", "p99.9", "max"
    }  # fmt: skip
    assert report["successes"]["throughput"] == {
        "input_tokens_per_sec": pytest.approx(200 / 7.2),
        "output_tokens_per_sec": pytest.approx(22 / 7.2),
        "total_tokens_per_sec": pytest.approx(222 / 7.2),
        "requests_per_sec": pytest.approx(2 / 7.2),
    }
    assert report["successes"]["goodput_metrics"]["good_requests"] == 0
    assert report["failures"] == {"count": 1, "request_latency": None, "by_label": {"refused 429": {"count": 1}}}


# ----------------------------------------------------------------------------------------------------- over the seeds


def test_the_interval_is_students() -> None:
    mean, half_width = comparison.estimate([1.0, 2.0, 3.0])
    assert mean == 2
    assert half_width == pytest.approx(4.302653 / math.sqrt(3)), "t of 2 degrees of freedom at 97.5 %"
    assert math.isnan(comparison.estimate([5.0]).half_width)
    assert math.isnan(comparison.estimate([]).mean)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1).normal(10.0, 2.0, (2000, 3))
    found = [comparison.estimate(row.tolist()) for row in draws]
    assert np.mean([abs(mean - 10) <= half for mean, half in found]) == pytest.approx(0.95, abs=0.015)


def row(e2e_ms: float, kept_up_pct: float = 100.0) -> dict[str, float]:
    return {"e2e_mean_ms": e2e_ms, "kept_up_pct": kept_up_pct}


@pytest.mark.parametrize(
    ("ladder", "knee"),
    [
        ({1.0: row(100), 2.0: row(250), 4.0: row(301)}, 2.0),
        ({1.0: row(100), 2.0: row(301), 4.0: row(200)}, 1.0),
        ({1.0: row(100), 2.0: row(200, 89.9)}, 1.0),
        ({1.0: row(301)}, 0.0),
        ({4.0: row(300), 1.0: row(100)}, 4.0),
        ({1.0: row(100), 2.0: {}}, 1.0),
    ],
    ids=["slow", "a gap", "behind", "never", "any order", "no figures"],
)
def test_the_knee_is_the_last_rate_before_the_first_that_is_too_slow_or_falls_behind(
    ladder: dict[float, dict[str, float]], knee: float
) -> None:
    assert comparison.knee_per_s(ladder, reference_ms=100.0, factor=3.0) == knee


def test_a_ratio_is_to_the_best_arm_and_one_without_a_value_is_infinitely_worse() -> None:
    assert comparison.ratios({"x": 30.0, "y": 20.0, "z": math.inf}) == {"x": 1.5, "y": 1.0, "z": math.inf}
    assert comparison.ratios({"x": math.inf}) == {}


def one_ladder(name: str, rate: float, **e2e_ms: float) -> dict[str, Ladder]:
    arms = {arm: {figure: Estimate(value) for figure in comparison.COMPARED} for arm, value in e2e_ms.items()}
    return {name: {Step(rate, f"{name}{rate:g}"): arms}}


def test_an_arm_stands_by_its_worst_ratio_and_their_geometric_mean() -> None:
    of_two = {**one_ladder("p", 1.0, x=10.0, y=40.0), **one_ladder("q", 1.0, x=90.0, y=10.0)}
    found = comparison.standings(of_two)
    assert found["x"]["ttft_p90_ms"] == pytest.approx((9.0, 3.0))
    assert found["y"]["ttft_p90_ms"] == pytest.approx((4.0, 2.0))


def test_flat_names_tell_scenario_step_arm_and_figure() -> None:
    runs = [("p", Step(5.0, "p5"), arm, row(100.0 * seed)) for arm in "xy" for seed in (1, 2)]
    found = comparison.flat(comparison.ladders(runs), factor=3.0)
    assert found["p.p5.x.e2e_mean_ms"] == 150
    assert found["p.p5.x.ci95_e2e_mean_ms"] == pytest.approx(12.7062 * 50, rel=1e-4)
    assert found["p.y.knee_per_s"] == 5
    assert found["summary.x.e2e_mean_worst_ratio"] == found["summary.x.e2e_mean_geometric_mean_ratio"] == 1


def test_the_knee_of_all_arms_is_measured_from_the_best_low_load() -> None:
    runs = [("p", Step(1.0, "p1"), "bad start", row(400.0)), ("p", Step(2.0, "p2"), "bad start", row(500.0))]
    runs += [("p", Step(1.0, "p1"), "good", row(100.0)), ("p", Step(2.0, "p2"), "good", row(250.0))]
    (ladder,) = comparison.ladders(runs).values()
    assert comparison.knees(ladder, factor=3.0) == {"bad start": 0.0, "good": 2.0}
