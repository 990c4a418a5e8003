"""All leases of one worker and the heartbeat that keeps them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from batchgw.records import BatchClaim, Claim, Lease
from batchgw.store.base import StoreUnavailable, Work

log = logging.getLogger(__name__)

LEASE_S = 15.0
HEARTBEAT_S = 5.0
AGAIN_S = 1.0
"""After a heartbeat that did not reach the database."""


class Leases:
    """What is held is renewed with each beat; what was lost, or is of a batch that ends, is told to who holds it."""

    def __init__(
        self, store: Work, worker: str, lease_s: float = LEASE_S, heartbeat_s: float = HEARTBEAT_S,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        if not 0 < heartbeat_s <= lease_s / 2:
            raise ValueError(
                f"a heartbeat every {heartbeat_s} s cannot keep a lease of {lease_s} s; at most half of it"
            )
        self._store, self.worker, self.lease_s, self._clock = store, worker, lease_s, clock
        self._heartbeat_s = heartbeat_s
        self._held: dict[Lease, tuple[Claim | BatchClaim, Callable[[], None], Callable[[], None] | None]] = {}

    def hold(
        self, claim: Claim | BatchClaim, lost: Callable[[], None], ended: Callable[[], None] | None = None
    ) -> None:
        """``lost``: it is another's now; ``ended``: its batch is ending or over. Both are told once, then forgotten."""
        self._held[claim.lease] = (claim, lost, ended)

    def let_go(self, claim: Claim | BatchClaim) -> None:
        self._held.pop(claim.lease, None)

    async def run(self) -> None:
        while True:
            try:
                await self.beat()
                await asyncio.sleep(self._heartbeat_s)
            except StoreUnavailable as e:
                log.warning("no heartbeat: %s", e)
                await asyncio.sleep(min(AGAIN_S, self._heartbeat_s))

    async def beat(self) -> None:
        """Raises StoreUnavailable; what is held stays held then, and the store decides later whose it is."""
        held = [claim for claim, _, _ in self._held.values()]
        if not held:
            return
        alive = await self._store.heartbeat(self.worker, held, self._clock(), self.lease_s)
        for claim in held:
            lease = claim.lease
            if lease not in self._held:
                continue
            _, lost, ended = self._held[lease]
            if lease in alive.lost:
                del self._held[lease]
                lost()
            elif ended is not None and lease.batch_id in alive.ended:
                self._held[lease] = (claim, lost, None)  # still ours, to hand in what is finished
                ended()
