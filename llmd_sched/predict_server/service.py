"""The predictor behind the API: the model in use, its calibration, its live errors, and the trainer that is fed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal, NamedTuple, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmd_sched.errors import SchedError
from llmd_sched.predict import state
from llmd_sched.predict import trainer as trainers
from llmd_sched.predict.base import TargetName
from llmd_sched.predict.calibrate import Calibrator, group_of
from llmd_sched.predict.features import FEATURES
from llmd_sched.predict.frames import Held
from llmd_sched.predict.ledger import Accuracy, RunningError
from llmd_sched.predict.model import Model
from llmd_sched.predict.trainer import TrainerProcess
from llmd_sched.predict_server.rows import POD_TYPES, Entry, Row, feature_rows, samples
from llmd_sched.types import QUANTILES, Sample

STATE_NAME = "predict-server"
LEARNED_AT_ONCE = 250
"""Entries between two looks at the event loop, a few milliseconds; predictions asked for meanwhile come in between."""
TICK_S = 1e-6
"""Between the arrivals of two entries of one body: the trainer tells rows apart by when they came."""

_log = logging.getLogger(__name__)


class NotReady(SchedError):
    """Nothing has been learned yet."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The command line of ``predict-server``."""

    host: str = "0.0.0.0"
    port: int = 8000
    """0 lets the system choose."""
    objective: Literal["mean", "quantile"] = "quantile"
    quantile: float = 0.9
    interval_s: float = 1.0
    min_samples: int = 50
    """Labels before the first fit."""
    preset: str = "default"
    state_dir: str = ""


class Forecast(NamedTuple):
    """Of n rows, TTFT before TPOT."""

    point_ms: NDArray[np.float64]
    """(2, n)"""
    quantiles_ms: NDArray[np.float64]
    """(2, levels, n) at ``QUANTILES``."""


class Fed(msgspec.Struct):
    """Totals of what came in to be learned."""

    entries: int = 0
    labels: int = 0
    unlabelled: int = 0
    """Entries with nothing observed."""


class Service:
    """Predicts and learns. Owned by one event loop. ConfigError when the state folder cannot be written to."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.calibrator = Calibrator()
        self.accuracy = Accuracy()
        """Of what learned models said of entries that arrived later."""
        self.fed = Fed()
        self.loaded_at: datetime | None = None
        """When the model in use came to be so; None before the first one learned."""
        self.model = Model.cold(settings.preset)
        self._calibrated = False
        self._newest_s = self._forgotten_s = -np.inf
        path = state.prepare(settings.state_dir, STATE_NAME)
        found = state.restored(path, time.monotonic(), time.time()) if path else None
        if found is not None:
            self.model = found.model
            if self.ready:
                self.publish(found.model)
        self.trainer = TrainerProcess(
            self.model,
            self.publish,
            trainers.Settings(interval_s=settings.interval_s, first_samples=settings.min_samples),
            classes=lambda: POD_TYPES,
            state_path=path,
        )

    @property
    def ready(self) -> bool:
        return self.model.version > 0

    async def start(self) -> None:
        self.model.predict(np.zeros((1, len(FEATURES))))  # compiles the kernels before a request needs them
        await self.trainer.start()

    async def stop(self) -> None:
        """The trainer keeps its state on the way out."""
        await self.trainer.stop()

    def check_ready(self) -> None:
        """NotReady before a model has been learned."""
        if not self.ready:
            first, seen = self.settings.min_samples, self.fed.labels
            raise NotReady(f"nothing has been learned yet: the first model needs {first} labels, {seen} have arrived")

    def predict(self, rows: Sequence[Row]) -> Forecast:
        """NotReady before a model has been learned."""
        self.check_ready()
        both = feature_rows(rows)
        point_ms = self._point_ms(both)
        factors = [
            [self.calibrator.factor(name, level, both[target], point_ms[target]) for level in range(len(QUANTILES))]
            for target, name in enumerate(get_args(TargetName))
        ]
        return Forecast(point_ms, point_ms[:, None, :] * np.array(factors))

    def _point_ms(self, both: NDArray[np.float64]) -> NDArray[np.float64]:
        """(2, n): each target of its own rows, from one call for both kinds of rows."""
        n = both.shape[1]
        ttft_ms, tpot_ms = self.model.predict(both.reshape(2 * n, -1))
        return np.array([ttft_ms[:n], tpot_ms[n:]])

    def answer_ms(self, forecast: Forecast) -> NDArray[np.float64]:
        """(2, n): the part of the forecast that the objective asks for."""
        if self.settings.objective == "mean":
            return forecast.point_ms
        return forecast.quantiles_ms[:, QUANTILES.index(self.settings.quantile)]

    async def learn(self, entries: Sequence[Entry]) -> None:
        """Judge what the model in use says of each entry, then hand its labels to the trainer."""
        for begin in range(0, len(entries), LEARNED_AT_ONCE):
            self._learn(entries[begin : begin + LEARNED_AT_ONCE])
            await asyncio.sleep(0)

    def _learn(self, entries: Sequence[Entry]) -> None:
        both, version = feature_rows(entries), self.model.version
        at_s = max(time.monotonic(), self._newest_s) + TICK_S * np.arange(1.0, len(entries) + 1.0)
        self._newest_s = float(at_s[-1])
        self.fed.entries += len(entries)
        self.fed.unlabelled += sum(not (entry.actual_ttft_ms or entry.actual_tpot_ms) for entry in entries)
        for sample in samples(entries, both, self._point_ms(both), version, at_s):
            self.fed.labels += 1
            if version:  # what a preset says is served to nobody, so it is neither judged nor corrected
                self._judge(sample)
            self.trainer.add(sample)

    def _judge(self, sample: Sample) -> None:
        judged: tuple[tuple[TargetName, RunningError, float, float | None], ...] = (
            ("ttft", self.accuracy.ttft, sample.predicted_ttft_ms, sample.ttft_ms),
            ("tpot", self.accuracy.tpot, sample.predicted_tpot_ms, sample.tpot_ms),
        )
        for name, error, predicted_ms, measured_ms in judged:
            if measured_ms is not None:
                factors = self.calibrator.factors(name, group_of(sample.row, predicted_ms))
                error.add(predicted_ms, tuple(predicted_ms * factor for factor in factors), measured_ms)
        self._calibrated = True
        self.calibrator.learn(sample)

    def held(self, target: TargetName) -> Held:
        """What the trainer's window holds, as of its last report, at most a second old."""
        held = self.trainer.held.get(target, Held())
        # A report from before ``flush`` reached the trainer still tells of rows that are gone by now.
        return held if held.oldest_s > self._forgotten_s else Held()

    def flush(self) -> tuple[int, int]:
        """Forget all labels; the model in use stays. How many of TTFT and of TPOT the window held."""
        rows = self.held("ttft").rows, self.held("tpot").rows
        self._newest_s = self._forgotten_s = max(time.monotonic(), self._newest_s)
        self.trainer.forget()
        return rows

    def forget_errors(self) -> None:
        """Judge anew, as if nothing had been predicted so far."""
        self.accuracy = Accuracy()

    def publish(self, model: Model) -> None:
        """Use ``model`` from the next request on."""
        if not self._calibrated:
            self.calibrator = Calibrator()  # no outcome has spoken yet, so the newest fit's own held-out rows do
        self.model, self.loaded_at = model, datetime.now(UTC)
        self.calibrator.publish(model)
        _log.info("model %d, fitted on %d TTFT and %d TPOT labels", model.version, model.ttft.rows, model.tpot.rows)
