"""Latency objectives at stake: who has which, and what one more request costs."""

from __future__ import annotations

import numpy as np
import pytest

from llmd_sched.predict.price import Prices
from llmd_sched.predict.slos import RunningSlos, losses
from llmd_sched.types import Array, Endpoint, Request

A, B = Endpoint("a", "10.0.0.1", 8000), Endpoint("b", "10.0.0.2", 8000)


def request(**slos: float) -> Request:
    return Request(id="r", prompts=(b"hi",), input_tokens=1, size_bytes=2, streaming=True, **slos)


def lost(asked: Request, tpot_ms: list[float], running: RunningSlos, ttft_ms: float = 100.0) -> Array:
    n = len(tpot_ms)
    prices = Prices(np.full(n, 100.0), copy_ms=np.zeros(n), slowdown_ms=np.full(n, 0.5), smooth_tpot_ms=np.zeros(n))
    there = running.counts([A, B][:n])
    return losses(asked, np.full(n, ttft_ms), np.array(tpot_ms), prices, np.full(n, 200.0), there)


def test_the_tightest_limit_of_an_endpoint_is_known_until_its_request_ends() -> None:
    running = RunningSlos()
    running.add("x", A.key, 30.0)
    running.add("y", A.key, 40.0)
    assert running.tightest_ms([A, B]).tolist() == [30.0, np.inf]
    running.remove("x")
    assert running.tightest_ms([A, B]).tolist() == [40.0, np.inf]
    running.remove("y")
    running.remove("y")
    assert len(running) == 0
    assert running.counts([A, B])[1].shape == (0, 2)


def test_limits_that_hardly_differ_are_counted_together() -> None:
    running = RunningSlos()
    for number in range(1000):
        running.add(f"r{number}", (A if number % 2 else B).key, 30.0 + number * 1e-3)
    limits, counts = running.counts([A, B])
    assert len(limits) <= 2
    assert limits == pytest.approx([30.0] * len(limits), rel=0.05)
    assert counts.sum(axis=0).tolist() == [500.0, 500.0]


def test_no_request_with_an_objective_means_none_can_be_lost() -> None:
    assert lost(request(), [20.0, 90.0], RunningSlos()).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("slos", "tpot_ms", "own"),
    [({"tpot_slo_ms": 30.0}, 10.0, 0.0), ({"tpot_slo_ms": 30.0}, 30.0, 0.5), ({"tpot_slo_ms": 30.0}, 60.0, 1.0),
     ({"ttft_slo_ms": 100.0}, 10.0, 0.5), ({"ttft_slo_ms": 10.0, "tpot_slo_ms": 30.0}, 30.0, 1.0),
     ({"ttft_slo_ms": 100.0, "tpot_slo_ms": 30.0}, 30.0, 0.75)],
    ids=["far below", "at the limit", "far above", "first token", "either is enough", "both uncertain"],
)  # fmt: skip
def test_its_own_objectives_count_once(slos: dict[str, float], tpot_ms: float, own: float) -> None:
    assert lost(request(**slos), [tpot_ms], RunningSlos()) == pytest.approx([own], abs=1e-3)


def test_others_are_lost_where_it_tips_them_over_and_not_where_they_are_safe_or_lost_already() -> None:
    running = RunningSlos()
    for number in range(10):
        running.add(f"a{number}", A.key, 30.0)
        running.add(f"b{number}", B.key, 30.0)
    near, safe = lost(request(), [30.0, 15.0], running)
    near_again, gone = lost(request(), [30.0, 60.0], running)
    assert near == near_again > 1.0
    assert safe < 0.01
    assert gone < 0.1


@pytest.mark.parametrize("limit_ms", [0.0, -1.0])
def test_a_limit_must_be_above_0(limit_ms: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        RunningSlos().add("x", A.key, limit_ms)
