"""How many lines may be in flight, which are next, which are to be aborted: batchgw's half of the pace.

The scheduler says how much batch each endpoint can take now (``PoolHeadroom``); ``Pace`` holds the lines in flight
against it. In a burst it takes the shortest of the next lines and closes the excess at once; between bursts it takes
them as they come. Without news it falls back to a small fixed number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import msgspec

Mode: TypeAlias = Literal["idle", "burst"]

LOOK_AHEAD = 50
"""Waiting lines that are looked at, of those never aborted and of the aborted each."""

STALE_AFTER_S = 1.0
ONSET_S = 1.0
"""Lines are aborted only so soon after a burst began; what is too much later runs out by itself."""

ANYWHERE = ""
"""Endpoint of lines that are sent before any endpoint was named: wherever the router likes."""

PATIENCE_S = 5.0
"""Of aborted lines: in a burst that lasts longer they go on too, within its limits, when there is nothing else. What is
left of a batch in the end would wait for the end of the burst otherwise."""

TOLERATED_SHARE = 1.1
TOLERATED_LINES = 2
"""So many times n* and so many more may stay at an onset: each abort costs its line another prefill."""


class Assumed(msgspec.Struct, frozen=True, kw_only=True):
    """What a headroom was computed from; interactive load as it would be without batch."""

    arrivals_per_s: float
    prompt_tokens_per_s: float
    running: float
    context_tokens: float
    step_ms: float
    base_ms: float
    prefill_token_ms: float
    sequence_ms: float
    context_token_ms: float


class Headroom(msgspec.Struct, frozen=True, kw_only=True):
    """Of one endpoint."""

    endpoint: str
    mode: Mode
    n_star: int
    """Batch requests that may be in flight."""
    prefill_tokens: int
    """Batch prompt tokens that may wait for their first token together; one prompt always may."""
    prefill_tokens_per_s: float | None
    """At which batch prompts may be sent; None = no bound."""
    step_budget_ms: float | None
    batch_running: int
    """As the scheduler counts them."""
    assumed: Assumed


class PoolHeadroom(msgspec.Struct, frozen=True, kw_only=True):
    """Of all endpoints, at one moment. The JSON of ``llmd_sched.headroom.wire``."""

    version: int
    mode: Mode
    carriers: tuple[str, ...]
    endpoints: tuple[Headroom, ...]


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """Of several that send batch to the same endpoints, this is the one with this number, from 0."""

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise ValueError(f"number must be 0 to {self.of - 1} for a share of {self.of}, not {self.number}")

    def part(self, headroom: Headroom, endpoint: int) -> Headroom:
        """Its part of what the ``endpoint``-th endpoint can take: together they have all of it, none less than others
        everywhere."""
        if self.of == 1:
            return headroom
        behind = (self.number + endpoint) % self.of
        per_s = headroom.prefill_tokens_per_s
        return msgspec.structs.replace(
            headroom,
            n_star=(headroom.n_star + self.of - 1 - behind) // self.of,
            prefill_tokens=headroom.prefill_tokens // self.of,
            prefill_tokens_per_s=None if per_s is None else per_s / self.of,
        )


class FixedCap(msgspec.Struct, frozen=True, kw_only=True):
    """What is safe on an endpoint of which nothing is known."""

    lines: int = 4
    prefill_tokens: int = 400

    def __post_init__(self) -> None:
        if self.lines < 0 or self.prefill_tokens < 0:
            raise ValueError(f"lines and prefill_tokens of a fixed cap must be 0 or more, not {self}")


class Waiting(NamedTuple):
    """A line that is not in flight."""

    prompt_tokens: int
    """Those produced before an abort included."""
    aborted: bool = False


class Start(NamedTuple):
    """Send the waiting line at this position to this endpoint."""

    position: int
    endpoint: str


class Line:
    """A line in flight."""

    __slots__ = ("endpoint", "id", "prefilled", "prompt_tokens", "tokens")

    def __init__(self, id: str, endpoint: str, prompt_tokens: int) -> None:
        self.id = id
        self.endpoint = endpoint
        self.prompt_tokens = prompt_tokens
        self.prefilled = False
        self.tokens = 0
        """That have come out."""

    @property
    def computed_tokens(self) -> int:
        """What an abort throws away; of a prompt under way nothing is known."""
        return self.prompt_tokens + self.tokens if self.prefilled else 0


class _Place:
    """One endpoint: the lines there, and what was last heard of it."""

    def __init__(self, headroom: Headroom | None = None) -> None:
        self.headroom = headroom
        self.gone = False
        """The latest news did not name it."""
        self.onset_s: float | None = None
        self.lines: dict[str, Line] = {}
        self.outstanding_tokens = 0
        """Of prompts whose first token has not come."""
        self.prefilling = 0
        self.credit_tokens = 0.0
        """Of prompts that may be sent; below 0 while a long one is paid off."""
        self._at_s = 0.0

    def earn(self, now_s: float) -> None:
        """Credit for the time since the last call; no more is saved up than may be outstanding."""
        dt_s, self._at_s = max(now_s - self._at_s, 0.0), now_s
        if self.headroom is None or self.headroom.prefill_tokens_per_s is None:
            self.credit_tokens = 1.0
        else:
            earned = self.credit_tokens + self.headroom.prefill_tokens_per_s * dt_s
            self.credit_tokens = min(earned, float(max(self.headroom.prefill_tokens, 1)))


class Pace:
    """Of one model. Tell it what happens; ask ``aborts`` after each ``hear`` and ``starts`` after everything."""

    def __init__(self, fixed: FixedCap | None = None, stale_after_s: float = STALE_AFTER_S) -> None:
        self.fixed = fixed or FixedCap()
        self.stale_after_s = stale_after_s
        self.share = Share()
        """Counts from the next ``hear`` on."""
        self.lines: dict[str, Line] = {}
        self._places: dict[str, _Place] = {}
        self._heard_s: float | None = None

    def hear(self, news: PoolHeadroom, now_s: float) -> None:
        """The latest word replaces the one before. An endpoint no longer named gets no further lines."""
        self._heard_s = now_s
        named = {one.endpoint: self.share.part(one, i) for i, one in enumerate(news.endpoints)}
        for name in [n for n, place in self._places.items() if n not in named and not place.lines]:
            del self._places[name]
        for name, place in self._places.items():
            place.gone = name not in named
        for name, headroom in named.items():
            place = self._places.setdefault(name, _Place())
            before, place.headroom = place.headroom, headroom
            if headroom.mode != "burst":
                place.onset_s = None
            elif before is None or before.mode != "burst":
                place.onset_s = now_s

    def started(self, line_id: str, endpoint: str, prompt_tokens: int) -> None:
        """Sent. ValueError when it is in flight already."""
        if line_id in self.lines:
            raise ValueError(f"line {line_id} is already in flight")
        place = self._places.setdefault(endpoint, _Place())
        line = self.lines[line_id] = place.lines[line_id] = Line(line_id, endpoint, prompt_tokens)
        place.outstanding_tokens += line.prompt_tokens
        place.prefilling += 1

    def stale(self, now_s: float) -> bool:
        """Nothing was heard, or not for long."""
        return self._heard_s is None or now_s - self._heard_s > self.stale_after_s

    def produced(self, line_ids: Iterable[str], count: int = 1) -> None:
        """``count`` tokens each; unknown ids are ignored."""
        get = self.lines.get
        for line_id in line_ids:
            line = get(line_id)
            if line is not None:
                line.tokens += count
                if not line.prefilled:
                    self._prefilled(line)

    def ended(self, line_id: str) -> Line | None:
        """Finished, failed or aborted: what was known of it, or None."""
        line = self.lines.pop(line_id, None)
        if line is not None:
            if not line.prefilled:
                self._prefilled(line)
                line.prefilled = False
            del self._places[line.endpoint].lines[line_id]
        return line

    def aborts(self, now_s: float) -> list[str]:
        """Lines to close now, to be resumed later with the tokens they have: the least computed first."""
        ids: list[str] = []
        for place in self._places.values():
            if place.headroom is None or place.gone or place.onset_s is None or now_s - place.onset_s > ONSET_S:
                continue
            n_star = place.headroom.n_star
            if len(place.lines) > TOLERATED_SHARE * n_star + TOLERATED_LINES:
                cheapest = sorted(place.lines.values(), key=lambda line: line.computed_tokens)
                ids += [line.id for line in cheapest[: len(cheapest) - n_star]]
        return ids

    def starts(self, waiting: Sequence[Waiting], now_s: float) -> list[Start]:
        """Which of the waiting lines to send where, in the caller's order between bursts; what it names is to be sent.

        The first LOOK_AHEAD of those never aborted and of the aborted are looked at: so give both, or a burst that
        follows many aborts finds nothing to take.
        """
        left = _looked_at(waiting)
        stale = self.stale(now_s)
        if stale and not self._places:
            self._places[ANYWHERE] = _Place()
        chosen: list[Start] = []
        for name, place in self._places.items():
            place.earn(now_s)
            impatient = stale or (place.onset_s is not None and now_s - place.onset_s > PATIENCE_S)
            chosen += [Start(position, name) for position in self._choose(place, left, stale, impatient)]
        return chosen

    def _choose(self, place: _Place, left: dict[int, Waiting], stale: bool, impatient: bool) -> Iterator[int]:
        """Takes what it chooses out of ``left``, and its prompt out of the credit."""
        lines, allowance, picky = self._limits(place, stale)
        metered = not stale and place.headroom is not None and place.headroom.prefill_tokens_per_s is not None
        outstanding, prefilling = place.outstanding_tokens, place.prefilling
        for _ in range(lines - len(place.lines)):
            position = _shortest(left, impatient) if picky else next(iter(left), None)
            if position is None or (metered and place.credit_tokens <= 0):
                return
            if prefilling and outstanding + left[position].prompt_tokens > allowance:
                return
            prompt_tokens = left.pop(position).prompt_tokens
            outstanding += prompt_tokens
            prefilling += 1
            if metered:
                place.credit_tokens -= prompt_tokens
            yield position

    def _limits(self, place: _Place, stale: bool) -> tuple[int, int, bool]:
        """Lines, outstanding prompt tokens, and whether to be picky."""
        if place.gone:
            return 0, 0, True
        if stale or place.headroom is None:
            return self.fixed.lines, self.fixed.prefill_tokens, True
        return place.headroom.n_star, place.headroom.prefill_tokens, place.headroom.mode == "burst"

    def _prefilled(self, line: Line) -> None:
        line.prefilled = True
        place = self._places[line.endpoint]
        place.outstanding_tokens -= line.prompt_tokens
        place.prefilling -= 1


def _looked_at(waiting: Sequence[Waiting]) -> dict[int, Waiting]:
    seen = [0, 0]
    left: dict[int, Waiting] = {}
    for position, line in enumerate(waiting):
        seen[line.aborted] += 1
        if seen[line.aborted] <= LOOK_AHEAD:
            left[position] = line
    return left


def _shortest(left: dict[int, Waiting], aborted_too: bool) -> int | None:
    """An aborted line comes last: its prompt is long, and its prefill was paid once already."""
    fresh = [position for position, line in left.items() if not line.aborted]
    among = fresh or (left if aborted_too else ())
    return min(among, key=lambda position: left[position].prompt_tokens, default=None)
