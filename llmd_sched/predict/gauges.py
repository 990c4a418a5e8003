"""What an operator needs to believe or distrust the model, read from the live objects when Prometheus asks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import get_args

from llmd_sched.predict.base import TargetName
from llmd_sched.predict.ledger import Ledger, RunningError
from llmd_sched.predict.model import Model
from llmd_sched.predict.producer import PredictedLatency
from llmd_sched.predict.trainer import TrainerProcess
from llmd_sched.telemetry import Gauge
from llmd_sched.types import QUANTILES

_PREFIX = "llm_d_epp_predictor_"
_PLUGIN = ("plugin_name",)
_TARGET = ("plugin_name", "target")


def predictor_gauges(producer: PredictedLatency, trainer: TrainerProcess, now_s: float) -> Iterable[Gauge]:
    """Everything of one predictor and its trainer; ``now_s`` on the clock of the samples."""
    plugin = (producer.name,)
    for name, text, value in (*_of_the_model(producer.model, now_s), *_of_the_trainer(trainer)):
        yield _PREFIX + name, text, _PLUGIN, [(plugin, float(value))]
    yield _PREFIX + "open_predictions", "Predictions without an outcome yet.", _PLUGIN, [(plugin, len(producer.ledger))]
    yield from _of_the_ledger(plugin, producer.ledger)
    yield from _of_the_window(plugin, producer, trainer, now_s)
    yield from _of_the_fit(plugin, producer.model)


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


def _of_the_ledger(plugin: tuple[str], ledger: Ledger) -> Iterable[Gauge]:
    fates = [((*plugin, fate), float(count)) for fate, count in sorted(ledger.counts.items())]
    yield _PREFIX + "outcomes_total", "Predictions by what became of them.", ("plugin_name", "fate"), fates
    live: list[tuple[str, RunningError]] = [("ttft", ledger.accuracy.ttft), ("tpot", ledger.accuracy.tpot)]
    errors = [((*plugin, name), error.mape_pct / 100.0) for name, error in live]
    yield _PREFIX + "live_error_ratio", "Mean absolute percentage error, newest predictions.", _TARGET, errors
    covered = [
        ((*plugin, name, str(quantile)), share / 100.0)
        for name, error in live
        for quantile, share in zip(QUANTILES, error.coverage_pct, strict=True)
    ]
    text = "Share of the newest outcomes within the predicted quantile."
    yield _PREFIX + "live_coverage_ratio", text, (*_TARGET, "quantile"), covered


def _of_the_window(
    plugin: tuple[str], producer: PredictedLatency, trainer: TrainerProcess, now_s: float
) -> Iterable[Gauge]:
    names = producer.classes.names
    rows = [
        ((*plugin, target, names[one] if one < len(names) else "?"), float(count))
        for target, held in trainer.held.items()
        for one, count in held.rows_by_class.items()
    ]
    yield _PREFIX + "window_rows", "Labelled rows in the window.", (*_TARGET, "engine_class"), rows
    for end, text in (("oldest", "Age of the window's oldest row."), ("newest", "Age of the window's newest row.")):
        ages = [((*plugin, target), now_s - getattr(held, f"{end}_s")) for target, held in trainer.held.items()]
        yield f"{_PREFIX}window_{end}_age_seconds", text, _TARGET, ages


def _of_the_fit(plugin: tuple[str], model: Model) -> Iterable[Gauge]:
    targets = [(name, model.target(name)) for name in get_args(TargetName)]
    rows = [((*plugin, name), float(target.rows)) for name, target in targets]
    yield _PREFIX + "model_rows", "Labelled rows the target was fitted on.", _TARGET, rows
    trees = [((*plugin, name), float(len(target.trees.first_leaf))) for name, target in targets]
    yield _PREFIX + "model_trees", "Trees in use; 0 = the base alone.", _TARGET, trees
    promised = [((*plugin, name), math.expm1(target.held_out_error)) for name, target in targets]
    yield _PREFIX + "held_out_error_ratio", "Median error on rows the fit had not seen.", _TARGET, promised
    bias = [
        ((*plugin, name, endpoint), math.exp(value))
        for name, target in targets
        for endpoint, value in sorted(target.bias.items())
    ]
    text = "How many times slower an endpoint is than its row explains."
    yield _PREFIX + "endpoint_bias_ratio", text, (*_TARGET, "model_server_endpoint"), bias
