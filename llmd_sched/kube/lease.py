"""Leader election by a ``coordination.k8s.io/v1`` Lease, with the semantics of Kubernetes' own client.

The holder renews every ``retry_s``; when it could not for ``renew_s`` it stops leading. Another takes the lease when
it saw no renewal for the lease's duration, counted by its own clock from when it saw the last, so clocks need not
agree. Writes carry the resource version that was read, so of two that try only one succeeds.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from random import Random
from typing import Any

import aiohttp
import msgspec

from llmd_sched.kube.client import ApiClient, ApiError

log = logging.getLogger(__name__)

LEASES = "/apis/coordination.k8s.io/v1/namespaces/{}/leases"
RELEASE_TIMEOUT_S = 2.0
FOLLOWER_JITTER = 1.2
"""A follower waits ``retry_s`` times 1 to 2.2."""


class Timings(msgspec.Struct, frozen=True):
    """Seconds."""

    lease_s: float = 15.0
    renew_s: float = 10.0
    retry_s: float = 2.0

    def check(self) -> None:
        if not self.lease_s > self.renew_s > self.retry_s * FOLLOWER_JITTER > 0:
            raise ValueError(f"the lease must outlast the renewal deadline, and that {FOLLOWER_JITTER} retries: {self}")


class Record(msgspec.Struct, frozen=True, rename="camel"):
    """A Lease's ``spec``."""

    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: str | None = None
    renew_time: str | None = None
    lease_transitions: int | None = None


class Election:
    """What one candidate knows of the lease, without a clock: ``now_s`` is monotonic, ``date_s`` the time of day."""

    def __init__(self, identity: str, timings: Timings) -> None:
        timings.check()
        self.identity = identity
        self.timings = timings
        self.record = Record()
        self._seen_at_s = float("-inf")
        self._renewed_at_s: float | None = None

    def leading(self, now_s: float) -> bool:
        return self._renewed_at_s is not None and now_s < self.deadline_s

    @property
    def deadline_s(self) -> float:
        """When we stop leading unless we renew before."""
        return float("-inf") if self._renewed_at_s is None else self._renewed_at_s + self.timings.renew_s

    def observe(self, record: Record, now_s: float) -> None:
        """The lease as it was read."""
        if record != self.record:
            self.record, self._seen_at_s = record, now_s
        if record.holder_identity != self.identity:
            self._renewed_at_s = None

    def free(self, now_s: float) -> bool:
        """Whether we may write ourselves into it: it is ours, nobody's, or its holder does not renew it."""
        holder = self.record.holder_identity
        if not holder or holder == self.identity:
            return True
        return now_s >= self._seen_at_s + float(self.record.lease_duration_seconds or 0)

    def claim(self, date_s: float) -> Record:
        """What to write to get or to keep it."""
        ours = self.record.holder_identity == self.identity
        return Record(
            self.identity,
            math.ceil(self.timings.lease_s),
            self.record.acquire_time if ours else micro_time(date_s),
            micro_time(date_s),
            (self.record.lease_transitions or 0) + (not ours and self.record != Record()),
        )

    def release(self, date_s: float) -> Record:
        """What to write to give it away."""
        at = micro_time(date_s)
        return Record("", 1, at, at, self.record.lease_transitions or 0)

    def wrote(self, record: Record, asked_at_s: float) -> None:
        """Our claim was accepted; it counts from when it was sent, which is before any other can have seen it."""
        self.record, self._seen_at_s = record, asked_at_s
        self._renewed_at_s = asked_at_s if record.holder_identity == self.identity else None


class _Lease(msgspec.Struct, frozen=True):
    metadata: dict[str, Any]
    spec: Record = Record()


