"""Who says how many lines may run: the words between the worker and what holds it back, and the gates' way of it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from batchgw.client.requests import Flight

ANYWHERE = ""


class Start(NamedTuple):
    """The waiting line at this position, to this endpoint (host:port), or ANYWHERE the router likes."""

    position: int
    endpoint: str = ANYWHERE


class Window(Protocol):
    """A congestion window."""

    window: float
    increases: int

    @property
    def decreases(self) -> Mapping[str, int]:
        """By the status that made them."""


class Standing(NamedTuple):
    """How one of those who hold lines back stands, for metrics. ``source``: the model of a gate, or the address of a
    scheduler. ``held`` is why nothing starts, in one word of HELD; ``room`` lines might have started when it was last
    asked. ``budget`` is a gate's share, ``heard_s`` the age of a scheduler's last word."""

    source: str
    held: str
    in_flight: int
    most: int
    room: int
    budget: float | None = None
    heard_s: float | None = None
    windows: Sequence[Window] = ()


HELD = ("opening", "closed", "unheard")
"""A gate that has no reading yet, one without budget, a scheduler that is silent or cannot be reached."""


class Pacer(Protocol):
    """The worker asks before each start and tells what happens. Models are independent of each other.

    All but ``open``, ``close`` and ``admit`` are called often and must return at once.
    """

    changed: asyncio.Event
    """Set whenever more may start, or something is to be aborted; the worker clears it."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def starts(self, model: str, waiting: Sequence[Flight]) -> Sequence[Start]:
        """Which of the waiting lines (oldest first) start now, and where. What is returned will be started."""

    async def admit(self, flight: Flight) -> bool:
        """The last word on one line, asked once it counts as started; False puts it back for a moment."""

    def started(self, flight: Flight) -> None: ...

    def tokens(self, flight: Flight, count: int) -> None: ...

    def answered(self, flight: Flight, status: int | None, reason: str, retry_after_s: float | None) -> None:
        """One attempt is over, see ``batchgw.client.requests.Watch``."""

    def ended(self, flight: Flight, aborted: bool) -> None:
        """It is no longer in flight. Called once for each ``started``."""

    def aborts(self, model: str) -> Collection[str]:
        """Keys of lines in flight that are to be cut now and go on later; asked after each ``changed``."""

    def standings(self) -> Sequence[Standing]: ...


class Gate(Protocol):
    """What a ``batchgw.gates`` gate gives to a pacer."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def budget(self) -> float:
        """Share of the concurrency, in [0, 1]."""

    def windows(self) -> Sequence[Window]:
        """Congestion windows in it."""

    def room(self, max_concurrency: int, in_flight: int) -> int:
        """Lines that may start now."""

    async def admit(self, id: str, tenant: str) -> bool: ...

    def release(self, id: str) -> None:
        """What ``admit`` granted is given back."""

    def answered(self, id: str, status: int | None, reason: str, retry_after_s: float | None) -> None: ...


class GatePacer:
    """One gate for each model, made when the model is first seen. ``per_model`` and ``total`` lines at most in flight.

    Closed until the gate has opened. Aborts nothing: gates know no interactive requests.
    """

    def __init__(self, gate: Callable[[str], Gate], per_model: int = 10, total: int = 100) -> None:
        if per_model < 1 or total < 1:
            raise ValueError(f"lines in flight per model ({per_model}) and in all ({total}) must be at least 1")
        self.changed = asyncio.Event()
        self._make = gate
        self._per_model, self._total = per_model, total
        self._gates: dict[str, Gate] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._in_flight: dict[str, int] = defaultdict(int)
        self._room: dict[str, int] = {}

    async def open(self) -> None:
        """Gates open when they are first needed."""

    async def close(self) -> None:
        for task in self._opening.values():
            task.cancel()
        await asyncio.gather(*self._opening.values(), return_exceptions=True)
        await asyncio.gather(*(gate.close() for gate in self._gates.values()), return_exceptions=True)

    def starts(self, model: str, waiting: Sequence[Flight]) -> Sequence[Start]:
        gate = self._gate(model)
        in_flight = self._in_flight[model]
        most = min(self._per_model - in_flight, self._total - sum(self._in_flight.values()), len(waiting))
        if most <= 0 or not self._is_open(model):
            self._room[model] = 0
            return ()
        self._room[model] = room = gate.room(self._per_model, in_flight)
        return [Start(i) for i in range(min(most, room))]

    async def admit(self, flight: Flight) -> bool:
        return await self._gate(flight.call.model).admit(flight.key, flight.call.tenant)

    def started(self, flight: Flight) -> None:
        self._in_flight[flight.call.model] += 1

    def tokens(self, flight: Flight, count: int) -> None: ...

    def answered(self, flight: Flight, status: int | None, reason: str, retry_after_s: float | None) -> None:
        self._gate(flight.call.model).answered(flight.key, status, reason, retry_after_s)

    def ended(self, flight: Flight, aborted: bool) -> None:
        self._in_flight[flight.call.model] -= 1
        self._gate(flight.call.model).release(flight.key)
        self.changed.set()

    def aborts(self, model: str) -> Collection[str]:
        return ()

    def standings(self) -> Sequence[Standing]:
        return [self._standing(model, gate) for model, gate in self._gates.items()]

    def _standing(self, model: str, gate: Gate) -> Standing:
        budget = gate.budget()
        in_flight, room = self._in_flight[model], max(0, self._room.get(model, 0))
        full = in_flight > 0  # with nothing in flight, it is not our own lines that took the budget
        held = "opening" if not self._is_open(model) else "closed" if budget <= 0 and not full else ""
        return Standing(model, held, in_flight, self._per_model, room, budget=budget, windows=gate.windows())

    def _gate(self, model: str) -> Gate:
        gate = self._gates.get(model)
        if gate is None:
            gate = self._gates[model] = self._make(model)
            self._opening[model] = asyncio.create_task(self._open(gate))
        return gate

    async def _open(self, gate: Gate) -> None:
        await gate.open()
        self.changed.set()

    def _is_open(self, model: str) -> bool:
        task = self._opening[model]
        return task.done() and not task.cancelled() and task.exception() is None
