"""Which batch's chunk runs next."""

from collections import Counter
from typing import Any

import pytest

from batchgw.planner import AGED_AFTER_S, AGED_EVERY, Planner
from batchgw.records import Waiting

DAY_S = 86_400.0


def row(batch_id: str, **fields: Any) -> Waiting:
    usual: dict[str, Any] = {
        "tenant": "t",
        "model": "m",
        "deadline_s": DAY_S,
        "created_s": 0.0,
        "queued_lines": 1000,
        "leased_lines": 0,
        "done_lines": 0,
        "started_s": None,
        "next_prefix": 0,
    }
    return Waiting(batch_id=batch_id, **{**usual, **fields})


def planner(*rows: Waiting, now_s: float = 0.0, weights: dict[str, float] | None = None) -> Planner:
    made = Planner(weights)
    made.see(rows, now_s)
    return made


def chosen(plan: Planner, model: str = "m", prefixes: frozenset[int] = frozenset(), now_s: float = 0.0) -> str | None:
    found = plan.choose(model, prefixes, now_s)
    return found and found.batch_id


def claims(plan: Planner, count: int, now_s: float = 0.0, lines: int = 50) -> list[str]:
    """The batches of the next ``count`` chunks, none of which ends."""
    made = []
    for _ in range(count):
        found = plan.choose("m", (), now_s)
        assert found is not None
        plan.claimed(found, lines, now_s)
        made.append(found.batch_id)
    return made


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row("later"), row("sooner", deadline_s=DAY_S - 1)], "sooner"),
        ([row("busy", tenant="a", leased_lines=100), row("idle", tenant="b", deadline_s=2 * DAY_S)], "idle"),
        ([row("a", tenant="a", leased_lines=40), row("b", tenant="b", deadline_s=2 * DAY_S)], "a"),
        ([row("other", next_prefix=1), row("shares", next_prefix=7, deadline_s=2 * DAY_S)], "shares"),
        ([row("busy", next_prefix=7, leased_lines=100), row("idle", tenant="b")], "idle"),
        ([row("done", queued_lines=0, deadline_s=1.0), row("has work")], "has work"),
        ([row("elsewhere", model="n")], None),
        ([], None),
    ],
    ids=["earlier deadline", "fair share", "less than a chunk apart", "shared prefix", "fairness before prefix",
         "nothing queued", "another model", "nothing"],
)  # fmt: skip
def test_the_order_is_late_then_fair_then_prefix_then_deadline(rows: list[Waiting], expected: str | None) -> None:
    assert chosen(planner(*rows), prefixes=frozenset({7})) == expected


def measured(*rows: Waiting, lines_s: float = 1.0) -> Planner:
    """One whose model has just done ``lines_s`` lines per second for ten seconds."""
    other = row("measured", queued_lines=0, leased_lines=1)
    plan = planner(*rows, other, now_s=-10.0)
    plan.see([*rows, row("measured", queued_lines=0, leased_lines=1, done_lines=int(10 * lines_s))], 0.0)
    return plan


def test_a_batch_that_will_miss_its_window_goes_before_fair_share_and_prefix() -> None:
    late = row("late", tenant="busy", leased_lines=500, queued_lines=900, deadline_s=1300.0)
    plan = measured(late, row("fresh", tenant="idle", next_prefix=7))
    assert chosen(plan, prefixes=frozenset({7})) == "late"


def test_slack_is_the_time_left_when_all_lines_due_before_are_done() -> None:
    first, second = row("first", deadline_s=1500.0, queued_lines=1000), row("second", deadline_s=2000.0)
    plan = measured(first, second, lines_s=2.0)
    slack = {one.batch_id: one for one in plan.slacks(0.0)}
    assert slack["first"].slack_s == pytest.approx(1500 - 1000 / 2)
    assert slack["second"].slack_s == pytest.approx(2000 - 2000 / 2)
    assert not slack["second"].late


def test_without_a_measured_speed_nothing_is_late_before_its_deadline_is_near() -> None:
    plan = planner(row("huge", queued_lines=10**9), now_s=0.0)
    assert [(one.slack_s, one.late) for one in plan.slacks(0.0)] == [(DAY_S, False)]
    assert [one.late for one in plan.slacks(DAY_S - 1)] == [True]


def test_speed_counts_all_workers_lines_also_those_of_batches_that_ended() -> None:
    plan = planner(row("ends", queued_lines=0, leased_lines=30, done_lines=70), row("goes", done_lines=0))
    plan.see([row("goes", done_lines=50)], 10.0)
    assert plan.speeds.lines_s("m") == pytest.approx(8.0)


def test_a_throttled_models_speed_falls_and_another_models_does_not() -> None:
    plan = Planner()
    for second in range(0, 300, 10):
        both = [row("a", done_lines=10 * min(second, 100)), row("b", model="n", done_lines=10 * second)]
        plan.see(both, float(second))
    assert plan.speeds.lines_s("m") < 1.0
    assert plan.speeds.lines_s("n") == pytest.approx(10.0)


def test_a_paused_model_takes_nothing_from_another() -> None:
    plan = planner(row("paused"), row("runs", model="n"))
    assert plan.models() == ["m", "n"]
    assert chosen(plan, "n") == "runs"


def test_tenants_share_by_weight_whatever_the_number_of_their_batches() -> None:
    rows = [row(f"many-{i}", tenant="many") for i in range(9)]
    plan = planner(*rows, row("one", tenant="one", deadline_s=2 * DAY_S), weights={"one": 2.0})
    counted = Counter(name.split("-")[0] for name in claims(plan, 30))
    assert counted["one"] == pytest.approx(20, abs=1)


def test_nobody_starves_behind_a_batch_that_is_late_for_ever() -> None:
    hopeless = row("hopeless", queued_lines=10**7, deadline_s=100.0)
    plan = measured(hopeless, *[row(f"patient-{i}") for i in range(5)])
    now_s = AGED_AFTER_S + 1.0
    made = claims(plan, 5 * AGED_EVERY, now_s=now_s)
    assert {name for name in made if name != "hopeless"} == {f"patient-{i}" for i in range(5)}
    assert made.count("hopeless") == 5 * AGED_EVERY - 5


def test_a_row_whose_claim_failed_is_left_alone_until_the_next_look() -> None:
    plan = planner(row("gone", deadline_s=1.0), row("there"))
    found = plan.choose("m", (), 0.0)
    assert found is not None
    plan.claimed(found, 0, 0.0)
    assert chosen(plan) == "there"
    plan.see([row("gone", deadline_s=1.0), row("there")], 1.0)
    assert chosen(plan) == "gone"
