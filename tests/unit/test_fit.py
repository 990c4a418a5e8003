import lightgbm as lgb
import msgspec
import numpy as np
import pytest

from llmd_sched.predict import base, gate
from llmd_sched.predict import features as f
from llmd_sched.predict.fit import DEFAULT
from llmd_sched.predict.forest import parse
from llmd_sched.predict.gate import next_model
from llmd_sched.predict.inline import Drift, InlineTrainer
from llmd_sched.predict.model import Made, Model
from llmd_sched.predict.window import Caps, Window
from llmd_sched.types import Array, Sample


class Engine:
    """A made-up engine: latencies by a law the base cannot quite express, with 5 % noise."""

    def __init__(self, seed: int = 0, slowdown: float = 1.0, engine_class: int = 0, endpoint: str = "") -> None:
        self.rng = np.random.default_rng(seed)
        self.slowdown = slowdown
        self.engine_class, self.endpoint = engine_class, endpoint
        self.now_s = 0.0

    def true_ttft_ms(self, X: Array) -> Array:
        work = 0.1 * X[:, f.UNCACHED] + 0.09 * X[:, f.INFLIGHT_PREFILL] + np.where(X[:, f.KV_USAGE] > 0.8, 300.0, 0.0)
        return np.asarray(self.slowdown * (40.0 + work))

    def true_tpot_ms(self, X: Array) -> Array:
        return np.asarray(self.slowdown * (15.0 + 0.1 * X[:, f.RUNNING] + 1e-4 * X[:, f.RESIDENT]))

    def rows(self, count: int, load: float = 1.0) -> Array:
        X = np.zeros((count, len(f.FEATURES)))
        X[:, f.INPUT] = self.rng.uniform(50, 4000, count)
        X[:, f.UNCACHED] = X[:, f.INPUT] * self.rng.choice([0.1, 1.0], count)
        X[:, f.PREFIX_MATCH] = f.prefix_match(X[:, f.UNCACHED] / X[:, f.INPUT], 1.0)
        X[:, f.ENGINE_CLASS] = self.engine_class
        X[:, f.RUNNING] = X[:, f.INFLIGHT_REQUESTS] = np.floor(self.rng.uniform(0, 40 * load, count))
        X[:, f.INFLIGHT_PREFILL] = self.rng.uniform(0, 10_000 * load, count)
        X[:, f.RESIDENT] = X[:, f.RUNNING] * 1500.0
        X[:, f.KV_USAGE] = self.rng.uniform(0, 1, count)
        return X

    def samples(self, count: int, load: float = 1.0, model: Model | None = None) -> list[Sample]:
        """With what ``model`` predicts of them, if one is given."""
        X = self.rows(count, load)
        predicted = model.predict(X, self.bias(model, count)) if model else np.zeros((2, count))
        noise = np.exp(0.05 * self.rng.normal(size=(2, count)))
        ttft_ms, tpot_ms = self.true_ttft_ms(X) * noise[0], self.true_tpot_ms(X) * noise[1]
        made = []
        for i, row in enumerate(X.tolist()):
            self.now_s += 0.05
            said = float(predicted[0][i]), float(predicted[1][i]), model.version if model else 0
            made.append(
                Sample(tuple(row), float(ttft_ms[i]), float(tpot_ms[i]), *said, self.now_s, endpoint=self.endpoint)
            )
        return made

    def bias(self, model: Model, count: int) -> Array:
        return model.bias([self.endpoint] * count)

    def error(self, model: Model, load: float = 1.0) -> tuple[float, float]:
        """Mean relative errors of both targets against the noiseless law on fresh rows."""
        X = self.rows(400, load)
        truth = self.true_ttft_ms(X), self.true_tpot_ms(X)
        ttft, tpot = (
            np.abs(p / t - 1.0).mean() for p, t in zip(model.predict(X, self.bias(model, 400)), truth, strict=True)
        )
        return float(ttft), float(tpot)


def window_of(*batches: list[Sample]) -> Window:
    window = Window()
    for batch in batches:
        for sample in batch:
            window.add(sample)
    return window


