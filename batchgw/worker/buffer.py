"""Chunks in hand, and their lines that wait to be sent."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable

from batchgw.client.requests import Flight
from batchgw.records import Claim, Result


class Held:
    """A chunk that is ours. ``left`` lines have no written result yet; ``over`` when nothing of it is to run any more,
    and what is finished still counts."""

    __slots__ = ("claim", "finished", "flights", "left", "over")

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.left = claim.chunk.stop - claim.chunk.start - len(claim.done)
        self.finished: list[Result] = []
        self.flights: dict[Flight, asyncio.Task[None]] = {}
        self.over = False

    def cut(self) -> None:
        """Cancels what runs."""
        for task in self.flights.values():
            task.cancel()


class Buffer:
    """Lines by model, oldest first. ``bytes`` are those of their bodies."""

    def __init__(self) -> None:
        self._lines: dict[str, list[tuple[Flight, Held]]] = defaultdict(list)
        self.bytes = 0

    def models(self) -> list[str]:
        return [model for model, lines in self._lines.items() if lines]

    def count(self, model: str) -> int:
        return len(self._lines[model])

    def flights(self, model: str) -> list[Flight]:
        return [flight for flight, _ in self._lines[model]]

    def put(self, flight: Flight, held: Held) -> None:
        self._lines[flight.call.model].append((flight, held))
        self.bytes += len(flight.call.body)

    def take(self, model: str, positions: Iterable[int]) -> list[tuple[Flight, Held]]:
        """Those at ``positions`` (each once), in that order."""
        lines = self._lines[model]
        taken = [lines[position] for position in positions]
        for position in sorted(positions, reverse=True):
            del lines[position]
        self.bytes -= sum(len(flight.call.body) for flight, _ in taken)
        return taken

    def drop(self, held: Held) -> None:
        """All lines of this chunk."""
        model = held.claim.chunk.model
        self.take(model, [i for i, (_, of) in enumerate(self._lines[model]) if of is held])