class Elector:
    """Takes part in an election as long as it runs. ``on_change`` is told whether we lead, at each change."""

    def __init__(
        self,
        api: ApiClient,
        namespace: str,
        name: str,
        identity: str,
        on_change: Callable[[bool], None],
        rng: Random,
        *,
        timings: Timings | None = None,
        clock: Callable[[], float] = time.monotonic,
        date: Callable[[], float] = time.time,
    ) -> None:
        self.election = Election(identity, timings or Timings())
        self._api, self._namespace, self._name = api, namespace, name
        self._folder = LEASES.format(namespace)
        self._on_change, self._rng, self._clock, self._date = on_change, rng, clock, date
        self._metadata: dict[str, Any] | None = None
        """Of the lease as last read or written; it carries the resource version."""
        self._told = False
        self._said = ""
        self._task: asyncio.Task[None] | None = None

    @property
    def leading(self) -> bool:
        return self.election.leading(self._clock())

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="leader election")

    async def stop(self) -> None:
        """Gives the lease away, so that a follower need not wait for its end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.leading:
            try:
                async with asyncio.timeout(RELEASE_TIMEOUT_S):
                    await self._release()
            except (ApiError, aiohttp.ClientError, msgspec.MsgspecError, OSError, TimeoutError) as error:
                log.warning("lease %s: not released: %s", self._name, error or type(error).__name__)
        self.election.observe(Record(), self._clock())
        self._tell()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(await self.step())

    async def step(self) -> float:
        """One attempt to get or to keep the lease; the seconds to wait before the next."""
        self._tell()  # before the API server is asked, which may take long
        try:
            async with asyncio.timeout(self._patience_s()):
                await self._try()
            self._said = ""
        except (ApiError, aiohttp.ClientError, msgspec.MsgspecError, OSError, TimeoutError) as error:
            self._metadata = None
            self._say(str(error) or type(error).__name__)
        self._tell()
        retry_s = self.election.timings.retry_s
        if self.leading:
            return max(0.0, min(retry_s, self.election.deadline_s - self._clock()))
        return retry_s * (1.0 + FOLLOWER_JITTER * self._rng.random())

    def _patience_s(self) -> float:
        most_s = self.election.timings.renew_s / 2.0
        return max(0.0, min(most_s, self.election.deadline_s - self._clock())) if self.leading else most_s

    async def _try(self) -> None:
        if not self.leading or self._metadata is None:
            await self._read()
        if not self.election.free(self._clock()):
            return
        asked_at_s, claim = self._clock(), self.election.claim(self._date())
        if await self._write(claim):
            self.election.wrote(claim, asked_at_s)
        elif self.leading:  # whoever wrote it may have taken it from us
            await self._read()

    async def _read(self) -> None:
        try:
            lease = msgspec.json.decode(await self._api.get(f"{self._folder}/{self._name}"), type=_Lease)
        except ApiError as error:
            if error.status != 404:
                raise
            lease = None
        self._metadata = lease.metadata if lease else None
        self.election.observe(lease.spec if lease else Record(), self._clock())

    async def _write(self, record: Record) -> bool:
        """False when another wrote since we read."""
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "spec": record}
        try:
            if self._metadata is None:
                metadata = {"name": self._name, "namespace": self._namespace}
                reply = await self._api.post(self._folder, {**body, "metadata": metadata})
            else:
                reply = await self._api.put(f"{self._folder}/{self._name}", {**body, "metadata": self._metadata})
        except ApiError as error:
            if error.status != 409:
                raise
            self._metadata = None
            return False
        self._metadata = msgspec.json.decode(reply, type=_Lease).metadata
        return True

    async def _release(self) -> None:
        await self._read()
        if self.leading:
            await self._write(self.election.release(self._date()))

    def _tell(self) -> None:
        leading = self.leading
        if leading != self._told:
            self._told = leading
            log.info("lease %s/%s: %s", self._namespace, self._name, "leading" if leading else "following")
            self._on_change(leading)

    def _say(self, message: str) -> None:
        if message != self._said:
            self._said = message
            log.warning("lease %s/%s: %s", self._namespace, self._name, message)


def lease_name(namespace: str, pool: str) -> str:
    return f"epp-{namespace}-{pool}.llm-d.ai"


def micro_time(date_s: float) -> str:
    """Kubernetes' MicroTime."""
    return datetime.fromtimestamp(date_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
