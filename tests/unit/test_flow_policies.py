"""Who is next: the heap, orderings, turns among flows, and ceilings."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.config import convert
from llmd_sched.flow import program, queues
from llmd_sched.flow.limits import LIMITS, PriorityHoldback, SoftReflectiveCeiling, StaticUsageLimit
from llmd_sched.flow.policy import ORDERING, Fairness, GlobalStrictFairness, Lineup, RoundRobinFairness
from llmd_sched.flow.program import FAIRNESS, ProgramAwareFairness, Programs
from llmd_sched.flow.queues import Heap, Item, Sizes
from tests.builders import fuzzed, request

every_fairness = pytest.mark.parametrize("name", FAIRNESS)


def item(number: int, flow: str = "a", key: float = 0.0, tokens: int = 0, at_s: float = 0.0, **fields: object) -> Item:
    made = Item(request(fairness_id=flow, input_tokens=tokens, **fields), None, number, 0, at_s)
    made.key = key
    return made


def drained(lineup: Lineup, now_s: float = 0.0) -> list[int]:
    return [lineup.pop(now_s).number for _ in range(len(lineup))]


def lineup_of(policy: Fairness, *items: Item) -> Lineup:
    lineup = policy.open()
    for one in items:
        lineup.add(one)
    return lineup


def test_a_heap_gives_out_by_key_then_arrival() -> None:
    heap = Heap()
    for one in (item(3, key=1.0), item(2, key=5.0), item(4, key=1.0), item(1, key=math.inf), item(5, key=-1.0)):
        heap.push(one)
    assert [heap.pop().number for _ in range(5)] == [5, 3, 4, 2, 1]
    with pytest.raises(IndexError):
        heap.pop()


@fuzzed
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["push", "push", "pop", "remove"])), max_size=120))
def test_a_heap_is_a_sorted_list_and_its_dead_never_outnumber_the_living(steps: list[tuple[int, str]]) -> None:
    heap, model = Heap(), []
    random = Random(len(steps))
    for number, (key, what) in enumerate(steps):
        if what == "push":
            made = item(number, key=float(key))
            heap.push(made)
            model.append(made)
        elif model:
            model.sort(key=lambda i: (i.key, i.number))
            if what == "pop":
                assert heap.pop() is model.pop(0)
            else:
                heap.remove(model.pop(random.randrange(len(model))))
        assert len(heap) == len(model) == sum(i.queued for i in model)
        assert len(heap._entries) <= 2 * len(model)
        if model:
            assert heap.head() is min(model, key=lambda i: (i.key, i.number))


@pytest.mark.parametrize(
    ("name", "slo_ms", "ttl_s", "expected"),
    [
        ("fcfs-ordering-policy", 5.0, 60.0, 0.0),
        ("edf-ordering-policy", None, 60.0, 160.0),
        ("edf-ordering-policy", 5.0, math.inf, math.inf),
        ("slo-deadline-ordering-policy", 500.0, 60.0, 100.5),
        ("slo-deadline-ordering-policy", 0.25, 60.0, 100.00025),
        ("slo-deadline-ordering-policy", None, 60.0, 3700.0),
        ("slo-deadline-ordering-policy", 0.0, 60.0, 3700.0),
        ("slo-deadline-ordering-policy", -5.0, 60.0, 3700.0),
        ("slo-deadline-ordering-policy", math.nan, 60.0, 3700.0),
        ("slo-deadline-ordering-policy", math.inf, 60.0, 3700.0),
        ("slo-deadline-ordering-policy", 1e12, 60.0, 3700.0),
    ],
)
def test_an_ordering_gives_each_request_its_place(
    name: str, slo_ms: float | None, ttl_s: float, expected: float
) -> None:
    assert ORDERING[name]().key(request(ttft_slo_ms=slo_ms), 100.0, ttl_s) == pytest.approx(expected)


def test_requests_without_an_slo_go_last_but_not_for_ever() -> None:
    key = ORDERING["slo-deadline-ordering-policy"]().key
    without = key(request(), 0.0, 60.0)
    assert key(request(ttft_slo_ms=500.0), 3000.0, 60.0) < without < key(request(), 1.0, 60.0)
    assert without < key(request(ttft_slo_ms=500.0), 3600.0, 60.0)


def test_strict_fairness_knows_no_flows() -> None:
    made = [item(1, "a", 3.0), item(2, "b", 1.0), item(3, "a", 2.0), item(4, "c", 1.0)]
    assert drained(lineup_of(GlobalStrictFairness(), *made)) == [2, 4, 3, 1]


def test_round_robin_takes_flows_in_order_of_their_id_and_goes_on_after_the_last_one() -> None:
    made = [item(n, flow) for n, flow in enumerate("aaabbcaa")]
    lineup = lineup_of(RoundRobinFairness(), *made)
    assert [lineup.pop(0.0).number for _ in range(4)] == [0, 3, 5, 1]
    lineup.add(item(9, "aa"))  # between the one that was last served and the next
    assert [lineup.pop(0.0).number for _ in range(5)] == [9, 4, 2, 6, 7]


def test_round_robin_orders_within_a_flow() -> None:
    made = [item(1, "a", 9.0), item(2, "a", 1.0), item(3, "b", 9.0), item(4, "b", 1.0)]
    assert drained(lineup_of(RoundRobinFairness(), *made)) == [2, 4, 1, 3]


def test_round_robin_forgets_a_flow_whose_requests_were_all_removed() -> None:
    gone = item(2, "b")
    lineup = lineup_of(RoundRobinFairness(), item(1, "a"), gone, item(3, "c"))
    lineup.remove(gone, 0.0)
    assert drained(lineup) == [1, 3]


def test_least_attained_service_goes_first() -> None:
    lineup = lineup_of(ProgramAwareFairness(), *[item(n, "ab"[n % 2], tokens=(1000, 10)[n % 2]) for n in range(6)])
    # a runs once and costs 1000, so all of b comes before its next
    assert drained(lineup) == [0, 1, 3, 5, 2, 4]


def test_completion_tokens_count_for_fairness() -> None:
    lineup = lineup_of(ProgramAwareFairness(), item(1, "a"), item(2, "b"))
    lineup.served("a", 2.0 * 50, 0.0)
    assert drained(lineup) == [2, 1]


@pytest.mark.parametrize(
    ("service", "head_s", "weights", "first"),
    [
        ({"a": 100.0, "b": 0.0}, (0.0, 9.0), (0.8, 0.2), "b"),
        ({"a": 100.0, "b": 0.0}, (0.0, 9.0), (0.2, 0.8), "a"),
        ({"a": 100.0, "b": 100.0}, (5.0, 3.0), (0.8, 0.2), "b"),  # service alike: the longer wait
        ({"a": 0.0, "b": 0.0}, (3.0, 3.0), (0.8, 0.2), "a"),  # all alike: arrival
        ({"a": 100.0, "b": 0.0}, (0.0, 9.0), (0.0, 0.0), "a"),
    ],
)
def test_the_score_weighs_service_and_wait(
    service: dict[str, float], head_s: tuple[float, float], weights: tuple[float, float], first: str
) -> None:
    policy = ProgramAwareFairness(
        las_weight_service=weights[0], las_weight_head_wait=weights[1], las_half_life_seconds=0.0
    )
    lineup = policy.open()
    for name, tokens in service.items():
        lineup.served(name, tokens, 0.0)
    for number, (name, at_s) in enumerate(zip("ab", head_s, strict=True)):
        lineup.add(item(number, name, at_s=at_s))
    assert lineup.pop(10.0).request.fairness_id == first


def test_scores_are_those_of_the_formula() -> None:
    random = Random(1)
    lineup = ProgramAwareFairness(las_half_life_seconds=0.0).open()
    service = {f"p{n}": random.uniform(0, 1000) for n in range(40)}
    heads = {name: random.uniform(0, 50) for name in service}
    for number, name in enumerate(service):
        lineup.served(name, service[name], 0.0)
        lineup.add(item(number, name, at_s=heads[name]))

    def score(name: str) -> float:
        low, high = min(service[n] for n in heads), max(service[n] for n in heads)
        late, early = max(heads.values()), min(heads.values())
        served = (service[name] - low) / (high - low) if high > low else 0.5
        return 0.8 * (1 - served) + 0.2 * ((late - heads[name]) / (late - early) if late > early else 0.5)

    while heads:
        best = max(heads, key=score)
        assert lineup.pop(60.0).request.fairness_id == best
        del heads[best]


def test_attained_service_halves_with_the_half_life() -> None:
    lineup = ProgramAwareFairness(las_half_life_seconds=60.0).open()
    lineup.served("a", 800.0, 0.0)
    assert lineup.attained_tokens(120.0) == pytest.approx({"a": 200.0})
    lineup.served("b", 100.0, 120.0)
    assert lineup.attained_tokens(180.0) == pytest.approx({"a": 100.0, "b": 50.0})
    never = ProgramAwareFairness(las_half_life_seconds=0.0).open()
    never.served("a", 800.0, 0.0)
    assert never.attained_tokens(1e6) == {"a": 800.0}


def test_accounts_survive_any_number_of_half_lives() -> None:
    lineup = ProgramAwareFairness(las_half_life_seconds=1.0, eviction_ttl_seconds=1e9).open()
    for at_s in range(0, 3000, 7):
        lineup.served("a", 128.0, float(at_s))
    assert lineup.attained_tokens(2996.0)["a"] == pytest.approx(128.0 / (1 - 0.5**7))
    lineup.served("b", 8.0, 1e7)
    assert lineup.attained_tokens(1e7) == pytest.approx({"a": 0.0, "b": 8.0})


def test_a_program_is_forgotten_once_idle_for_its_ttl() -> None:
    lineup = ProgramAwareFairness(eviction_ttl_seconds=100.0).open()
    lineup.add(item(1, "queued", at_s=0.0))
    lineup.served("idle", 5.0, 0.0)
    lineup.served("other", 5.0, 99.0)
    assert set(lineup.attained_tokens(99.0)) == {"queued", "idle", "other"}
    lineup.served("other", 5.0, 100.0)
    assert set(lineup.attained_tokens(100.0)) == {"queued", "other"}


def test_idle_programs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "MAX_IDLE_PROGRAMS", 3)
    lineup = ProgramAwareFairness().open()
    lineup.add(item(1, "queued"))
    for n in range(10):
        lineup.served(f"p{n}", 1.0, 0.0)
    assert set(lineup.attained_tokens(0.0)) == {"queued", "p7", "p8", "p9"}


def test_jains_index_says_how_even_service_is() -> None:
    lineup = ProgramAwareFairness(las_half_life_seconds=0.0).open()
    assert lineup.jains_index() == 1.0
    lineup.served("a", 10.0, 0.0)
    lineup.served("b", 10.0, 0.0)
    assert lineup.jains_index() == pytest.approx(1.0)
    lineup.served("a", 20.0, 0.0)
    assert lineup.jains_index() == pytest.approx(1600 / (2 * 1000))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"lasDecayFactor": 0.9}, "lasDecayFactor was removed"),
        ({"strategy": "drr"}, "accepted is las"),
        ({"evictionTtlSeconds": 0}, "must be positive"),
        ({"lasHalfLifeSeconds": -1}, "0 or more"),
    ],
)
def test_parameters_of_program_aware_fairness_that_make_no_sense_are_refused(
    parameters: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        convert(parameters, ProgramAwareFairness).check()


@every_fairness
@fuzzed
@given(steps=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3)), max_size=80))
def test_whatever_the_policy_everybody_leaves_once_and_a_flow_in_its_order(
    name: str, steps: list[tuple[str, int]]
) -> None:
    lineup = FAIRNESS[name]().open()
    inside: dict[int, Item] = {}
    for number, (flow, what) in enumerate(steps):
        if what <= 1:
            inside[number] = item(number, flow, key=float(what), tokens=number, at_s=float(number))
            lineup.add(inside[number])
        elif inside and what == 2:
            gone = inside.pop(next(iter(inside)))
            lineup.remove(gone, float(number))
            assert not gone.queued
        elif inside:
            out = lineup.pop(float(number))
            assert inside.pop(out.number) is out
            rest = [i for i in inside.values() if i.request.fairness_id == out.request.fairness_id]
            assert all((out.key, out.number) < (i.key, i.number) for i in rest)
        assert len(lineup) == len(inside)
    assert sorted(drained(lineup)) == sorted(inside)
    with pytest.raises(IndexError):
        lineup.pop(0.0)


def test_programs_keep_their_rows_straight_as_flows_come_and_go() -> None:
    lineup = ProgramAwareFairness(las_half_life_seconds=0.0).open()
    assert isinstance(lineup, Programs)
    random = Random(3)
    inside: list[Item] = []
    for number in range(3000):
        if inside and random.random() < 0.5:
            lineup.remove(inside.pop(random.randrange(len(inside))), 0.0)
        else:
            inside.append(item(number, f"p{random.randrange(60)}", at_s=float(number)))
            lineup.add(inside[-1])
        for row, one in enumerate(lineup._active):
            assert one.slot == row
            assert lineup._head_s[row] == one.queue.head().enqueued_s


def test_an_empty_flow_is_shown_as_zero_for_five_minutes() -> None:
    sizes = Sizes()
    one, two = item(1, "a", size_bytes=10), item(2, "a", size_bytes=5)
    key = ("a", 0, "m", "m")
    sizes.add(one)
    sizes.add(two)
    assert dict(sizes.items(0.0)) == {key: (2, 15)}
    sizes.remove(one, 1.0)
    sizes.remove(two, 2.0)
    assert dict(sizes.items(301.9)) == {key: (0, 0)}
    assert dict(sizes.items(302.0)) == {}


def test_a_flow_that_came_back_is_not_forgotten() -> None:
    sizes = Sizes()
    first, second = item(1, "a"), item(2, "a")
    sizes.add(first)
    sizes.remove(first, 0.0)
    sizes.add(second)
    assert [size for _, size in sizes.items(1000.0)] == [(1, 0)]
    sizes.remove(second, 1000.0)
    assert [size for _, size in sizes.items(1299.0)] == [(0, 0)]


def test_empty_flows_that_are_shown_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "MAX_IDLE_FLOWS", 2)
    sizes = Sizes()
    for n in range(5):
        one = item(n, f"f{n}")
        sizes.add(one)
        sizes.remove(one, 0.0)
    assert [key[0] for key, _ in sizes.items(0.0)] == ["f3", "f4"]


@pytest.mark.parametrize(
    ("policy", "priorities", "saturation", "expected"),
    [
        (StaticUsageLimit(), (5, 0, -1), 0.3, [1.0, 1.0, 1.0]),
        (StaticUsageLimit(threshold=0.7), (5, 0), 0.3, [0.7, 0.7]),
        (PriorityHoldback(min_ceiling=0.5), (0,), 0.3, [1.0]),
        (PriorityHoldback(min_ceiling=0.5), (100, 0, -10), 0.3, [1.0, 0.75, 0.5]),
        (PriorityHoldback(min_ceiling=0.2, max_ceiling=0.8), (9, 1), 0.3, [0.8, 0.2]),
        (PriorityHoldback(min_ceiling=0.5, domain="value"), (100, 50, 0), 0.3, [1.0, 0.75, 0.5]),
        (PriorityHoldback(min_ceiling=0.5, domain="value"), (100, 0, -100), 0.3, [1.0, 0.75, 0.5]),
        (PriorityHoldback(min_ceiling=0.5, domain="value"), (100, 90, 0), 0.3, [1.0, 0.95, 0.5]),
        (PriorityHoldback(min_ceiling=0.5, domain="value"), (7,), 0.3, [1.0]),
        (SoftReflectiveCeiling(), (5, 0, -1), 0.4, [1.0, 0.8, 0.6]),
        (SoftReflectiveCeiling(), (0,), 0.9, [1.0]),
        (SoftReflectiveCeiling(), (5, 0), 1.0, [0.0, 0.0]),
        (SoftReflectiveCeiling(), (5, 0), 1.7, [0.0, 0.0]),
        (SoftReflectiveCeiling(), (5, 0), 0.0, [1.0, 1.0]),
    ],
)
def test_ceilings(policy: object, priorities: tuple[int, ...], saturation: float, expected: list[float]) -> None:
    policy.check()
    assert list(policy.open()(priorities, saturation)) == pytest.approx(expected)


@pytest.mark.parametrize(("saturation", "every"), [(0.5, 1), (0.7, 2), (0.75, 3), (0.9, 9), (0.95, 19)])
def test_a_band_above_its_soft_ceiling_is_opened_every_so_often(saturation: float, every: int) -> None:
    ceilings = SoftReflectiveCeiling().open()
    let = [saturation < ceilings((5, 0), saturation)[1] for _ in range(4 * every)]
    assert let == ([False] * (every - 1) + [True]) * 4


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("static-usage-limit-policy", {"threshold": 0.0}, "positive"),
        ("static-usage-limit-policy", {"threshold": -1.0}, "positive"),
        ("priority-holdback-policy", {"minCeiling": 0.5, "shape": "cubic"}, "accepted is linear"),
        ("priority-holdback-policy", {"minCeiling": 0.5, "domain": "log"}, "accepted are rank and value"),
        ("priority-holdback-policy", {"minCeiling": 0.9, "maxCeiling": 0.8}, "not above maxCeiling"),
        ("priority-holdback-policy", {"minCeiling": 0.9, "maxCeiling": 1.1}, "between 0 and 1"),
        ("priority-holdback-policy", {"minCeiling": -0.1}, "between 0 and 1"),
        ("priority-holdback-policy", {}, "minCeiling"),
    ],
)
def test_parameters_of_a_limit_that_make_no_sense_are_refused(
    name: str, parameters: dict[str, object], words: str
) -> None:
    with pytest.raises(Exception, match=words):
        convert(parameters, LIMITS[name]).check()


def test_the_tables_have_the_names_of_the_reference() -> None:
    assert set(FAIRNESS) == {
        "global-strict-fairness-policy",
        "round-robin-fairness-policy",
        "program-aware-fairness",
    }
    assert set(ORDERING) == {"fcfs-ordering-policy", "edf-ordering-policy", "slo-deadline-ordering-policy"}
    assert set(LIMITS) == {"static-usage-limit-policy", "priority-holdback-policy", "soft-reflective-ceiling-policy"}
