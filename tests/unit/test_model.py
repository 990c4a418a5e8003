from typing import Any

import lightgbm as lgb
import msgspec
import numpy as np
import pytest

from llmd_sched.predict import base, blob
from llmd_sched.predict import features as f
from llmd_sched.predict.forest import parse
from llmd_sched.predict.model import MAX_FACTOR, MAX_MS, MIN_MS, BadModel, Model, Target

RNG = np.random.default_rng(5)
TYPICAL = np.ones(len(f.FEATURES))
TYPICAL[[f.UNCACHED, f.INPUT, f.RUNNING, f.INFLIGHT_PREFILL, f.RESIDENT]] = 1e3, 2e3, 30, 2e4, 5e4
ROWS = np.abs(RNG.normal(size=(40, len(f.FEATURES)))) * TYPICAL
ROWS[:, f.ENGINE_CLASS] = 0.0


def with_trees(scale: float = 1.0) -> Model:
    X = np.abs(RNG.normal(size=(400, len(f.FEATURES))))
    quiet = {"verbosity": -1, "num_threads": 1}
    booster = lgb.train({"objective": "regression", **quiet}, lgb.Dataset(X, scale * X[:, 0], params=quiet), 5)
    trees = parse(booster.model_to_string())
    cold = Model.cold()
    return Model(
        version=3,
        ttft=Target(cold.ttft.coefficients, trees, rows=400, newest_s=7.0),
        tpot=Target(cold.tpot.coefficients, trees),
        samples=9,
        preset="default",
        fitted_at_s=12.5,
    )


@pytest.mark.parametrize("preset", sorted(base.COLD_START))
def test_a_cold_model_tells_loads_apart(preset: str) -> None:
    idle, busy = np.zeros((1, len(f.FEATURES))), np.zeros((1, len(f.FEATURES)))
    busy[0, [f.UNCACHED, f.INPUT, f.RUNNING, f.WAITING, f.INFLIGHT_PREFILL]] = [2000, 2000, 40, 5, 30_000]
    model = Model.cold(preset)
    assert model.version == 0
    for slow, fast in zip(model.predict(busy), model.predict(idle), strict=True):
        assert slow[0] > 1.3 * fast[0] > 1.0


def test_the_presets_are_sane_for_hardware_they_name() -> None:
    idle = np.zeros((1, len(f.FEATURES)))
    idle[0, [f.UNCACHED, f.INPUT]] = 1000
    ttft_ms, tpot_ms = Model.cold("llama-3-8b-h100").predict(idle)
    assert 30 < ttft_ms[0] < 60
    assert 6 < tpot_ms[0] < 9
    ttft_ms, tpot_ms = Model.cold("qwen3-32b-h200").predict(idle)
    assert 100 < ttft_ms[0] < 180
    assert 17 < tpot_ms[0] < 22


def test_a_prediction_is_the_base_times_the_trees() -> None:
    model = with_trees(0.1)
    factor = np.exp(model.forest.predict(ROWS))
    np.testing.assert_allclose(model.predict(ROWS)[0], base.ttft_terms(ROWS) @ model.ttft.coefficients[0] * factor[0])
    np.testing.assert_allclose(model.predict(ROWS)[1], base.tpot_terms(ROWS) @ model.tpot.coefficients[0] * factor[1])


def test_the_trees_may_correct_the_base_only_so_far() -> None:
    ttft_ms, _ = with_trees(1000.0).predict(ROWS)
    assert (ttft_ms <= base.ttft_terms(ROWS) @ Model.cold().ttft.coefficients[0] * MAX_FACTOR * (1 + 1e-9)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300, 0.0])
def test_predictions_are_finite_whatever_the_row(value: float) -> None:
    with np.errstate(all="ignore"):
        for times_ms in with_trees().predict(np.full((2, len(f.FEATURES)), value)):
            assert np.isfinite(times_ms).all()
            assert (times_ms >= MIN_MS).all()
            assert (times_ms <= MAX_MS).all()


