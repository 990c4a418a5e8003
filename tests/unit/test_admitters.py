"""Who is refused, and how often."""

from __future__ import annotations

from random import Random

import pytest

from llmd_sched.errors import NotAdmitted
from llmd_sched.pool.pool import NEVER_READ_AGE_S, Load, Pool
from llmd_sched.sched.admitters import UNKNOWN_AGE_S, LatencySloAdmitter, ProbabilisticAdmitter
from llmd_sched.types import Candidates
from tests.builders import candidates, endpoints, pool_of, predicted, request, router_of

SHED = request(priority=-1, ttft_slo_ms=100.0)


def hopeless(running: float = 1.0, kv_usage: float = 0.5) -> Candidates:
    """Two endpoints that keep no SLO; the second has this load, the first is busy."""
    return predicted([-5.0, -5.0], [0.0, 0.0]).with_columns(
        candidates(running=[1.0, running], kv_usage=[0.5, kv_usage]).columns
    )


def slo_refusal(asked: object = SHED, view: Candidates | None = None) -> str:
    return LatencySloAdmitter().refusal(asked, hopeless() if view is None else view, Random(0))  # type: ignore[arg-type]


def test_a_request_that_may_be_shed_and_keeps_no_slo_anywhere_is_refused() -> None:
    assert slo_refusal() == "no endpoint is predicted to keep its SLO"


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        (request(priority=-1, ttft_slo_ms=100.0), True),
        (request(priority=-1, tpot_slo_ms=100.0), True),
        (request(priority=-9, ttft_slo_ms=100.0, tpot_slo_ms=1.0), True),
        (request(priority=0, ttft_slo_ms=100.0), False),
        (request(priority=5, ttft_slo_ms=100.0), False),
        (request(priority=-1), False),
    ],
)
def test_only_negative_priority_with_an_slo_is_looked_at(asked: object, refused: bool) -> None:
    assert bool(slo_refusal(asked)) is refused


@pytest.mark.parametrize(
    ("running", "kv_usage", "refused"),
    [(1.0, 0.5, True), (0.0, 0.5, False), (1.0, 0.019, False), (1.0, 0.02, True), (0.0, 0.0, False)],
)
def test_an_idle_or_cold_endpoint_is_worth_a_try(running: float, kv_usage: float, refused: bool) -> None:
    assert bool(slo_refusal(view=hopeless(running, kv_usage))) is refused


@pytest.mark.parametrize(
    ("ttft", "tpot", "refused"),
    [
        ([-1.0, 1.0], [0.0, 0.0], False),
        ([-1.0, 0.0], [0.0, 0.0], False),
        ([-1.0, 1.0], [0.0, -1.0], True),  # each endpoint misses one of the two
        ([1.0, -1.0], [-1.0, 0.0], True),
        ([1.0, 1.0], [-1.0, -1.0], True),
    ],
)
def test_an_endpoint_must_keep_both(ttft: list[float], tpot: list[float], refused: bool) -> None:
    view = predicted(ttft, tpot).with_columns(candidates(running=[1, 1], kv_usage=[0.5, 0.5]).columns)
    assert bool(slo_refusal(view=view)) is refused


def test_without_predictions_nobody_is_refused() -> None:
    assert slo_refusal(view=candidates(running=[1, 1], kv_usage=[0.5, 0.5])) == ""
    assert slo_refusal(view=candidates(0)) == ""


@pytest.mark.parametrize(
    ("waiting", "kv_usage", "saturation"),
    [
        ([0], [0.0], 0.0),
        ([5], [0.0], 1.0),
        ([0], [0.8], 1.0),
        ([1], [0.4], 0.5),
        ([2], [0.2], 0.4),
        ([10], [0.1], 2.0),  # not capped
        ([0, 5], [0.0, 0.0], 0.5),
        ([1, 0, 0], [0.0, 0.4, 0.8], (0.2 + 0.5 + 1.0) / 3),
    ],
)
def test_saturation_is_the_mean_of_the_larger_share(
    waiting: list[float], kv_usage: list[float], saturation: float
) -> None:
    view = candidates(waiting=waiting, kv_usage=kv_usage)
    assert ProbabilisticAdmitter().saturation(view) == pytest.approx(saturation)


