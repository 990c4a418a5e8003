import numpy as np
import pytest

from llmd_sched.predict import features as f
from llmd_sched.predict.fit import Recipe, fit
from llmd_sched.predict.inline import InlineTrainer
from llmd_sched.predict.model import Model
from llmd_sched.predict.window import Window
from llmd_sched.types import Array, Sample


class Engine:
    """A made-up engine: latencies by a law the base cannot quite express, with 5 % noise."""

    def __init__(self, seed: int = 0, slowdown: float = 1.0) -> None:
        self.rng = np.random.default_rng(seed)
        self.slowdown = slowdown
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
        X[:, f.RUNNING] = X[:, f.INFLIGHT_REQUESTS] = np.floor(self.rng.uniform(0, 40 * load, count))
        X[:, f.INFLIGHT_PREFILL] = self.rng.uniform(0, 10_000 * load, count)
        X[:, f.RESIDENT] = X[:, f.RUNNING] * 1500.0
        X[:, f.KV_USAGE] = self.rng.uniform(0, 1, count)
        return X

    def samples(self, count: int, load: float = 1.0) -> list[Sample]:
        X = self.rows(count, load)
        noise = np.exp(0.05 * self.rng.normal(size=(2, count)))
        ttft_ms, tpot_ms = self.true_ttft_ms(X) * noise[0], self.true_tpot_ms(X) * noise[1]
        made = []
        for row, ttft, tpot in zip(X.tolist(), ttft_ms.tolist(), tpot_ms.tolist(), strict=True):
            self.now_s += 0.05
            made.append(Sample(tuple(row), ttft, tpot, 0.0, 0.0, 0, self.now_s))
        return made

    def error(self, model: Model, load: float = 1.0) -> tuple[float, float]:
        """Mean relative errors of both targets against the noiseless law on fresh rows."""
        X = self.rows(400, load)
        truth = self.true_ttft_ms(X), self.true_tpot_ms(X)
        ttft, tpot = (np.abs(p / t - 1.0).mean() for p, t in zip(model.predict(X), truth, strict=True))
        return float(ttft), float(tpot)


def window_of(*batches: list[Sample]) -> Window:
    window = Window()
    for batch in batches:
        for sample in batch:
            window.add(sample)
    return window


def test_a_law_is_learned_from_a_few_hundred_rows() -> None:
    engine = Engine()
    model = fit(window_of(engine.samples(800)), None, version=1, now_s=0.0)
    assert model is not None
    ttft, tpot = engine.error(model)
    assert ttft < 0.06
    assert tpot < 0.03
    assert model.version == 1
    assert model.ttft.rows == 800
    assert len(model.ttft.trees.first_leaf) > 0


def test_fifty_rows_already_beat_the_preset_without_trees() -> None:
    engine = Engine(slowdown=0.25)
    model = fit(window_of(engine.samples(50)), None, version=1, now_s=0.0)
    assert model is not None
    assert len(model.ttft.trees.first_leaf) == 0
    assert all(new < 0.5 * old for new, old in zip(engine.error(model), engine.error(Model.cold()), strict=True))


def test_loads_never_seen_are_extrapolated() -> None:
    engine = Engine()
    model = fit(window_of(engine.samples(800)), None, version=1, now_s=0.0)
    assert model is not None
    assert engine.error(model, load=5.0)[0] < 0.15


def test_a_few_stalls_do_not_steer_the_model() -> None:
    engine = Engine()
    samples = engine.samples(600)
    for number in range(0, 600, 50):
        old = samples[number]
        samples[number] = Sample(old.row, 80.0 * (old.ttft_ms or 0.0), old.tpot_ms, 0.0, 0.0, 0, old.at_s)
    model = fit(window_of(samples), None, version=1, now_s=0.0)
    assert model is not None
    assert engine.error(model)[0] < 0.07