def test_no_rows_give_no_predictions() -> None:
    ttft_ms, tpot_ms = Model.cold().predict(np.zeros((0, len(f.FEATURES))))
    assert ttft_ms.shape == tpot_ms.shape == (0,)


def test_bytes_bring_back_the_same_model() -> None:
    model = with_trees()
    again = Model.from_bytes(model.to_bytes())
    assert (again.version, again.samples, again.fitted_at_s, again.ttft.rows, again.ttft.newest_s) == (
        3,
        9,
        12.5,
        400,
        7,
    )
    for ours, theirs in zip(model.predict(ROWS), again.predict(ROWS), strict=True):
        assert (ours == theirs).all()


def test_a_cold_model_survives_bytes_too() -> None:
    assert Model.from_bytes(Model.cold().to_bytes()).ttft.newest_s == -np.inf


def test_each_engine_class_has_its_own_base_and_strangers_the_pools() -> None:
    cold = Model.cold()
    lines = np.vstack([cold.ttft.coefficients, cold.ttft.coefficients, 3.0 * cold.ttft.coefficients])
    model = msgspec.structs.replace(cold, ttft=msgspec.structs.replace(cold.ttft, coefficients=lines))
    rows = np.repeat(ROWS[:1], 4, axis=0)
    rows[:, f.ENGINE_CLASS] = [0.0, 1.0, 2.0, 31.0]
    ttft_ms, _ = model.predict(rows)
    np.testing.assert_allclose(ttft_ms / ttft_ms[0], [1.0, 3.0, 1.0, 1.0])


def test_the_bias_of_an_endpoint_multiplies_its_predictions() -> None:
    cold = Model.cold()
    model = msgspec.structs.replace(cold, ttft=msgspec.structs.replace(cold.ttft, bias={"default/slow": np.log(1.5)}))
    rows = np.repeat(ROWS[:1], 2, axis=0)
    ttft_ms, tpot_ms = model.predict(rows, model.bias(["default/slow", "default/new"]))
    assert ttft_ms[0] / ttft_ms[1] == pytest.approx(1.5)
    assert tpot_ms[0] == tpot_ms[1]


def test_foreign_bytes_are_refused() -> None:
    with pytest.raises(BadModel, match="not a model"):
        Model.from_bytes(b"\x80\x04\x95pickle")


@pytest.mark.parametrize("at", [25, 40, 500, -1])
def test_damage_is_noticed(at: int) -> None:
    blob = bytearray(with_trees().to_bytes())
    blob[at] ^= 1
    with pytest.raises(BadModel, match="damaged"):
        Model.from_bytes(bytes(blob))


def test_a_cut_off_model_is_refused() -> None:
    with pytest.raises(BadModel):
        Model.from_bytes(with_trees().to_bytes()[:-10])


@pytest.mark.parametrize(
    "change",
    [
        {"features": ("a", "b")},
        {"classes": ()},
        {"classes": tuple(map(str, range(1 + f.MAX_CLASSES)))},
        {"ttft": Target(np.zeros(2), Model.cold().ttft.trees)},
        {"ttft": msgspec.structs.replace(with_trees().ttft, trees=Model.cold().ttft.trees, coefficients=np.zeros(1))},
    ],
)
def test_a_model_that_does_not_fit_a_row_is_refused(change: dict[str, Any]) -> None:
    class Other(msgspec.Struct):
        version: int
        ttft: Target
        tpot: Target
        features: tuple[str, ...] = f.FEATURES
        classes: tuple[str, ...] = ("",)

    cold = Model.cold()
    other = Other(**{"version": 1, "ttft": cold.ttft, "tpot": cold.tpot, **change})
    with pytest.raises(BadModel):
        Model.from_bytes(blob.seal(b"llmd-sched model 2\n", other))


def test_a_preset_nobody_knows_is_an_error() -> None:
    with pytest.raises(KeyError):
        Model.cold("abacus")
