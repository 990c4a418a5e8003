"""Turns by what each program (one fairness id) has been given lately: ``program-aware-fairness``."""

from __future__ import annotations

from collections import OrderedDict

import msgspec
import numpy as np

from llmd_sched.flow.policy import Fairness, GlobalStrictFairness, Lineup, RoundRobinFairness
from llmd_sched.flow.queues import Heap, Item
from llmd_sched.types import Array

MAX_IDLE_PROGRAMS = 10_000
"""Programs with nothing queued whose service is remembered in one band; beyond it the longest idle go first."""
RESCALE_AFTER_HALF_LIVES = 64.0


class ProgramAwareFairness(Fairness, frozen=True):
    """Least attained service first: programs that were given less, and whose next request has waited longer.

    A program's score is ``lasWeightService`` x (1 - service) + ``lasWeightHeadWait`` x (wait of its next request),
    each scaled to 0..1 over the programs with something queued (0.5 where they are equal). Service is prompt tokens,
    counted when a request is dispatched, plus twice the completion tokens, counted at its end; it halves every
    ``lasHalfLifeSeconds`` (0 = never). A program idle for ``evictionTtlSeconds`` is forgotten, at once when its time
    has come, so ``evictionSweepSeconds`` changes nothing. Accounts are kept per priority band.
    """

    strategy: str = "las"
    eviction_ttl_seconds: float = 3600.0
    eviction_sweep_seconds: float = 300.0
    las_weight_service: float = 0.8
    las_weight_head_wait: float = 0.2
    las_half_life_seconds: float = 60.0
    las_decay_factor: float | msgspec.UnsetType = msgspec.UNSET

    def check(self) -> None:
        if self.las_decay_factor is not msgspec.UNSET:
            raise ValueError("lasDecayFactor was removed: decay goes by wall clock, set lasHalfLifeSeconds instead")
        if self.strategy != "las":
            raise ValueError(f"strategy {self.strategy!r}: accepted is las")
        if self.eviction_ttl_seconds <= 0 or self.eviction_sweep_seconds <= 0:
            raise ValueError("evictionTtlSeconds and evictionSweepSeconds must be positive")
        if min(self.las_weight_service, self.las_weight_head_wait, self.las_half_life_seconds) < 0:
            raise ValueError("lasWeightService, lasWeightHeadWait and lasHalfLifeSeconds must be 0 or more")

    def open(self) -> Programs:
        return Programs(self)


class _Program:
    __slots__ = ("fairness_id", "idle_since_s", "queue", "service", "slot")

    def __init__(self, fairness_id: str) -> None:
        self.fairness_id = fairness_id
        self.queue = Heap()
        self.service = 0.0
        """In units that grow by the decay: a token served later counts for more, so nobody's account need be touched
        as time passes."""
        self.slot = -1
        """Its row in the columns while it has something queued."""
        self.idle_since_s = 0.0


