"""What an operator needs to believe or distrust the model, read from the live objects when Prometheus asks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from llmd_sched.predict.base import TargetName
from llmd_sched.predict.frames import Held
from llmd_sched.predict.ledger import Accuracy, RunningError
from llmd_sched.predict.model import Model
from llmd_sched.predict.producer import PredictedLatency
from llmd_sched.predict.trainer import TrainerProcess
from llmd_sched.telemetry import Gauge
from llmd_sched.types import QUANTILES

_PREFIX = "llm_d_epp_predictor_"
_PLUGIN = ("plugin_name",)
_TARGET = ("plugin_name", "target")


def producer_gauges(producer: PredictedLatency, trainer: TrainerProcess, now_s: float) -> Iterable[Gauge]:
    """Everything of one producer and its trainer; ``now_s`` on the clock of the samples."""
    name, ledger = producer.name, producer.ledger
    yield _PREFIX + "open_predictions", "Predictions without an outcome yet.", _PLUGIN, [((name,), len(ledger))]
    fates = [((name, fate), float(count)) for fate, count in sorted(ledger.counts.items())]
    yield _PREFIX + "outcomes_total", "Predictions by what became of them.", ("plugin_name", "fate"), fates
    yield from predictor_gauges(
        name, producer.model, trainer, trainer.held, ledger.accuracy, producer.classes.names, now_s
    )


def predictor_gauges(
    name: str,
    model: Model,
    trainer: TrainerProcess,
    held: Mapping[str, Held],
    accuracy: Accuracy,
    classes: Sequence[str],
    now_s: float,
) -> Iterable[Gauge]:
    """The model in use, its trainer, the window it was fitted on and its live errors, whoever predicts with it."""
    for metric, text, value in (*_of_the_model(model, now_s), *_of_the_trainer(trainer)):
        yield _PREFIX + metric, text, _PLUGIN, [((name,), float(value))]
    yield from _of_the_errors(name, accuracy)
    yield from _of_the_window(name, held, classes, now_s)
    yield from _of_the_fit(name, model)


def _of_the_model(model: Model, now_s: float) -> Iterable[tuple[str, str, float]]:
    yield "model_version", "Version of the model in use; 0 is the cold start.", model.version
    yield "model_samples", "Samples its trainer had received when it was fitted.", model.samples
    age_s = now_s - model.fitted_at_s if model.version else math.nan
    yield "model_age_seconds", "Since the model in use was fitted.", age_s


def _of_the_trainer(trainer: TrainerProcess) -> Iterable[tuple[str, str, float]]:
    counts = trainer.counts
    yield "trainer_up", "1 while the trainer's process runs.", float(trainer.pid is not None)
    yield "trainer_restarts_total", "Times the trainer died or hung and was started again.", trainer.restarts
    yield "fit_cpu_seconds", "CPU of the last fit of both targets.", trainer.fit_cpu_ms / 1e3
    yield "fits_total", "Fits tried.", counts.fits
    yield "fits_failed_total", "Fits that ended in an error.", counts.failed
    yield "models_published_total", "Models taken into use.", counts.published
    yield "models_rejected_total", "Fits of one target the gate refused.", counts.rejected
    yield "drift_events_total", "Times the live error left what the fit had promised.", counts.drifts
    yield "base_fallbacks_total", "Times trees were dropped because the base alone did better.", counts.fallbacks
    yield "samples_sent_total", "Samples given to the trainer.", trainer.samples_sent
    yield "samples_dropped_total", "Samples lost to a full buffer or a broken pipe.", trainer.samples_dropped
    yield "labels_refused_total", "Labels that were no measurement.", counts.refused


def _of_the_errors(plugin: str, accuracy: Accuracy) -> Iterable[Gauge]:
    live: list[tuple[str, RunningError]] = [("ttft", accuracy.ttft), ("tpot", accuracy.tpot)]
    errors = [((plugin, name), error.mape_pct / 100.0) for name, error in live]
    yield _PREFIX + "live_error_ratio", "Mean absolute percentage error, newest predictions.", _TARGET, errors
    covered = [
        ((plugin, name, str(quantile)), share / 100.0)
        for name, error in live
        for quantile, share in zip(QUANTILES, error.coverage_pct, strict=True)
    ]
    text = "Share of the newest outcomes within the predicted quantile."
    yield _PREFIX + "live_coverage_ratio", text, (*_TARGET, "quantile"), covered


def _of_the_window(plugin: str, held: Mapping[str, Held], classes: Sequence[str], now_s: float) -> Iterable[Gauge]:
    rows = [
        ((plugin, target, classes[one] if one < len(classes) else "?"), float(count))
        for target, one_target in held.items()
        for one, count in one_target.rows_by_class.items()
    ]
    yield _PREFIX + "window_rows", "Labelled rows in the window.", (*_TARGET, "engine_class"), rows
    for end, text in (("oldest", "Age of the window's oldest row."), ("newest", "Age of the window's newest row.")):
        ages = [((plugin, target), now_s - getattr(one_target, f"{end}_s")) for target, one_target in held.items()]
        yield f"{_PREFIX}window_{end}_age_seconds", text, _TARGET, ages


def _of_the_fit(plugin: str, model: Model) -> Iterable[Gauge]:
    targets = [(name, model.target(name)) for name in get_args(TargetName)]
    rows = [((plugin, name), float(target.rows)) for name, target in targets]
    yield _PREFIX + "model_rows", "Labelled rows the target was fitted on.", _TARGET, rows
    trees = [((plugin, name), float(len(target.trees.first_leaf))) for name, target in targets]
    yield _PREFIX + "model_trees", "Trees in use; 0 = the base alone.", _TARGET, trees
    promised = [((plugin, name), math.expm1(target.held_out_error)) for name, target in targets]
    yield _PREFIX + "held_out_error_ratio", "Median error on rows the fit had not seen.", _TARGET, promised
    bias = [
        ((plugin, name, endpoint), math.exp(value))
        for name, target in targets
        for endpoint, value in sorted(target.bias.items())
    ]
    text = "How many times slower an endpoint is than its row explains."
    yield _PREFIX + "endpoint_bias_ratio", text, (*_TARGET, "model_server_endpoint"), bias
