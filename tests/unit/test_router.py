"""One request from choice to end: each decision sees the last one's charge, and every charge comes back once."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import msgspec
import numpy as np
import pytest

from llmd_sched import router as module
from llmd_sched.errors import NoCandidates, NoEndpoints, NoneLeft, NotCached
from llmd_sched.plugin import Filter, Picker, Producer
from llmd_sched.pool.inflight import InFlightLoadProducer
from llmd_sched.pool.pool import Load, Pool
from llmd_sched.router import GONE_LOST_AFTER_S, IDLE_LOST_AFTER_S, LOST_AFTER_S, Router
from llmd_sched.sched.handlers import Scheduling, SingleProfileHandler
from llmd_sched.sched.pickers import MaxScorePicker, WeightedRandomPicker
from llmd_sched.sched.pipeline import Profile
from llmd_sched.sched.scorers import ActiveRequestScorer, KvCacheUtilizationScorer
from llmd_sched.types import Array, Candidates, Decision, End, Endpoint, Outcome, Prediction, Request
from tests.builders import COLUMNS, INFLIGHT, asking, endpoint, endpoints, pool_of, prompt, request, router_of, streamed

BALANCED = "plugins: [{type: active-request-scorer}]"


class Recorder(Producer):
    """Notes every call; fails where it is told to."""

    def __init__(self, name: str = "recorder", fails: str = "") -> None:
        super().__init__(name)
        self.calls: list[tuple[str, str]] = []
        self.members: list[str] = []
        self.fails = fails

    def _note(self, verb: str, about: str) -> None:
        self.calls.append((verb, about))
        if verb == self.fails:
            raise RuntimeError("out of order")

    def produce(self, request: Request, candidates: Candidates, now_s: float) -> dict[str, Array]:
        self._note("produce", request.id)
        return {f"noted/{self.name}": np.arange(len(candidates), dtype=float)}

    def predicted(self, candidates: Candidates, position: int, prefill: int | None = None) -> Prediction | None:
        return Prediction(row=(float(position),), ttft_ms=1.0, tpot_ms=1.0, model_version=7)

    def chosen(self, decision: Decision, candidates: Candidates, position: int, now_s: float) -> None:
        self._note("chosen", f"{decision.ticket}@{candidates.endpoints[position].name}")

    def first_token(self, ticket: str, now_s: float) -> None:
        self._note("first_token", ticket)

    def finished(self, ticket: str, outcome: Outcome, now_s: float) -> None:
        self._note("finished", f"{ticket} {outcome.end}")

    def endpoints_changed(self, endpoints: list[Endpoint]) -> None:
        self.members = [e.name for e in endpoints]

    def verbs(self) -> list[str]:
        return [verb for verb, _ in self.calls]


def made(
    producers: list[Producer],
    pool: Pool | None = None,
    picker: Picker | None = None,
    filters: tuple[Filter, ...] = (),
    seed: int = 0,
) -> Router:
    scorers = ((ActiveRequestScorer(), 1.0), (KvCacheUtilizationScorer(), 1.0))
    profile = Profile("p", filters, scorers, picker or MaxScorePicker())
    scheduling = Scheduling({"p": profile}, SingleProfileHandler())
    pool = pool_of(endpoints(3)) if pool is None else pool
    return Router(pool, producers, scheduling, Random(seed), ticket_prefix="t")


def in_flight(router: Router, now_s: float = 0.0) -> list[float]:
    """Open requests per endpoint, as the next request would see them."""
    (live,) = [p for p in router.producers if p.name == INFLIGHT]
    view = router.pool.candidates(None, now_s)
    return live.produce(request(), view, now_s)[COLUMNS["inflight_requests"]].tolist()


def charged_tokens(router: Router) -> list[float]:
    (live,) = [p for p in router.producers if p.name == INFLIGHT]
    return live.produce(request(), router.pool.candidates(None, 0.0), 0.0)[COLUMNS["inflight_tokens"]].tolist()


def test_each_choice_sees_the_charge_of_the_one_before() -> None:
    router = router_of(BALANCED, pool_of(endpoints(4)))
    picked = [router.choose(request(), None, 0.0).picked[0].name for _ in range(4)]
    assert sorted(picked) == ["e0", "e1", "e2", "e3"]
    assert in_flight(router) == [1, 1, 1, 1]


def test_a_decision_says_where_and_why() -> None:
    asked = asking(prompt(2))
    router = router_of("plugins: [{type: queue-scorer}]", pool_of(endpoints(2), {"e0": Load(5.0, 0.0, 0.0)}, 12.0))
    decision = router.choose(asked, None, 12.5)
    assert decision.request is asked
    assert [e.name for e in decision.picked] == ["e1"]
    assert decision.scores == {"10.0.0.1:8000": 0.0, "10.0.0.2:8000": 1.0}
    assert (decision.prediction, decision.explored, decision.at_s) == (None, False, 12.5)
    assert router.open == {decision.ticket: decision}


def test_only_the_first_of_several_picked_is_charged() -> None:
    router = router_of(
        BALANCED[:-1] + ", {type: max-score-picker, parameters: {maxNumOfEndpoints: 2}}]", pool_of(endpoints(3))
    )
    decision = router.choose(request(), None, 0.0)
    assert len(decision.picked) == 2
    assert in_flight(router)[int(decision.picked[0].name[1])] == sum(in_flight(router)) == 1


def test_tickets_are_unique_though_request_ids_are_not() -> None:
    router = made([])
    tickets = {router.choose(request(id="same"), None, 0.0).ticket for _ in range(50)}
    assert len(tickets) == 50
    assert all(t.startswith("t") for t in tickets)


@pytest.mark.parametrize("end", list(End))
def test_every_end_gives_the_charge_back_once(end: End) -> None:
    router = router_of(BALANCED, pool_of(endpoints(1)))
    first, second = (router.choose(asking(prompt(1)), None, 0.0) for _ in range(2))
    assert router.finish(first.ticket, Outcome(end=end), 1.0) is first
    assert router.finish(first.ticket, Outcome(end=end), 1.0) is None
    assert in_flight(router) == [1]
    router.finish(second.ticket, Outcome(end=end), 1.0)
    assert (in_flight(router), charged_tokens(router), router.open) == ([0], [0], {})


def test_producers_are_told_each_thing_once_and_in_order() -> None:
    one = Recorder()
    router = made([one])
    decision = router.choose(request(id="r1"), None, 0.0)
    router.first_token(decision.ticket, 0.1)
    for _ in range(3):
        router.finish(decision.ticket, streamed(), 0.2)
    router.first_token(decision.ticket, 0.3)
    router.finish("stranger", streamed(), 0.4)
    where = f"{decision.ticket}@{decision.picked[0].name}"
    assert one.calls == [
        ("produce", "r1"),
        ("chosen", where),
        ("first_token", decision.ticket),
        ("finished", f"{decision.ticket} finished"),
    ]


def test_the_prediction_of_the_picked_endpoint_rides_in_the_decision() -> None:
    pool = pool_of(endpoints(3), {"e0": Load(0, 0, 0.9), "e1": Load(0, 0, 0.5), "e2": Load(0, 0, 0.1)})
    decision = made([Recorder()], pool).choose(request(), None, 0.0)
    assert decision.prediction is not None
    assert (decision.picked[0].name, decision.prediction.row) == ("e2", (2.0,))


def test_an_empty_pool_or_subset_is_refused() -> None:
    one = Recorder()
    with pytest.raises(NoCandidates):
        made([one], Pool()).choose(request(), None, 0.0)
    with pytest.raises(NoCandidates):
        made([one]).choose(request(), {"10.9.9.9"}, 0.0)
    assert one.calls == []


def test_a_subset_is_honoured() -> None:
    router = made([])
    assert {router.choose(request(), {"10.0.0.2:8000"}, 0.0).picked[0].name for _ in range(5)} == {"e1"}


class Nobody(Filter, frozen=True):
    """Drops everything."""

    def keep(self, request: Request, candidates: Candidates, rng: Random) -> np.ndarray:
        return np.zeros(len(candidates), dtype=bool)


def test_a_request_the_filters_refuse_leaves_no_trace() -> None:
    live = InFlightLoadProducer().open(INFLIGHT)
    router = made([live], filters=(Nobody(),))
    with pytest.raises(NoneLeft):
        router.choose(request(), None, 0.0)
    assert (router.open, in_flight(router)) == ({}, [0, 0, 0])


def test_a_request_without_a_body_goes_anywhere_reachable() -> None:
    router = made([])
    assert {router.choose_any(None, 0.0).name for _ in range(60)} == {"e0", "e1", "e2"}
    assert router.choose_any({"10.0.0.3"}, 0.0).name == "e2"
    assert router.open == {}
    with pytest.raises(NoEndpoints):
        router.choose_any(set(), 0.0)
    with pytest.raises(NoEndpoints):
        made([], Pool()).choose_any(None, 0.0)


def test_a_producer_that_fails_to_produce_takes_no_request_down() -> None:
    bad, good = Recorder("bad", fails="produce"), Recorder("good")
    router = made([bad, good])
    decision = router.choose(request(), None, 0.0)
    router.finish(decision.ticket, streamed(), 1.0)
    assert good.verbs() == ["produce", "chosen", "finished"]
    assert "chosen" not in bad.verbs()
    assert router.producer_errors == {"bad": 1, "good": 0}
    assert router.last_producer_error == "bad: RuntimeError: out of order"


def test_what_reads_a_failed_producer_does_without() -> None:
    """The active-request scorer finds no column and scores everyone alike."""
    router = router_of(BALANCED, pool_of(endpoints(2)))
    router.producers[0].produce = Recorder(fails="produce").produce  # type: ignore[method-assign]
    decision = router.choose(request(), None, 0.0)
    assert set(decision.scores.values()) == {1.0}
    assert router.producer_errors[INFLIGHT] == 1


@pytest.mark.parametrize("text", ["plugins: [{type: latency-scorer}, {type: slo-headroom-tier-filter}]"])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_any_producer_of_the_latency_stack_may_fail(text: str, broken: int) -> None:
    router = router_of(text, pool_of(endpoints(2)))
    name = router.producers[broken].name
    router.producers[broken].produce = Recorder(fails="produce").produce  # type: ignore[method-assign]
    decision = router.choose(asking(prompt(1)), None, 0.0)
    router.finish(decision.ticket, streamed(), 1.0)
    assert router.producer_errors[name] == 1
    assert decision.prediction is None or broken == 0


def test_a_model_that_fails_takes_no_request_down() -> None:
    router = router_of("plugins: [{type: latency-scorer}]", pool_of(endpoints(2)))

    class Broken:
        """A model whose trees are gone."""

        version = 1

        def predict(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            raise ValueError("no trees")

    router.producers[-1].model = Broken()  # type: ignore[attr-defined]
    decision = router.choose(request(), None, 0.0)
    assert decision.prediction is None
    assert sum(router.producer_errors.values()) == 1


@pytest.mark.parametrize("verb", ["chosen", "first_token", "finished"])
@pytest.mark.parametrize("first", [True, False])
def test_a_producer_that_fails_later_keeps_no_other_from_giving_back(verb: str, first: bool) -> None:
    bad, live = Recorder(fails=verb), InFlightLoadProducer().open(INFLIGHT)
    router = made([bad, live] if first else [live, bad], pool_of(endpoints(1)))
    decision = router.choose(asking(prompt(1)), None, 0.0)
    router.first_token(decision.ticket, 0.5)
    assert router.finish(decision.ticket, streamed(), 1.0) is decision
    assert (in_flight(router), router.open) == ([0], {})
    assert router.producer_errors[bad.name] == 1


def test_open_requests_are_bounded_and_the_oldest_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OPEN_REQUESTS", 3)
    router = router_of(BALANCED, pool_of(endpoints(1)))
    tickets = [router.choose(request(), None, float(i)).ticket for i in range(5)]
    assert list(router.open) == tickets[2:]
    assert (in_flight(router), router.lost) == ([3], 2)


def explored(kv_usage: list[float], picker: Picker, seeds: int = 40) -> set[tuple[str, bool]]:
    pool = pool_of(endpoints(len(kv_usage)), {f"e{i}": Load(0, 0, kv) for i, kv in enumerate(kv_usage)})
    decisions = [made([], pool, picker, seed=s).choose(request(), None, 0.0) for s in range(seeds)]
    return {(d.picked[0].name, d.explored) for d in decisions}


def test_a_pick_below_the_best_score_is_marked_as_explored() -> None:
    assert explored([0.2, 0.6], WeightedRandomPicker()) == {("e0", False), ("e1", True)}


def test_the_best_score_is_no_exploration_even_when_tied() -> None:
    assert explored([0.2, 0.2], WeightedRandomPicker()) == {("e0", False), ("e1", False)}
    assert explored([0.6, 0.2], MaxScorePicker()) == {("e1", False)}


def due_at(decision: Decision, at_s: float) -> Decision:
    """The same, its first token predicted for then."""
    assert decision.prediction is not None
    prediction = msgspec.structs.replace(decision.prediction, ttft_ms=1e3 * (at_s - decision.at_s))
    return msgspec.structs.replace(decision, prediction=prediction)


def test_without_a_prediction_a_first_token_is_assumed_when_the_prefill_ahead_should_be_done() -> None:
    router = router_of("plugins: [{type: token-load-scorer}]", pool_of(endpoints(1)))
    first, second = (router.choose(asking(prompt(250, seed=i)), None, 0.0) for i in range(2))  # 16,000 tokens each
    for decision in (first, second):
        router.assume_first_token(decision)
    router.choose(request(), None, 1.5)
    assert charged_tokens(router) == [pytest.approx(16_000)]
    router.choose(request(), None, 2.5)
    assert charged_tokens(router) == [pytest.approx(0)]


def test_how_long_a_prompt_takes_is_learnt_from_those_that_were_measured() -> None:
    router = router_of("plugins: [{type: token-load-scorer}]", pool_of(endpoints(1)))
    for i in range(3):
        decision = router.choose(asking(prompt(250, seed=i)), None, float(10 * i))
        router.finish(decision.ticket, streamed(ttft_ms=4000.0, e2e_ms=9000.0), 10.0 * i + 9)
    router.assume_first_token(router.choose(asking(prompt(250, seed=9)), None, 100.0))
    router.choose(request(), None, 103.9)
    assert charged_tokens(router)[0] > 15_000
    router.choose(request(), None, 104.1)
    assert charged_tokens(router) == [pytest.approx(0)]


def test_expected_first_tokens_come_with_the_next_choice() -> None:
    one = Recorder()
    router = made([one])
    decisions = [router.choose(request(), None, 0.0) for _ in range(3)]
    tickets = [decision.ticket for decision in decisions]
    for decision, at_s in zip(decisions, (3.0, 1.0, 2.0), strict=True):
        router.assume_first_token(due_at(decision, at_s))
    router.choose(request(), None, 2.0)
    told = [about for verb, about in one.calls if verb == "first_token"]
    assert told == [tickets[1], tickets[2]]


def test_an_expected_first_token_of_a_finished_request_is_forgotten() -> None:
    one = Recorder()
    router = made([one])
    decision = router.choose(request(), None, 0.0)
    router.assume_first_token(due_at(decision, 5.0))
    router.finish(decision.ticket, streamed(), 1.0)
    router.choose(request(), None, 9.0)
    assert "first_token" not in one.verbs()


def reaping(load: Load | None = None) -> tuple[Router, Decision]:
    pool = pool_of(endpoints(1), {"e0": load or Load(0.0, 0.0, 0.0)})
    router = router_of(BALANCED, pool)
    return router, router.choose(request(), None, 0.0)


def reap_at(router: Router, now_s: float, load: Load | None = None) -> int:
    if load is not None:
        router.pool.record(router.pool.endpoints[0], load, now_s)
    return router.reap(now_s)


IDLE, BUSY, QUEUED = Load(0.0, 0.0, 0.0), Load(0.0, 2.0, 0.1), Load(3.0, 0.0, 0.1)


@pytest.mark.parametrize(
    ("now_s", "load", "lost"),
    [
        (IDLE_LOST_AFTER_S - 0.1, IDLE, 0),
        (IDLE_LOST_AFTER_S + 0.1, IDLE, 1),
        (IDLE_LOST_AFTER_S + 0.1, BUSY, 0),
        (IDLE_LOST_AFTER_S + 0.1, QUEUED, 0),
        (IDLE_LOST_AFTER_S + 0.1, None, 0),  # last read too long ago to tell
        (LOST_AFTER_S, BUSY, 0),
        (LOST_AFTER_S + 0.1, BUSY, 1),
        (LOST_AFTER_S + 0.1, None, 1),
    ],
)
def test_a_request_is_given_up_when_its_engine_is_idle_or_it_is_very_old(
    now_s: float, load: Load | None, lost: int
) -> None:
    router, decision = reaping()
    assert reap_at(router, now_s, load) == lost
    assert router.lost == lost
    assert (decision.ticket in router.open) == (not lost)
    assert in_flight(router, now_s) == [1 - lost]


def test_a_request_of_an_endpoint_that_is_gone_is_given_up_when_old() -> None:
    router, _ = reaping()
    router.pool.apply([endpoint(5)])
    assert router.reap(GONE_LOST_AFTER_S - 1) == 0
    assert router.reap(GONE_LOST_AFTER_S + 1) == 1


def test_an_outcome_that_comes_after_reaping_changes_nothing() -> None:
    router, decision = reaping()
    reap_at(router, 60.0, IDLE)
    assert router.finish(decision.ticket, streamed(), 61.0) is None
    assert in_flight(router, 61.0) == [0]


def test_reaping_spares_the_young_behind_the_old() -> None:
    router, old = reaping()
    young = router.choose(request(), None, 55.0)
    assert reap_at(router, 60.0, IDLE) == 1
    assert list(router.open) == [young.ticket] != [old.ticket]


def test_producers_follow_the_members_of_the_pool() -> None:
    one = Recorder()
    router = made([one])
    assert one.members == ["e0", "e1", "e2"]
    router.pool.apply([endpoint(9)])
    assert one.members == ["e9"]


@pytest.mark.parametrize("change", [lambda pool: pool.apply(endpoints(1)), lambda pool: pool.apply([])])
def test_endpoints_may_leave_while_their_requests_are_open(change: Callable[[Pool], None]) -> None:
    router = router_of("plugins: [{type: latency-scorer}, {type: prefix-cache-scorer}]", pool_of(endpoints(3)))
    open_ = [router.choose(asking(prompt(2, seed=i)), None, 0.0) for i in range(6)]
    change(router.pool)
    for decision in open_:
        router.first_token(decision.ticket, 0.5)
        router.finish(decision.ticket, streamed(), 1.0)
    router.pool.apply(endpoints(3))
    assert (in_flight(router), charged_tokens(router)) == ([0, 0, 0], [0, 0, 0])


def test_the_same_seed_gives_the_same_decisions() -> None:
    def decisions() -> list[str]:
        router = router_of(
            "plugins: [{type: latency-scorer}, {type: weighted-random-picker}]", pool_of(endpoints(5)), seed=4
        )
        return [router.choose(asking(prompt(1, seed=i % 3)), None, i / 10).picked[0].name for i in range(30)]

    assert decisions() == decisions()


def test_a_client_that_wants_a_cached_prompt_or_nothing_is_refused_until_it_is_cached() -> None:
    router = router_of("plugins: [{type: prefix-cache-scorer}]", pool_of(endpoints(3)))
    asked = asking(prompt(4), only_if_cached=True)
    with pytest.raises(NotCached, match="no decode worker has the requested KV cache"):
        router.choose(asked, None, 0.0)
    assert not router.open
    chosen = router.choose(asking(prompt(4)), None, 0.0)
    assert router.choose(asked, None, 0.0).picked == chosen.picked


def test_whoever_asks_is_told_of_the_endpoint_of_each_decision() -> None:
    router = router_of("plugins: [{type: queue-scorer}]", pool_of(endpoints(2)))
    told: list[str] = []
    router.on_chosen = lambda chosen: told.append(chosen.key)
    decisions = [router.choose(request(), None, 0.0) for _ in range(5)]
    assert told == [decision.picked[0].key for decision in decisions]
