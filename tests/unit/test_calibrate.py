import math

import msgspec
import numpy as np
import pytest

from llmd_sched.predict import features as f
from llmd_sched.predict.calibrate import COLD_OFFSETS, LEAST_OF_GROUP, Calibrator, group_of
from llmd_sched.predict.model import Model
from llmd_sched.types import QUANTILES, Sample

GROUP = group_of((0.0,) * len(f.FEATURES), 100.0)


def row(waiting: float = 0.0, engine_class: int = 0) -> tuple[float, ...]:
    made = [0.0] * len(f.FEATURES)
    made[f.WAITING], made[f.ENGINE_CLASS] = waiting, float(engine_class)
    return tuple(made)


def feed(calibrator: Calibrator, ratios: np.ndarray, **where: float) -> list[bool]:
    """Whether each measured/predicted ratio was within the upper quantile before it was learned."""
    asked = row(**where)  # type: ignore[arg-type]
    covered = []
    for ratio in ratios.tolist():
        covered.append(ratio <= calibrator.factors("ttft", group_of(asked, 100.0))[1])
        calibrator.learn(Sample(asked, 100.0 * ratio, None, 100.0, 0.0, 1, 0.0))
    return covered


@pytest.mark.parametrize("spread", [0.02, 0.3, 1.0])
def test_the_upper_quantile_covers_nine_of_ten_whatever_the_noise(spread: float) -> None:
    calibrator = Calibrator()
    covered = feed(calibrator, np.exp(spread * np.random.default_rng(1).standard_normal(3000)))
    assert 0.88 < np.mean(covered[500:]) < 0.92
    middle, upper = calibrator.factors("ttft", GROUP)
    assert math.log(middle) == pytest.approx(0.0, abs=0.25 * spread)
    assert math.log(upper) == pytest.approx(1.28 * spread, abs=0.5 * spread)


def test_it_follows_when_predictions_become_twice_too_low() -> None:
    calibrator, rng = Calibrator(), np.random.default_rng(2)
    feed(calibrator, np.exp(0.1 * rng.standard_normal(500)))
    covered = feed(calibrator, 2.0 * np.exp(0.1 * rng.standard_normal(400)))
    assert 0.86 < np.mean(covered[50:]) < 0.94


def test_it_narrows_again_when_the_noise_does() -> None:
    calibrator, rng = Calibrator(), np.random.default_rng(3)
    feed(calibrator, np.exp(1.0 * rng.standard_normal(500)))
    feed(calibrator, np.exp(0.01 * rng.standard_normal(300)))
    assert calibrator.factors("ttft", GROUP)[1] < 1.1


def test_a_group_is_told_apart_once_it_has_shown_enough() -> None:
    calibrator = Calibrator()
    feed(calibrator, np.full(200, 1.0))
    feed(calibrator, np.full(LEAST_OF_GROUP - 1, 3.0), waiting=5.0)
    queued, empty = group_of(row(waiting=5.0), 100.0), group_of(row(), 100.0)
    assert calibrator.factors("ttft", queued) == calibrator.factors("ttft", group_of(row(engine_class=9), 100.0))
    feed(calibrator, np.full(200, 3.0), waiting=5.0)
    assert calibrator.factors("ttft", queued)[0] == pytest.approx(3.0, rel=0.1)
    assert calibrator.factors("ttft", empty)[0] == pytest.approx(1.0, abs=0.1)


def test_the_targets_are_calibrated_apart() -> None:
    calibrator = Calibrator()
    feed(calibrator, np.full(300, 2.0))
    assert calibrator.factors("tpot", GROUP) == tuple(math.exp(offset) for offset in COLD_OFFSETS)


def test_many_rows_get_the_factors_of_their_groups() -> None:
    calibrator = Calibrator()
    feed(calibrator, np.full(300, 1.0))
    feed(calibrator, np.full(300, 3.0), waiting=5.0)
    rows = np.array([row(), row(waiting=2.0), row()])
    predicted_ms = np.array([100.0, 100.0, 1e9])
    found = calibrator.factor("ttft", 1, rows, predicted_ms).tolist()
    groups = [group_of(one, ms) for one, ms in zip(rows, predicted_ms.tolist(), strict=True)]
    assert found == [calibrator.factors("ttft", group)[1] for group in groups]
    assert found[0] < found[1]


def test_additive_noise_is_wide_for_short_predictions_and_narrow_for_long_ones() -> None:
    calibrator, rng = Calibrator(), np.random.default_rng(5)
    for _ in range(1500):
        for predicted_ms in (20.0, 2000.0):
            measured_ms = predicted_ms + abs(rng.normal(0.0, 20.0))
            calibrator.learn(Sample(row(), measured_ms, None, predicted_ms, 0.0, 1, 0.0))
    short, long = (calibrator.factors("ttft", group_of(row(), ms))[1] for ms in (20.0, 2000.0))
    assert short == pytest.approx(1.0 + 1.64, rel=0.2)
    assert long == pytest.approx(1.016, abs=0.01)


@pytest.mark.parametrize("ms", [0.0, 1e-9, 1e12])
def test_a_prediction_of_any_size_has_a_group(ms: float) -> None:
    assert group_of(row(), ms) in range(12)


def test_the_first_learned_model_brings_its_own_offsets_and_later_ones_do_not() -> None:
    cold, calibrator = Model.cold(), Calibrator()
    calibrator.publish(cold)
    assert calibrator.factors("ttft", GROUP)[1] == pytest.approx(math.exp(COLD_OFFSETS[1]))

    def learned(upper: float) -> Model:
        target = msgspec.structs.replace(cold.ttft, held_out_quantiles=(0.0, upper))
        return msgspec.structs.replace(cold, version=1, ttft=target)

    calibrator.publish(learned(0.2))
    calibrator.publish(learned(0.9))
    assert calibrator.factors("ttft", GROUP)[1] == pytest.approx(math.exp(0.2))


def test_what_is_no_measurement_teaches_nothing() -> None:
    calibrator = Calibrator()
    for measured_ms, predicted_ms in ((0.0, 5.0), (5.0, 0.0)):
        calibrator.learn(Sample(row(), measured_ms, None, predicted_ms, 0.0, 1, 0.0))
    assert len(calibrator.factors("ttft", GROUP)) == len(QUANTILES)
    assert calibrator.factors("ttft", GROUP)[1] == pytest.approx(math.exp(COLD_OFFSETS[1]))
