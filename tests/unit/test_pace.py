"""How many lines batchgw starts, which, and which it aborts."""

from __future__ import annotations

import msgspec
import pytest

from batchgw.pace import (
    ANYWHERE,
    LOOK_AHEAD,
    ONSET_S,
    PATIENCE_S,
    STALE_AFTER_S,
    Assumed,
    FixedCap,
    Headroom,
    Mode,
    Pace,
    PoolHeadroom,
    Share,
    Start,
    Waiting,
)
from llmd_sched.headroom import wire

ASSUMED = dict.fromkeys(Assumed.__struct_fields__, 1.5)


def news(
    n_star: int = 10,
    mode: Mode = "idle",
    prefill_tokens: int = 1000,
    per_s: float | None = None,
    names: tuple[str, ...] = ("a",),
) -> PoolHeadroom:
    endpoints = tuple(
        Headroom(
            endpoint=name,
            mode=mode,
            n_star=n_star,
            prefill_tokens=prefill_tokens,
            prefill_tokens_per_s=per_s,
            step_budget_ms=None,
            batch_running=0,
            assumed=Assumed(**ASSUMED),
        )
        for name in names
    )
    return PoolHeadroom(version=1, mode=mode, carriers=names, endpoints=endpoints)


def lines(*prompts: int, aborted: bool = False) -> list[Waiting]:
    return [Waiting(prompt, aborted) for prompt in prompts]


def filled(count: int, *, mode: Mode = "idle", prompt_tokens: int = 10) -> Pace:
    """A pace with ``count`` lines that decode; line ``i`` has produced ``i + 1`` tokens."""
    pace = Pace()
    pace.hear(news(count, mode), 0.0)
    for number in range(count):
        pace.started(f"l{number}", "a", prompt_tokens)
        pace.produced([f"l{number}"] * (number + 1))
    return pace


def positions(starts: list[Start]) -> list[int]:
    return [start.position for start in starts]


def test_both_halves_write_the_same_json() -> None:
    """The wire is defined twice because batchgw does not import the scheduler."""
    sent = wire.PoolHeadroom(
        version=3,
        mode="burst",
        carriers=("a", "b"),
        endpoints=(
            wire.Headroom(
                endpoint="a",
                mode="burst",
                n_star=4,
                prefill_tokens=400,
                prefill_tokens_per_s=12.5,
                step_budget_ms=None,
                batch_running=2,
                assumed=wire.Assumed(**ASSUMED),
            ),
        ),
    )
    coded = msgspec.json.encode(sent)
    assert msgspec.json.encode(msgspec.json.decode(coded, type=PoolHeadroom)) == coded


def test_between_bursts_lines_start_in_order_up_to_n_star() -> None:
    pace = Pace()
    pace.hear(news(n_star=3), 0.0)
    assert pace.starts(lines(90, 10, 50, 20), 0.0) == [Start(0, "a"), Start(1, "a"), Start(2, "a")]


@pytest.mark.parametrize(
    ("prompts", "started"),
    [
        ([600, 300, 200], [0, 1]),  # 600 + 300 + 200 would be beyond 1000
        ([4000, 1], [0]),  # one prompt always may, and then it is full
        ([1000], [0]),
    ],
)
def test_outstanding_prompts_stay_within_the_allowance(prompts: list[int], started: list[int]) -> None:
    pace = Pace()
    pace.hear(news(), 0.0)
    assert positions(pace.starts(lines(*prompts), 0.0)) == started


def test_a_first_token_makes_room_for_the_next_prompt() -> None:
    pace = Pace()
    pace.hear(news(), 0.0)
    pace.started("x", "a", 900)
    assert pace.starts(lines(200), 0.0) == []
    pace.produced(["x", "somebody else's"])
    assert positions(pace.starts(lines(200), 0.0)) == [0]


def test_a_line_that_ends_before_its_first_token_gives_its_allowance_back() -> None:
    pace = Pace()
    pace.hear(news(), 0.0)
    pace.started("x", "a", 900)
    ended = pace.ended("x")
    assert ended is not None
    assert ended.computed_tokens == 0
    assert pace.ended("x") is None
    assert positions(pace.starts(lines(900), 0.0)) == [0]


def test_in_a_burst_the_shortest_that_was_never_aborted_goes_first() -> None:
    pace = Pace()
    pace.hear(news(n_star=2, mode="burst"), 0.0)
    waiting = [*lines(5, aborted=True), *lines(90, 30, 60)]
    assert positions(pace.starts(waiting, 0.0)) == [2, 3]


def test_in_a_burst_only_the_next_lines_are_looked_at_however_many_were_aborted() -> None:
    pace = Pace()
    pace.hear(news(n_star=1, mode="burst"), 0.0)
    waiting = [*lines(*[1] * 200, aborted=True), *lines(*[9] * LOOK_AHEAD), *lines(2)]
    assert positions(pace.starts(waiting, 0.0)) == [200]


def test_aborted_lines_go_on_in_a_burst_that_does_not_end_when_there_is_nothing_else() -> None:
    pace = Pace()
    pace.hear(news(mode="burst"), 0.0)
    waiting = lines(7, aborted=True)
    pace.hear(news(mode="burst"), PATIENCE_S)
    assert pace.starts(waiting, PATIENCE_S) == []
    assert positions(pace.starts(waiting, PATIENCE_S + 0.1)) == [0]