def test_a_law_is_learned_from_a_few_hundred_rows() -> None:
    engine = Engine()
    model = next_model(window_of(engine.samples(800)), None, version=1, now_s=0.0)
    assert model is not None
    ttft, tpot = engine.error(model)
    assert ttft < 0.06
    assert tpot < 0.03
    assert model.version == 1
    assert model.ttft.rows == 800
    assert len(model.ttft.trees.first_leaf) > 0


def test_fifty_rows_already_beat_the_preset_without_trees() -> None:
    engine = Engine(slowdown=0.25)
    model = next_model(window_of(engine.samples(50)), None, version=1, now_s=0.0)
    assert model is not None
    assert len(model.ttft.trees.first_leaf) == 0
    assert all(new < 0.5 * old for new, old in zip(engine.error(model), engine.error(Model.cold()), strict=True))


def test_loads_never_seen_are_extrapolated() -> None:
    engine = Engine()
    model = next_model(window_of(engine.samples(800)), None, version=1, now_s=0.0)
    assert model is not None
    assert engine.error(model, load=5.0)[0] < 0.15


def test_a_few_stalls_do_not_steer_the_model() -> None:
    engine = Engine()
    samples = engine.samples(600)
    for number in range(0, 600, 50):
        old = samples[number]
        samples[number] = Sample(old.row, 80.0 * (old.ttft_ms or 0.0), old.tpot_ms, 0.0, 0.0, 0, old.at_s)
    model = next_model(window_of(samples), None, version=1, now_s=0.0)
    assert model is not None
    assert engine.error(model)[0] < 0.07


def test_after_a_shift_of_regime_the_model_follows() -> None:
    engine = Engine()
    window = window_of(engine.samples(1500))
    model = next_model(window, None, version=1, now_s=0.0)
    engine.slowdown = 2.0
    assert model is not None
    assert engine.error(model)[0] > 0.4
    for _ in range(8):
        for sample in engine.samples(150):
            window.add(sample)
        model = next_model(window, model, model.version + 1, now_s=engine.now_s) or model
    assert engine.error(model)[0] < 0.12


def test_noise_alone_grows_no_trees() -> None:
    engine = Engine()
    model = next_model(window_of(engine.samples(600)), None, version=1, now_s=0.0)
    assert model is not None
    assert len(model.tpot.trees.first_leaf) <= 15  # its law is the base's; the residual is noise
    assert len(model.ttft.trees.first_leaf) > 15


def test_the_gate_keeps_the_incumbent_against_worse_data() -> None:
    engine, broken = Engine(), Engine(slowdown=6.0)
    good = next_model(window_of(engine.samples(800)), None, version=1, now_s=0.0)
    assert good is not None
    misleading = broken.samples(300)
    engine.now_s = broken.now_s = max(engine.now_s, broken.now_s)
    assert next_model(window_of(misleading, engine.samples(20)), good, version=2, now_s=0.0) is None


def test_one_target_may_pass_while_the_other_has_no_rows() -> None:
    only_ttft = [Sample(s.row, s.ttft_ms, None, 0.0, 0.0, 0, s.at_s) for s in Engine().samples(200)]
    cold = Model.cold()
    model = next_model(window_of(only_ttft), cold, version=1, now_s=0.0)
    assert model is not None
    assert model.tpot is cold.tpot
    assert model.ttft is not cold.ttft


def test_a_nearly_empty_window_does_not_replace_a_model_of_many_rows() -> None:
    engine = Engine()
    good = next_model(window_of(engine.samples(500)), None, version=1, now_s=0.0)
    assert next_model(window_of(engine.samples(10)), good, version=2, now_s=0.0) is None


@pytest.mark.parametrize("count", [0, 1, 5, 59, 60, 61, 99, 150])
def test_any_number_of_rows_can_be_fitted(count: int) -> None:
    engine = Engine()
    model = next_model(window_of(engine.samples(count)), None, version=1, now_s=0.0)
    assert (model is None) == (count == 0)
    if model is not None:
        assert all(np.isfinite(times_ms).all() for times_ms in model.predict(engine.rows(50)))


