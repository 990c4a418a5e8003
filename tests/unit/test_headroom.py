"""The scheduler's half of batch pacing: step model, burst detector, load, law and board."""

from __future__ import annotations

import math
from random import Random

import pytest

from llmd_sched.config import convert
from llmd_sched.headroom.board import BATCH_WITHIN_S, HAND_OVER_S, SHRINK_AFTER_S, HeadroomBoard
from llmd_sched.headroom.burst import BurstDetector
from llmd_sched.headroom.law import HeadroomSettings, prefill_allowance, prefill_rate, target
from llmd_sched.headroom.load import EndpointLoad, Flight
from llmd_sched.headroom.steps import Calibration, StepModel
from llmd_sched.headroom.wire import PoolHeadroom

STEP = StepModel(base_s=7e-3, prefill_token_s=20e-6, sequence_s=24e-6, context_token_s=0.055e-6)
KV_TOKENS = 467_000


def load() -> EndpointLoad:
    made = EndpointLoad(STEP, KV_TOKENS)
    made.advance(0.0)
    return made


def board(endpoints: int = 1, **settings: object) -> HeadroomBoard:
    made = HeadroomBoard(HeadroomSettings(**settings))  # type: ignore[arg-type]
    made.endpoints_changed({f"e{n}": (STEP, KV_TOKENS) for n in range(endpoints)})
    return made


def with_batch(endpoints: int, **settings: object) -> HeadroomBoard:
    """One batch request runs on the last endpoint, so that there is a reason to keep engines free."""
    made = board(endpoints, **settings)
    made.arrived("line", f"e{endpoints - 1}", 10, 0.0, batch=True)
    return made


def poisson(rng: Random, from_s: float, to_s: float, per_s: float) -> list[float]:
    times, at_s = [], from_s
    while (at_s := at_s + rng.expovariate(per_s)) < to_s:
        times.append(at_s)
    return times


def burst(made: HeadroomBoard, at_s: float, count: int = 30, endpoint: str = "e0") -> PoolHeadroom:
    """``count`` interactive requests in one second."""
    for number in range(count):
        made.arrived(f"{endpoint} {at_s} {number}", endpoint, 500, at_s + number / count)
    return made.look(at_s + 1)


# ----------------------------------------------------------------------------------------------------------- step model


@pytest.mark.parametrize(("base", "load_factor"), [(1.3, 0.7), (0.7, 1.3), (1.0, 2.0), (1.0, 1.0)])
def test_calibration_finds_both_factors_though_their_errors_are_opposite(base: float, load_factor: float) -> None:
    calibration, rng = Calibration(STEP), Random(1)
    for _ in range(200):
        load_s = rng.uniform(0, 30e-3)
        gap_s = (base * STEP.base_s + load_factor * load_s) * math.exp(rng.gauss(0, 0.05))
        calibration.observe(gap_s, load_s)
    assert calibration.model.base_s == pytest.approx(base * STEP.base_s, rel=0.08)
    assert calibration.model.context_token_s == pytest.approx(load_factor * STEP.context_token_s, rel=0.08)
    assert calibration.model.prefill_token_s == STEP.prefill_token_s


def test_calibration_stays_within_its_limits_whatever_it_is_told() -> None:
    calibration = Calibration(STEP)
    for _ in range(100):
        calibration.observe(10.0, 1e-3)
    assert calibration.model.base_s <= 3 * STEP.base_s
    assert calibration.model.sequence_s <= 3 * STEP.sequence_s


def test_a_step_without_a_base_is_refused() -> None:
    with pytest.raises(ValueError, match="base_s must be positive"):
        StepModel(base_s=0.0)


# ------------------------------------------------------------------------------------------------------------- detector


def onset_s(detector: BurstDetector, times: list[float]) -> float | None:
    for at_s in times:
        detector.arrived(at_s, 0)
        if detector.on:
            return at_s
    return None


@pytest.mark.parametrize("seed", range(5))
def test_a_burst_is_seen_within_a_second_and_ten_quiet_minutes_are_none(seed: int) -> None:
    detector, rng = BurstDetector(), Random(seed)
    assert onset_s(detector, poisson(rng, 0, 600, 1.0)) is None
    seen_s = onset_s(detector, poisson(rng, 600, 610, 15.0))
    assert seen_s is not None
    assert seen_s < 601


def test_the_more_come_the_sooner_it_is_seen() -> None:
    detector, rng = BurstDetector(), Random(3)
    detector.quiet_per_s, detector.busy_per_s = 4.0, 60.0
    seen_s = onset_s(detector, poisson(rng, 0, 10, 60.0))
    assert seen_s is not None
    assert seen_s < 0.4


def test_a_handful_sent_at_once_is_no_burst() -> None:
    detector = BurstDetector()
    for at_s in range(0, 1000, 10):
        for _ in range(4):
            detector.arrived(float(at_s), 0)
        detector.look(at_s + 0.2, 0)
        assert not detector.on