def test_prompts_are_sent_at_the_rate_that_was_allowed() -> None:
    pace = Pace()
    pace.hear(news(n_star=100, per_s=100.0), 10.0)
    assert positions(pace.starts(lines(1050), 10.0)) == [0]  # 1000 were saved up, so 50 are owed
    assert pace.starts(lines(1), 10.4) == []
    assert positions(pace.starts(lines(1), 10.6)) == [0]


def test_at_an_onset_the_least_computed_are_aborted_down_to_n_star() -> None:
    pace = filled(20)
    pace.hear(news(n_star=3, mode="burst"), 5.0)
    assert pace.aborts(5.0) == [f"l{n}" for n in range(17)]


@pytest.mark.parametrize(("in_flight", "aborted"), [(13, 0), (14, 4)])
def test_a_small_excess_runs_out_by_itself(in_flight: int, aborted: int) -> None:
    pace = filled(in_flight)
    pace.hear(news(n_star=10, mode="burst"), 5.0)
    assert len(pace.aborts(5.0)) == aborted


@pytest.mark.parametrize(("after_s", "aborts"), [(ONSET_S, True), (ONSET_S + 0.01, False)])
def test_aborts_end_with_the_first_second_of_a_burst(after_s: float, aborts: bool) -> None:
    pace = filled(20)
    pace.hear(news(n_star=30, mode="burst"), 5.0)
    pace.hear(news(n_star=3, mode="burst"), 5.0 + after_s)
    assert bool(pace.aborts(5.0 + after_s)) is aborts


def test_nothing_is_aborted_between_bursts() -> None:
    pace = filled(20)
    pace.hear(news(n_star=0), 5.0)
    assert pace.aborts(5.0) == []
    assert pace.starts(lines(1), 5.0) == []


def test_endpoints_are_filled_each_to_its_own_number() -> None:
    pace = Pace()
    pace.hear(news(n_star=1, names=("a", "b")), 0.0)
    assert pace.starts(lines(1, 2, 3), 0.0) == [Start(0, "a"), Start(1, "b")]


def test_an_endpoint_that_is_no_longer_named_gets_nothing_and_keeps_what_it_has() -> None:
    pace = filled(2)
    pace.hear(news(n_star=5, names=("b",)), 1.0)
    assert {start.endpoint for start in pace.starts(lines(*[1] * 9), 1.0)} == {"b"}
    assert set(pace.lines) == {"l0", "l1"}


def test_without_news_a_fixed_number_of_short_lines_is_in_flight() -> None:
    pace = Pace(FixedCap(lines=2, prefill_tokens=400))
    pace.hear(news(n_star=50), 0.0)
    waiting = lines(300, 200, 100)
    assert len(pace.starts(waiting, STALE_AFTER_S)) == 3
    assert positions(pace.starts(waiting, STALE_AFTER_S + 0.1)) == [2, 1]


def test_before_any_news_the_fixed_number_goes_wherever_the_router_likes() -> None:
    pace = Pace(FixedCap(lines=1))
    (start,) = pace.starts(lines(10, 20), 0.0)
    assert start == Start(0, ANYWHERE)
    pace.started("x", start.endpoint, 10)
    assert pace.starts(lines(20), 0.1) == []


def test_a_line_is_in_flight_once() -> None:
    pace = filled(1)
    with pytest.raises(ValueError, match="l0 is already in flight"):
        pace.started("l0", "a", 1)


def test_a_fixed_cap_is_not_negative() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        FixedCap(lines=-1)


@pytest.mark.parametrize("of", [1, 2, 3, 7])
@pytest.mark.parametrize("n_star", [0, 1, 5, 100])
def test_shares_together_are_the_whole_and_nobody_is_always_the_one_with_less(of: int, n_star: int) -> None:
    (whole,) = news(n_star, per_s=70.0).endpoints
    parts = [[Share(number=number, of=of).part(whole, endpoint) for number in range(of)] for endpoint in range(2 * of)]
    for one in parts:
        assert sum(part.n_star for part in one) == n_star
        assert sum(part.prefill_tokens_per_s or 0 for part in one) == pytest.approx(70.0)
        assert sum(part.prefill_tokens for part in one) <= whole.prefill_tokens
    assert len({sum(one[number].n_star for one in parts) for number in range(of)}) == 1


def test_of_several_workers_each_fills_its_share() -> None:
    pace = Pace()
    pace.share = Share(number=1, of=2)
    pace.hear(news(n_star=3, names=("a", "b")), 0.0)
    chosen = pace.starts(lines(*[1] * 9), 0.0)
    assert [start.endpoint for start in chosen] == ["a", "b", "b"]


@pytest.mark.parametrize(("number", "of"), [(-1, 1), (1, 1), (2, 2), (0, 0)])
def test_a_share_is_one_of_so_many(number: int, of: int) -> None:
    with pytest.raises(ValueError, match="number must be 0 to"):
        Share(number=number, of=of)


def test_several_tokens_may_come_at_once() -> None:
    pace = Pace()
    pace.started("x", "a", 10)
    pace.produced(["x", "unheard-of"], 7)
    assert (pace.lines["x"].tokens, pace.lines["x"].prefilled) == (7, True)


def test_how_old_news_may_be_is_the_callers_choice() -> None:
    pace = Pace(FixedCap(lines=0), stale_after_s=5.0)
    assert pace.stale(0.0)
    pace.hear(news(n_star=1), 0.0)
    assert (pace.stale(5.0), pace.stale(5.1)) == (False, True)
    assert len(pace.starts(lines(1), 5.0)) == 1
    assert pace.starts(lines(1), 5.1) == []
