"""What a request costs the others, read off the base."""

from __future__ import annotations

import numpy as np
import pytest

from llmd_sched.predict import features as f
from llmd_sched.predict.base import COLD_START
from llmd_sched.predict.model import Model
from llmd_sched.predict.price import Prices, prices

PRESET = COLD_START["default"]
LINEAR, ATTENTION = PRESET.ttft[1], PRESET.ttft[3]


def rows(uncached: list[float], prompt: float = 1000.0, **columns: float) -> np.ndarray:
    table = np.zeros((len(uncached), len(f.FEATURES)))
    table[:, f.UNCACHED], table[:, f.INPUT] = uncached, prompt
    for name, value in columns.items():
        table[:, getattr(f, name)] = value
    return table


def priced(table: np.ndarray, log_bias: np.ndarray) -> Prices:
    model = Model.cold()
    return prices(model, table, log_bias, model.predict(table, log_bias)[1])


def test_prefill_is_priced_by_what_is_not_cached_and_by_what_it_attends_to() -> None:
    found = priced(rows([0.0, 400.0, 1000.0]), np.zeros((2, 3)))
    expected = [0.0, LINEAR * 400 + ATTENTION * 400 * 800, LINEAR * 1000 + ATTENTION * 1000 * 500]
    assert found.prefill_ms.tolist() == pytest.approx(expected)


def test_a_copy_is_what_the_best_holder_has_and_this_endpoint_lacks() -> None:
    found = priced(rows([400.0, 1000.0, 400.0]), np.zeros((2, 3)))
    assert found.copy_ms.tolist() == pytest.approx([0.0, found.prefill_ms[1] - found.prefill_ms[0], 0.0])


def test_a_prompt_that_nobody_holds_is_no_copy_anywhere() -> None:
    assert priced(rows([1000.0, 1000.0]), np.zeros((2, 2))).copy_ms.tolist() == [0.0, 0.0]


def test_a_sequence_more_slows_a_full_batch_less_than_an_empty_one() -> None:
    empty, full = (priced(rows([9.0], INFLIGHT_REQUESTS=n), np.zeros((2, 1))) for n in (0.0, 100.0))
    assert 0 < full.slowdown_ms[0] < empty.slowdown_ms[0]


def test_an_endpoint_that_is_slower_than_its_class_is_dearer() -> None:
    bias = np.log(np.array([[2.0, 1.0], [3.0, 1.0]]))
    found = priced(rows([500.0, 500.0]), bias)
    assert found.prefill_ms[0] == pytest.approx(2.0 * found.prefill_ms[1])
    assert found.slowdown_ms[0] == pytest.approx(3.0 * found.slowdown_ms[1])


def test_a_class_without_coefficients_of_its_own_has_the_pools() -> None:
    known, unknown = (priced(rows([500.0], ENGINE_CLASS=c), np.zeros((2, 1))) for c in (0.0, 7.0))
    assert known == unknown


def test_the_smooth_tpot_has_the_level_of_the_predictions_and_the_differences_of_the_base() -> None:
    table = rows([500.0] * 3)
    table[:, f.INFLIGHT_REQUESTS] = [10.0, 11.0, 12.0]
    base = Model.cold().predict(table)[1]
    noisy = 1.3 * base * np.array([0.98, 1.0, 1.02])
    assert prices(Model.cold(), table, np.zeros((2, 3)), noisy).smooth_tpot_ms == pytest.approx(1.3 * base)


def test_no_endpoint_has_no_price() -> None:
    assert [len(values) for values in priced(rows([]), np.zeros((2, 0)))] == [0, 0, 0, 0]
