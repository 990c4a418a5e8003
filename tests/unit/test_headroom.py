"""The scheduler's half of the pace: when it is a burst, how fast steps are, how much batch fits."""

from __future__ import annotations

from random import Random

import pytest

from llmd_sched.headroom.board import HeadroomBoard
from llmd_sched.headroom.burst import BurstDetector
from llmd_sched.headroom.law import HeadroomSettings, target
from llmd_sched.headroom.load import EndpointLoad
from llmd_sched.headroom.steps import Calibration, StepModel
from llmd_sched.headroom.wire import PoolHeadroom

MODEL = StepModel(base_s=7e-3, prefill_token_s=20e-6, sequence_s=25e-6, context_token_s=0.055e-6)


def arrivals(rate_per_s: float, from_s: float, to_s: float, rng: Random) -> list[float]:
    at_s, times = from_s, []
    while (at_s := at_s + rng.expovariate(rate_per_s)) < to_s:
        times.append(at_s)
    return times


def switches(detector: BurstDetector, times: list[float], until_s: float, running: float = 0.0) -> list[float]:
    """When the mode changed, with a look every 100 ms."""
    looks = [k / 10 for k in range(int(10 * (times[0] if times else 0)), int(10 * until_s))]
    changed, on = [], detector.on
    for at_s, is_arrival in sorted([(t, True) for t in times] + [(t, False) for t in looks]):
        detector.arrived(at_s, running) if is_arrival else detector.look(at_s, running)
        if detector.on is not on:
            on = detector.on
            changed.append(at_s)
    return changed


@pytest.mark.parametrize("seed", range(5))
def test_a_burst_is_seen_within_a_second_and_its_end_within_two(seed: int) -> None:
    rng = Random(seed)
    times = arrivals(1, 0, 90, rng) + arrivals(15, 90, 180, rng) + arrivals(1, 180, 270, rng)
    on_s, off_s = switches(BurstDetector(), times, 270)
    assert 90 < on_s < 91.5
    assert 180 < off_s < 183


def test_steady_traffic_is_no_burst() -> None:
    rng = Random(1)
    assert switches(BurstDetector(), arrivals(1, 0, 600, rng), 600) == []


def test_a_burst_does_not_end_while_its_requests_still_run() -> None:
    detector = BurstDetector()
    rng = Random(2)
    switches(detector, arrivals(15, 0, 30, rng), 30, running=20)
    assert detector.on
    for k in range(300, 400):
        detector.look(k / 10, running=15)
    assert detector.on
    detector.look(40.0, running=2)
    assert not detector.on


def test_an_empty_endpoint_takes_what_fills_a_step_up_to_the_budget() -> None:
    load = EndpointLoad(MODEL, 467_000)
    budget_s = 2 * MODEL.base_s
    n_star = target(load, budget_s, 0.7)
    assert (
        MODEL.base_s + n_star * load.batch_sequence_s <= budget_s < MODEL.base_s + (n_star + 1) * load.batch_sequence_s
    )


def test_without_a_bound_the_cache_is_the_limit() -> None:
    load = EndpointLoad(MODEL, 467_000)
    assert target(load, float("inf"), 0.7) == int(0.7 * 467_000 / load.batch_context_tokens)


def test_no_budget_leaves_no_room() -> None:
    assert target(EndpointLoad(MODEL, 467_000), MODEL.base_s / 2, 0.7) == 0


def test_calibration_finds_a_model_that_is_wrong_in_both_parts() -> None:
    rng, calibration = Random(3), Calibration(MODEL)
    truth = MODEL.scaled(1.3, 0.7)
    for _ in range(300):
        sequences, context = rng.randrange(1, 200), rng.randrange(1000, 300_000)
        gap_s = (truth.base_s + truth.load_s(sequences, context)) * rng.gauss(1, 0.03)
        calibration.observe(gap_s, MODEL.load_s(sequences, context))
    assert calibration.model.base_s == pytest.approx(truth.base_s, rel=0.05)
    assert calibration.model.sequence_s == pytest.approx(truth.sequence_s, rel=0.05)


def board(**settings: object) -> HeadroomBoard:
    made = HeadroomBoard(HeadroomSettings(**settings))  # type: ignore[arg-type]
    made.endpoints_changed(dict.fromkeys("abcd", (MODEL, 467000)))
    return made


def n_stars(headroom: PoolHeadroom) -> dict[str, int]:
    return {one.endpoint: one.n_star for one in headroom.endpoints}


def test_in_a_burst_there_is_less_room_than_before_it() -> None:
    pool = board(mode="harvest", consolidate=False)
    before = n_stars(pool.look(0.0))
    for n in range(40):
        pool.arrived(f"r{n}", "a", 500, 1.0 + n / 20)
    headroom = pool.look(3.0)
    assert headroom.mode == "burst"
    assert n_stars(headroom)["a"] < before["a"] / 10


def test_every_look_has_a_version_of_its_own_and_requests_that_ended_are_forgotten() -> None:
    pool = board()
    for n in range(10):
        pool.arrived(f"r{n}", "abcd"[n % 4], 500, 0.1 * n)
        pool.first_token(f"r{n}", 0.1 * n + 0.05)
    for n in range(10):
        pool.finished(f"r{n}", 5.0 + n, output_tokens=50)
        pool.finished(f"r{n}", 5.0 + n)
    assert [pool.look(20.0).version, pool.look(20.1).version] == [1, 2]
    assert all(load.interactive.running == load.interactive.decoding == 0 for load in pool.loads.values())


def test_batch_is_counted_where_it_runs_and_starts_no_burst() -> None:
    pool = board()
    for n in range(50):
        pool.arrived(f"b{n}", "b", 500, n / 1000, batch=True)
    headroom = pool.look(0.1)
    assert headroom.mode == "idle"
    assert {one.endpoint: one.batch_running for one in headroom.endpoints} == {"a": 0, "b": 50, "c": 0, "d": 0}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"itl_ms": 0.0}, "itlMs"), ({"burst_share": 2.0}, "burstShare"), ({"kv_share": 0.0}, "kvShare")],
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HeadroomBoard(HeadroomSettings(**wrong))  # type: ignore[arg-type]
