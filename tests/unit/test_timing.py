"""Timing a sample of the decisions, plugin by plugin."""

from __future__ import annotations

from itertools import count

from llmd_sched.router import SAMPLE_EVERY
from llmd_sched.sched.timing import Timing, timed
from tests.builders import asking, endpoints, pool_of, prompt, router_of, streamed

BODY = (
    "plugins: [{type: prefix-cache-affinity-filter}, {type: queue-scorer, name: q}, {type: token-load-scorer},"
    " {type: random-picker}]"
)


def test_a_timed_decision_is_the_same_decision_and_names_who_ran_in_their_order() -> None:
    notes: list[Timing] = []
    ticks = count()
    plain, sampled = (router_of(BODY, pool_of(endpoints(4)), seed=3) for _ in range(2))
    sampled.sampled = timed(sampled.scheduling, {"q": "queue-scorer"}, lambda: float(next(ticks)), notes)
    for i in range(SAMPLE_EVERY + 1):
        made = [router.choose(asking(prompt(2, seed=i)), None, float(i)) for router in (plain, sampled)]
        assert made[0].picked == made[1].picked
        for router, decision in zip((plain, sampled), made, strict=True):
            router.finish(decision.ticket, streamed(), float(i))
    assert [note[:3] for note in notes[:4]] == [
        ("Filter", "prefix-cache-affinity-filter", "prefix-cache-affinity-filter"),
        ("Scorer", "queue-scorer", "q"),
        ("Scorer", "token-load-scorer", "token-load-scorer"),
        ("Picker", "random-picker", "random-picker"),
    ]
    assert len(notes) == 2 * 4
    assert all(took_s == 1.0 for *_, took_s in notes)
