"""The metrics page, and who shares it."""

from __future__ import annotations

import asyncio
import gzip

from llmd_sched.admin.metrics import MetricsPage


async def test_a_page_is_compressed_where_that_is_asked_for() -> None:
    page = MetricsPage(lambda: b"up 1\n")
    assert await page.render(False) == b"up 1\n"
    assert gzip.decompress(await page.render(True)) == b"up 1\n"


async def test_a_scraper_that_goes_away_leaves_the_page_to_the_others() -> None:
    page = MetricsPage(lambda: b"up 1\n")
    first, second = (asyncio.create_task(page.render(True)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert gzip.decompress(await second) == b"up 1\n"
    assert first.cancelled()
