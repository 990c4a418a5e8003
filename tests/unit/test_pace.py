"""batchgw's half of the pace, event by event."""

from __future__ import annotations

import msgspec
import pytest

from batchgw import pace
from batchgw.pace import LOOK_AHEAD, FixedCap, Mode, Pace, Start, Waiting
from llmd_sched.headroom import wire

ASSUMED = dict.fromkeys(pace.Assumed.__struct_fields__, 1.0)


def news(
    n_star: int, mode: Mode = "idle", prefill_tokens: int = 1000, version: int = 1, name: str = "a"
) -> pace.PoolHeadroom:
    endpoint = pace.Headroom(
        endpoint=name,
        mode=mode,
        n_star=n_star,
        prefill_tokens=prefill_tokens,
        step_budget_ms=None,
        batch_running=0,
        assumed=pace.Assumed(**ASSUMED),
    )
    return pace.PoolHeadroom(version=version, mode=mode, carriers=(), endpoints=(endpoint,))


def lines(*prompt_tokens: int) -> list[Waiting]:
    return [Waiting(tokens) for tokens in prompt_tokens]


def running(pacer: Pace, count: int, now_s: float, n_star: int = 100) -> None:
    """``count`` lines that decode; line number n has n + 1 tokens."""
    pacer.hear(news(n_star), now_s)
    for n in range(count):
        pacer.started(f"l{n}", "a", 100)
        for _ in range(n + 1):
            pacer.produced([f"l{n}"])


def test_between_bursts_lines_start_in_order_as_many_as_there_is_room_for() -> None:
    pacer = Pace()
    pacer.hear(news(3, prefill_tokens=10_000), 0.0)
    assert pacer.starts(lines(900, 10, 500, 20), 0.1) == [Start(0, "a"), Start(1, "a"), Start(2, "a")]


def test_in_a_burst_the_shortest_goes_first_and_never_one_that_was_aborted() -> None:
    pacer = Pace()
    pacer.hear(news(1, "burst"), 0.0)
    waiting = [Waiting(900), Waiting(5, aborted=True), Waiting(40), Waiting(50)]
    assert pacer.starts(waiting, 0.1) == [Start(2, "a")]


def test_prompts_wait_for_the_prefill_allowance_but_one_may_always_go() -> None:
    pacer = Pace()
    pacer.hear(news(10, prefill_tokens=1000), 0.0)
    (first,) = pacer.starts(lines(5000, 10), 0.1)
    pacer.started("x", "a", 5000)
    assert pacer.starts(lines(10), 0.1) == []
    pacer.produced(["x"])
    assert (first.position, pacer.starts(lines(10), 0.1)) == (0, [Start(0, "a")])


def test_only_the_next_lines_are_looked_at() -> None:
    pacer = Pace()
    pacer.hear(news(1, "burst"), 0.0)
    assert pacer.starts(lines(*[100] * LOOK_AHEAD, 1), 0.1) == [Start(0, "a")]


def test_at_an_onset_the_least_computed_are_closed_down_to_what_may_stay() -> None:
    pacer = Pace()
    running(pacer, 10, 0.0)
    pacer.hear(news(4, "burst"), 1.0)
    assert pacer.aborts(1.1) == ["l0", "l1", "l2", "l3", "l4", "l5"]


def test_a_little_too_much_stays_and_so_does_whatever_is_left_a_second_later() -> None:
    pacer = Pace()
    running(pacer, 6, 0.0)
    pacer.hear(news(4, "burst"), 1.0)
    assert pacer.aborts(1.1) == []  # 6 <= 1.1 x 4 + 2
    pacer.hear(news(1, "burst", version=3), 2.5)
    assert pacer.aborts(2.5) == []


def test_news_that_is_old_leaves_a_small_fixed_number() -> None:
    pacer = Pace(FixedCap(lines=2))
    assert len(pacer.starts(lines(1, 1, 1), 0.0)) == 2
    pacer.hear(news(50), 0.0)
    assert len(pacer.starts(lines(1, 1, 1), 0.9)) == 3
    assert len(pacer.starts(lines(1, 1, 1), 1.1)) == 2


def test_an_endpoint_that_is_no_longer_named_gets_nothing_more() -> None:
    pacer = Pace()
    pacer.hear(news(5), 0.0)
    pacer.started("x", "a", 10)
    pacer.hear(news(1, name="b", version=2), 0.1)
    assert pacer.starts(lines(1, 1, 1), 0.2) == [Start(0, "b")]


def test_a_line_cannot_be_in_flight_twice_and_its_end_frees_its_place_at_once() -> None:
    pacer = Pace()
    pacer.hear(news(1), 0.0)
    pacer.started("x", "a", 10)
    with pytest.raises(ValueError, match="already in flight"):
        pacer.started("x", "a", 10)
    assert pacer.starts(lines(1), 0.1) == []
    ended = pacer.ended("x")
    assert (ended is not None, pacer.ended("x")) == (True, None)
    assert pacer.starts(lines(1), 0.1) == [Start(0, "a")]


def test_both_sides_write_and_read_the_same_json() -> None:
    said = news(7, "burst")
    data = msgspec.json.encode(said)
    assert msgspec.json.encode(msgspec.json.decode(data, type=wire.PoolHeadroom)) == data
    for name in ("Assumed", "Headroom", "PoolHeadroom"):
        assert getattr(pace, name).__struct_fields__ == getattr(wire, name).__struct_fields__