def test_the_trees_of_tpot_do_not_look_at_what_tpot_once_predicted() -> None:
    engine = Engine()
    made = []
    for sample in engine.samples(600):
        row = list(sample.row)
        row[f.ADMISSION_WAIT] = 0.5 * (sample.tpot_ms or 0.0)
        made.append(msgspec.structs.replace(sample, row=tuple(row)))
    model = next_model(window_of(made), None, version=1, now_s=0.0)
    assert model is not None
    assert f.ADMISSION_WAIT not in model.tpot.trees.numeric.feature


def test_rows_that_are_all_the_same_are_fitted_by_the_base_alone() -> None:
    engine = Engine()
    row = tuple(engine.rows(1)[0].tolist())
    same = [Sample(row, 100.0 + number % 3, 20.0, 0.0, 0.0, 0, float(number)) for number in range(100)]
    model = next_model(window_of(same), None, version=1, now_s=0.0)
    assert model is not None
    assert model.predict(np.array([row]))[0][0] == pytest.approx(101.0, rel=0.02)


def test_the_same_window_gives_the_same_model() -> None:
    one, two = (next_model(window_of(Engine().samples(300)), None, version=1, now_s=0.0) for _ in range(2))
    assert one is not None
    assert two is not None
    assert one.to_bytes() == two.to_bytes()


@pytest.mark.parametrize(
    ("feature", "target"), [(i, name) for name, signs in f.MONOTONE.items() for i, sign in enumerate(signs) if sign > 0]
)
def test_more_load_is_never_predicted_faster(feature: int, target: str) -> None:
    engine = Engine()
    model = next_model(window_of(engine.samples(800)), None, version=1, now_s=0.0)
    assert model is not None
    for row in engine.rows(20):
        X = np.repeat(row[None], 50, axis=0)
        X[:, feature] = np.linspace(0, 1.5 * row[feature] + 10.0, 50)
        X[:, f.UNCACHED] = np.minimum(X[:, f.UNCACHED], X[:, f.INPUT])
        X[:, f.PREFIX_MATCH] = 1.0 - X[:, f.UNCACHED] / X[:, f.INPUT]
        predicted = model.predict(X)[target == "tpot"]
        assert (np.diff(predicted) >= -1e-9).all()


def interleaved(engines: list[Engine], count: int) -> list[Sample]:
    """``count`` samples of each in turn, on one clock."""
    begin_s = max(engine.now_s for engine in engines)
    parts = [engine.samples(count) for engine in engines]
    mixed = [sample for group in zip(*parts, strict=True) for sample in group]
    timed = [msgspec.structs.replace(sample, at_s=begin_s + 0.05 * (i + 1)) for i, sample in enumerate(mixed)]
    for engine in engines:
        engine.now_s = timed[-1].at_s if timed else begin_s
    return timed


def test_two_engine_classes_in_one_pool_are_both_learned() -> None:
    fast, slow = Engine(1, engine_class=1), Engine(2, slowdown=3.0, engine_class=2)
    model = next_model(
        window_of(interleaved([fast, slow], 400)), None, version=1, now_s=0.0, classes=("", "fast", "slow")
    )
    assert model is not None
    assert model.classes == ("", "fast", "slow")
    for engine in (fast, slow):
        ttft, tpot = engine.error(model)
        assert ttft < 0.08
        assert tpot < 0.04


def test_a_class_that_appears_in_mid_run_is_learned_from_a_few_dozen_rows() -> None:
    fast, new = Engine(1, engine_class=1), Engine(2, slowdown=4.0, engine_class=2)
    window = window_of(fast.samples(800))
    model = next_model(window, None, version=1, now_s=fast.now_s)
    new.now_s = fast.now_s
    for sample in interleaved([fast, new], 40):
        window.add(sample)
    model = next_model(window, model, version=2, now_s=new.now_s)
    assert model is not None
    assert new.error(model)[0] < 0.15
    assert fast.error(model)[0] < 0.08


