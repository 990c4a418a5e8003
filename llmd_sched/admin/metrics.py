"""The metrics page, rendered off the event loop, and once for all who ask at the same time."""

from __future__ import annotations

import asyncio
import gzip
from typing import NamedTuple

from prometheus_client import CollectorRegistry, exposition, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

OPENMETRICS = "application/openmetrics-text"
GZIP_LEVEL = 1
"""A page shrinks tenfold at any level; this one costs least."""


class Form(NamedTuple):
    """How a page is wanted: four kinds, so at most four renderings wait for the thread."""

    openmetrics: bool
    gzipped: bool

    @classmethod
    def asked(cls, accept: str, accept_encoding: str) -> Form:
        """By the headers of a scrape; whatever they say, one of the four is served."""
        return cls(OPENMETRICS in _listed(accept), "gzip" in _listed(accept_encoding))

    @property
    def content_type(self) -> str:
        return openmetrics.CONTENT_TYPE_LATEST if self.openmetrics else exposition.CONTENT_TYPE_PLAIN_0_0_4


def _listed(header: str) -> set[str]:
    return {one.partition(";")[0].strip().lower() for one in header.split(",")}


class MetricsPage:
    """One registry's page. Collectors run in a thread, so they only read."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._underway: dict[Form, asyncio.Task[bytes]] = {}
        self._one_at_a_time = asyncio.Lock()

    async def render(self, form: Form) -> bytes:
        """A scrape that arrives while a page of its form is being made gets that page."""
        task = self._underway.get(form)
        if task is None:
            task = self._underway[form] = asyncio.create_task(self._render(form), name="metrics page")
            task.add_done_callback(lambda _: self._underway.pop(form))
        return await asyncio.shield(task)  # one scraper that goes away takes nothing from the others

    async def _render(self, form: Form) -> bytes:
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._page, form)

    def _page(self, form: Form) -> bytes:
        page = (openmetrics.generate_latest if form.openmetrics else generate_latest)(self._registry)
        return gzip.compress(page, GZIP_LEVEL) if form.gzipped else page