class Programs(Lineup):
    """Programs with something queued hold a row of two columns (service, when their head was queued), so a pick is a
    handful of numpy operations whatever their number."""

    def __init__(self, params: ProgramAwareFairness) -> None:
        self._params = params
        self._active: list[_Program] = []
        self._service: Array = np.zeros(16)
        self._head_s: Array = np.zeros(16)
        self._programs: dict[str, _Program] = {}
        self._idle: OrderedDict[str, _Program] = OrderedDict()
        self._count = 0
        self._origin_s = 0.0

    def __len__(self) -> int:
        return self._count

    def add(self, item: Item) -> None:
        program = self._program(item.request.fairness_id, item.enqueued_s)
        program.queue.push(item)
        self._count += 1
        if program.slot < 0:
            self._activate(program)
        self._head_s[program.slot] = program.queue.head().enqueued_s

    def remove(self, item: Item, now_s: float) -> None:
        program = self._programs[item.request.fairness_id]
        program.queue.remove(item)
        self._left(program, now_s)

    def pop(self, now_s: float) -> Item:
        program = self._next()
        item = program.queue.pop()
        self._left(program, now_s)
        self.served(program.fairness_id, item.request.input_tokens, now_s)
        return item

    def _next(self) -> _Program:
        if not self._active:
            raise IndexError("nothing is queued")
        count = len(self._active)
        scores = self._params.las_weight_service * (1.0 - _unit_range(self._service[:count]))
        scores += self._params.las_weight_head_wait * _unit_range(-self._head_s[:count])
        best = np.flatnonzero(scores == scores.max())
        if len(best) == 1:
            return self._active[int(best[0])]
        return min((self._active[i] for i in best), key=lambda p: p.queue.head().number)

    def served(self, fairness_id: str, tokens: float, now_s: float) -> None:
        program = self._program(fairness_id, now_s)
        unit = self._unit(now_s)  # before the account is read: it may rescale it
        program.service += tokens * unit
        if program.slot >= 0:
            self._service[program.slot] = program.service

    def attained_tokens(self, now_s: float) -> dict[str, float]:
        """Service per program, decayed to now."""
        unit = self._unit(now_s)
        return {name: program.service / unit for name, program in self._programs.items()}

    def jains_index(self) -> float:
        """(sum x)^2 / (n sum x^2) over the programs' service; 1 = all alike, also when nobody was served."""
        service = np.array([p.service for p in self._programs.values()])
        squares = float(np.square(service).sum())
        return float(service.sum()) ** 2 / (len(service) * squares) if squares else 1.0

    def _program(self, fairness_id: str, now_s: float) -> _Program:
        """The program's account; one without anything queued counts as idle from now on."""
        program = self._programs.get(fairness_id)
        if program is None:
            program = self._programs[fairness_id] = _Program(fairness_id)
        if program.slot < 0:
            self._rest(program, now_s)
        return program

    def _rest(self, program: _Program, now_s: float) -> None:
        program.idle_since_s = now_s
        self._idle[program.fairness_id] = program
        self._idle.move_to_end(program.fairness_id)
        while True:  # ends with the program at hand, which has been idle for no time
            oldest = next(iter(self._idle.values()))
            expired = now_s - oldest.idle_since_s >= self._params.eviction_ttl_seconds
            if len(self._idle) <= MAX_IDLE_PROGRAMS and not expired:
                return
            del self._idle[oldest.fairness_id], self._programs[oldest.fairness_id]

    def _activate(self, program: _Program) -> None:
        del self._idle[program.fairness_id]
        program.slot = len(self._active)
        self._active.append(program)
        if program.slot == len(self._service):
            self._service = np.concatenate((self._service, np.zeros(program.slot)))
            self._head_s = np.concatenate((self._head_s, np.zeros(program.slot)))
        self._service[program.slot] = program.service

    def _left(self, program: _Program, now_s: float) -> None:
        """One of its items is gone; an empty program gives its row to the last one."""
        self._count -= 1
        if program.queue:
            self._head_s[program.slot] = program.queue.head().enqueued_s
            return
        last = self._active.pop()
        if last is not program:
            self._active[program.slot] = last
            self._service[program.slot] = self._service[last.slot]
            self._head_s[program.slot] = self._head_s[last.slot]
            last.slot = program.slot
        program.slot = -1
        self._rest(program, now_s)

    def _unit(self, now_s: float) -> float:
        """What one token is worth now in the units of the accounts; they are rescaled before these overflow."""
        half_life_s = self._params.las_half_life_seconds
        if not half_life_s:
            return 1.0
        half_lives = (now_s - self._origin_s) / half_life_s
        if half_lives > RESCALE_AFTER_HALF_LIVES:
            self._rescale(0.5 ** min(half_lives, 1000.0))
            self._origin_s, half_lives = now_s, 0.0
        return float(2.0**half_lives)

    def _rescale(self, factor: float) -> None:
        for program in self._programs.values():
            program.service *= factor
        self._service *= factor


def _unit_range(values: Array) -> Array:
    """Scaled to 0..1, shape unchanged; 0.5 where all are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.full(len(values), 0.5)


FAIRNESS: dict[str, type[Fairness]] = {
    "global-strict-fairness-policy": GlobalStrictFairness,
    "round-robin-fairness-policy": RoundRobinFairness,
    "program-aware-fairness": ProgramAwareFairness,
}
