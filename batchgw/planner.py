"""Which batch's chunk runs next, for each model by itself. Pure: rows of the store and the time in, one row out.

The order is read off one key. Who will miss its window at the measured speed goes first. Among the others the tenant
with the fewest lines in flight (by weight) goes first; tenants within one chunk of each other are equal, and among
equals whose next line shares its prefix with what runs now, then the earlier deadline. Every ``AGED_EVERY``-th claim of
a model belongs to whoever has waited longest, so with N batches waiting each gets a chunk within N * AGED_EVERY claims,
whatever the others' deadlines.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from batchgw.records import Waiting

AGED_EVERY = 4
AGED_AFTER_S = 60.0
"""A batch that got a chunk more recently than this is not starving."""

EQUAL_LINES = 50
"""Tenants whose lines in flight differ by less have the same share: one chunk, the grain of a claim."""

SPEED_TAU_S = 60.0
MIN_STEP_S = 1.0
"""Snapshots closer than this to the last measured one tell too little of a speed."""

RISK_SHARE = 0.05
"""A batch whose slack is under this share of its window is treated as late: speeds are estimates."""

Key = tuple[str, str]
"""Batch id and model."""


class Slack(msgspec.Struct, frozen=True):
    """``slack_s``: time left over when all lines due up to this batch's deadline are done at the measured speed."""

    batch_id: str
    model: str
    tenant: str
    slack_s: float
    late: bool


class Speeds:
    """Lines per second of each model over all workers: a mean that forgets with SPEED_TAU_S, from the store's rows."""

    def __init__(self) -> None:
        self._rows: dict[Key, Waiting] = {}
        self._seen_s = -math.inf
        self._lines_s: dict[str, float] = {}

    def see(self, waiting: Iterable[Waiting], now_s: float) -> None:
        """Snapshots in the order of their time; one less than MIN_STEP_S after the last is left out."""
        step_s = now_s - self._seen_s
        if step_s < MIN_STEP_S:
            return
        rows = {(row.batch_id, row.model): row for row in waiting}
        if self._rows:
            self._learn(self._done(rows), step_s)
        self._rows, self._seen_s = rows, now_s

    def _done(self, rows: Mapping[Key, Waiting]) -> dict[str, int]:
        """Lines finished since the last snapshot, for each model that had work in it."""
        done = {model: 0 for _, model in self._rows}
        for key, row in rows.items():
            if key in self._rows:
                done[row.model] += max(0, row.done_lines - self._rows[key].done_lines)
        for key, row in self._rows.items():
            if key not in rows and not row.queued_lines:  # its last lines were running, and now it is over
                done[row.model] += row.leased_lines
        return done

    def _learn(self, done: Mapping[str, int], step_s: float) -> None:
        kept = math.exp(-step_s / SPEED_TAU_S)
        for model, lines in done.items():
            measured = lines / step_s
            if lines or model in self._lines_s:  # before the first line is done there is nothing to measure
                self._lines_s[model] = kept * self._lines_s.get(model, measured) + (1 - kept) * measured

    def lines_s(self, model: str) -> float:
        """0 where nothing has been measured."""
        return self._lines_s.get(model, 0.0)


class Planner:
    """Chooses over the last snapshot of ``Store.waiting``, which it keeps up with its own claims.

    ``weights`` of tenants: one with weight 2 may have twice the lines in flight; 1 where not given.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = weights or {}
        self.speeds = Speeds()
        self._rows: dict[str, dict[str, Waiting]] = {}
        """By model, then batch."""
        self._served_s: dict[Key, float] = {}
        """When the batch was last seen to have lines running or done, or first seen at all."""
        self._claims: dict[str, int] = defaultdict(int)

    def see(self, waiting: Sequence[Waiting], now_s: float) -> None:
        self.speeds.see(waiting, now_s)
        before, self._rows = self._rows, defaultdict(dict)
        for row in waiting:
            key = (row.batch_id, row.model)
            was = before.get(row.model, {}).get(row.batch_id)
            if row.leased_lines or (was is not None and row.done_lines > was.done_lines):
                self._served_s[key] = now_s
            self._rows[row.model][row.batch_id] = row
        self._served_s = {
            (row.batch_id, row.model): self._served_s.get((row.batch_id, row.model), now_s) for row in waiting
        }

    def rows(self) -> list[Waiting]:
        return [row for rows in self._rows.values() for row in rows.values()]

    def models(self) -> list[str]:
        """Those with lines that nobody has claimed."""
        return [model for model, rows in self._rows.items() if any(row.queued_lines for row in rows.values())]

    def choose(self, model: str, prefixes: Collection[int], now_s: float) -> Waiting | None:
        """The row whose chunk is to be claimed; None without any. ``prefixes``: of the lines that run now."""
        rows = [row for row in self._rows.get(model, {}).values() if row.queued_lines > 0]
        if not rows:
            return None
        if self._claims[model] % AGED_EVERY == AGED_EVERY - 1:
            oldest = min(rows, key=lambda row: (self._served_s[row.batch_id, model], row.created_s, row.batch_id))
            if now_s - self._served_s[oldest.batch_id, model] >= AGED_AFTER_S:
                return oldest
        late = {slack.batch_id for slack in self._slacks(model, now_s) if slack.late}
        shares = self._shares()

        def key(row: Waiting) -> tuple[bool, float, bool, float, float, str]:
            if row.batch_id in late:
                return (False, 0.0, False, row.deadline_s, row.created_s, row.batch_id)
            share = shares[row.tenant] // EQUAL_LINES
            return (True, share, row.next_prefix not in prefixes, row.deadline_s, row.created_s, row.batch_id)

        return min(rows, key=key)

    def claimed(self, row: Waiting, lines: int, now_s: float) -> None:
        """A chunk of ``lines`` was claimed from it; 0: the store had none, and the row waits for the next snapshot."""
        moved = min(lines, row.queued_lines)
        queued = row.queued_lines - moved if lines else 0
        changed = msgspec.structs.replace(row, queued_lines=queued, leased_lines=row.leased_lines + moved)
        self._rows[row.model][row.batch_id] = changed
        if lines:
            self._claims[row.model] += 1
            self._served_s[row.batch_id, row.model] = now_s

    def _shares(self) -> dict[str, float]:
        """Lines in flight of each tenant over all models, by its weight."""
        shares: dict[str, float] = defaultdict(float)
        for rows in self._rows.values():
            for row in rows.values():
                shares[row.tenant] += row.leased_lines / self._weights.get(row.tenant, 1.0)
        return shares

    def slacks(self, now_s: float) -> list[Slack]:
        return [slack for model in self._rows for slack in self._slacks(model, now_s)]

    def _slacks(self, model: str, now_s: float) -> list[Slack]:
        """By deadline: a batch is due after those with earlier ones. Without a measured speed all time left is it."""
        speed, due, slacks = self.speeds.lines_s(model), 0, []
        for row in sorted(self._rows.get(model, {}).values(), key=lambda row: row.deadline_s):
            due += row.queued_lines + row.leased_lines
            slack_s = row.deadline_s - now_s - (due / speed if speed else 0.0)
            late = slack_s < RISK_SHARE * (row.deadline_s - row.created_s)
            slacks.append(Slack(row.batch_id, model, row.tenant, slack_s, late))
        return slacks
