"""The gate endpoint-scrape: a router's or an engine's own metrics page, without a Prometheus server."""

from __future__ import annotations

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from batchgw.gates.base import Gate, Polled, Spec, Tools, page


class EndpointScrape(Spec, frozen=True, kw_only=True):
    """budget = 1 - value / (pods * ``max_count_per_pod``) - ``baseline``.

    ``value`` is the sum of ``metric`` over the samples at ``url`` that have ``labels``; pods the same of
    ``pods_metric``, or 1 without one. ``fallback`` is the budget when a page or a sample is missing: 0, closed.
    """

    url: str
    metric: str
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    max_count_per_pod: float = 100.0
    baseline: float = 0.05
    fallback: float = 0.0
    pods_url: str = ""
    """Empty: as ``url``."""
    pods_metric: str = ""
    pods_labels: dict[str, str] = msgspec.field(default_factory=dict)

    def check(self, tools: Tools) -> None:
        if self.max_count_per_pod <= 0 or not 0 <= self.baseline < 1:
            raise ValueError("maxCountPerPod must be above 0 and baseline within [0, 1)")

    def make(self, tools: Tools) -> Gate:
        return Polled("endpoint-scrape", self.read, self.fallback, tools.poll_s, measured=True)

    async def read(self) -> float | None:
        text = (await page(self.url)).decode()
        value, pods = sample(text, self.metric, self.labels), 1.0
        if self.pods_metric:
            pods_text = (await page(self.pods_url)).decode() if self.pods_url else text
            pods = sample(pods_text, self.pods_metric, self.pods_labels) or 0.0
        if value is None or pods <= 0:
            return None
        return 1.0 - value / (pods * self.max_count_per_pod) - self.baseline


def sample(text: str, name: str, labels: dict[str, str]) -> float | None:
    """Sum over the samples of this name that have these labels; None without any. Raises ValueError for no page."""
    found = [
        one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if one.name == name and labels.items() <= one.labels.items()
    ]
    return sum(found) if found else None
