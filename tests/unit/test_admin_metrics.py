"""The metrics page: which form is served, and who shares it."""

from __future__ import annotations

import asyncio
import gzip

import pytest
from prometheus_client import CollectorRegistry, Gauge

from llmd_sched.admin.metrics import Form, MetricsPage

PROMETHEUS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"


@pytest.mark.parametrize(
    ("accept", "encoding", "form"),
    [
        ("", "", Form(False, False)),
        ("*/*", "gzip, deflate", Form(False, True)),
        (PROMETHEUS, "gzip", Form(True, True)),
        ("text/html, Application/OpenMetrics-Text ; version=nonsense", "br;q=1, GZIP;q=0.5", Form(True, True)),
        ("x/application/openmetrics-text", "xgzip", Form(False, False)),
    ],
)
def test_a_form_is_chosen_by_the_headers(accept: str, encoding: str, form: Form) -> None:
    assert Form.asked(accept, encoding) == form


async def test_a_scraper_that_goes_away_leaves_the_page_to_the_others() -> None:
    registry = CollectorRegistry()
    Gauge("up", "Whether.", registry=registry).set(1)
    page = MetricsPage(registry)
    first, second = (asyncio.create_task(page.render(Form(False, True))) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert b"up 1.0" in gzip.decompress(await second)
    assert first.cancelled()