def test_an_endpoint_that_is_slow_for_a_hidden_reason_is_told_apart() -> None:
    pool = [Engine(i, endpoint=f"default/e{i}") for i in range(4)]
    pool[3].slowdown = 1.5
    model = next_model(window_of(interleaved(pool, 200)), None, version=1, now_s=0.0)
    assert model is not None
    for target in (model.ttft, model.tpot):
        assert np.exp(target.bias["default/e3"] - target.bias.get("default/e0", 0.0)) == pytest.approx(1.5, rel=0.1)
    for engine in pool:
        ttft, tpot = engine.error(model)
        assert ttft < 0.09
        assert tpot < 0.06


def test_an_endpoint_alone_has_no_bias() -> None:
    model = next_model(
        window_of(Engine(endpoint="default/only", slowdown=2.0).samples(300)), None, version=1, now_s=0.0
    )
    assert model is not None
    assert model.ttft.bias == {}


def test_a_fit_says_how_far_off_it_was_on_rows_it_had_not_seen() -> None:
    engine = Engine()
    model = next_model(window_of(engine.samples(800)), None, version=1, now_s=0.0)
    assert model is not None
    middle, upper = model.ttft.held_out_quantiles
    assert abs(middle) < 0.04
    assert 0.03 < upper < 0.15
    assert 0.0 < model.ttft.held_out_error < 0.08


# ------------------------------------------------------------------------------------------- the trainer in line


def test_the_inline_trainer_publishes_at_its_first_samples_and_then_at_most_every_interval() -> None:
    engine, trainer = Engine(), InlineTrainer(interval_s=1.0, first_samples=50, least_new=20)
    published = []
    for number, sample in enumerate(engine.samples(400)):  # twenty per second
        trainer.add(sample)
        if trainer.tick(sample.at_s) is not None:
            published.append(number + 1)
    assert published[0] == 50
    assert 10 <= len(published) <= 18
    assert min(np.diff(published)) >= 20
    assert trainer.model.version == trainer.counts.published == len(published)
    assert trainer.model.samples == published[-1]


def test_a_large_window_waits_for_a_share_of_it_to_be_new() -> None:
    engine, trainer = Engine(), InlineTrainer(interval_s=0.0, window=Window(Caps(4000, 4000, 4000)))
    for sample in engine.samples(3000):
        trainer.add(sample)
    trainer.tick(1.0)
    for sample in engine.samples(119):
        trainer.add(sample)
    assert not trainer.due(2.0)
    trainer.add(engine.samples(1)[0])
    assert trainer.due(2.0)


def test_the_inline_trainer_counts_what_it_refuses() -> None:
    engine, broken = Engine(), Engine(slowdown=6.0)
    trainer = InlineTrainer(next_model(window_of(engine.samples(800)), None, version=7, now_s=0.0))
    broken.now_s = engine.now_s
    for sample in broken.samples(100):
        trainer.add(sample)
    engine.now_s = broken.now_s
    for sample in engine.samples(20):
        trainer.add(sample)
    trainer.add(Sample(engine.samples(1)[0].row, -1.0, None, 0.0, 0.0, 0, 0.0))
    assert trainer.tick(1e6) is None
    counts = trainer.counts
    assert (counts.rejected, trainer.window.refused, counts.published, trainer.model.version) == (2, 1, 0, 7)


def learned(engine: Engine, count: int = 800) -> InlineTrainer:
    """A trainer that has published once."""
    trainer = InlineTrainer(interval_s=0.0)
    for sample in engine.samples(count):
        trainer.add(sample)
    assert trainer.tick(engine.now_s) is not None
    return trainer


def test_drift_forces_a_refit_before_enough_is_new_and_the_model_follows_at_once() -> None:
    engine = Engine()
    trainer = learned(engine)
    engine.slowdown = 2.5
    for sample in engine.samples(40, model=trainer.model):
        trainer.add(sample)
    assert trainer.counts.drifts == 2
    assert trainer.due(engine.now_s)
    trainer.tick(engine.now_s)
    for sample in engine.samples(80, model=trainer.model):
        trainer.add(sample)
        trainer.tick(engine.now_s)
    ttft, tpot = engine.error(trainer.model)
    assert ttft < 0.15
    assert tpot < 0.1