def test_what_a_burst_is_is_learned_from_the_bursts() -> None:
    detector, rng = BurstDetector(), Random(4)
    for cycle in range(3):
        for at_s in poisson(rng, cycle * 200, cycle * 200 + 100, 4.0):
            detector.arrived(at_s, 4)
        for at_s in poisson(rng, cycle * 200 + 100, cycle * 200 + 200, 60.0):
            detector.arrived(at_s, 60)
        detector.look(cycle * 200 + 205, 0)
    assert 40 < detector.busy_per_s < 80
    assert onset_s(detector, poisson(rng, 606, 806, 4.0)) is None


def test_a_burst_ends_when_arrivals_stop_and_its_requests_are_done() -> None:
    detector = BurstDetector()
    for number in range(300):
        detector.arrived(number / 15, 20)
    assert detector.on
    for tenth in range(30):
        detector.look(20 + tenth / 10, 20)
    assert detector.on  # they still run
    detector.look(23.1, 5)
    assert not detector.on


# ----------------------------------------------------------------------------------------------------------------- load


def test_steps_are_counted_by_the_model_so_context_grows_without_reports() -> None:
    made, flight = load(), Flight(1000, 1000, batch=True)
    made.arrived(flight)
    made.advance(0.1)
    made.first_token(flight, 0.1)
    made.advance(0.1 + 100 * (7e-3 + 24e-6 + 0.055e-6 * 1000))
    sequences, context_tokens = made.decoding()
    assert sequences == 1
    assert context_tokens == pytest.approx(1100, abs=0.5)


def test_a_request_that_ends_takes_all_it_added_with_it() -> None:
    made, flights = load(), [Flight(500 + n, 500, batch=n % 2 == 0) for n in range(10)]
    for number, flight in enumerate(flights):
        made.arrived(flight)
        made.advance(number + 1)
        made.first_token(flight, number + 1)
    for number, flight in enumerate(flights):
        made.advance(20 + number)
        made.ended(flight, 100, 20 + number)
    assert made.decoding() == (0, pytest.approx(0, abs=1e-6))
    assert made.interactive.running == made.batch.running == 0


def test_the_counterfactual_takes_out_what_batch_keeps_in_flight() -> None:
    made = load()
    for _ in range(10):
        made.arrived(Flight(500, 500, batch=False))
    for _ in range(100):
        made.arrived(Flight(1500, 1500, batch=True))
    for tenth in range(1, 100):
        made.advance(tenth / 10)
    assert made.stretch > 2
    running, context_tokens = made.without_batch()
    assert running == pytest.approx(10 / made.stretch)
    assert context_tokens == pytest.approx(5000 / made.stretch)


def test_rates_follow_arrivals_and_do_not_count_cached_tokens() -> None:
    made = load()
    for number in range(1000):
        made.advance(number / 100)
        made.arrived(Flight(500, 100, batch=False))
    assert made.arrivals_per_s == pytest.approx(100, rel=0.02)
    assert made.prompt_tokens_per_s == pytest.approx(10_000, rel=0.02)


# ------------------------------------------------------------------------------------------------------------------ law


def test_the_target_fills_an_idle_step_up_to_the_budget() -> None:
    made = load()
    per_line_s = 24e-6 + 0.055e-6 * 1750 + 20e-6 * 3
    assert made.batch_sequence_s == pytest.approx(per_line_s)
    assert target(made, 10e-3, 0.85) == int(3e-3 / per_line_s)


@pytest.mark.parametrize(("budget_s", "lines"), [(math.inf, 226), (10.0, 226), (7e-3, 0), (1e-3, 0)])
def test_the_target_is_between_nothing_and_what_the_cache_holds(budget_s: float, lines: int) -> None:
    assert target(load(), budget_s, 0.85) == lines


def test_prompts_may_be_sent_as_fast_as_the_mean_step_allows() -> None:
    assert prefill_rate(load(), 14e-3) == pytest.approx(7e-3 / 14e-3 / 20e-6)
    assert prefill_rate(load(), 1e-3) == 0
    assert prefill_rate(load(), math.inf) is None


@pytest.mark.parametrize(
    ("bursting", "budget_s", "tokens"), [(True, math.inf, 400), (False, 0.01, 1024), (False, math.inf, 8192)]
)
def test_the_prefill_allowance_goes_by_what_is_at_stake(bursting: bool, budget_s: float, tokens: int) -> None:
    assert prefill_allowance(HeadroomSettings(), bursting, budget_s) == tokens


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("itlMs", 0, "positive"),
        ("burstShare", 1.5, "0 to 1"),
        ("kvShare", 0, "above 0"),
        ("idlePrefillTokens", -1, "0 or more"),
    ],
)
def test_a_setting_out_of_range_says_what_is_accepted(field: str, value: float, accepted: str) -> None:
    with pytest.raises(ValueError, match=accepted):
        convert({field: value}, HeadroomSettings, "batch").check()


# ---------------------------------------------------------------------------------------------------------------- board


def test_idle_protect_keeps_steps_within_the_bound_and_harvest_fills_the_cache() -> None:
    (protect,) = board(itl_ms=10.0, consolidate=False).look(1.0).endpoints
    assert (protect.mode, protect.n_star, protect.step_budget_ms) == ("idle", 16, 10.0)
    (harvest,) = board(mode="harvest").look(1.0).endpoints
    assert (harvest.n_star, harvest.step_budget_ms, harvest.prefill_tokens_per_s) == (226, None, None)


