"""Names, types, labels, buckets and twins of every metric, read from the page, against the reference's table."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

import llmd_sched
from llmd_sched.predict.gauges import producer_gauges
from llmd_sched.predict.producer import PredictedLatencyProducer
from llmd_sched.predict.trainer import TrainerProcess
from llmd_sched.telemetry import Telemetry, pool_gauges, pulled
from llmd_sched.telemetry.names import METRICS, OURS, row_of
from tests.builders import endpoints
from tests.contract.metrics_table import EXPECTED, Expected
from tests.contract.metrics_table import OURS as EXPECTED_OURS

NAMES = [one.name for one in EXPECTED]
WITHOUT_TWIN = {"inference_objective_request_ttft_seconds", "inference_objective_request_tpot_seconds"}
DEPRECATED = ("inference_", "llm_d_inference_scheduler_", "kvcache_")


class Page:
    """The text Prometheus reads, taken apart."""

    def __init__(self, telemetry: Telemetry) -> None:
        lines = telemetry.page().decode().splitlines()
        heads = [line.split(" ", 3)[1:] for line in lines if line.startswith("# ")]
        self.help = {name: text for which, name, text in heads if which == "HELP"}
        self.type = {name: text for which, name, text in heads if which == "TYPE"}
        self.labels: dict[str, set[str]] = {}
        self.edges: dict[str, list[float]] = {}
        for line in lines:
            if line and not line.startswith("# "):
                self._sample(*line.rpartition(" ")[::2])
        assert len(self.type) == len([which for which, *_ in heads if which == "TYPE"]), "a family stands there twice"

    def _sample(self, key: str, value: str) -> None:
        name, _, rest = key.partition("{")
        float(value)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        if "le" in labels:
            self.edges.setdefault(name.removesuffix("_bucket"), []).append(float(labels.pop("le")))
        family = name if name in self.type else re.sub(r"_(bucket|sum|count)$", "", name)
        assert family in self.type, f"{name} has no TYPE"
        self.labels.setdefault(family, set()).update(labels)


@pytest.fixture(scope="module")
def observed() -> Page:
    """Every metric of the table observed once."""
    telemetry = Telemetry(CollectorRegistry())
    for one in EXPECTED:
        values = [f"a-{label}" for label in row_of(one.name).labels]
        if one.kind == "counter":
            telemetry.counter(one.name).labels(*values).inc()
        elif one.kind == "gauge":
            telemetry.gauge(one.name).labels(*values).set(1.0)
        else:
            telemetry.histogram(one.name).labels(*values).observe(1.0)
    return Page(telemetry)


@pytest.fixture(scope="module")
def read() -> Page:
    """What is no histogram, pulled rather than observed."""
    telemetry = Telemetry(CollectorRegistry())
    for one in EXPECTED:
        if one.kind != "histogram":
            row = row_of(one.name)
            telemetry.pull(lambda name=one.name, labels=row.labels: pulled(name, [(labels, 1.0)]))
    return Page(telemetry)


def check(page: Page, one: Expected) -> None:
    name = f"llm_d_epp_{one.name}"
    assert page.type[name] == one.kind
    assert page.labels[name] == one.labels
    assert tuple(page.edges.get(name, ())) == ((*one.buckets, float("inf")) if one.buckets else ())
    assert page.help[name].startswith("[ALPHA] ")
    if one.twin:
        assert page.type[one.twin] == one.kind
        assert page.labels[one.twin] == one.twin_labels
        assert page.edges.get(one.twin) == page.edges.get(name)
        assert page.help[one.twin].startswith(f"[ALPHA] [Deprecated: Use {name}] ")


@pytest.mark.parametrize("one", EXPECTED, ids=NAMES)
def test_an_observed_metric_is_the_references(observed: Page, one: Expected) -> None:
    check(observed, one)


@pytest.mark.parametrize(
    "one", [e for e in EXPECTED if e.kind != "histogram"], ids=[e.name for e in EXPECTED if e.kind != "histogram"]
)
def test_a_pulled_metric_is_the_references(read: Page, one: Expected) -> None:
    check(read, one)


def test_no_row_is_missing_or_too_many() -> None:
    assert sorted(METRICS) == sorted(NAMES)
    assert len(set(NAMES)) == len(NAMES)
    assert {name: row.kind for name, row in OURS.items()} == EXPECTED_OURS


def test_no_deprecated_name_stands_alone(observed: Page) -> None:
    twins = {one.twin for one in EXPECTED if one.twin}
    assert {name for name in observed.type if name.startswith(DEPRECATED)} - WITHOUT_TWIN == twins


def whole() -> Page:
    """A process that predicts, with a pool, and all that is ours."""
    telemetry = Telemetry(CollectorRegistry())
    series = telemetry.series("m", "t", "f", 0)
    series.requests.inc()
    series.predictions.observe("p", 0.1, 0.01, 0.001)
    series.predictions.measure("p", "ttft", 10.0, 20.0)
    series.predictions.measure("p", "tpot", 10.0, 20.0)
    columns = {name: np.zeros(2) for name in ("kv_usage", "waiting", "running")}
    telemetry.pull(lambda: pool_gauges("pool", columns, np.ones(2, dtype=bool), endpoints(2)))
    telemetry.pull(lambda: telemetry.running([]))
    producer = PredictedLatencyProducer().open("p")
    telemetry.pull(lambda: producer_gauges(producer, TrainerProcess(producer.model), 1.0))
    for name, row in OURS.items():
        if name != "ignored_header_total":
            telemetry.pull(lambda name=name, row=row: pulled(name, [(row.labels, 1.0)]))
    telemetry.ignored_headers.labels("x").inc()
    return Page(telemetry)


def test_a_process_exports_nothing_that_neither_table_has() -> None:
    page = whole()
    ours = {f"llm_d_epp_{name}" for name in (*NAMES, *EXPECTED_OURS)}
    found = {name for name in page.type if name.startswith("llm_d_epp_")}
    assert {name for name in found - ours if not name.startswith("llm_d_epp_predictor_")} == set()
    assert {f"llm_d_epp_{name}" for name in EXPECTED_OURS} <= found
    assert set(page.type) >= WITHOUT_TWIN


def test_no_source_file_names_a_metric_that_neither_table_has() -> None:
    known = {*NAMES, *EXPECTED_OURS, ""}
    for path in Path(llmd_sched.__file__).parent.rglob("*.py"):
        for name in re.findall(r"llm_d_epp_(\w*)", path.read_text()):
            assert name in known or name.startswith("predictor_"), f"{path.name}: llm_d_epp_{name}"
