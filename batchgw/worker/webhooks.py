"""Telling webhooks: each event until it is taken, with the same id, at growing distances, and not for ever."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import aiohttp
import msgspec

from batchgw import webhooks
from batchgw.records import Delivery
from batchgw.store.base import Deliveries
from batchgw.worker.metrics import Metrics

log = logging.getLogger(__name__)

TIMEOUT_S = 15.0
AGAIN_S = (5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
"""Waits after each failed attempt, as Standard Webhooks suggests; then the event is given up."""


class Webhook(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """``secret``: ``whsec_`` and base64; several, space separated, while one is being replaced."""

    url: str
    secret: str

    def check(self) -> None:
        if not self.url.startswith(("https://", "http://")):
            raise ValueError(f"url of a webhook must begin with https:// or http://, not {self.url!r}")
        webhooks.sign(self.secret, "evt_x", 0, b"")


class Teller:
    """``step`` tells one event; it is called again and again. ``hooks`` by the name that deliveries have."""

    def __init__(
        self, store: Deliveries, hooks: Mapping[str, Webhook], metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._store, self._hooks, self._metrics, self._clock = store, hooks, metrics, clock

    async def step(self) -> bool:
        """True when there was an event to tell. Raises StoreUnavailable."""
        delivery = await self._store.claim_delivery(self._clock(), 2 * TIMEOUT_S)
        if delivery is None:
            return False
        hook = self._hooks.get(delivery.webhook)
        outcome = "unknown webhook" if hook is None else await self._tell(hook, delivery)
        attempt = delivery.attempts - 1
        if not outcome:
            await self._store.end_delivery(delivery.id)
        elif hook is None or attempt >= len(AGAIN_S):
            log.error("webhook %s: event %s given up: %s", delivery.webhook, delivery.id, outcome)
            await self._store.end_delivery(delivery.id)
        else:
            await self._store.retry_delivery(delivery.id, self._clock() + AGAIN_S[attempt])
        self._metrics.deliveries.labels("failed" if outcome else "delivered").inc()
        return True

    async def _tell(self, hook: Webhook, delivery: Delivery) -> str:
        """Why it was not taken; empty when it was (any 2xx)."""
        body = webhooks.payload(delivery)
        signed = webhooks.sign(hook.secret, delivery.id, int(self._clock()), body)
        headers = {"content-type": "application/json", **signed}
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.post(hook.url, data=body, headers=headers, allow_redirects=False) as response,
            ):
                return "" if 200 <= response.status < 300 else f"status {response.status}"
        except (aiohttp.ClientError, TimeoutError) as e:
            return f"{type(e).__name__}: {e}"
