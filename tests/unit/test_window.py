import numpy as np
import pytest

from llmd_sched.predict import features as f
from llmd_sched.predict.window import STRATA, Window, stratum
from llmd_sched.types import Sample


def sample(
    at_s: float, ttft_ms: float | None = 100.0, tpot_ms: float | None = 20.0, waiting: float = 0.0, prefill: float = 0.0
) -> Sample:
    row = [0.0] * len(f.FEATURES)
    row[f.WAITING], row[f.INFLIGHT_PREFILL], row[f.INPUT], row[f.UNCACHED] = waiting, prefill, 100.0, 100.0
    return Sample(tuple(row), ttft_ms, tpot_ms, 0.0, 0.0, 0, at_s)


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
    window = Window(cap=100, cap_per_stratum=3)
    for number in range(10):
        window.add(sample(float(number)))
    assert window.arrays("ttft").at_s.tolist() == [7.0, 8.0, 9.0]


def test_a_regime_absent_from_the_latest_traffic_survives() -> None:
    window = Window(cap=60, cap_per_stratum=50)
    for number in range(20):
        window.add(sample(float(number), waiting=20.0, prefill=1e6))
    for number in range(20, 2000):
        window.add(sample(float(number)))
    held = window.arrays("ttft")
    assert int((held.X[:, f.WAITING] == 20.0).sum()) == 20
    assert len(held.y_ms) == 60


def test_the_total_is_bounded_and_the_largest_stratum_pays() -> None:
    window = Window(cap=30, cap_per_stratum=30)
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
    lowest[f.UNCACHED] = lowest[f.INPUT] = 100.0
    highest[f.UNCACHED] = 0.0
    assert stratum(lowest) == 0
    assert stratum(highest) == STRATA - 1


def test_an_empty_window_gives_empty_arrays() -> None:
    data = Window().arrays("tpot")
    assert data.X.shape == (0, len(f.FEATURES))
    assert len(data.y_ms) == len(data.age) == len(data.at_s) == 0
