"""The total cost of a request, term by term."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from llmd_sched.sched.cost import RequestCostScorer
from tests.builders import COLUMNS, candidates, request


def view(**columns: list[float]) -> object:
    n = len(next(iter(columns.values())))
    usual = {
        "ttft_ms": 100.0, "smooth_tpot_ms": 10.0, "expected_output_tokens": 50.0, "prefill_ms": 0.0, "copy_ms": 0.0,
        "slowdown_ms": 0.0, "inflight_requests": 0.0, "generated_tokens": 0.0,
    }  # fmt: skip
    return candidates(**{name: columns.get(name, [value] * n) for name, value in usual.items()})


def costs(scorer: RequestCostScorer | None = None, **columns: list[float]) -> list[float]:
    found = (scorer or RequestCostScorer()).cost_ms(view(**columns))  # type: ignore[arg-type]
    assert found is not None
    return found.tolist()


def test_its_own_time_is_ttft_and_a_smooth_tpot_for_each_token() -> None:
    assert costs(ttft_ms=[100.0, 300.0], smooth_tpot_ms=[10.0, 2.0]) == [600.0, 400.0]


def test_everybody_there_waits_for_its_prefill() -> None:
    assert costs(prefill_ms=[80.0, 80.0], inflight_requests=[0.0, 3.0]) == [600.0, 600.0 + 3 * 80.0]


@pytest.mark.parametrize(("generated", "remaining"), [(0.0, 100.0), (40.0, 60.0), (100.0, 25.0), (900.0, 25.0)])
def test_each_token_still_to_come_there_is_slower(generated: float, remaining: float) -> None:
    found = costs(slowdown_ms=[0.5], inflight_requests=[2.0], generated_tokens=[generated])
    assert found == pytest.approx([600.0 + 0.5 * remaining])


def test_a_second_copy_costs_its_prefill_for_everybody_an_endpoint_has_on_the_average() -> None:
    found = costs(copy_ms=[0.0, 70.0], inflight_requests=[2.0, 4.0])
    assert found == pytest.approx([600.0, 600.0 + 3.0 * 70.0 * (1 + 3.0)])


def test_the_weights_are_weights() -> None:
    scorer = RequestCostScorer(others_weight=0.0, copy_weight=0.0)
    found = costs(scorer, copy_ms=[70.0], prefill_ms=[80.0], slowdown_ms=[0.5], inflight_requests=[2.0])
    assert found == [600.0]


def test_an_objective_lost_costs_a_share_of_the_mean_own_time() -> None:
    columns = view(ttft_ms=[100.0, 300.0])
    columns = columns.with_columns({COLUMNS["slo_losses"]: np.array([0.0, 2.0])})  # type: ignore[attr-defined]
    found = RequestCostScorer(slo_weight=0.5).cost_ms(columns)
    assert found is not None
    assert found.tolist() == [600.0, 800.0 + 0.5 * 2.0 * 700.0]


@pytest.mark.parametrize("weight", ["othersWeight", "copyWeight", "sloWeight"])
@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_a_weight_is_a_finite_number(weight: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{weight} must be a finite number"):
        msgspec.convert({weight: value}, RequestCostScorer).check()


def test_the_cheapest_scores_1_and_one_twice_as_dear_a_half() -> None:
    scored = RequestCostScorer().score(request(), view(ttft_ms=[100.0, 700.0]))  # type: ignore[arg-type]
    assert scored.tolist() == [1.0, 0.5]


def test_without_predictions_nobody_is_better() -> None:
    assert RequestCostScorer().score(request(), candidates(3)).tolist() == [0.0, 0.0, 0.0]
    assert np.isfinite(RequestCostScorer().score(request(), candidates(3))).all()


@pytest.mark.parametrize(("pressure", "share"), [(0.0, 0.0), (0.5, 0.0), (0.75, 0.5), (1.0, 1.0), (7.0, 1.0)])
def test_a_second_copy_costs_nothing_while_there_is_room_for_what_is_asked_again(pressure: float, share: float) -> None:
    columns = view(copy_ms=[70.0])
    columns = columns.with_columns({COLUMNS["pressure"]: np.array([pressure])})  # type: ignore[attr-defined]
    found = RequestCostScorer().cost_ms(columns)
    assert found is not None
    assert found.tolist() == pytest.approx([600.0 + share * 3.0 * 70.0])
