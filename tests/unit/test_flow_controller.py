"""Who may wait, for how long, who is next, and that everybody leaves exactly once."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.errors import Evicted, RequestError
from llmd_sched.flow import controller
from llmd_sched.flow.controller import Blocked, FlowControl
from llmd_sched.flow.dispatch import Dispatcher, shed
from llmd_sched.flow.limits import PriorityHoldback, SoftReflectiveCeiling, StaticUsageLimit, UsageLimits
from llmd_sched.flow.outcomes import refusal
from llmd_sched.flow.policy import EdfOrdering, Fairness, SloDeadlineOrdering
from llmd_sched.flow.program import FAIRNESS
from llmd_sched.flow.queues import Item, QueueOutcome
from llmd_sched.flow.saturation import ConcurrencyDetector, UtilizationDetector
from llmd_sched.flow.settings import BandSettings, FlowSettings
from llmd_sched.types import Candidates
from tests.builders import candidates, decision, endpoints, fuzzed, request

ROUND_ROBIN = FAIRNESS["round-robin-fairness-policy"]()


def flow_of(*priorities: int, **fields: object) -> FlowControl:
    return FlowControl(FlowSettings(bands=dict.fromkeys(priorities, BandSettings()), **fields))


def drained(flow: FlowControl, saturation: float = 0.0, now_s: float = 0.0) -> list[str]:
    ids = []
    while (item := flow.next(saturation, now_s)) is not None:
        ids.append(item.request.id)
    return ids


def put(flow: FlowControl, name: str, priority: int = 0, now_s: float = 0.0, **fields: object) -> Item:
    return flow.enqueue(request(id=name, priority=priority, **fields), now_s)


def test_higher_priorities_go_first_and_equals_in_order_of_arrival() -> None:
    flow = flow_of(10, -5)
    for name, priority in (("a", -5), ("b", 0), ("c", 10), ("d", 0), ("e", 10)):
        put(flow, name, priority)
    assert drained(flow) == ["c", "e", "b", "d", "a"]
    assert (len(flow), flow.size_bytes) == (0, 0)


def test_a_dispatched_item_knows_how_long_it_waited() -> None:
    flow = flow_of()
    item = put(flow, "a", now_s=3.0)
    assert item.outcome is None
    assert flow.next(0.0, 5.5) is item
    assert (item.outcome, item.waited_s) == (QueueOutcome.DISPATCHED, 2.5)


@pytest.mark.parametrize(
    ("limits", "saturation", "waiting", "first", "blocked"),
    [
        (StaticUsageLimit(), 0.99, (5, 0), 5, None),
        (StaticUsageLimit(), 1.0, (5, 0), None, Blocked(5, 1.0)),
        (StaticUsageLimit(threshold=0.5), 0.5, (0,), None, Blocked(0, 0.5)),
        (PriorityHoldback(min_ceiling=0.5), 0.6, (0,), 0, None),  # 5 -> 1.0, 0 -> 0.75, -5 -> 0.5
        (PriorityHoldback(min_ceiling=0.5), 0.6, (0, -5), 0, None),
        (PriorityHoldback(min_ceiling=0.5), 0.6, (-5,), None, Blocked(-5, 0.5)),
        (PriorityHoldback(min_ceiling=0.5, max_ceiling=0.8), 0.8, (5, -5), None, Blocked(5, 0.8)),
        (SoftReflectiveCeiling(), 0.9, (5, 0), 5, None),
        (SoftReflectiveCeiling(), 0.9, (0,), None, Blocked(0, pytest.approx(0.55))),
    ],
)
def test_a_band_waits_at_its_ceiling(
    limits: UsageLimits, saturation: float, waiting: tuple[int, ...], first: int | None, blocked: Blocked | None
) -> None:
    flow = flow_of(5, -5, usage_limits=limits)
    for priority in waiting:
        put(flow, "x", priority)
    item = flow.next(saturation, 0.0)
    assert (item and item.priority) == first
    assert flow.blocked == blocked


class Inverted(UsageLimits, frozen=True):
    """Holds back the higher priorities, to tell who blocks whom."""

    def open(self):
        return lambda priorities, saturation: [0.5 if p > 0 else 1.0 for p in priorities]


def test_a_band_that_is_held_back_holds_back_those_below_only_while_it_has_requests() -> None:
    flow = flow_of(5, usage_limits=Inverted())
    put(flow, "low")
    high = put(flow, "high", 5)
    assert flow.next(0.7, 0.0) is None
    assert flow.blocked == Blocked(5, 0.5)
    flow.cancel(high, 0.0)
    assert drained(flow, 0.7) == ["low"]


def test_every_ceiling_is_asked_for_all_bands_whether_anybody_waits_there() -> None:
    seen = []

    class Noting(UsageLimits, frozen=True):
        def open(self):
            return lambda priorities, saturation: seen.append((tuple(priorities), saturation)) or [1.0] * 3

    flow = flow_of(-3, 7, usage_limits=Noting())
    put(flow, "a")
    flow.next(0.25, 0.0)
    assert seen == [((7, 0, -3), 0.25)]


@pytest.mark.parametrize(
    ("priority", "bands", "objectives", "expected"),
    [(0, (), (), 0), (5, (), (), 0), (5, (5,), (), 5), (5, (), (5,), 5), (-5, (1,), (), 0), (-5, (), (-5, 3), -5)],
)
def test_a_request_waits_in_the_band_of_its_priority_else_in_band_0(
    priority: int, bands: tuple[int, ...], objectives: tuple[int, ...], expected: int
) -> None:
    flow = flow_of(*bands)
    flow.provide(objectives, 0.0)
    assert put(flow, "a", priority).priority == expected


def test_a_band_that_is_not_configured_is_made_from_its_template() -> None:
    plain, negative = BandSettings(max_requests=7), BandSettings(max_requests=3)
    flow = FlowControl(FlowSettings(default_band=plain, default_negative_band=negative))
    flow.provide((4, -4), 0.0)
    assert {p: b.settings.max_requests for p, b in flow.bands.items()} == {4: 7, 0: 7, -4: 3}
    only = FlowControl(FlowSettings(default_band=plain))
    only.provide((-4,), 0.0)
    assert only.bands[-4].settings.max_requests == 7


def test_a_band_nobody_wants_goes_after_it_was_empty_for_ten_minutes() -> None:
    flow = flow_of(9)
    flow.provide((5,), 0.0)
    item = put(flow, "a", 5)
    flow.provide((), 1.0)
    flow.cancel(item, 100.0)
    put(flow, "b", 9, 699.0)
    assert list(flow.bands) == [9, 5, 0]
    flow.provide((), 700.0)
    assert list(flow.bands) == [9, 0]
    flow.provide((5,), 701.0)
    flow.provide((), 702.0)
    put(flow, "c", 9, 1400.0)  # traffic alone does it too
    assert list(flow.bands) == [9, 0]


def test_bands_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "MAX_BANDS", 4)
    flow = flow_of(1)
    flow.provide(range(2, 9), 0.0)
    assert list(flow.bands) == [8, 7, 1, 0]
    assert flow.bands_refused == 5
    assert put(flow, "a", 3).priority == 0


CAPS = [
    # settings, bands, (priority, bytes) queued before, the one at hand, words of the refusal ("" = it is let in)
    ({}, BandSettings(max_requests=2), [(0, 1)], (0, 1), ""),
    ({}, BandSettings(max_requests=2), [(0, 1), (0, 1)], (0, 1), "priority 0 would hold 3 requests; at most 2"),
    ({}, BandSettings(max_requests=2), [(0, 1), (0, 1)], (5, 1), ""),
    ({}, BandSettings(max_bytes=10), [(0, 6)], (0, 4), ""),
    ({}, BandSettings(max_bytes=10), [(0, 6)], (0, 5), "priority 0 would hold 11 bytes; at most 10"),
    ({}, BandSettings(max_bytes=10), [], (0, 11), "priority 0 would hold 11 bytes"),
    ({"max_requests": 2}, BandSettings(), [(0, 1), (5, 1)], (5, 1), "flow control would hold 3 requests; at most 2"),
    ({"max_bytes": 10}, BandSettings(), [(0, 5), (5, 5)], (0, 1), "flow control would hold 11 bytes; at most 10"),
    ({"max_bytes": 10}, BandSettings(), [(0, 5), (5, 5)], (0, 0), ""),
]


@pytest.mark.parametrize(("fields", "band", "before", "asked", "words"), CAPS)
@pytest.mark.parametrize("has_endpoints", [True, False])
def test_caps(
    fields: dict[str, int],
    band: BandSettings,
    before: list[tuple[int, int]],
    asked: tuple[int, int],
    words: str,
    has_endpoints: bool,
) -> None:
    flow = FlowControl(FlowSettings(bands={0: band, 5: band}, **fields))
    flow.observe(has_endpoints, 0.0)
    for priority, size_bytes in before:
        assert put(flow, "x", priority, size_bytes=size_bytes).outcome is None
    item = put(flow, "y", asked[0], size_bytes=asked[1])
    if not words:
        assert item.outcome is None
        return
    assert item.outcome is (QueueOutcome.REJECTED_CAPACITY if has_endpoints else QueueOutcome.REJECTED_NO_ENDPOINTS)
    assert words in item.detail
    assert len(flow) == len(before)


def test_room_is_given_back_at_once() -> None:
    flow = flow_of(max_requests=1)
    first = put(flow, "a")
    assert put(flow, "b").outcome is QueueOutcome.REJECTED_CAPACITY
    flow.cancel(first, 0.0)
    assert put(flow, "c").outcome is None


@pytest.mark.parametrize(
    ("ttl_s", "no_endpoint_ttl_s", "flips", "enqueued_s", "expected_s", "outcome"),
    [
        (60.0, None, (), 5.0, 65.0, QueueOutcome.EVICTED_TTL),
        (math.inf, None, (), 5.0, math.inf, None),
        (60.0, None, ((0.0, False),), 5.0, 65.0, QueueOutcome.EVICTED_NO_ENDPOINTS),
        (60.0, 10.0, ((0.0, False),), 5.0, 15.0, QueueOutcome.EVICTED_NO_ENDPOINTS),
        (60.0, 10.0, ((30.0, False),), 5.0, 40.0, QueueOutcome.EVICTED_NO_ENDPOINTS),
        (math.inf, None, ((30.0, False),), 5.0, 90.0, QueueOutcome.EVICTED_NO_ENDPOINTS),
        (math.inf, 7.0, ((30.0, False),), 5.0, 37.0, QueueOutcome.EVICTED_NO_ENDPOINTS),
        (60.0, 10.0, ((30.0, False), (35.0, True)), 5.0, 95.0, QueueOutcome.EVICTED_TTL),
        (60.0, 10.0, ((30.0, False), (32.0, False)), 5.0, 40.0, QueueOutcome.EVICTED_NO_ENDPOINTS),  # no flip
        (60.0, 10.0, ((2.0, False),), 5.0, 15.0, QueueOutcome.EVICTED_NO_ENDPOINTS),  # before it came
    ],
)
def test_a_request_expires_exactly_when_its_budget_is_used_up(
    ttl_s: float,
    no_endpoint_ttl_s: float | None,
    flips: tuple[tuple[float, bool], ...],
    enqueued_s: float,
    expected_s: float,
    outcome: QueueOutcome | None,
) -> None:
    flow = flow_of(ttl_s=ttl_s, no_endpoint_ttl_s=no_endpoint_ttl_s)
    for at_s, has_endpoints in (f for f in flips if f[0] < enqueued_s):
        flow.observe(has_endpoints, at_s)
    item = put(flow, "a", now_s=enqueued_s)
    for at_s, has_endpoints in (f for f in flips if f[0] >= enqueued_s):
        flow.observe(has_endpoints, at_s)
    assert flow.next_deadline_s() == expected_s
    if outcome is None:
        assert flow.expired(1e12) == []
        return
    assert flow.expired(math.nextafter(expected_s, 0)) == []
    assert flow.expired(expected_s) == [item]
    assert (item.outcome, item.waited_s) == (outcome, expected_s - enqueued_s)
    assert flow.next_deadline_s() == math.inf


def test_those_whose_time_is_up_leave_in_order_of_arrival_whatever_their_band() -> None:
    flow = flow_of(5, ttl_s=10.0)
    for second, priority in enumerate((0, 5, 0, 5)):
        put(flow, str(second), priority, float(second))
    assert [i.request.id for i in flow.expired(12.0)] == ["0", "1", "2"]
    assert flow.next_deadline_s() == 13.0


def test_nothing_is_dispatched_to_an_empty_pool() -> None:
    flow = flow_of(usage_limits=StaticUsageLimit(threshold=5.0))
    flow.observe(False, 0.0)
    put(flow, "a")
    assert flow.next(1.0, 0.0) is None
    flow.observe(True, 1.0)
    assert drained(flow, 1.0) == ["a"]


def test_a_cancelled_request_leaves_at_once_and_once() -> None:
    flow = flow_of()
    item, other = put(flow, "a", now_s=1.0), put(flow, "b", now_s=2.0)
    assert flow.cancel(item, 3.0)
    assert (item.outcome, item.waited_s) == (QueueOutcome.EVICTED_CONTEXT_CANCELLED, 2.0)
    assert not flow.cancel(item, 4.0)
    assert drained(flow) == ["b"]
    assert not flow.cancel(other, 5.0)
    assert flow.bands[0].outcomes == {"Dispatched": 1, "EvictedContextCancelled": 1}


def test_after_the_stop_nobody_waits() -> None:
    flow = flow_of(5)
    items = [put(flow, "a"), put(flow, "b", 5)]
    assert flow.stop(1.0) == items
    assert {i.outcome for i in items} == {QueueOutcome.EVICTED_OTHER}
    assert put(flow, "c").outcome is QueueOutcome.REJECTED_OTHER
    assert len(flow) == 0


def test_deadline_orderings_work_through_the_bands() -> None:
    band = BandSettings(ordering=SloDeadlineOrdering())
    flow = FlowControl(FlowSettings(bands={0: band}))
    for name, slo_ms in (("none", None), ("slow", 900.5), ("fast", 100.25), ("never", None)):
        put(flow, name, ttft_slo_ms=slo_ms)
    assert drained(flow) == ["fast", "slow", "none", "never"]
    edf = FlowControl(FlowSettings(bands={0: BandSettings(ordering=EdfOrdering())}))
    for second, name in enumerate("abc"):
        put(edf, name, now_s=float(second))
    assert drained(edf) == ["a", "b", "c"]


def test_flows_take_turns_within_their_band() -> None:
    flow = FlowControl(FlowSettings(bands={0: BandSettings(fairness=ROUND_ROBIN)}))
    for name in ("x1", "x2", "x3", "y1", "z1", "z2"):
        put(flow, name, fairness_id=name[0])
    assert drained(flow) == ["x1", "y1", "z1", "x2", "z2", "x3"]


def test_what_a_request_cost_is_told_to_the_fairness_of_its_band() -> None:
    band = BandSettings(fairness=FAIRNESS["program-aware-fairness"]())
    flow = FlowControl(FlowSettings(bands={0: band}))
    put(flow, "a", fairness_id="a")
    put(flow, "b", fairness_id="b")
    flow.served(request(fairness_id="a", priority=77), 100.0, 0.0)
    assert drained(flow) == ["b", "a"]


def test_sizes_are_shown_per_flow_and_model() -> None:
    flow = flow_of(5)
    put(flow, "a", 5, fairness_id="x", size_bytes=7)
    put(flow, "b", 6, fairness_id="x", size_bytes=3, model="n", target_model="t")
    assert dict(flow.sizes.items(0.0)) == {("x", 5, "m", "m"): (1, 7), ("x", 0, "n", "t"): (1, 3)}
    assert (flow.bands[5].requests, flow.bands[5].size_bytes, flow.size_bytes) == (1, 7, 10)


REFUSALS = [
    (QueueOutcome.REJECTED_CAPACITY, 429, "rejected-saturated", "ResourceExhausted - full"),
    (QueueOutcome.REJECTED_NO_ENDPOINTS, 503, "rejected-no-endpoints", "no endpoints available: full"),
    (QueueOutcome.EVICTED_TTL, 429, "rejected-ttl-expired", "request timed out in queue: after 1.500 s"),
    (QueueOutcome.EVICTED_NO_ENDPOINTS, 503, "rejected-no-endpoints", "no endpoints available: none appeared in 1.5"),
    (QueueOutcome.EVICTED_CONTEXT_CANCELLED, 503, "rejected-context-cancelled", "client disconnected: "),
    (QueueOutcome.REJECTED_OTHER, 503, "rejected-shutting-down", "shutting down"),
    (QueueOutcome.EVICTED_OTHER, 503, "rejected-shutting-down", "shutting down"),
    (None, 500, None, "Internal - internal flow control error"),
]


@pytest.mark.parametrize(("outcome", "status", "reason", "words"), REFUSALS)
def test_every_outcome_has_its_status_and_reason(
    outcome: QueueOutcome | None, status: int, reason: str | None, words: str
) -> None:
    item = Item(request(), None, 1, 0, 0.0)
    item.outcome, item.detail, item.waited_s = outcome, "full", 1.5
    error = refusal(item)
    assert (error.status, error.reason) == (status, reason)
    assert words in error.body
    assert {o for o, *_ in REFUSALS} >= {o for o in QueueOutcome if o is not QueueOutcome.DISPATCHED}


def test_an_evicted_request_is_told_so_in_these_words_alone() -> None:
    error = Evicted()
    assert isinstance(error, RequestError)
    assert (error.status, error.reason, error.body) == (429, "evicted", "request evicted by flow control")


@pytest.mark.parametrize(
    ("priority", "saturation", "dropped"),
    [(-1, 0.99, False), (-1, 1.0, True), (-1, 3.0, True), (0, 3.0, False), (5, 1.0, False)],
)
def test_without_flow_control_a_full_pool_drops_what_is_sheddable(
    priority: int, saturation: float, dropped: bool
) -> None:
    error = shed(request(priority=priority), lambda: saturation)
    assert (error is not None) == dropped
    if error is not None:
        assert (error.status, error.reason) == (429, "rejected-saturated")
        assert error.body.endswith("system saturated, sheddable request dropped")


def test_without_flow_control_the_pool_is_looked_at_for_sheddable_requests_only() -> None:
    def never() -> float:
        raise AssertionError

    assert shed(request(priority=0), never) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_bytes": -1}, "0 .no cap. or more"),
        ({"ttl_s": 0.0}, "must be positive"),
        ({"ttl_s": math.nan}, "must be positive"),
        ({"no_endpoint_ttl_s": -1.0}, "must be positive"),
        ({"default_band": BandSettings(max_requests=0)}, "of a band must be positive"),
        ({"bands": {i: BandSettings() for i in range(128)}}, "128 given; at most 127"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FlowControl(FlowSettings(**fields))


class VirtualPool:
    """Endpoints with a concurrency limit, driven in virtual time."""

    def __init__(self, endpoints: int = 3, limit: int = 4) -> None:
        self.counts = [0.0] * endpoints
        self.limit = limit
        self.looks = 0

    def look(self, now_s: float) -> Candidates:
        self.looks += 1
        return candidates(inflight_requests=self.counts) if self.counts else candidates(0)

    def dispatcher(self, **fields: object) -> Dispatcher:
        return Dispatcher(flow_of(**fields), ConcurrencyDetector(max_concurrency=self.limit), self.look)


def test_a_released_burst_does_not_overshoot_the_limit() -> None:
    pool = VirtualPool()
    dispatcher = pool.dispatcher()
    for n in range(100):
        put(dispatcher.flow, str(n))
    random = Random(1)
    for second in range(40):
        while dispatcher.step(float(second)) is not None:
            pool.counts[random.randrange(3)] += 1
        assert sum(pool.counts) == 12
        pool.counts[pool.counts.index(max(pool.counts))] -= 1.0
    assert dispatcher.saturation == 1.0


def test_between_two_reads_of_the_metrics_no_more_is_let_go_than_they_have_room_for() -> None:
    members, read_at_s, waiting = endpoints(2), 0.0, [0.0, 3.0]

    def look(now_s: float) -> Candidates:
        view = candidates(waiting=waiting, metrics_age_s=[now_s - read_at_s] * 2)
        return Candidates(members, view.columns)

    dispatcher = Dispatcher(flow_of(), UtilizationDetector(queue_depth_threshold=5), look)
    for n in range(100):
        put(dispatcher.flow, str(n))

    def let_go(now_s: float) -> int:
        count = 0
        while (item := dispatcher.step(now_s)) is not None:
            dispatcher.sent(decision(item.request.id, item.request, members[0]))
            count += 1
        return count

    assert let_go(0.01) == 7  # 2 x 5 - 3
    assert let_go(0.04) == 0
    read_at_s, waiting = 0.05, [0.0, 0.0]
    assert let_go(0.06) == 10


def test_the_dispatcher_sees_the_pool_become_empty_and_come_back() -> None:
    pool = VirtualPool()
    counts, pool.counts = pool.counts, []
    dispatcher = pool.dispatcher(no_endpoint_ttl_s=5.0)
    put(dispatcher.flow, "a", now_s=1.0)
    assert dispatcher.step(2.0) is None
    assert dispatcher.flow.next_deadline_s() == 7.0
    pool.counts = counts
    item = dispatcher.step(3.0)
    assert item is not None
    assert item.request.id == "a"


def test_the_pool_is_not_looked_at_while_nobody_waits() -> None:
    pool = VirtualPool()
    assert pool.dispatcher().step(0.0) is None
    assert pool.looks == 0


STEP = st.one_of(
    st.tuples(st.just("enqueue"), st.sampled_from([5, 0, -5, 99]), st.sampled_from("abc"), st.integers(0, 40)),
    st.tuples(st.just("next"), st.floats(0, 1.5), st.just(""), st.just(0)),
    st.tuples(st.just("cancel"), st.integers(0, 50), st.just(""), st.just(0)),
    st.tuples(st.just("wait"), st.floats(0, 20), st.just(""), st.just(0)),
    st.tuples(st.just("flip"), st.booleans(), st.just(""), st.just(0)),
)


@pytest.mark.parametrize("fairness", [kind() for kind in FAIRNESS.values()], ids=list(FAIRNESS))
@fuzzed
@given(steps=st.lists(STEP, max_size=120))
def test_everybody_leaves_exactly_once_and_no_cap_is_exceeded(
    fairness: Fairness, steps: list[tuple[str, float, str, int]]
) -> None:
    band = BandSettings(max_bytes=100, max_requests=6, fairness=fairness)
    settings = FlowSettings(
        bands={5: band, 0: band, -5: band}, max_bytes=200, max_requests=12, ttl_s=30.0, no_endpoint_ttl_s=7.0
    )
    flow, now_s = FlowControl(settings), 0.0
    inside: dict[int, Item] = {}
    ended: Counter[tuple[int, QueueOutcome]] = Counter()

    def left(item: Item) -> None:
        assert inside.pop(item.number) is item
        count(item)

    def count(item: Item) -> None:
        assert item.outcome is not None
        assert not item.queued
        ended[item.priority, item.outcome] += 1

    arrived = 0
    for what, number, name, size_bytes in steps:
        now_s += 0.01
        if what == "enqueue":
            arrived += 1
            item = flow.enqueue(request(priority=int(number), fairness_id=name, size_bytes=size_bytes), now_s)
            if item.outcome is None:
                inside[item.number] = item
            else:
                count(item)
        elif what == "next" and (item_out := flow.next(number, now_s)) is not None:
            assert item_out.priority == max(i.priority for i in inside.values())
            left(item_out)
        elif what == "cancel" and inside:
            one = list(inside.values())[int(number) % len(inside)]
            assert flow.cancel(one, now_s)
            left(one)
        elif what == "wait":
            now_s += number
            for one in flow.expired(now_s):
                left(one)
            assert flow.next_deadline_s() > now_s
        elif what == "flip":
            flow.observe(bool(number), now_s)
        assert len(flow) == len(inside) <= 12
        assert flow.size_bytes == sum(i.request.size_bytes for i in inside.values()) <= 200
        for priority, one_band in flow.bands.items():
            mine = [i for i in inside.values() if i.priority == priority]
            assert one_band.requests == len(one_band.lineup) == len(mine) <= 6
            assert one_band.size_bytes == sum(i.request.size_bytes for i in mine) <= 100
    for one in flow.stop(now_s):
        left(one)
    assert not inside
    assert sum(ended.values()) == arrived
    assert ended == Counter({(p, o): n for p, b in flow.bands.items() for o, n in b.outcomes.items()})
    assert all(sizes == (0, 0) for _, sizes in flow.sizes.items(now_s))
