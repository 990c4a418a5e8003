"""The metrics page, rendered off the event loop, and once for all who ask at the same time."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable

GZIP_LEVEL = 1
"""A page shrinks tenfold at any level; this one costs least."""


class MetricsPage:
    """``page`` runs in a thread, so what it calls only reads."""

    def __init__(self, page: Callable[[], bytes]) -> None:
        self._make = page
        self._underway: dict[bool, asyncio.Task[bytes]] = {}
        self._one_at_a_time = asyncio.Lock()

    async def render(self, gzipped: bool) -> bytes:
        """A scrape that arrives while a page of its kind is being made gets that page."""
        task = self._underway.get(gzipped)
        if task is None:
            task = self._underway[gzipped] = asyncio.create_task(self._render(gzipped), name="metrics page")
            task.add_done_callback(lambda _: self._underway.pop(gzipped))
        return await asyncio.shield(task)  # one scraper that goes away takes nothing from the others

    async def _render(self, gzipped: bool) -> bytes:
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._page, gzipped)

    def _page(self, gzipped: bool) -> bytes:
        page = self._make()
        return gzip.compress(page, GZIP_LEVEL) if gzipped else page
