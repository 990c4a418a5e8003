import numpy as np
import pytest
from numpy.typing import NDArray

from llmd_sched.predict import base
from llmd_sched.predict import features as f

RNG = np.random.default_rng(3)


def random_rows(count: int) -> NDArray[np.float64]:
    rows = np.zeros((count, len(f.FEATURES)))
    rows[:, f.INPUT] = RNG.uniform(100, 4000, count)
    rows[:, f.UNCACHED] = rows[:, f.INPUT] * RNG.uniform(0, 1, count)
    rows[:, f.RUNNING] = RNG.integers(0, 60, count)
    rows[:, f.WAITING] = RNG.integers(0, 5, count)
    rows[:, f.INFLIGHT_PREFILL] = RNG.uniform(0, 20_000, count)
    return rows


def relative_error(coefficients: NDArray[np.float64], rows: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float(np.median(np.abs(base.ttft_terms(rows) @ coefficients / y - 1.0)))


@pytest.mark.parametrize("target", ["ttft", "tpot"])
@pytest.mark.parametrize("preset", sorted(base.COLD_START))
def test_more_load_never_makes_a_preset_faster(preset: str, target: base.TargetName) -> None:
    coefficients = np.array(getattr(base.COLD_START[preset], target))
    rows = random_rows(50)
    before = base.TERMS[target](rows) @ coefficients
    for feature, sign in enumerate(f.MONOTONE[target]):
        if sign:
            more = rows.copy()
            more[:, feature] *= 1.5 if sign > 0 else 0.5
            more[:, f.INPUT] = np.maximum(more[:, f.INPUT], more[:, f.UNCACHED])
            assert (base.TERMS[target](more) @ coefficients >= before - 1e-9).all()


def test_a_known_law_is_found_again() -> None:
    rows = random_rows(600)
    truth = np.array([40.0, 0.1, 0.0, 0.0, 0.09, 0.0, 0.5, 10.0, 0.0, 0.0, 0.0])
    y = base.ttft_terms(rows) @ truth * np.exp(0.05 * RNG.normal(size=600))
    found = base.fit(base.ttft_terms(rows), y, np.ones(600), np.array(base.COLD_START["default"].ttft))
    assert relative_error(found, rows, base.ttft_terms(rows) @ truth) < 0.03
    assert (found >= 0.0).all()


def test_a_few_huge_stalls_do_not_steer_the_base() -> None:
    rows = random_rows(400)
    truth = np.array([40.0, 0.1, 0.0, 0.0, 0.09, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0])
    clean = base.ttft_terms(rows) @ truth
    stalled = clean.copy()
    stalled[::40] *= 100.0
    found = base.fit(base.ttft_terms(rows), stalled, np.ones(400), np.array(base.COLD_START["default"].ttft))
    assert relative_error(found, rows, clean) < 0.03


def test_with_five_rows_the_preset_keeps_its_shape_at_the_level_of_the_data() -> None:
    prior = np.array(base.COLD_START["qwen3-32b-h200"].ttft)
    few, many = random_rows(5), random_rows(200)
    y = 3.0 * base.ttft_terms(few) @ prior
    found = base.fit(base.ttft_terms(few), y, np.ones(5), prior)
    assert relative_error(found, many, 3.0 * base.ttft_terms(many) @ prior) < 0.05


def test_a_term_that_never_occurred_keeps_the_presets_slope() -> None:
    prior = np.array(base.COLD_START["default"].tpot)
    rows = random_rows(300)
    y = 2.0 * base.tpot_terms(rows) @ prior
    found = base.fit(base.tpot_terms(rows), y, np.ones(300), prior)
    resident = base.TPOT_TERMS.index("resident")
    assert found[resident] == pytest.approx(2.0 * prior[resident])


def test_the_tpot_base_saturates_with_the_prefill_backlog() -> None:
    rows = np.zeros((3, len(f.FEATURES)))
    rows[:, f.INFLIGHT_PREFILL] = [0.0, 1e6, 2e6]
    idle, busy, busier = base.tpot_terms(rows) @ np.array(base.COLD_START["default"].tpot)
    assert busy > 1.3 * idle
    assert busier < 1.05 * busy


def test_a_prompt_believed_cached_that_never_was_is_priced_by_its_length() -> None:
    rows = random_rows(400)
    y = 40.0 + 0.1 * rows[:, f.INPUT]
    found = base.fit(base.ttft_terms(rows), y, np.ones(400), np.array(base.COLD_START["default"].ttft))
    assert relative_error(found, rows, y) < 0.05


def test_a_new_class_starts_at_its_own_level_with_the_pools_shape() -> None:
    rows = random_rows(300)
    classes = np.zeros(300, dtype=np.int64)
    classes[-8:] = 1
    rows[:, f.ENGINE_CLASS] = classes
    truth = np.array([40.0, 0.1, 0.0, 0.0, 0.09, 0.0, 0.5, 10.0, 0.0, 0.0, 0.0])
    y = base.ttft_terms(rows) @ truth * np.where(classes == 1, 3.0, 1.0)
    prior = np.array(base.COLD_START["default"].ttft)
    table = base.fit_classes(base.ttft_terms(rows), y, np.ones(300), classes, prior, ridge_rows=10.0)
    assert table.shape == (3, len(base.TTFT_TERMS))
    more = random_rows(100)
    more[:, f.ENGINE_CLASS] = 1
    predicted = base.base_ms(base.ttft_terms(more), table, more[:, f.ENGINE_CLASS])
    assert np.median(np.abs(predicted / (3.0 * base.ttft_terms(more) @ truth) - 1.0)) < 0.1


def test_a_pool_of_one_class_has_one_law() -> None:
    rows = random_rows(100)
    y = base.ttft_terms(rows) @ np.array(base.COLD_START["default"].ttft)
    prior = np.array(base.COLD_START["default"].ttft)
    table = base.fit_classes(base.ttft_terms(rows), y, np.ones(100), np.full(100, 2), prior, ridge_rows=3.0)
    assert (table == table[0]).all()
    assert len(table) == 4
