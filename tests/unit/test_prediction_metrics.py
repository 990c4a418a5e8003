"""Metrics of the predictions under both names, and what an operator sees of the predictor itself."""

from __future__ import annotations

import math

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from llmd_sched.predict.frames import Counts, Held
from llmd_sched.predict.gauges import producer_gauges
from llmd_sched.predict.model import Model
from llmd_sched.predict.producer import PredictedLatencyProducer
from llmd_sched.predict.trainer import TrainerProcess
from llmd_sched.telemetry import LATENCY_S, LONG_TPOT_S, PREDICTION_S, Telemetry
from tests.builders import endpoint

Sampled = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Exposed:
    """A registry as Prometheus reads it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.telemetry = Telemetry(self.registry)

    def samples(self) -> Sampled:
        families = text_string_to_metric_families(generate_latest(self.registry).decode())
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples().get((name, tuple(sorted(labels.items()))))


NEW = {"model_name": "m", "target_model_name": "t", "plugin_name": "p", "plugin_type": "predicted-latency-producer"}
OLD = {"model_name": "m", "target_model_name": "t"}


@pytest.fixture
def exposed() -> Exposed:
    made = Exposed()
    predictions = made.telemetry.predictions.of_model("m", "t")
    predictions.observe("p", ttft_s=0.3, tpot_s=0.02, took_s=0.0003)
    predictions.observe("p", ttft_s=0.5, tpot_s=0.03, took_s=0.0004)
    predictions.measure("p", "ttft", 400.0, 350.0)
    predictions.measure("p", "tpot", 25.0, 30.0)
    return made


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("request_predicted_ttft_seconds", 0.8),
        ("request_predicted_tpot_seconds", 0.05),
        ("request_ttft_prediction_duration_seconds", 0.0007),
        ("request_tpot_prediction_duration_seconds", 0.0007),
    ],
)
def test_each_histogram_stands_under_its_new_and_its_old_name(exposed: Exposed, name: str, total: float) -> None:
    for prefix, labels in (("llm_d_epp_", NEW), ("inference_objective_", OLD)):
        assert exposed.value(f"{prefix}{name}_sum", **labels) == pytest.approx(total)
        assert exposed.value(f"{prefix}{name}_count", **labels) == 2
        assert exposed.value(f"{prefix}{name}_bucket", le="+Inf", **labels) == 2


@pytest.mark.parametrize(
    ("name", "buckets"),
    [
        ("request_predicted_ttft_seconds", LATENCY_S),
        ("request_predicted_tpot_seconds", LONG_TPOT_S),
        ("request_ttft_prediction_duration_seconds", PREDICTION_S),
        ("request_tpot_prediction_duration_seconds", PREDICTION_S),
    ],
)
def test_the_buckets_are_the_references(exposed: Exposed, name: str, buckets: tuple[float, ...]) -> None:
    for prefix in ("llm_d_epp_", "inference_objective_"):
        edges = {dict(labels)["le"] for (found, labels) in exposed.samples() if found == f"{prefix}{name}_bucket"}
        assert sorted(map(float, edges)) == [*map(float, buckets), math.inf]
    assert len(LATENCY_S) == 35
    assert LONG_TPOT_S[-1] == 360


def test_the_measured_times_stand_under_the_old_names_too(exposed: Exposed) -> None:
    assert exposed.value("inference_objective_request_ttft_seconds_sum", **OLD) == pytest.approx(0.4)
    assert exposed.value("inference_objective_request_tpot_seconds_sum", **OLD) == pytest.approx(0.025)


def test_a_reply_later_than_its_slo_is_counted_under_both_names(exposed: Exposed) -> None:
    for prefix, labels in (("llm_d_epp_", NEW), ("inference_objective_", OLD)):
        name = f"{prefix}request_slo_violation_total"
        assert exposed.value(name, type="ttft_slo_violation", **labels) == 1
        assert exposed.value(name, type="tpot_slo_violation", **labels) == 0


def test_without_an_slo_nothing_is_violated() -> None:
    exposed = Exposed()
    exposed.telemetry.predictions.of_model("m", "t").measure("p", "ttft", 1e6, None)
    assert exposed.value("llm_d_epp_request_slo_violation_total", type="ttft_slo_violation", **NEW) is None


def test_the_latest_value_of_each_kind_is_a_gauge(exposed: Exposed) -> None:
    expected = {
        "ttft": 0.4,
        "predicted_ttft": 0.5,
        "ttft_prediction_duration": 0.0004,
        "ttft_slo_violation": 1.0,
        "tpot": 0.025,
        "predicted_tpot": 0.03,
        "tpot_prediction_duration": 0.0004,
        "tpot_slo_violation": 0.0,
    }
    for prefix, labels in (("llm_d_epp", NEW), ("inference_objective", OLD)):
        for kind, value in expected.items():
            assert exposed.value(f"{prefix}_inference_request_metric", type=kind, **labels) == pytest.approx(value)


def test_twins_sum_over_what_they_cannot_tell_apart(exposed: Exposed) -> None:
    exposed.telemetry.predictions.of_model("m", "t").observe("q", ttft_s=1.0, tpot_s=0.1, took_s=0.001)
    assert exposed.value("inference_objective_request_predicted_ttft_seconds_count", **OLD) == 3
    assert exposed.value("llm_d_epp_request_predicted_ttft_seconds_count", **NEW) == 2


def test_the_predictor_shows_what_one_needs_to_believe_or_distrust_it() -> None:
    exposed = Exposed()
    producer = PredictedLatencyProducer().open("p")
    producer.classes.code(endpoint(labels={"llm-d.ai/accelerator": "H100"}).labels)
    cold = Model.cold()
    target = msgspec.structs.replace(cold.ttft, rows=321, held_out_error=math.log(1.2), bias={"ns/slow": math.log(1.5)})
    producer.publish(msgspec.structs.replace(cold, version=9, samples=400, fitted_at_s=95.0, ttft=target))
    producer.ledger.counts["settled"] = 7
    producer.ledger.accuracy.ttft.add(110.0, (90.0, 150.0), 100.0)
    trainer = TrainerProcess(producer.model)
    trainer.counts = Counts(samples=400, refused=2, fits=12, failed=1, published=9, rejected=3, drifts=4, fallbacks=5)
    trainer.held = {"ttft": Held({0: 20, 1: 301}, oldest_s=40.0, newest_s=99.0)}
    exposed.telemetry.pull(lambda: producer_gauges(producer, trainer, 100.0))

    def value(name: str, **labels: str) -> float | None:
        return exposed.value(f"llm_d_epp_predictor_{name}", plugin_name="p", **labels)

    assert value("model_version") == 9
    assert value("model_age_seconds") == 5.0
    assert value("model_rows", target="ttft") == 321
    assert value("model_trees", target="ttft") == 0
    assert value("held_out_error_ratio", target="ttft") == pytest.approx(0.2)
    assert value("live_error_ratio", target="ttft") == pytest.approx(0.1)
    assert value("live_coverage_ratio", target="ttft", quantile="0.9") == 1.0
    assert value("live_coverage_ratio", target="ttft", quantile="0.5") == 0.0
    assert value("window_rows", target="ttft", engine_class="H100") == 301
    assert value("window_oldest_age_seconds", target="ttft") == 60.0
    assert value("window_newest_age_seconds", target="ttft") == 1.0
    assert value("endpoint_bias_ratio", target="ttft", model_server_endpoint="ns/slow") == pytest.approx(1.5)
    assert value("outcomes_total", fate="settled") == 7
    assert value("trainer_up") == 0.0
    counters = ("fits", "fits_failed", "models_published", "models_rejected", "drift_events", "base_fallbacks")
    assert [value(f"{name}_total") for name in counters] == [12, 1, 9, 3, 4, 5]
    assert value("labels_refused_total") == 2