@pytest.mark.parametrize("mode", ["protect", "harvest"])
def test_in_a_burst_a_step_may_take_a_little_longer_than_without_batch(mode: str) -> None:
    made = board(mode=mode, itl_ms=50.0)
    news = burst(made, 10.0)
    (one,) = news.endpoints
    assert news.mode == one.mode == "burst"
    assert one.step_budget_ms == pytest.approx(1.12 * one.assumed.step_ms)
    assert one.n_star < 12


def test_protect_never_goes_beyond_the_bound_not_even_in_a_burst() -> None:
    (one,) = burst(board(itl_ms=7.5), 10.0).endpoints
    assert (one.step_budget_ms, one.n_star) == (7.5, 0)


def test_without_a_bound_protect_learns_what_bursts_look_like() -> None:
    made = board()
    assert made.look(0.0).endpoints[0].step_budget_ms in (None, pytest.approx(1.5 * 7.0))
    for second in range(1, 60):
        burst(made, float(second))
    assert made.learned_s is not None
    assert made.learned_s > 7e-3


def test_interactive_requests_share_few_endpoints_while_few_suffice() -> None:
    made = with_batch(4, itl_ms=12.0)
    news = made.look(0.0)
    assert news.carriers == ("e0",)
    made.arrived("one", "e0", 500, 0.1)
    news = made.look(0.2)
    assert [one.step_budget_ms for one in news.endpoints] == [12.0, None, None, None]


def test_without_batch_interactive_requests_have_all_endpoints() -> None:
    made = board(4, itl_ms=12.0)
    assert len(made.look(0.0).carriers) == 4
    made.arrived("line", "e3", 10, 1.0, batch=True)
    assert len(made.look(1.0).carriers) == 4
    assert len(made.look(1.0 + SHRINK_AFTER_S).carriers) == 1
    made.finished("line", 10.0)
    made.look(10.0)
    assert len(made.look(10.0 + BATCH_WITHIN_S - 4.1).carriers) == 1
    assert len(made.look(10.0 + BATCH_WITHIN_S).carriers) == 4


def test_an_onset_hands_over_first_to_endpoints_that_are_rid_of_their_batch() -> None:
    made = with_batch(2, itl_ms=12.0)
    made.look(0.0)
    for number in range(100):
        made.arrived(f"batch {number}", "e1", 1500, 1.0, batch=True)
    news = burst(made, 10.0)
    assert (news.mode, news.carriers) == ("burst", ("e0",))
    assert made.look(11.0 + HAND_OVER_S + 0.1).carriers == ("e0", "e1")


def test_an_endpoint_without_batch_carries_at_once() -> None:
    made = with_batch(2, itl_ms=12.0)
    made.look(0.0)
    for number in range(100):
        made.arrived(f"batch {number}", "e1", 1500, 1.0, batch=True)
    burst(made, 10.0)
    for number in range(100):
        made.finished(f"batch {number}", 11.1)
    assert made.look(11.2).carriers == ("e0", "e1")


def test_a_burst_that_is_over_needs_its_endpoints_no_longer() -> None:
    made = with_batch(2, itl_ms=12.0)
    assert len(burst(made, 10.0).carriers) == 2
    for number in range(30):
        made.finished(f"e0 10.0 {number}", 12.0)
    quiet_s = next(12.0 + n / 10 for n in range(100) if made.look(12.0 + n / 10).mode == "idle")
    assert made.look(quiet_s + SHRINK_AFTER_S / 2).carriers == ("e0",)


def test_else_fewer_must_have_sufficed_for_a_while() -> None:
    made = with_batch(2, itl_ms=9.2)
    for number in range(15):  # too few to be a burst, too many for one endpoint
        made.arrived(f"x {number}", "e0", 500, number / 3)
    assert len(made.look(5.0).carriers) == 2
    for number in range(15):
        made.finished(f"x {number}", 5.0)
    assert len(made.look(5.0 + SHRINK_AFTER_S - 0.1).carriers) == 2
    assert made.look(5.0 + SHRINK_AFTER_S).carriers == ("e0",)


def test_unknown_endpoints_and_tickets_are_ignored() -> None:
    made = board()
    made.arrived("x", "elsewhere", 100, 0.0)
    made.first_token("x", 1.0)
    made.tokens("x", 5, 1.0)
    made.finished("x", 2.0, 7)
    assert made.look(3.0).endpoints[0].assumed.running == 0


def test_token_reports_calibrate_the_endpoint() -> None:
    made = board()
    made.arrived("x", "e0", 100, 0.0)
    made.first_token("x", 0.1)
    at_s = 0.1
    for _ in range(60):
        at_s += 2.0
        made.tokens("x", 100, at_s)  # 20 ms a token, not 7
    made.finished("x", at_s, 6001)
    assert made.look(at_s).endpoints[0].assumed.base_ms > 10


def test_versions_grow() -> None:
    made = board()
    assert [made.look(float(n)).version for n in range(3)] == [1, 2, 3]
