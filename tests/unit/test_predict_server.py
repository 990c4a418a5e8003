"""The service behind the API without its child process, and the command line."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from llmd_sched.errors import ConfigError
from llmd_sched.predict import state
from llmd_sched.predict.frames import Held
from llmd_sched.predict.model import Model
from llmd_sched.predict.window import Window
from llmd_sched.predict_server import replies
from llmd_sched.predict_server.cli import add_arguments
from llmd_sched.predict_server.metrics import Metrics
from llmd_sched.predict_server.rows import Entry, Row
from llmd_sched.predict_server.service import LEARNED_AT_ONCE, STATE_NAME, NotReady, Service, Settings
from llmd_sched.types import Sample

ROW = Row(
    kv_cache_percentage=0.5,
    input_token_length=1000,
    num_request_waiting=0,
    num_request_running=3,
    num_tokens_generated=1,
    prefix_cache_score=0.0,
)


def entry(ttft_ms: float = 100.0, tpot_ms: float = 0.0) -> Entry:
    return Entry(**msgspec.structs.asdict(ROW), actual_ttft_ms=ttft_ms, actual_tpot_ms=tpot_ms)


def learned(version: int = 1, **fields: Any) -> Model:
    """The preset as if it had been learned; ``fields`` of its TTFT target."""
    cold = Model.cold()
    return msgspec.structs.replace(cold, version=version, ttft=msgspec.structs.replace(cold.ttft, **fields))


class Fed:
    """A service whose trainer only collects."""

    def __init__(self, **settings: Any) -> None:
        self.service = Service(Settings(**settings))
        self.samples: list[Sample] = []
        self.service.trainer.add = self.samples.append  # type: ignore[method-assign]

    def learn(self, *entries: Entry) -> None:
        asyncio.run(self.service.learn(entries))


def test_nothing_is_predicted_before_a_model_was_learned() -> None:
    fed = Fed(min_samples=50)
    fed.learn(*[entry()] * 12)
    with pytest.raises(NotReady, match="needs 50 labels, 12 have arrived"):
        fed.service.predict([ROW])


@pytest.mark.parametrize(
    ("settings", "factor"),
    [({"objective": "mean"}, 1.0), ({"quantile": 0.5}, 1.0), ({"quantile": 0.9}, 2.0)],
)
def test_the_objective_says_which_part_of_the_forecast_is_the_answer(settings: dict, factor: float) -> None:
    service = Service(Settings(**settings))
    service.publish(learned(held_out_quantiles=(0.0, float(np.log(2.0)))))
    forecast = service.predict([ROW, ROW])
    assert service.answer_ms(forecast)[0] == pytest.approx(factor * forecast.point_ms[0])


def test_the_bounds_are_the_quantiles_of_the_calibration() -> None:
    service = Service(Settings())
    service.publish(learned(held_out_quantiles=(float(np.log(0.5)), float(np.log(2.0)))))
    forecast = service.predict([ROW])
    reply = replies.full_prediction(service, forecast)
    point_ms = float(forecast.point_ms[0, 0])
    assert reply.ttft_prediction_bounds == pytest.approx((0.5 * point_ms, 2.0 * point_ms))
    assert reply.ttft_uncertainty == pytest.approx(1.5 * point_ms)
    assert reply.ttft_ms == pytest.approx(2.0 * point_ms)


def test_a_sample_carries_what_the_model_in_use_says_of_its_row() -> None:
    fed = Fed()
    fed.service.publish(learned(version=3))
    fed.learn(entry(ttft_ms=100.0, tpot_ms=20.0))
    ttft_ms, tpot_ms = fed.service.predict([ROW]).point_ms[:, 0].tolist()
    assert [(s.ttft_ms, s.tpot_ms) for s in fed.samples] == [(100.0, None), (None, 20.0)]
    assert fed.samples[0].predicted_ttft_ms == pytest.approx(ttft_ms)
    assert fed.samples[1].predicted_tpot_ms == pytest.approx(tpot_ms)
    assert {s.model_version for s in fed.samples} == {3}


def test_samples_arrive_one_after_the_other_across_bodies() -> None:
    fed = Fed()
    fed.learn(*[entry()] * (LEARNED_AT_ONCE + 10))
    fed.learn(*[entry()] * 10)
    at_s = [sample.at_s for sample in fed.samples]
    assert len(at_s) == LEARNED_AT_ONCE + 20
    assert at_s == sorted(set(at_s))


def test_an_entry_with_nothing_observed_is_counted_and_not_learned() -> None:
    fed = Fed()
    fed.learn(entry(0.0, 0.0), entry())
    assert len(fed.samples) == 1
    assert (fed.service.fed.entries, fed.service.fed.unlabelled, fed.service.fed.labels) == (2, 1, 1)


def test_no_entries_are_no_error() -> None:
    fed = Fed()
    fed.learn()
    assert fed.samples == []


def test_errors_of_learned_models_are_judged_and_correct_the_quantiles() -> None:
    fed = Fed()
    fed.service.publish(learned(held_out_quantiles=(0.0, 0.0)))
    before_ms = fed.service.answer_ms(fed.service.predict([ROW]))[0, 0]
    fed.learn(*[entry(ttft_ms=2.0 * before_ms)] * 60)
    assert fed.service.answer_ms(fed.service.predict([ROW]))[0, 0] > 1.5 * before_ms
    assert fed.service.accuracy.ttft.count == 60
    assert fed.service.accuracy.ttft.mape_pct == pytest.approx(50.0)
    assert fed.service.accuracy.tpot.count == 0


def test_errors_of_the_preset_are_not_since_it_answers_nobody() -> None:
    fed = Fed()
    fed.learn(*[entry(ttft_ms=1e6)] * 60)
    fed.service.publish(learned(held_out_quantiles=(0.0, 0.1)))
    forecast = fed.service.predict([ROW])
    assert fed.service.accuracy.ttft.count == 0
    assert forecast.quantiles_ms[0, :, 0] == pytest.approx(forecast.point_ms[0] * np.exp([0.0, 0.1]))


def test_until_an_outcome_speaks_each_new_fit_brings_its_own_quantiles() -> None:
    fed = Fed()
    fed.service.publish(learned(version=1, held_out_quantiles=(0.0, 0.9)))
    fed.service.publish(learned(version=2, held_out_quantiles=(0.0, 0.1)))
    assert fed.service.calibrator.factors("ttft", 0) == pytest.approx(np.exp([0.0, 0.1]))
    fed.learn(entry(ttft_ms=float(fed.service.predict([ROW]).point_ms[0, 0])))
    kept = fed.service.calibrator.factors("ttft", 0)
    fed.service.publish(learned(version=3, held_out_quantiles=(0.0, 0.9)))
    assert fed.service.calibrator.factors("ttft", 0) == kept


def test_after_a_flush_no_report_from_before_it_is_believed() -> None:
    service = Service(Settings())
    now_s = time.monotonic()
    service.trainer.held = {"ttft": Held({0: 40, 1: 2}, now_s - 5.0, now_s), "tpot": Held({0: 7}, now_s - 5.0, now_s)}
    assert service.flush() == (42, 7)
    assert (service.held("ttft").rows, service.held("tpot").rows) == (0, 0)
    assert service.flush() == (0, 0)
    later_s = time.monotonic() + 1.0
    service.trainer.held = {"ttft": Held({0: 3}, later_s, later_s)}
    assert replies.data_status(service)["training_data"] == {"ttft_samples": 3, "tpot_samples": 0, "total_samples": 3}


def test_a_saved_state_is_ready_at_once(tmp_path: Path) -> None:
    model = learned(version=9, rows=100)
    state.save(tmp_path / state.file_name(STATE_NAME), model, Window(), time.monotonic(), time.time())
    service = Service(Settings(state_dir=str(tmp_path)))
    assert service.ready
    assert service.model.version == 9
    assert service.loaded_at is not None
    assert replies.status(service, "http://x")["models_exist"] == {"ttft_model": True, "tpot_model": False}


@pytest.mark.parametrize("saved", [b"", b"rubbish"])
def test_a_state_that_cannot_be_read_starts_cold(tmp_path: Path, saved: bytes) -> None:
    (tmp_path / state.file_name(STATE_NAME)).write_bytes(saved)
    assert not Service(Settings(state_dir=str(tmp_path))).ready


def test_a_state_saved_before_the_first_fit_is_not_ready(tmp_path: Path) -> None:
    state.save(tmp_path / state.file_name(STATE_NAME), Model.cold(), Window(), time.monotonic(), time.time())
    assert not Service(Settings(state_dir=str(tmp_path))).ready


def test_a_state_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--predictor-state-dir: cannot write"):
        Service(Settings(state_dir=str(tmp_path / "file")))


def test_the_metrics_page_has_the_references_names_and_ours() -> None:
    fed = Fed(quantile=0.9)
    fed.service.publish(learned(version=4))
    fed.learn(entry(), entry(0.0, 0.0))
    fed.service.trainer.held = {"ttft": Held({0: 5, 2: 1}, 1.0, 2.0)}
    metrics = Metrics(fed.service)
    metrics.count("/predict", 422)
    metrics.predicted(3, 0.002, refused=1)
    lines = set(metrics.page().decode().splitlines())
    assert lines >= {
        'model_type{type="lightgbm"} 1.0',
        'objective_type{type="quantile"} 1.0',
        "model_quantile 0.9",
        'training_samples_count{model="ttft",pod_type=""} 5.0',
        'training_samples_count{model="ttft",pod_type="decode"} 1.0',
        "ttft_live_sample_count 1.0",
        "tpot_live_coverage_percent NaN",
        'llm_d_epp_predictor_model_version{plugin_name="predict-server"} 4.0',
        "predict_server_entries_total 2.0",
        "predict_server_entries_unlabelled_total 1.0",
        'predict_server_requests_total{route="/predict",status="422"} 1.0',
        'predict_server_rows_total{fate="predicted"} 3.0',
        'predict_server_rows_total{fate="refused"} 1.0',
        'predict_server_prediction_seconds_bucket{le="0.002"} 1.0',
    }


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="p")
    add_arguments(parser)
    return parser.parse_args(argv)


VARIABLES = {
    "PREDICT_HOST": ("host", "127.0.0.1", "127.0.0.1"),
    "PREDICT_PORT": ("port", "8123", 8123),
    "LATENCY_OBJECTIVE_TYPE": ("objective", "mean", "mean"),
    "LATENCY_QUANTILE_ALPHA": ("quantile", "0.50", 0.5),
    "LATENCY_RETRAINING_INTERVAL_SEC": ("retraining_interval", "1800", 1800.0),
    "LATENCY_MIN_SAMPLES_FOR_RETRAIN_FRESH": ("min_samples", "10", 10),
}


def test_without_flags_and_environment_the_defaults_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    args = vars(parse())
    assert args == {
        "host": "0.0.0.0",
        "port": 8000,
        "objective": "quantile",
        "quantile": 0.9,
        "retraining_interval": 1.0,
        "min_samples": 50,
        "preset": "default",
        "predictor_state_dir": "",
        "verbosity": 2,
    }


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_of_the_reference_is_the_default_and_its_flag_wins(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    name, text, value = VARIABLES[variable]
    monkeypatch.setenv(variable, text)
    assert vars(parse())[name] == value
    monkeypatch.setenv(variable, "rubbish")
    assert vars(parse(f"--{name.replace('_', '-')}", text))[name] == value


@pytest.mark.parametrize(
    ("flag", "value", "accepted"),
    [
        ("--port", "x", "a port from 0 (any free one) to 65535 (set by the flag or $PREDICT_PORT)"),
        ("--port", "65536", "a port from 0"),
        ("--objective", "median", "mean or quantile (set by the flag or $LATENCY_OBJECTIVE_TYPE)"),
        ("--quantile", "0.95", "a quantile that is kept: 0.5 or 0.9 (set by the flag or $LATENCY_QUANTILE_ALPHA)"),
        ("--quantile", "ninety", "a quantile that is kept"),
        ("--retraining-interval", "0", "a number of seconds, at least 0.1"),
        ("--retraining-interval", "nan", "a number of seconds"),
        ("--min-samples", "0", "a whole number of samples, at least 1"),
        ("--min-samples", "1.5", "a whole number of samples"),
        ("--preset", "h900", "a preset: default, "),
    ],
)
def test_a_bad_value_is_refused_with_its_flag_and_what_is_accepted(
    capsys: pytest.CaptureFixture[str], flag: str, value: str, accepted: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(flag, value)
    assert ended.value.code == 2
    assert f"argument {flag}: {value!r} is not {accepted}" in capsys.readouterr().err


def test_a_bad_variable_is_refused_like_its_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LATENCY_QUANTILE_ALPHA", "0.95")
    with pytest.raises(SystemExit) as ended:
        parse()
    assert ended.value.code == 2
    assert "0.5 or 0.9 (set by the flag or $LATENCY_QUANTILE_ALPHA)" in capsys.readouterr().err


def test_replies_name_every_field_of_the_reference() -> None:
    service = Service(Settings())
    asked = {
        "status": replies.status(service, "http://here"),
        "reload": replies.reloaded(service),
        "info": replies.model_info(service),
        "flush": replies.flushed(1, 2, training=True, test=False, metrics=True, reason="r"),
    }
    read = json.loads(msgspec.json.encode(asked))
    kind = {"model_type": "lightgbm", "objective_type": "quantile", "quantile": 0.9}
    assert read["status"] == kind | {
        "is_ready": False,
        "last_model_load": None,
        "training_server_url": "http://here",
        "models_exist": {"ttft_model": False, "tpot_model": False},
        "ensemble_active": False,
    }
    assert read["reload"] == kind | {"synced": True, "loaded": False, "is_ready": False, "last_load_time": None}
    assert read["info"]["model_status"] == {"ttft_model_ready": False, "tpot_model_ready": False}
    assert read["flush"].pop("flushed_at").endswith("Z")
    assert read["flush"] == {
        "success": True,
        "reason": "r",
        "ttft_training_samples_flushed": 1,
        "tpot_training_samples_flushed": 2,
        "ttft_test_samples_flushed": 0,
        "tpot_test_samples_flushed": 0,
        "metrics_cleared": True,
        "message": "Successfully flushed: 1 TTFT and 2 TPOT training samples, all metric scores",
    }
