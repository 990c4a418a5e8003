"""Which requests in flight make room, how many at a time, and when the next may."""

from __future__ import annotations

import math

import pytest

from llmd_sched.flow import reclaim
from llmd_sched.flow.controller import Blocked
from llmd_sched.flow.reclaim import Reclaimer

TOP = Blocked(10, 1.0)


def reclaimer(*running: tuple[str, int], grace_s: float = 0.01) -> Reclaimer:
    made = Reclaimer(grace_s)
    for ticket, priority in running:
        made.started(ticket, priority)
    return made


RUNNING = (("a", -1), ("b", -5), ("c", -1), ("d", -5), ("e", 0))


@pytest.mark.parametrize(
    ("blocked", "saturation", "in_flight", "expected"),
    [
        (TOP, 1.0, 10, ["d"]),  # at the ceiling: one; lowest priority, newest
        (TOP, 1.1, 10, ["d"]),  # 0.1 / 0.11
        (TOP, 1.2, 10, ["d", "b"]),  # 0.2 / 0.12
        (TOP, 3.0, 10, ["d", "b"]),  # never more than two
        (Blocked(10, 0.5), 0.75, 3, ["d"]),  # 0.25 / 0.25
        (Blocked(10, 0.5), 0.75, 4, ["d", "b"]),  # 0.25 / 0.1875
        (Blocked(0, 1.0), 2.0, 10, ["d", "b"]),
        (Blocked(-1, 1.0), 2.0, 10, ["d", "b"]),  # strictly below only
        (Blocked(-5, 1.0), 2.0, 10, []),
        (Blocked(-9, 1.0), 2.0, 10, []),
        (Blocked(10, 0.0), 0.0, 0, ["d"]),
    ],
)
def test_victims(blocked: Blocked, saturation: float, in_flight: int, expected: list[str]) -> None:
    made = reclaimer(*RUNNING)
    assert made.victims(blocked, saturation, in_flight, 0.0) == expected
    assert made.issued[blocked.priority] == made.pending == len(expected)


def test_requests_that_are_not_sheddable_are_never_victims() -> None:
    made = reclaimer(("a", 0), ("b", 3))
    assert made.victims(TOP, 2.0, 2, 0.0) == []
    assert made.next_deadline_s(0.0) == math.inf


def test_a_request_that_ended_is_no_victim() -> None:
    made = reclaimer(("a", -1), ("b", -1))
    made.finished("b", 0.0)
    assert made.victims(TOP, 9.0, 2, 0.0) == ["a"]
    assert made.outcomes == {}


def test_it_waits_for_all_evictions_to_show_and_then_for_the_grace() -> None:
    made = reclaimer(*((str(n), -1) for n in range(6)), grace_s=0.5)
    waits = []
    made.on_confirmed = waits.append
    assert made.victims(TOP, 9.0, 6, 1.0) == ["5", "4"]
    assert made.victims(TOP, 9.0, 6, 1.1) == []
    made.finished("4", 1.2)
    assert made.victims(TOP, 9.0, 6, 1.75) == []
    made.finished("5", 2.0)
    assert (made.pending, waits) == (0, pytest.approx([0.2, 1.0]))
    assert made.next_deadline_s(2.0) == 2.5
    assert made.victims(TOP, 9.0, 6, 2.49) == []
    assert made.victims(TOP, 9.0, 6, 2.5) == ["3", "2"]
    assert made.outcomes == {"confirmed": 2}


def test_an_eviction_without_effect_is_given_up_after_ten_seconds() -> None:
    made = reclaimer(("a", -1), ("b", -1))
    assert made.victims(TOP, 1.0, 2, 0.0) == ["b"]
    assert made.next_deadline_s(0.0) == 10.0
    assert made.victims(TOP, 1.0, 2, 9.99) == []
    assert made.victims(TOP, 1.0, 2, 10.0) == ["a"]
    made.finished("b", 11.0)  # late: it was given up already
    assert made.outcomes == {"timed_out": 1}


def test_an_eviction_that_cannot_be_done_is_not_waited_for() -> None:
    made = reclaimer(("a", -1), ("b", -1))
    assert made.victims(TOP, 1.0, 2, 0.0) == ["b"]
    made.failed("b")
    assert made.victims(TOP, 1.0, 2, 0.0) == ["a"]
    assert made.outcomes == {"failed": 1}


def test_it_has_no_deadline_once_the_grace_is_over_or_nobody_is_left() -> None:
    made = reclaimer(("a", -1), ("b", -1))
    made.victims(TOP, 1.0, 2, 0.0)
    made.finished("b", 1.0)
    assert made.next_deadline_s(1.0) == pytest.approx(1.01)
    assert made.next_deadline_s(2.0) == math.inf
    made.finished("a", 3.0)
    assert made.next_deadline_s(3.0) == math.inf


def test_what_is_followed_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reclaim, "MAX_EVICTABLE", 3)
    made = reclaimer(("a", -1), ("b", -2), ("c", -1), ("d", -1))
    seen = []
    for _ in range(5):
        for ticket in made.victims(TOP, 1.0, 9, 0.0):
            seen.append(ticket)
            made.failed(ticket)
    assert seen == ["b", "d", "c"]
