"""The board as a plugin, and who goes where by it."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from llmd_sched.catalog import resolve
from llmd_sched.config import load
from llmd_sched.errors import ConfigError, NoneLeft
from llmd_sched.headers import DESTINATION_SUBSET
from llmd_sched.headroom.producer import LATE_LOOK_S, LOOK_S, UNREAD_KV_TOKENS, BatchHeadroom
from llmd_sched.headroom.routing import BatchHeadroomFilter
from llmd_sched.headroom.wire import PoolHeadroom
from llmd_sched.pool.pool import Load, Pool
from llmd_sched.router import Router
from llmd_sched.types import Candidates, End, Outcome
from tests.builders import CONFIG_HEAD, HARVEST, asking, candidates, endpoints, pool_of, prompt, router_of, streamed

BATCH = asking(prompt(4), priority=-1)
USER = asking(prompt(4))
ROOM, CARRIER = "batch_room/batch-headroom-producer", "carrier/batch-headroom-producer"


def board_of(router: Router) -> BatchHeadroom:
    (found,) = [one for one in router.producers if isinstance(one, BatchHeadroom)]
    return found


def made(config: str = HARVEST, count: int = 2, **loads: Load) -> tuple[Router, BatchHeadroom, Pool]:
    pool = pool_of(endpoints(count), loads)
    router = router_of(config, pool)
    board = board_of(router)
    board.look(pool.candidates(None, 0.0), 0.0)
    return router, board, pool


def burst(router: Router, at_s: float, count: int = 40) -> list[str]:
    return [router.choose(USER, None, at_s + i / count).ticket for i in range(count)]


def side(board: BatchHeadroom) -> list[tuple[int, int]]:
    """Interactive and batch requests on each endpoint."""
    return [(load.interactive.running, load.batch.running) for load in board.board.loads.values()]


# --------------------------------------------------------------------------------------------------------- the producer


def test_a_request_of_negative_priority_is_batch_and_any_other_interactive() -> None:
    router, board, _ = made(count=1)
    tickets = [router.choose(one, None, 0.0).ticket for one in (BATCH, USER, asking(prompt(1), priority=3))]
    assert side(board) == [(2, 1)]
    for ticket in tickets:
        router.finish(ticket, streamed(), 1.0)
    assert side(board) == [(0, 0)]


@pytest.mark.parametrize("end", End)
def test_however_a_request_ends_it_is_counted_no_more(end: End) -> None:
    router, board, _ = made(count=1)
    ticket = router.choose(BATCH, None, 0.0).ticket
    router.first_token(ticket, 0.1)
    router.finish(ticket, Outcome(end=end), 0.2)
    assert side(board) == [(0, 0)]
    assert board.board.loads["10.0.0.1:8000"].outstanding_tokens == 0


def test_the_arrival_that_begins_a_burst_is_news_at_once() -> None:
    router, board, pool = made()
    heard: list[PoolHeadroom] = []
    board.on_news.append(heard.append)
    for i in range(40):
        if i % 10 == 0:
            board.look(pool.candidates(None, i / 100), i / 100)
        heard.clear()
        router.choose(USER, None, i / 100 + 0.005)
        assert board.news.mode == board.board.mode
        if board.board.mode == "burst":
            break
    assert [news.mode for news in heard] == ["burst"]
    assert max(one.n_star for one in heard[0].endpoints) < 10


def test_room_shrinks_with_each_batch_request_and_comes_back_with_its_end() -> None:
    router, board, pool = made(count=1)
    room = board.produce(BATCH, pool.candidates(None, 0.0), 0.0)[ROOM]
    tickets = [router.choose(BATCH, None, 0.01).ticket for _ in range(3)]
    assert board.produce(BATCH, pool.candidates(None, 0.0), 0.02)[ROOM] == room - 3
    router.finish(tickets[0], Outcome(end=End.ABORTED), 0.03)
    assert board.produce(BATCH, pool.candidates(None, 0.0), 0.04)[ROOM] == room - 2
    board.look(pool.candidates(None, 0.1), 0.1)
    assert board.produce(BATCH, pool.candidates(None, 0.1), 0.1)[ROOM] == room - 2


def test_columns_of_one_request_do_not_change_with_the_next() -> None:
    router, board, pool = made()
    before = board.produce(BATCH, pool.candidates(None, 0.0), 0.0)[ROOM]
    kept = before.copy()
    router.choose(BATCH, None, 0.0)
    assert np.array_equal(before, kept)


def test_where_nobody_looks_a_request_does() -> None:
    router, board, _ = made()
    version = board.news.version
    router.choose(USER, None, LATE_LOOK_S - 0.01)
    assert board.news.version == version
    router.choose(USER, None, LATE_LOOK_S)
    assert board.news.version == version + 1


@pytest.mark.parametrize(
    ("kv_tokens", "told", "expected"),
    [("", (16.0, 5000.0), 80_000), ("kvTokens: 123456", (16.0, 5000.0), 123_456), ("", (0.0, 0.0), UNREAD_KV_TOKENS)],
)
def test_the_kv_cache_is_what_the_configuration_says_else_the_engine(
    kv_tokens: str, told: tuple[float, float], expected: int
) -> None:
    config = f"plugins: [{{type: batch-headroom-producer, parameters: {{{kv_tokens}}}}}]"
    _, board, pool = made(config, 1, e0=Load(0, 0, 0, block_tokens=told[0], cache_blocks=told[1]))
    (load,) = board.board.loads.values()
    assert load.kv_tokens == expected
    pool.apply([*endpoints(2)])
    assert board.board.loads["10.0.0.1:8000"].kv_tokens == expected


def test_an_endpoint_that_cannot_be_reached_is_not_named() -> None:
    _, board, pool = made()
    for _ in range(2):
        pool.record_failure(pool.endpoints[0])
    board.look(pool.candidates(None, LOOK_S), LOOK_S)
    assert [one.endpoint for one in board.news.endpoints] == ["10.0.0.2:8000"]
    assert set(board.news.carriers) <= {"10.0.0.2:8000"}


def test_a_pool_that_changes_is_followed() -> None:
    router, board, pool = made()
    router.choose(BATCH, None, 0.0)
    pool.apply(endpoints(5))
    decision = router.choose(BATCH, None, 0.01)
    pool.apply(endpoints(1))
    router.finish(decision.ticket, streamed(), 0.02)
    board.look(pool.candidates(None, 0.1), 0.1)
    assert [one.endpoint for one in board.news.endpoints] == ["10.0.0.1:8000"]
    assert not any(router.producer_errors.values())


def test_a_first_token_nobody_sees_is_due_when_the_prompts_before_it_are_computed() -> None:
    router, board, _ = made(count=1)
    first = router.choose(asking(prompt(100)), None, 0.0).ticket
    second = router.choose(asking(prompt(100)), None, 0.0).ticket
    prefill_ms = 0.02 * 6400
    assert board.first_token_due_ms(second) == pytest.approx(2 * prefill_ms + 10.5, rel=0.01)
    router.first_token(first, 0.2)
    assert prefill_ms < board.first_token_due_ms(second) < 1.2 * prefill_ms
    assert board.first_token_due_ms("unheard-of") == 0


def test_step_times_are_calibrated_by_the_measured_time_per_token_where_there_is_one() -> None:
    """The end of a reply may be reported late; what was measured of it counts."""
    router, board, _ = made(count=1)
    (load,) = board.board.loads.values()
    for i in range(60):
        at_s = 2.0 * i
        ticket = router.choose(asking(prompt(1)), None, at_s).ticket
        router.first_token(ticket, at_s + 0.05)
        outcome = streamed(ttft_ms=50.0, e2e_ms=50.0 + 99 * 10.0, output_tokens=100)
        router.finish(ticket, outcome, at_s + 1.8)
    assert load.model.base_s == pytest.approx(10e-3, rel=0.05)


def n_star(board: BatchHeadroom) -> int:
    (one,) = board.news.endpoints
    return one.n_star


PROTECT = HARVEST.replace("mode: harvest", "mode: protect, itlMs: 12")


def told(board: BatchHeadroom, pool: Pool, running: float, from_s: float, to_s: float) -> None:
    """The engine says so, ten times a second."""
    for tenth in range(round(10 * from_s), round(10 * to_s)):
        pool.record(pool.endpoints[0], Load(0.0, running, 0.0), tenth / 10)
        board.look(pool.candidates(None, tenth / 10), tenth / 10)


def test_requests_of_before_a_restart_are_load_at_once_and_no_more_when_they_have_ended() -> None:
    _, board, pool = made(PROTECT, 1)
    told(board, pool, 0, 0.0, 1.0)
    alone = n_star(board)
    _, board, pool = made(PROTECT, 1, e0=Load(0.0, 40.0, 0.0))
    told(board, pool, 40, 0.0, 1.0)
    assert 0 < n_star(board) < 0.6 * alone
    assert board.board.loads["10.0.0.1:8000"].unseen == 40
    told(board, pool, 0, 1.0, 2.0)
    assert n_star(board) == alone


def test_another_routers_requests_become_load_once_they_stay() -> None:
    _, board, pool = made(PROTECT, 1)
    told(board, pool, 0, 0.0, 3.0)
    alone = n_star(board)
    told(board, pool, 30, 3.0, 4.5)
    assert n_star(board) == alone
    told(board, pool, 30, 4.5, 9.0)
    assert n_star(board) < 0.8 * alone


def test_what_we_sent_ourselves_is_no_other_routers_however_late_the_engine_tells_it() -> None:
    router, board, pool = made(PROTECT, 1)
    told(board, pool, 0, 0.0, 3.0)
    tickets = [router.choose(BATCH, None, 3.0).ticket for _ in range(20)]
    told(board, pool, 20, 3.0, 5.0)
    for ticket in tickets:
        router.finish(ticket, Outcome(end=End.ABORTED), 5.0)
    told(board, pool, 20, 5.0, 5.5)
    told(board, pool, 0, 5.5, 9.0)
    assert board.board.loads["10.0.0.1:8000"].unseen == 0


# --------------------------------------------------------------------------------------------------------- the filter


def kept(filter: BatchHeadroomFilter, view: Candidates, priority: int, named: str = "") -> list[bool]:
    headers = {DESTINATION_SUBSET: named} if named else {}
    asked = asking(prompt(1), priority=priority, headers=headers)
    return filter.keep(asked, view, Random(0)).tolist()


@pytest.mark.parametrize(
    ("room", "carrier", "expected"),
    [
        ((5, 5, 5), (1, 0, 0), (False, True, True)),
        ((5, 0, 5), (1, 0, 0), (False, False, True)),
        ((5, 0, -2), (1, 0, 0), (True, False, False)),
        ((3, 1, 0), (1, 1, 1), (True, True, False)),
        ((-4, -1, -1), (1, 1, 1), (False, True, True)),
    ],
)
def test_batch_goes_where_there_is_room_and_no_interactive_request(
    room: tuple[float, ...], carrier: tuple[float, ...], expected: tuple[bool, ...]
) -> None:
    view = candidates(**{ROOM: room, CARRIER: carrier})
    assert kept(BatchHeadroomFilter(), view, -1) == list(expected)


def test_batch_without_room_anywhere_may_be_refused_instead() -> None:
    view = candidates(**{ROOM: (0, -1), CARRIER: (1, 1)})
    assert kept(BatchHeadroomFilter(when_full="refuse"), view, -1) == [False, False]
    router, board, _ = made(HARVEST.replace("filter", "filter\n  parameters: {whenFull: refuse}"), 1)
    (room,) = {one.n_star for one in board.news.endpoints}
    for _ in range(room):
        router.choose(BATCH, None, 0.0)
    with pytest.raises(NoneLeft):
        router.choose(BATCH, None, 0.0)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("10.0.0.2:8000", (False, True, False)),
        (" 10.0.0.3:8000, 10.0.0.2:8000", (False, True, True)),
        ("10.9.9.9:8000", (True, False, False)),
        ("10.0.0.2", (True, False, False)),
        (",,", (True, False, False)),
    ],
)
def test_batch_goes_where_its_gateway_says_as_long_as_that_is_there(named: str, expected: tuple[bool, ...]) -> None:
    view = candidates(**{ROOM: (5, 0, 0), CARRIER: (0, 0, 1)})
    assert kept(BatchHeadroomFilter(), view, -1, named) == list(expected)


def test_no_header_steers_an_interactive_request() -> None:
    view = candidates(**{ROOM: (5, 5), CARRIER: (1, 0)})
    assert kept(BatchHeadroomFilter(), view, 0, "10.0.0.2:8000") == [True, False]


@pytest.mark.parametrize(("carrier", "expected"), [((1, 0), [True, False]), ((0, 0), [True, True])])
def test_interactive_requests_go_to_those_that_carry_them_or_to_all(
    carrier: tuple[float, ...], expected: list[bool]
) -> None:
    assert kept(BatchHeadroomFilter(), candidates(**{ROOM: (0, 9), CARRIER: carrier}), 0) == expected


def test_few_users_share_one_engine_and_a_burst_has_them_all() -> None:
    router, board, pool = made(count=4)
    router.choose(BATCH, None, 1.0)
    for at_s in (1.0, 10.0):
        board.look(pool.candidates(None, at_s), at_s)
    tickets = [router.choose(USER, None, 10.0 + i).ticket for i in range(5)]
    assert [interactive for interactive, _ in side(board)] == [5, 0, 0, 0]
    for ticket in tickets:
        router.finish(ticket, streamed(), 16.0)
    burst(router, 20.0, count=60)
    assert board.news.mode == "burst"
    burst(router, 21.0, count=60)
    assert all(interactive for interactive, _ in side(board))


# ------------------------------------------------------------------------------------------------------ configuration


def resolved(body: str) -> list[str]:
    return list(resolve(load(CONFIG_HEAD + body)).plugins)


def test_the_filter_alone_brings_a_board() -> None:
    assert "batch-headroom-producer" in resolved("plugins: [{type: batch-headroom-filter}]")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{mode: greedy}", "Invalid enum value 'greedy'"),
        ("{itlMs: 0}", "itlMs must be a positive number of milliseconds"),
        ("{stepBaseMs: 0}", "stepBaseMs must be above 0"),
        ("{kvTokens: 0}", "kvTokens must be at least 1"),
        ("{burstShare: 2}", "burstShare must be 0 to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_is_accepted(body: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        resolved(f"plugins: [{{type: batch-headroom-producer, parameters: {body}}}]")
    assert error.value.path.startswith("$.plugins[0].parameters")


def test_a_board_that_is_named_and_not_declared_is_refused() -> None:
    with pytest.raises(ConfigError, match="reads HeadroomInfo from 'mine', which is not declared"):
        resolved("plugins: [{type: batch-headroom-filter, parameters: {headroomInfoProducerName: mine}}]")
