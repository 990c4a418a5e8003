import numpy as np
import pytest

from llmd_sched.predict import features as f
from llmd_sched.predict.window import MAX_ENDPOINTS, STRATA_PER_CLASS, Caps, Window, stratum
from llmd_sched.types import Sample


def sample(
    at_s: float,
    ttft_ms: float | None = 100.0,
    tpot_ms: float | None = 20.0,
    waiting: float = 0.0,
    prefill: float = 0.0,
    engine_class: int = 0,
    endpoint: str = "",
) -> Sample:
    row = [0.0] * len(f.FEATURES)
    row[f.WAITING], row[f.INFLIGHT_PREFILL], row[f.INPUT], row[f.UNCACHED] = waiting, prefill, 100.0, 100.0
    row[f.ENGINE_CLASS] = float(engine_class)
    return Sample(tuple(row), ttft_ms, tpot_ms, 0.0, 0.0, 0, at_s, endpoint=endpoint)


def test_rows_come_back_oldest_first_with_their_age() -> None:
    window = Window()
    for number in range(5):
        window.add(sample(float(number), ttft_ms=10.0 + number, waiting=float(number * 4)))
    data = window.arrays("ttft")
    assert data.y_ms.tolist() == [10.0, 11.0, 12.0, 13.0, 14.0]
    assert data.age.tolist() == [4, 3, 2, 1, 0]
    assert data.at_s.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert data.X[:, f.WAITING].tolist() == [0.0, 4.0, 8.0, 12.0, 16.0]


def test_the_targets_are_kept_apart() -> None:
    window = Window()
    assert window.add(sample(0.0, tpot_ms=None)) == 1
    assert window.add(sample(1.0)) == 2
    assert (window.size("ttft"), window.size("tpot")) == (2, 1)


def test_within_a_full_stratum_the_newest_replaces_the_oldest() -> None:
    window = Window(Caps(100, 100, 3))
    for number in range(10):
        window.add(sample(float(number)))
    assert window.arrays("ttft").at_s.tolist() == [7.0, 8.0, 9.0]


def test_a_regime_absent_from_the_latest_traffic_survives() -> None:
    window = Window(Caps(60, 60, 50))
    for number in range(20):
        window.add(sample(float(number), waiting=20.0, prefill=1e6))
    for number in range(20, 2000):
        window.add(sample(float(number)))
    held = window.arrays("ttft")
    assert int((held.X[:, f.WAITING] == 20.0).sum()) == 20
    assert len(held.y_ms) == 60


def test_the_total_is_bounded_and_the_largest_stratum_pays() -> None:
    window = Window(Caps(30, 30, 30))
    for number in range(28):
        window.add(sample(float(number)))
    for number in range(28, 48):
        window.add(sample(float(number), waiting=4.0))
    held = window.arrays("tpot")
    assert len(held.y_ms) == 30
    assert int((held.X[:, f.WAITING] == 4.0).sum()) in (14, 15, 16)
    assert held.at_s[-1] == 47.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0, -5.0])
def test_a_label_that_is_no_measurement_is_refused_and_counted(bad: float) -> None:
    window = Window()
    assert window.add(sample(0.0, ttft_ms=bad)) == 1
    assert (window.refused, window.size("ttft"), window.size("tpot")) == (1, 0, 1)


@pytest.mark.parametrize("row", [(1.0,), (np.nan,) * len(f.FEATURES), ()])
def test_a_row_that_is_no_row_is_refused(row: tuple[float, ...]) -> None:
    window = Window()
    assert window.add(Sample(row, 1.0, 1.0, 0.0, 0.0, 0, 0.0)) == 0
    assert window.refused == 2


def test_every_row_has_a_stratum_and_extremes_use_the_whole_range() -> None:
    lowest, highest = np.zeros(len(f.FEATURES)), np.full(len(f.FEATURES), 1e9)
    highest[f.ENGINE_CLASS] = 3.0
    assert stratum(lowest) == 0
    assert stratum(highest) == 4 * STRATA_PER_CLASS - 1


def test_an_empty_window_gives_empty_arrays() -> None:
    data = Window().arrays("tpot")
    assert data.X.shape == (0, len(f.FEATURES))
    assert len(data.y_ms) == len(data.age) == len(data.at_s) == 0


def test_a_class_has_a_cap_of_its_own_and_cannot_push_another_out() -> None:
    window = Window(Caps(total=100, per_class=30, per_stratum=30))
    for number in range(10):
        window.add(sample(float(number), engine_class=1))
    for number in range(10, 200):
        window.add(sample(float(number), waiting=float(number % 2 * 20)))
    assert window.rows_by_class("ttft") == {0: 30, 1: 10}


def test_age_counts_the_labels_of_ones_own_class() -> None:
    window = Window()
    for number, one in enumerate([0, 1, 1, 0, 1]):
        window.add(sample(float(number), engine_class=one))
    assert window.arrays("ttft").age.tolist() == [1, 2, 1, 0, 0]


def test_rows_remember_who_answered_and_names_without_rows_are_forgotten() -> None:
    window = Window(Caps(total=2, per_class=2, per_stratum=2))
    for number in range(3 * MAX_ENDPOINTS):
        window.add(sample(float(number), endpoint=f"e{number}"))
    held = window.arrays("ttft")
    names = [held.endpoints[i] for i in held.endpoint]
    assert names == [f"e{3 * MAX_ENDPOINTS - 2}", f"e{3 * MAX_ENDPOINTS - 1}"]
    assert len(held.endpoints) <= MAX_ENDPOINTS + 1


@pytest.mark.parametrize("engine_class", [-1, f.MAX_CLASSES])
def test_a_row_of_a_class_that_cannot_be_is_refused(engine_class: int) -> None:
    window = Window()
    assert window.add(sample(0.0, engine_class=engine_class)) == 0


def test_span_and_clear() -> None:
    window = Window()
    assert np.isnan(window.span_s("ttft")).all()
    window.add(sample(3.0))
    window.add(sample(5.0))
    assert window.span_s("ttft") == (3.0, 5.0)
    window.clear()
    assert window.size("ttft") == 0
    assert np.isnan(window.span_s("ttft")).all()


def test_what_arrays_gave_restores_the_same_rows() -> None:
    window, again = Window(), Window()
    for number in range(30):
        window.add(sample(float(number), waiting=float(number % 7), endpoint=f"e{number % 3}"))
    again.restore("ttft", window.arrays("ttft"))
    ours, theirs = window.arrays("ttft"), again.arrays("ttft")
    assert (ours.X == theirs.X).all()
    assert [ours.endpoints[i] for i in ours.endpoint] == [theirs.endpoints[i] for i in theirs.endpoint]
    assert again.size("tpot") == 0


@pytest.mark.parametrize(
    "change",
    [
        {"y_ms": np.array([1.0])},
        {"y_ms": np.array([1.0, -1.0])},
        {"y_ms": np.array([1.0, np.nan])},
        {"at_s": np.array([1.0])},
        {"X": np.zeros((2, 3))},
        {"X": np.full((2, len(f.FEATURES)), np.inf)},
        {"X": np.full((2, len(f.FEATURES)), 99.0)},
        {"endpoint": np.array([0, 7], dtype=np.int32)},
    ],
)
def test_rows_that_do_not_fit_together_are_not_restored(change: dict[str, np.ndarray]) -> None:
    window = Window()
    window.add(sample(1.0))
    window.add(sample(2.0))
    with pytest.raises(ValueError, match=r"label|class|endpoint"):
        Window().restore("ttft", window.arrays("ttft")._replace(**change))