def test_after_a_shift_of_regime_the_model_follows() -> None:
    engine = Engine()
    window = window_of(engine.samples(1500))
    model = fit(window, None, version=1, now_s=0.0)
    engine.slowdown = 2.0
    assert model is not None
    assert engine.error(model)[0] > 0.4
    for _ in range(8):
        for sample in engine.samples(150):
            window.add(sample)
        model = fit(window, model, model.version + 1, now_s=engine.now_s) or model
    assert engine.error(model)[0] < 0.12


def test_noise_alone_grows_no_trees() -> None:
    engine = Engine()
    model = fit(window_of(engine.samples(600)), None, version=1, now_s=0.0)
    assert model is not None
    assert len(model.tpot.trees.first_leaf) <= 15  # its law is the base's; the residual is noise
    assert len(model.ttft.trees.first_leaf) > 15


def test_the_gate_keeps_the_incumbent_against_worse_data() -> None:
    engine, broken = Engine(), Engine(slowdown=6.0)
    good = fit(window_of(engine.samples(800)), None, version=1, now_s=0.0)
    assert good is not None
    misleading = broken.samples(300)
    engine.now_s = broken.now_s = max(engine.now_s, broken.now_s)
    assert fit(window_of(misleading, engine.samples(20)), good, version=2, now_s=0.0) is None


def test_one_target_may_pass_while_the_other_has_no_rows() -> None:
    only_ttft = [Sample(s.row, s.ttft_ms, None, 0.0, 0.0, 0, s.at_s) for s in Engine().samples(200)]
    cold = Model.cold()
    model = fit(window_of(only_ttft), cold, version=1, now_s=0.0)
    assert model is not None
    assert model.tpot is cold.tpot
    assert model.ttft is not cold.ttft


def test_a_nearly_empty_window_does_not_replace_a_model_of_many_rows() -> None:
    engine = Engine()
    good = fit(window_of(engine.samples(500)), None, version=1, now_s=0.0)
    assert fit(window_of(engine.samples(10)), good, version=2, now_s=0.0) is None


@pytest.mark.parametrize("count", [0, 1, 5, 59, 60, 61, 99, 150])
def test_any_number_of_rows_can_be_fitted(count: int) -> None:
    engine = Engine()
    model = fit(window_of(engine.samples(count)), None, version=1, now_s=0.0)
    assert (model is None) == (count == 0)
    if model is not None:
        assert all(np.isfinite(times_ms).all() for times_ms in model.predict(engine.rows(50)))


def test_the_same_window_gives_the_same_model() -> None:
    one, two = (fit(window_of(Engine().samples(300)), None, version=1, now_s=0.0) for _ in range(2))
    assert one is not None
    assert two is not None
    assert one.to_bytes() == two.to_bytes()


def test_with_monotone_trees_more_prefill_is_never_faster() -> None:
    engine = Engine()
    model = fit(window_of(engine.samples(800)), None, version=1, now_s=0.0, recipe=Recipe(monotone=True))
    assert model is not None
    X = np.repeat(engine.rows(1), 50, axis=0)
    X[:, f.INFLIGHT_PREFILL] = np.linspace(0, 30_000, 50)
    assert (np.diff(model.predict(X)[0]) >= -1e-9).all()


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
    assert trainer.model.version == trainer.published == len(published)
    assert trainer.model.samples == published[-1]


def test_the_inline_trainer_counts_what_it_refuses() -> None:
    engine, broken = Engine(), Engine(slowdown=6.0)
    trainer = InlineTrainer(fit(window_of(engine.samples(800)), None, version=7, now_s=0.0))
    broken.now_s = engine.now_s
    for sample in broken.samples(100):
        trainer.add(sample)
    engine.now_s = broken.now_s
    for sample in engine.samples(20):
        trainer.add(sample)
    trainer.add(Sample(engine.samples(1)[0].row, -1.0, None, 0.0, 0.0, 0, 0.0))
    assert trainer.tick(1e6) is None
    assert (trainer.rejected, trainer.refused, trainer.published, trainer.model.version) == (2, 1, 0, 7)
