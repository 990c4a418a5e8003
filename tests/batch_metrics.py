"""All metrics of the batch gateway with something in each: from a made-up state, for their names, labels and values."""

from __future__ import annotations

from collections import Counter
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client import Counter as Counted

from batchgw.api.metrics import ApiMetrics
from batchgw.app.measured import StorageMetrics
from batchgw.pace import Assumed, Headroom, PoolHeadroom
from batchgw.planner import Slack
from batchgw.records import Waiting
from batchgw.worker.gauges import View
from batchgw.worker.metrics import Metrics
from batchgw.worker.pacer import Standing


class Window:
    window, increases, decreases = 12.0, 40, Counter({"429": 3, "503": 1})


def waiting(batch_id: str, tenant: str, model: str, queued: int, leased: int) -> Waiting:
    return Waiting(
        batch_id=batch_id, tenant=tenant, model=model, deadline_s=1000.0, created_s=0.0, queued_lines=queued,
        leased_lines=leased, done_lines=0, started_s=None, next_prefix=0,
    )  # fmt: skip


VIEW = View(
    waiting=[waiting("b1", "ada", "m", 100, 20), waiting("b2", "bob", "m", 30, 0), waiting("b2", "bob", "n", 7, 0)],
    slacks=[Slack("b1", "m", "ada", -40.0, True), Slack("b2", "m", "bob", 90.0, False)],
    speeds={"m": 2.5, "n": 0.0},
    flights={("m", "e0:8000"): 12, ("m", "e1:8000"): 8, ("n", ""): 3},
    unwritten=5,
    standings=[
        Standing("m", "", 20, 50, 7, budget=0.4, windows=[Window()]),
        Standing("n", "closed", 3, 50, 0, budget=0.0),
        Standing("http://scheduler:9090", "unheard", 0, 5000, 0, heard_s=12.5),
    ],
)
ASSUMED = Assumed(
    arrivals_per_s=3.0, prompt_tokens_per_s=900.0, running=4.0, context_tokens=4000.0, step_ms=11.0, base_ms=8.0,
    prefill_token_ms=0.1, sequence_ms=0.2, context_token_ms=0.001,
)  # fmt: skip


def headroom(endpoint: str, n_star: int, step_budget_ms: float | None, mode: Any = "burst") -> Headroom:
    return Headroom(
        endpoint=endpoint, mode=mode, n_star=n_star, prefill_tokens=512, prefill_tokens_per_s=None,
        step_budget_ms=step_budget_ms, batch_running=2, assumed=ASSUMED,
    )  # fmt: skip


NEWS = PoolHeadroom(
    version=3, mode="burst", carriers=("e0:8000",),
    endpoints=(headroom("e0:8000", 4, 25.0), headroom("e1:8000", 60, None, "idle")),
)  # fmt: skip


def everything() -> CollectorRegistry:
    """Each metric with all of its labels."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.watch(lambda: VIEW)
    metrics.watch_headroom(lambda: {"http://scheduler:9090": NEWS})
    for one in (metrics, ApiMetrics(registry), StorageMetrics(registry, "serve")):
        for held in vars(one).values():
            if isinstance(held, Counted | Gauge | Histogram) and held._labelnames:
                held.labels(*held._labelnames)
    return registry


def labels_by_name() -> dict[str, set[str]]:
    """The names on the page, and which labels each has."""
    found: dict[str, set[str]] = {}
    for metric in everything().collect():
        for sample in metric.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found