def test_without_drift_nothing_is_forced() -> None:
    engine = Engine()
    trainer = learned(engine)
    for sample in engine.samples(15, model=trainer.model):
        trainer.add(sample)
    assert trainer.counts.drifts == 0
    assert not trainer.due(engine.now_s)


def test_stalls_alone_are_no_drift() -> None:
    drift = Drift()
    assert not any(drift.add(100.0, 100.0 if number % 3 else 5000.0, 0.05) for number in range(200))


def test_what_the_preset_said_before_anything_was_learned_is_no_drift() -> None:
    engine = Engine(slowdown=0.2)
    trainer = InlineTrainer(interval_s=0.0)
    for sample in engine.samples(100, model=trainer.model):
        trainer.add(sample)
    trainer.tick(engine.now_s)
    for sample in engine.samples(100, model=Model.cold()):  # still under way when the first model came
        trainer.add(sample)
    assert trainer.counts.drifts == 0


def test_trees_that_turn_out_to_be_nonsense_are_dropped() -> None:
    engine = Engine()
    trainer = learned(engine)
    good = trainer.model.tpot
    law = lgb.Dataset(engine.rows(200), np.random.default_rng(1).choice([-0.5, 0.5], 200))
    nonsense = lgb.train({"verbosity": -1, "num_threads": 1, "min_data_in_leaf": 1, "learning_rate": 1.0}, law, 1)
    misled = msgspec.structs.replace(good, trees=parse(nonsense.model_to_string()))
    trainer.model = msgspec.structs.replace(trainer.model, tpot=misled)
    trainer.window.clear()
    for sample in Engine(slowdown=9.0).samples(400):  # what else it remembers is no help
        trainer.add(sample)
    for sample in engine.samples(60, model=trainer.model):
        trainer.add(sample)
    assert trainer.counts.drifts >= 1
    model = trainer.tick(engine.now_s)
    assert model is not None
    assert model.tpot.made in (Made.BASE_ALONE, Made.SHORT_MEMORY)
    assert trainer.counts.fallbacks == (model.tpot.made is Made.BASE_ALONE)
    assert engine.error(model)[1] < 0.06


def test_the_base_alone_is_a_candidate_after_drift() -> None:
    engine = Engine()
    old, window = learned(engine).model.ttft, window_of(engine.samples(100))
    data = window.arrays("ttft")
    held = gate._held_out(data.at_s, -np.inf, DEFAULT, every_other=True)
    candidate = gate._base_alone("ttft", old, data, held)
    made = candidate.finish()
    assert (made.made, len(made.trees.first_leaf)) == (Made.BASE_ALONE, 0)
    base_ms = base.base_ms(base.ttft_terms(data.X), old.coefficients, data.X[:, f.ENGINE_CLASS])
    np.testing.assert_allclose(candidate.error, np.log(base_ms / data.y_ms))


def test_after_a_lasting_change_the_model_stays_right_while_the_window_still_remembers_the_old_one() -> None:
    engine = Engine()
    trainer = learned(engine)
    engine.slowdown = 2.5
    errors = []
    for _ in range(30):
        for sample in engine.samples(20, model=trainer.model):
            trainer.add(sample)
        trainer.tick(engine.now_s)
        errors.append(engine.error(trainer.model)[0])
    assert max(errors[3:]) < 0.12, errors  # no relapse
    assert trainer.model.ttft.made is not Made.USUAL


def test_a_trainer_that_forgets_keeps_its_model_and_waits_for_first_samples() -> None:
    engine = Engine()
    trainer = learned(engine)
    trainer.forget()
    assert trainer.window.size("ttft") == 0
    for sample in engine.samples(49):
        trainer.add(sample)
    assert not trainer.due(engine.now_s)
    trainer.add(engine.samples(1)[0])
    assert trainer.due(engine.now_s)
    assert trainer.model.version == 1
