"""What happens to the endpoints of the soak, drawn from a seed, and whose fault each failed request was. Pure.

All times are seconds; those of lives, results and outcomes are on one clock, the wall clock of this machine.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from random import Random
from typing import NamedTuple

import msgspec

from llmd_sched.load.report import Result
from llmd_sched.load.workload import Item, Span

KINDS = ("join", "leave", "freeze", "kill")
FEWEST_WELL, MOST = 5, 12
"""Endpoints nothing is happening to, and members, at any time."""
JOIN_S = 3.0
"""Until a new endpoint counts as well."""
DRAIN_S = 6.0
"""From leaving the pool to the end of the engine: discovery and the longest reply together take less."""
FREEZE_S = (0.3, 6.0)
"""Below the age at which a request on an idle engine is given up, and far below the client's timeout."""
DOWN_S = (1.0, 6.0)
RESTART_S = 3.0
"""What starting an engine again may take on a busy machine."""
FIRST_S, CALM_S = 3.0, 12.0
"""Nothing happens before and in the end, when all that was begun is over."""

KNOWN_AFTER_S = 1.0
"""A killed endpoint is known to be unreachable this long after: two failed reads."""
LEFT_AFTER_S = 1.5
"""... and one that left the file is out of the pool: looked at every second."""
FROZEN_AFTER_S = 3.0
"""... and the metrics of a frozen one count as stale: after two seconds."""


class Step(NamedTuple):
    """``kind`` begins at ``at_s`` and, for freeze and kill, is undone ``for_s`` later."""

    at_s: float
    kind: str
    endpoint: int
    for_s: float


def plan(seed: int, seconds: float, members: int, every_s: float) -> list[Step]:
    """In order; on average one per ``every_s``. Endpoints are numbered, 0 to ``members`` - 1 are there at first.

    An endpoint is let alone until what happens to it is over, and joins once: its successor has another number.
    """
    rng = Random(seed)
    well_from_s = dict.fromkeys(range(members), 0.0)
    steps: list[Step] = []
    at_s, new = FIRST_S, members
    while (at_s := at_s + rng.expovariate(1 / every_s)) < seconds - CALM_S:
        well = [n for n, from_s in well_from_s.items() if from_s <= at_s]
        kinds = (KINDS[:1] if len(well_from_s) < MOST else ()) + (KINDS[1:] if len(well) > FEWEST_WELL else ())
        if not kinds:
            continue
        kind = rng.choice(kinds)
        endpoint = new if kind == "join" else rng.choice(well)
        for_s = rng.uniform(*(FREEZE_S if kind == "freeze" else DOWN_S)) if kind in ("freeze", "kill") else 0.0
        steps.append(Step(at_s, kind, endpoint, for_s))
        if kind == "leave":
            del well_from_s[endpoint]
        else:
            new += kind == "join"
            well_from_s[endpoint] = at_s + for_s + {"join": JOIN_S, "kill": RESTART_S}.get(kind, 0.0)
    return steps


def items(seed: int, rate_per_s: float, seconds: float) -> Iterator[Item]:
    """Evenly spaced. Prompts of 30 to 8000 tokens, each with a head that one of 20 applications shares."""
    rng = Random(seed)
    for i in range(int(rate_per_s * seconds)):
        tokens = round(30 * (8000 / 30) ** rng.random())
        prompt = (Span(f"soak-{rng.randrange(20)}", tokens // 2), Span(f"soak-own-{i}", tokens - tokens // 2))
        yield Item(at_s=i / rate_per_s, session="soak", prompt=prompt, output_tokens=rng.randint(10, 30))


class Life(msgspec.Struct):
    """What was done to one endpoint, and when."""

    name: str
    hostport: str
    left_s: float = math.inf
    down: list[tuple[float, float]] = msgspec.field(default_factory=list)
    """From just before it was killed until its successor at the same address answered."""
    frozen: list[tuple[float, float]] = msgspec.field(default_factory=list)


class Told(msgspec.Struct):
    """One line of the scheduler's outcome log."""

    time_s: float
    request_id: str
    destination: str
    end: str
    status: int
    open_s: float

    @property
    def chosen_s(self) -> float:
        return self.time_s - self.open_s


class Account(msgspec.Struct):
    """Every request is in exactly one of ``completed``, ``on_killed`` and ``lost``."""

    completed: int = 0
    on_killed: int = 0
    """Failed on an endpoint that was killed while they were there, or chosen before that could be known."""
    lost: Counter[str] = msgspec.field(default_factory=Counter)
    """Reason -> requests that count against us."""
    to_left: int = 0
    """Sent to an endpoint that had left, whatever became of them."""
    to_frozen: int = 0
    """Sent to one whose metrics were stale by then; they are late."""
    untold: int = 0
    """Sent, but their end never reached the scheduler."""
    told_twice: int = 0
    ends: Counter[str] = msgspec.field(default_factory=Counter)
    """What the scheduler was told -> requests."""
    examples: list[str] = msgspec.field(default_factory=list)
    """Of lost requests; at most EXAMPLES."""
    lost_at_s: list[float] = msgspec.field(default_factory=list)
    on_killed_at_s: list[float] = msgspec.field(default_factory=list)


EXAMPLES = 20


def account(results: Iterable[Result], told: Sequence[Told], lives: Sequence[Life], began_s: float) -> Account:
    """``began_s``: when the replay began, to which the results' times are relative."""
    by_id = {one.request_id: one for one in told}
    at = {life.hostport: life for life in lives}
    out = Account(told_twice=len(told) - len(by_id), ends=Counter(one.end for one in told))
    out.to_left = sum(one.chosen_s > at[one.destination].left_s + LEFT_AFTER_S for one in told)
    out.to_frozen = sum(
        from_s + FROZEN_AFTER_S < one.chosen_s < to_s for one in told for from_s, to_s in at[one.destination].frozen
    )
    for result in results:
        one = by_id.get(result.request_id)
        out.untold += one is None
        if result.error is None:
            out.completed += 1
            continue
        sent_s = began_s + result.sent_s
        why = _fault(one, at, sent_s + result.e2e_s)
        if why is None:
            out.on_killed += 1
            out.on_killed_at_s.append(result.sent_s)
            continue
        out.lost[f"{why}: {result.error}"] += 1
        out.lost_at_s.append(result.sent_s)
        if len(out.examples) < EXAMPLES:
            out.examples.append(f"at {result.sent_s:.2f} s {why}, {result}, {one}")
    return out


def _fault(one: Told | None, lives: Mapping[str, Life], ended_s: float) -> str | None:
    """Why a failed request counts against us; None when its endpoint had been killed."""
    if one is None:
        return "no outcome"
    for began_s, end_s in lives[one.destination].down:
        if one.chosen_s <= end_s and ended_s >= began_s:
            return "endpoint known to be dead" if one.chosen_s > began_s + KNOWN_AFTER_S else None
    return "endpoint was alive"
