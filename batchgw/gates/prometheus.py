"""Gates that ask a Prometheus server: prometheus-saturation, prometheus-budget, prometheus-query.

An answer counts when it is one finite number, or several of which the largest is taken.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from batchgw.gates.base import Gate, Polled, Spec, Tools, page

SATURATION = "inference_extension_flow_control_pool_saturation"
QUEUED = "inference_extension_flow_control_queue_size"
READY_PODS = "inference_pool_ready_pods"
POD_QUEUE = "inference_pool_per_pod_queue_size"
RUNNING = "vllm:num_requests_running"


class _Data(msgspec.Struct):
    result: list[Any]


class _Answer(msgspec.Struct):
    data: _Data


async def ask(url: str, query: str) -> float | None:
    """None without data. Raises when the server cannot be reached or its answer is none."""
    body = await page(f"{url.rstrip('/')}/api/v1/query", {"query": query})
    result = msgspec.json.decode(body, type=_Answer).data.result
    # A vector is a list of samples, each with its value; a scalar is one value: time and text.
    texts = [sample["value"][1] if isinstance(sample, dict) else result[1] for sample in result]
    values = [value for value in map(float, texts) if math.isfinite(value)]
    return max(values, default=None)


class _Prometheus(Spec, frozen=True):
    """``url`` of the Prometheus server; empty: the one of all gates."""

    url: str = ""

    def check(self, tools: Tools) -> None:
        if not (self.url or tools.prometheus_url):
            raise ValueError("url of a Prometheus server must be given, here or as prometheusUrl of all gates")

    def _polled(self, tools: Tools, fallback: float) -> Gate:
        url = self.url or tools.prometheus_url
        return Polled(type(self).__name__, lambda: self.read(url), fallback, tools.poll_s, measured=True)

    async def read(self, url: str) -> float | None:
        raise NotImplementedError


class PrometheusSaturation(_Prometheus, frozen=True):
    """How far the pool's saturation is below ``threshold``: budget = threshold - saturation.

    ``fallback``: the saturation assumed without data; the reference's 0.0 leaves the gate open.
    """

    inference_pool: str = ""
    threshold: float = 0.8
    fallback: float = 0.0
    query: str = ""
    """Instead of the router's gauge of ``inference_pool``."""

    def check(self, tools: Tools) -> None:
        super().check(tools)
        if not (self.inference_pool or self.query):
            raise ValueError("inferencePool or query must be given")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be within (0, 1], not {self.threshold}")

    def make(self, tools: Tools) -> Gate:
        return self._polled(tools, self.threshold - self.fallback)

    async def read(self, url: str) -> float | None:
        saturation = await ask(url, self.query or f'{SATURATION}{{inference_pool="{self.inference_pool}"}}')
        return None if saturation is None else self.threshold - saturation


class PrometheusBudget(_Prometheus, frozen=True):
    """The dispatch budget D of the pool, less ``baseline``: budget = D - B.

    D is the first of these that has data, with mc = ``max_concurrency`` of one pod: 1 - requests in the router's queues
    / (ready pods * mc); 1 - mean queue of a pod / mc; 1 - requests running in the engines / (ready pods * mc).
    ``fallback`` is the budget without any of them: 0, closed.
    """

    pool: str = ""
    max_concurrency: float = 100.0
    baseline: float = 0.05
    fallback: float = 0.0

    def check(self, tools: Tools) -> None:
        super().check(tools)
        if not self.pool:
            raise ValueError("pool must be given")
        if self.max_concurrency <= 0 or not 0 <= self.baseline < 1:
            raise ValueError("maxConcurrency must be above 0 and baseline within [0, 1)")

    def make(self, tools: Tools) -> Gate:
        return self._polled(tools, self.fallback)

    def queries(self) -> tuple[str, ...]:
        """The load, as a share of the concurrency."""
        most = f'(sum({READY_PODS}{{name="{self.pool}"}}) * {self.max_concurrency:g})'
        return (
            f'sum({QUEUED}{{inference_pool="{self.pool}"}}) / {most}',
            f'avg({POD_QUEUE}{{name="{self.pool}"}}) / {self.max_concurrency:g}',
            f"sum({RUNNING}) / {most}",
        )

    async def read(self, url: str) -> float | None:
        for query in self.queries():
            load = await ask(url, query)
            if load is not None:
                return 1.0 - load - self.baseline
        return None


class PrometheusQuery(_Prometheus, frozen=True, kw_only=True):
    """The value of ``query``, clamped to [0, 1]; ``fallback`` without data: 0, closed."""

    query: str
    fallback: float = 0.0

    def make(self, tools: Tools) -> Gate:
        return self._polled(tools, self.fallback)

    async def read(self, url: str) -> float | None:
        return await ask(url, self.query)
