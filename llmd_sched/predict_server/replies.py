"""What the routes answer, field by field as llm-d's trainer and predictor do."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from llmd_sched.predict_server.rows import POD_TYPES, TPOT, TTFT
from llmd_sched.predict_server.service import Forecast, Service

MODEL_TYPE = "lightgbm"


class Prediction(msgspec.Struct, frozen=True):
    ttft_ms: float
    tpot_ms: float
    predicted_at: datetime
    model_type: str
    objective_type: str
    quantile: float
    last_model_load: datetime | None


class FullPrediction(Prediction, frozen=True):
    """With what only the trainer's route says. The bounds are our lowest and highest quantile, 0.5 and 0.9: half of
    all outcomes lie below the first, nine of ten below the second. The uncertainty is the distance between them."""

    ttft_uncertainty: float
    tpot_uncertainty: float
    ttft_prediction_bounds: tuple[float, float]
    tpot_prediction_bounds: tuple[float, float]


class BulkReply(msgspec.Struct, frozen=True):
    predictions: list[Prediction]
    total_requests: int
    successful_predictions: int
    failed_predictions: int
    processing_time_ms: float


class RowError(msgspec.Struct, frozen=True):
    index: int
    error: str
    request: msgspec.Raw
    """The row as it came."""


class LooseReply(msgspec.Struct, frozen=True):
    predictions: list[Prediction | None]
    errors: list[RowError]
    total_requests: int
    successful_predictions: int
    failed_predictions: int
    processing_time_ms: float


def predictions(service: Service, forecast: Forecast) -> list[Prediction]:
    settings = service.settings
    of_all = (datetime.now(UTC), MODEL_TYPE, settings.objective, settings.quantile, service.loaded_at)
    ttft_ms, tpot_ms = service.answer_ms(forecast).tolist()
    return [Prediction(ttft, tpot, *of_all) for ttft, tpot in zip(ttft_ms, tpot_ms, strict=True)]


def full_prediction(service: Service, forecast: Forecast) -> FullPrediction:
    """Of the one row the forecast is of."""
    (prediction,) = predictions(service, forecast)
    low, high = forecast.quantiles_ms[:, 0, 0].tolist(), forecast.quantiles_ms[:, -1, 0].tolist()
    return FullPrediction(
        **msgspec.structs.asdict(prediction),
        ttft_uncertainty=high[TTFT] - low[TTFT],
        tpot_uncertainty=high[TPOT] - low[TPOT],
        ttft_prediction_bounds=(low[TTFT], high[TTFT]),
        tpot_prediction_bounds=(low[TPOT], high[TPOT]),
    )


def loose_reply(found: dict[int, Prediction], errors: dict[int, str], raws: list[msgspec.Raw], ms: float) -> LooseReply:
    """Each row's prediction or error, by its place in the request."""
    rows = range(len(raws))
    failed = [RowError(index, errors[index], raws[index]) for index in rows if index in errors]
    return LooseReply([found.get(index) for index in rows], failed, len(raws), len(found), len(failed), ms)


def _kind(service: Service) -> dict[str, Any]:
    settings = service.settings
    return {"model_type": MODEL_TYPE, "objective_type": settings.objective, "quantile": settings.quantile}


def root(service: Service) -> dict[str, Any]:
    settings = service.settings
    what = "the mean" if settings.objective == "mean" else f"the {settings.quantile:.0%} quantile"
    return {
        "message": "Latency Predictor is running.",
        **_kind(service),
        "is_ready": service.ready,
        "description": f"Learns from training data and predicts {what} of TTFT and TPOT, in one process.",
    }


def status(service: Service, training_server_url: str) -> dict[str, Any]:
    return {
        "is_ready": service.ready,
        **_kind(service),
        "last_model_load": service.loaded_at,
        "training_server_url": training_server_url,
        "models_exist": {"ttft_model": service.model.ttft.rows > 0, "tpot_model": service.model.tpot.rows > 0},
        "ensemble_active": False,
    }


def reloaded(service: Service) -> dict[str, Any]:
    """There is nothing to sync: a model is in use from the moment it is published."""
    return {
        "synced": True,
        "loaded": service.ready,
        "is_ready": service.ready,
        **_kind(service),
        "last_load_time": service.loaded_at,
    }


def data_status(service: Service) -> dict[str, Any]:
    """There is no test set and no queue-gated ensemble: the trainer holds rows out by itself, fit by fit. Its window
    is not cut into the reference's buckets either; rows are counted by pod type."""
    ttft, tpot, accuracy = service.held("ttft"), service.held("tpot"), service.accuracy
    return {
        "training_data": _counted(ttft.rows, tpot.rows),
        "test_data": _counted(0, 0),
        "ensemble": {"ensemble_mode": False, "ensemble_active": False},
        "metrics": {"ttft_scores_count": accuracy.ttft.count, "tpot_scores_count": accuracy.tpot.count},
        "bucket_distribution": {f"pod_type_{POD_TYPES[one]}": n for one, n in ttft.rows_by_class.items()},
        "model_ready": service.ready,
        "last_retrain": service.loaded_at,
    }


def _counted(ttft: int, tpot: int) -> dict[str, int]:
    return {"ttft_samples": ttft, "tpot_samples": tpot, "total_samples": ttft + tpot}


def model_info(service: Service) -> dict[str, Any]:
    """No model leaves this process, so there is nothing to download."""
    return {
        **_kind(service),
        "available_endpoints": {},
        "model_status": {
            "ttft_model_ready": service.model.ttft.rows > 0,
            "tpot_model_ready": service.model.tpot.rows > 0,
        },
        "evaluation_info": {
            "coverage_percent": "Share of the newest outcomes at or below the predicted quantile; /metrics has it.",
            "mape_percent": "Mean absolute percentage error of the point forecast; /metrics has it.",
        },
    }


def flushed(ttft: int, tpot: int, *, training: bool, test: bool, metrics: bool, reason: str | None) -> dict[str, Any]:
    said = [
        f"{ttft} TTFT and {tpot} TPOT training samples" if training else "",
        "0 TTFT and 0 TPOT test samples" if test else "",
        "all metric scores" if metrics else "",
    ]
    what = ", ".join(filter(None, said))
    return {
        "success": True,
        "flushed_at": datetime.now(UTC),
        "reason": reason,
        "ttft_training_samples_flushed": ttft,
        "tpot_training_samples_flushed": tpot,
        "ttft_test_samples_flushed": 0,
        "tpot_test_samples_flushed": 0,
        "metrics_cleared": metrics,
        "message": f"Successfully flushed: {what}" if what else "No data flushed",
    }
