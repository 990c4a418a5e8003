"""Gates that ask nobody: constant, local-max-concurrency, composite."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from batchgw.gates.base import Gate, Open, Spec, Tools


class Constant(Spec, frozen=True):
    """Always open: only the worker's own limits hold."""

    def make(self, tools: Tools) -> Gate:
        return Open()


class LocalMaxConcurrency(Spec, frozen=True):
    """At most ``limit`` lines of one model in flight in this process: budget (limit - in flight) / limit."""

    limit: int

    def check(self, tools: Tools) -> None:
        if self.limit < 1:
            raise ValueError(f"limit must be at least 1, not {self.limit}")

    def make(self, tools: Tools) -> Gate:
        return _Limited(self.limit)


class _Limited(Open):
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: set[str] = set()

    def budget(self) -> float:
        return (self._limit - len(self._held)) / self._limit

    def room(self, max_concurrency: int, in_flight: int) -> int:
        return self._limit - in_flight

    async def admit(self, id: str, tenant: str) -> bool:
        if len(self._held) >= self._limit and id not in self._held:
            return False
        self._held.add(id)
        return True

    def release(self, id: str) -> None:
        self._held.discard(id)


class Composite(Spec, frozen=True):
    """All of ``gates`` (each as one would stand alone): the smallest budget, and admission by all or by none."""

    gates: list[dict[str, Any]]

    def check(self, tools: Tools) -> None:
        if not self.gates:
            raise ValueError("gates must name at least one gate")


class All(Open):
    """The live composite."""

    def __init__(self, gates: Sequence[Gate]) -> None:
        self._gates = gates

    async def open(self) -> None:
        await asyncio.gather(*(gate.open() for gate in self._gates))

    async def close(self) -> None:
        await asyncio.gather(*(gate.close() for gate in self._gates))

    def budget(self) -> float:
        return min(gate.budget() for gate in self._gates)

    def windows(self) -> Sequence[Any]:
        return [window for gate in self._gates for window in gate.windows()]

    def room(self, max_concurrency: int, in_flight: int) -> int:
        return min(gate.room(max_concurrency, in_flight) for gate in self._gates)

    async def admit(self, id: str, tenant: str) -> bool:
        for i, gate in enumerate(self._gates):
            if not await gate.admit(id, tenant):
                for granted in self._gates[:i]:
                    granted.release(id)
                return False
        return True

    def release(self, id: str) -> None:
        for gate in self._gates:
            gate.release(id)

    def answered(self, id: str, status: int | None, reason: str, retry_after_s: float | None) -> None:
        for gate in self._gates:
            gate.answered(id, status, reason, retry_after_s)