def test_an_endpoint_without_metrics_counts_as_full() -> None:
    ages = [0.0, NEVER_READ_AGE_S]
    view = candidates(waiting=[0, 20], kv_usage=[0, 0], metrics_age_s=ages)
    assert ProbabilisticAdmitter().saturation(view) == pytest.approx(0.5)


def test_a_pool_shows_an_endpoint_never_read_as_one_without_metrics() -> None:
    assert NEVER_READ_AGE_S >= UNKNOWN_AGE_S
    pool = Pool()
    pool.apply(endpoints(2))
    pool.record(pool.endpoints[0], Load(0.0, 0.0, 0.0), 5.0)
    assert ProbabilisticAdmitter().saturation(pool.candidates(None, 5.0)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("power", "k", "saturation", "probability"),
    [
        (5, 300, 0.0, 0.0),
        (5, 300, 0.15, 0.0227813),
        (5, 300, 0.2, 0.096),
        (5, 300, 0.3, 0.729),
        (5, 300, 0.34, 1.0),
        (5, 300, 1.0, 1.0),
        (5, 300, 1e6, 1.0),
        (2, 1, 0.5, 0.25),
        (1, 1, 0.5, 0.5),
        (1000, 300, 200.0, 1.0),  # the power itself is no float any more
        (1000, 300, 1e-9, 0.0),
    ],
)
def test_the_probability_grows_with_a_power_of_the_saturation(
    power: float, k: float, saturation: float, probability: float
) -> None:
    assert ProbabilisticAdmitter(power=power, k=k).probability(saturation) == pytest.approx(probability, abs=1e-6)


def test_requests_are_refused_as_often_as_the_probability_says() -> None:
    view = candidates(waiting=[1.0], kv_usage=[0.0])  # 300 * 0.2 ^ 5 = 0.096
    rng = Random(1)
    refused = sum(bool(ProbabilisticAdmitter().refusal(SHED, view, rng)) for _ in range(5000))
    assert refused / 5000 == pytest.approx(0.096, abs=0.015)


@pytest.mark.parametrize(("priority", "refused"), [(-1, True), (0, False), (3, False)])
def test_only_negative_priority_is_shed(priority: int, refused: bool) -> None:
    said = ProbabilisticAdmitter().refusal(request(priority=priority), candidates(waiting=[50.0]), Random(0))
    assert said == (f"priority {priority} is shed at a saturation of 10.00" if refused else "")


def test_an_empty_pool_refuses_nobody_here() -> None:
    assert ProbabilisticAdmitter().refusal(SHED, candidates(0), Random(0)) == ""


@pytest.mark.parametrize(
    "parameters",
    [{"queue_depth_threshold": 0}, {"kv_cache_util_threshold": 0}, {"power": 0}, {"k": -1.0}, {"k": float("inf")}],
)
def test_thresholds_must_be_positive(parameters: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="more than 0"):
        ProbabilisticAdmitter(**parameters).check()
    with pytest.raises(ValueError, match="at most 1"):
        ProbabilisticAdmitter(kv_cache_util_threshold=1.5).check()


def test_a_router_refuses_what_an_admitter_refuses_and_charges_nobody() -> None:
    pool = pool_of(endpoints(1), {"e0": Load(50.0, 9.0, 0.9)})
    router = router_of("plugins: [{type: probabilistic-admitter}, {type: active-request-scorer}]", pool)
    with pytest.raises(NotAdmitted, match="priority -1 is shed at a saturation of 10"):
        router.choose(request(priority=-1), None, 0.0)
    assert not router.open
    assert router.choose(request(), None, 0.0).picked[0].name == "e0"
