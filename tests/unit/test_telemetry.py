"""Bounds on labels, running requests, the pool's gauges, twins, and the page they stand on."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parsed_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from llmd_sched.telemetry import Gauge, Telemetry, Values, pool_gauges, pulled
from llmd_sched.telemetry import instruments as instruments_module
from llmd_sched.telemetry import requests as requests_module
from llmd_sched.telemetry.instruments import number
from tests.builders import endpoint, endpoints, request

Sampled = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(page: bytes) -> Sampled:
    families = text_string_to_metric_families(page.decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry(CollectorRegistry())


def value(telemetry: Telemetry, name: str, **labels: str) -> float | None:
    return samples(telemetry.page()).get((name, tuple(sorted(labels.items()))))


def read(values: Iterator[Gauge]) -> dict[str, dict[tuple[str, ...], float]]:
    return {name: dict(rows) for name, _, _, rows in values}


# --- bounds -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch) -> Telemetry:
    monkeypatch.setattr(requests_module, "MAX_LABEL_VALUES", 2)
    monkeypatch.setattr(requests_module, "MAX_LABEL_SETS", 3)
    return telemetry


def test_model_names_beyond_the_bound_are_other(small: Telemetry) -> None:
    assert small.labels("a", "b", "f", 0) == ("a", "b", "f", "0")
    assert small.labels("c", "a", "f", 0) == ("other", "a", "f", "0")
    assert small.labels("a", "d", "f", 0) == ("a", "other", "f", "0")


def test_a_configured_model_name_is_never_other(small: Telemetry) -> None:
    small.pin(["configured"])
    for name in ("a", "b", "c"):
        small.labels(name, name, "f", 0)
    assert small.labels("configured", "c", "f", 0)[:2] == ("configured", "other")


def test_fairness_ids_are_bounded_apart_from_models(small: Telemetry) -> None:
    assert [small.labels("a", "a", flow, 0)[2] for flow in ("x", "y", "z", "x")] == ["x", "y", "other", "x"]


def test_an_endless_name_is_cut(telemetry: Telemetry) -> None:
    assert telemetry.labels("m" * 10_000, "t", "f", 0)[0] == "m" * 256


def test_too_many_combinations_lose_their_fairness_id_and_then_everything(small: Telemetry) -> None:
    seen = [small.series("a", "a", "x", priority).labels for priority in range(7)]
    assert seen[2] == ("a", "a", "x", "2")
    assert seen[3] == ("a", "a", "other", "3")
    assert seen[4] == ("a", "a", "other", "4")
    assert seen[5] == ("other", "other", "other", "5")
    assert small.series("a", "a", "x", 2).labels == ("a", "a", "x", "2")
    assert small.series("a", "a", "x", 4).labels == ("a", "a", "other", "4")


def test_any_metric_is_bounded(telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruments_module, "MAX_CHILDREN", 2)
    for pod in "abcd":
        telemetry.counter("kv_cache_events_messages_received_total").labels(pod).inc()
    name = "llm_d_epp_kv_cache_events_messages_received_total"
    assert [value(telemetry, name, pod_identifier=pod) for pod in ("a", "b", "c", "other")] == [1, 1, None, 2]


# --- instruments ------------------------------------------------------------------------------------------------------


def test_an_instrument_is_made_once_and_its_kind_is_checked(telemetry: Telemetry) -> None:
    assert telemetry.histogram("prefix_indexer_hit_ratio") is telemetry.histogram("prefix_indexer_hit_ratio")
    with pytest.raises(ValueError, match="flow_control_queue_size is a gauge, not a counter"):
        telemetry.counter("flow_control_queue_size")
    with pytest.raises(KeyError):
        telemetry.counter("of_my_own_total")
    with pytest.raises(ValueError, match=r"prefix_indexer_hit_ratio takes .*plugin_type.*, not 1 values"):
        telemetry.histogram("prefix_indexer_hit_ratio").labels("p")


def test_a_histogram_counts_what_is_at_most_the_edge(telemetry: Telemetry) -> None:
    child = telemetry.histogram("prefix_indexer_hit_ratio").labels("p", "t")
    for ratio in (0.0, 0.1, 0.15, 1.0, 7.0):
        child.observe(ratio)
    name = "llm_d_epp_prefix_indexer_hit_ratio"
    labels = {"plugin_name": "p", "plugin_type": "t"}
    edges = {"0": 1, "0.1": 2, "0.2": 3, "0.9": 3, "1": 4, "+Inf": 5}
    assert {le: value(telemetry, f"{name}_bucket", le=le, **labels) for le in edges} == edges
    assert value(telemetry, f"{name}_sum", **labels) == pytest.approx(8.25)
    assert value(telemetry, f"{name}_count", **labels) == 5


def test_a_gauge_goes_up_and_down(telemetry: Telemetry) -> None:
    streams = telemetry.gauge("extproc_streams_inflight").labels()
    streams.inc()
    streams.inc(3)
    streams.dec()
    assert value(telemetry, "llm_d_epp_extproc_streams_inflight") == 3
    streams.set(1.5)
    assert value(telemetry, "llm_d_epp_extproc_streams_inflight") == 1.5


def test_what_was_never_observed_is_not_on_the_page_unless_it_has_no_labels(telemetry: Telemetry) -> None:
    telemetry.series("m", "t", "f", 0)
    page = telemetry.page().decode()
    assert "llm_d_epp_request_duration_seconds" not in page
    assert "llm_d_epp_scheduler_e2e_duration_seconds_count 0" in page


def test_plugins_are_timed_by_point_type_and_name(telemetry: Telemetry) -> None:
    telemetry.observe_plugins(
        [("Scorer", "queue-scorer", "q", 5.0, 0.004), ("Picker", "max-score-picker", "m", 6.0, 1)]
    )
    for prefix in ("llm_d_epp", "inference_extension"):
        name = f"{prefix}_plugin_duration_seconds_sum"
        labels = {"extension_point": "Scorer", "plugin_type": "queue-scorer", "plugin_name": "q"}
        assert value(telemetry, name, **labels) == pytest.approx(0.004)


# --- the page ---------------------------------------------------------------------------------------------------------


def filled(telemetry: Telemetry) -> Telemetry:
    for model in ("a", 'quo"te\\back\nline', "100%s", "\0"):
        for flow in ("x", "y"):
            series = telemetry.series(model, "t", flow, -1)
            series.requests.inc()
            series.duration_s.observe(0.3)
            series.ttft_s[True].observe(1e9)
            series.predictions.observe("p", 0.2, 0.01, 1e-5)
    telemetry.pull(lambda: pulled("flow_control_queue_size", [(("f", "0", "pool", "m", "t"), 4.0)]))
    return telemetry


def test_the_page_says_what_the_registry_says(telemetry: Telemetry) -> None:
    filled(telemetry)

    def own(page: bytes) -> Sampled:
        return {key: v for key, v in samples(page).items() if not key[0].startswith("process_")}

    assert own(telemetry.page()) == own(generate_latest(telemetry.registry))
    assert len(own(telemetry.page())) > 500


def test_the_registry_can_be_written_as_openmetrics(telemetry: Telemetry) -> None:
    page = openmetrics.generate_latest(filled(telemetry).registry).decode()
    assert "# TYPE llm_d_epp_request counter" in page
    assert page.endswith("# EOF\n")
    assert list(parsed_openmetrics(page))


def test_twins_sum_over_the_labels_they_lack(telemetry: Telemetry) -> None:
    filled(telemetry)
    old = {"model_name": "a", "target_model_name": "t"}
    assert value(telemetry, "inference_objective_request_total", priority="-1", **old) == 2
    assert value(telemetry, "inference_objective_request_duration_seconds_count", **old) == 2
    assert value(telemetry, "inference_objective_request_duration_seconds_bucket", le="0.2", **old) == 0
    assert value(telemetry, "inference_objective_request_duration_seconds_bucket", le="0.4", **old) == 2
    assert value(telemetry, "llm_d_epp_request_total", fairness_id="x", priority="-1", **old) == 1


def test_an_unpaired_surrogate_does_not_break_the_page(telemetry: Telemetry) -> None:
    telemetry.series("\ud800", "t", "f", 0).requests.inc()
    assert b'model_name="?"' in telemetry.page()


NUMBERS = [
    (0.0, "0"),
    (5, "5"),
    (0.25, "0.25"),
    (-3.0, "-3"),
    (0.0001, "0.0001"),
    (0.00001, "1e-05"),
    (131072, "131072"),
    (1048576, "1.048576e+06"),
    (1073741824, "1.073741824e+09"),
    (1e300, "1e+300"),
    (0.1 + 0.2, "0.30000000000000004"),
    (1234567.1, "1.2345671e+06"),
    (float("inf"), "+Inf"),
    (float("-inf"), "-Inf"),
    (float("nan"), "NaN"),
]


@pytest.mark.parametrize(("given", "text"), NUMBERS, ids=[text for _, text in NUMBERS])
def test_numbers_are_written_as_go_writes_them(given: float, text: str) -> None:
    assert number(given) == text


def test_what_cannot_be_read_takes_nothing_else_down(telemetry: Telemetry, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Iterator[Gauge]:
        yield from pulled("open_requests", [((), 3.0)])
        raise RuntimeError("changed size during iteration")

    telemetry.pull(broken)
    telemetry.pull(lambda: pulled("lost_requests_total", [((), 1.0)]))
    with caplog.at_level(logging.ERROR):
        page = samples(telemetry.page())
    assert page["llm_d_epp_open_requests", ()] == 3
    assert page["llm_d_epp_lost_requests_total", ()] == 1
    assert "changed size during iteration" in caplog.text


# --- pulled -----------------------------------------------------------------------------------------------------------


def test_running_requests_rise_fall_and_stay_at_nought(telemetry: Telemetry) -> None:
    flying = [request(model="m", target_model="t1"), request(model="m", target_model="t2", fairness_id="x")]
    telemetry.pull(lambda: telemetry.running(flying))
    first = {"model_name": "m", "target_model_name": "t1", "fairness_id": "default-flow", "priority": "0"}
    for one in flying:
        telemetry.series(one.model, one.target_model, one.fairness_id, one.priority)
    assert value(telemetry, "llm_d_epp_request_running", **first) == 1
    assert value(telemetry, "inference_objective_running_requests", model_name="m") == 2
    flying.clear()
    assert value(telemetry, "llm_d_epp_request_running", **first) == 0
    assert value(telemetry, "inference_objective_running_requests", model_name="m") == 0


def test_the_pools_gauges_are_over_fresh_endpoints() -> None:
    columns = {
        "kv_usage": np.array([0.2, 0.4, 0.9]),
        "waiting": np.array([1.0, 3.0, 50.0]),
        "running": np.array([4.0, 4.0, 70.0]),
    }
    found = read(pool_gauges("pool", columns, np.array([True, True, False]), endpoints(3)))
    one = {name: rows[("pool",)] for name, rows in found.items() if ("pool",) in rows}
    assert one == pytest.approx(
        {
            "llm_d_epp_ready_endpoints": 2.0,
            "llm_d_epp_average_kv_cache_utilization": 0.3,
            "llm_d_epp_average_queue_size": 2.0,
            "llm_d_epp_average_running_requests": 4.0,
            "llm_d_epp_std_dev_kv_cache_utilization": 0.1,
            "llm_d_epp_std_dev_queue_size": 1.0,
            "llm_d_epp_std_dev_running_requests": 0.0,
            "inference_pool_ready_pods": 2.0,
            "inference_pool_average_kv_cache_utilization": 0.3,
            "inference_pool_average_queue_size": 2.0,
            "inference_pool_average_running_requests": 4.0,
        }
    )
    queues = {("pool", endpoint(i).key): waiting for i, waiting in enumerate((1.0, 3.0, 50.0))}
    assert found["llm_d_epp_per_endpoint_queue_size"] == queues
    assert found["inference_pool_per_pod_queue_size"] == queues


def test_an_empty_or_stale_pool_is_nought_and_not_nan() -> None:
    columns = {name: np.array([5.0]) for name in ("kv_usage", "waiting", "running")}
    found = read(pool_gauges("pool", columns, np.array([False]), endpoints(1)))
    assert found["llm_d_epp_average_queue_size"] == {("pool",): 0.0}
    assert found["llm_d_epp_std_dev_queue_size"] == {("pool",): 0.0}
    assert read(pool_gauges("pool", {name: np.zeros(0) for name in columns}, np.zeros(0, dtype=bool), []))


TWINS = [
    (
        "prefix_indexer_size",
        [(("p", "t"), 3.0), (("q", "t"), 4.0)],
        "inference_extension_prefix_indexer_size",
        {(): 7.0},
    ),
    (
        "flow_control_pool_saturation",
        [(("pool", "prefill"), 0.4), (("pool", "decode"), 0.9), (("pool", "effective"), 0.9)],
        "inference_extension_flow_control_pool_saturation",
        {("pool",): 0.9},
    ),
    (
        "disagg_decision_total",
        [(("p", "t", "m", "decode-only"), 1.0), (("q", "t", "m", "decode-only"), 2.0)],
        "llm_d_inference_scheduler_disagg_decision_total",
        {("m", "decode-only"): 3.0},
    ),
]


@pytest.mark.parametrize(("name", "values", "twin", "merged"), TWINS, ids=[name for name, *_ in TWINS])
def test_a_pulled_twin_is_made_of_what_it_cannot_tell_apart(
    name: str, values: Values, twin: str, merged: dict[tuple[str, ...], float]
) -> None:
    assert read(pulled(name, values)) == {f"llm_d_epp_{name}": dict(values), twin: merged}
