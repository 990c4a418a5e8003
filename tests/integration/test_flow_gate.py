"""The gate on a real event loop: who gets through when, who leaves, and what it does while nothing happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection

import numpy as np
import pytest

from llmd_sched.errors import NoneLeft, RequestError
from llmd_sched.flow.controller import FlowControl
from llmd_sched.flow.dispatch import Dispatcher
from llmd_sched.flow.gate import DISPATCHES_PER_STEP, Gate
from llmd_sched.flow.queues import Item, QueueOutcome
from llmd_sched.flow.reclaim import Reclaimer
from llmd_sched.flow.saturation import ConcurrencyDetector, Stages, UtilizationDetector
from llmd_sched.flow.settings import BandSettings, FlowSettings
from llmd_sched.types import Candidates, Decision, Request
from tests.builders import candidates, decision, endpoint, request, streamed

SOON_S = 5.0
"""Far more than anything here takes; a test that waits for it has failed."""


class Bench:
    """A gate before endpoints with a limit each; requests end when told so."""

    def __init__(
        self, limit: int = 1, endpoints: int = 1, reclaimer: Reclaimer | None = None, **fields: object
    ) -> None:
        self.counts = [0.0] * endpoints
        self.open: dict[str, Decision] = {}
        self.looks = 0
        self.most = 0
        self.ended: list[Item] = []
        self.abandoned: list[Decision] = []
        self.evicted: list[str] = []
        self.can_evict = True
        self.error: Exception | None = None
        bands = dict.fromkeys((10, 0, -1), BandSettings())
        flow = FlowControl(FlowSettings(bands=bands, **fields), time.monotonic())
        self.gate = Gate(
            Dispatcher(flow, ConcurrencyDetector(max_concurrency=limit), self.look),
            self.choose,
            abandon=self.abandon,
            reclaimer=reclaimer,
            evict=self.evict,
            in_flight=lambda: len(self.open),
        )
        self.gate.on_end = self.ended.append

    def look(self, now_s: float) -> Candidates:
        self.looks += 1
        return candidates(inflight_requests=self.counts) if self.counts else candidates(0)

    def choose(self, asked: Request, subset: Collection[str] | None, now_s: float) -> Decision:
        if self.error is not None:
            raise self.error
        self.counts[self.counts.index(min(self.counts))] += 1
        self.most = max(self.most, int(sum(self.counts)))
        self.open[asked.id] = decision(asked.id, asked, endpoint())
        return self.open[asked.id]

    def finish(self, ticket: str) -> None:
        done = self.open.pop(ticket)
        self.counts[self.counts.index(max(self.counts))] -= 1
        self.gate.finished(done, streamed())

    def abandon(self, made: Decision) -> None:
        self.abandoned.append(made)
        self.finish(made.ticket)

    def evict(self, ticket: str) -> bool:
        if self.can_evict:
            self.evicted.append(ticket)
        return self.can_evict

    def ask(self, name: str, **fields: object) -> asyncio.Task[Decision]:
        return asyncio.create_task(self.gate.admit(request(id=name, **fields)))

    def outcomes(self) -> dict[str, QueueOutcome | None]:
        return {item.request.id: item.outcome for item in self.ended}


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def soon(awaitable: Awaitable[Decision]) -> Decision:
    async with asyncio.timeout(SOON_S):
        return await awaitable


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not holds():
            await asyncio.sleep(0.002)


async def test_with_room_a_request_goes_through_without_the_loop_turning() -> None:
    bench = Bench()
    admitted = bench.gate.admit(request(id="a"))
    with pytest.raises(StopIteration) as stopped:
        admitted.send(None)
    assert stopped.value.value.ticket == "a"
    assert bench.outcomes() == {"a": QueueOutcome.DISPATCHED}


async def test_without_room_it_waits_until_a_request_ends() -> None:
    bench = Bench()
    first, second = bench.ask("a"), bench.ask("b")
    await settle()
    assert first.done()
    assert not second.done()
    bench.finish("a")
    assert (await soon(second)).ticket == "b"


async def test_what_it_is_told_of_an_ended_stay_in_the_queue() -> None:
    bench = Bench()
    bench.ask("a")
    waiting = bench.ask("b", priority=10)
    await settle()
    await asyncio.sleep(0.02)
    bench.finish("a")
    await soon(waiting)
    item = bench.ended[-1]
    assert (item.priority, item.outcome) == (10, QueueOutcome.DISPATCHED)
    assert item.waited_s >= 0.02
    assert 0 < item.enqueue_s < item.waited_s


async def test_the_subset_reaches_the_choice() -> None:
    bench, seen = Bench(), []
    bench.gate._choose = lambda asked, subset, now_s: seen.append(subset) or bench.choose(asked, subset, now_s)
    await bench.gate.admit(request(), ("10.0.0.1",))
    assert seen == [("10.0.0.1",)]


async def test_a_burst_never_overshoots_the_limit_and_goes_by_priority() -> None:
    bench = Bench(limit=3, endpoints=2)
    tasks = [bench.ask(f"{i}", priority=(-1, 0, 10)[i % 3]) for i in range(60)]
    await settle()
    assert sum(bench.counts) == 6
    order = list(bench.open)
    while bench.open:
        for ticket in list(bench.open)[:4]:
            bench.finish(ticket)
        await settle()
        order += [ticket for ticket in bench.open if ticket not in order]
    await asyncio.gather(*tasks)
    assert bench.most == 6
    priorities = [(-1, 0, 10)[int(name) % 3] for name in order[6:]]
    assert len(order) == 60
    assert priorities == sorted(priorities, reverse=True)


async def test_wakes_coalesce() -> None:
    bench = Bench()
    for name in "ab":
        bench.ask(name)
    await settle()
    before = bench.looks
    for _ in range(100):
        bench.gate.wake()
    await settle()
    assert bench.looks == before + 1


async def test_a_wake_while_nobody_waits_does_nothing() -> None:
    bench = Bench()
    bench.gate.wake()
    await settle()
    assert bench.looks == 0


async def test_a_blocked_queue_is_not_looked_at_while_nothing_happens() -> None:
    bench = Bench()
    tasks = [bench.ask(str(i)) for i in range(50)]
    await settle()
    before = bench.looks
    await asyncio.sleep(0.1)
    assert bench.looks == before
    bench.gate.stop()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_loop_has_its_turn_while_many_are_released() -> None:
    bench = Bench()
    bench.counts = [1.0]
    tasks = [bench.ask(str(i)) for i in range(10 * DISPATCHES_PER_STEP)]
    await settle()
    bench.counts = [-1e6]
    bench.gate.wake()
    turns = []
    while len(bench.open) < len(tasks):
        await asyncio.sleep(0)
        turns.append(len(bench.open))
    assert max(b - a for a, b in zip([0, *turns], turns, strict=False)) <= DISPATCHES_PER_STEP
    await asyncio.gather(*tasks)


async def test_a_request_that_waited_too_long_is_refused_at_its_deadline() -> None:
    bench = Bench(ttl_s=0.05)
    bench.ask("a")
    await settle()
    begin_s = time.monotonic()
    with pytest.raises(RequestError) as refused:
        await soon(bench.ask("b"))
    assert time.monotonic() - begin_s >= 0.05
    assert refused.value.reason == "rejected-ttl-expired"
    assert bench.outcomes()["b"] is QueueOutcome.EVICTED_TTL


async def test_later_deadlines_follow_without_a_new_arrival() -> None:
    bench = Bench(ttl_s=0.04)
    bench.ask("a")
    await settle()
    waiting = [bench.ask("b")]
    await asyncio.sleep(0.02)
    waiting.append(bench.ask("c"))
    async with asyncio.timeout(SOON_S):
        errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert [e.reason for e in errors if isinstance(e, RequestError)] == ["rejected-ttl-expired"] * 2


async def test_an_empty_pool_holds_requests_until_an_endpoint_comes() -> None:
    bench = Bench(ttl_s=0.01, no_endpoint_ttl_s=60.0)
    counts, bench.counts = bench.counts, []
    waiting = bench.ask("a")
    await asyncio.sleep(0.05)  # longer than it may wait for room
    assert not waiting.done()
    bench.counts = counts
    bench.gate.wake()
    await soon(waiting)


async def test_an_empty_pool_refuses_when_its_own_budget_is_used_up() -> None:
    bench = Bench(ttl_s=60.0, no_endpoint_ttl_s=0.02)
    bench.counts = []
    with pytest.raises(RequestError) as refused:
        await soon(bench.ask("a"))
    assert (refused.value.status, refused.value.reason) == (503, "rejected-no-endpoints")


async def test_a_full_queue_refuses_at_once() -> None:
    bench = Bench(max_requests=1)
    bench.ask("a")
    await settle()
    bench.ask("b")
    await settle()
    with pytest.raises(RequestError) as refused:
        await bench.gate.admit(request(id="c"))
    assert (refused.value.status, refused.value.reason) == (429, "rejected-saturated")
    assert bench.outcomes() == {"a": QueueOutcome.DISPATCHED, "c": QueueOutcome.REJECTED_CAPACITY}


async def test_a_client_that_goes_leaves_the_queue_in_the_same_step() -> None:
    bench = Bench()
    bench.ask("a")
    gone, next_one = bench.ask("b"), bench.ask("c")
    await settle()
    gone.cancel()
    assert bench.outcomes()["b"] is QueueOutcome.EVICTED_CONTEXT_CANCELLED
    bench.finish("a")
    assert (await soon(next_one)).ticket == "c"
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert bench.abandoned == []
    assert [item.request.id for item in bench.ended] == ["a", "b", "c"]


async def test_a_client_that_goes_just_as_it_is_let_through_gives_its_place_back() -> None:
    bench = Bench()
    bench.ask("a")
    gone, next_one = bench.ask("b"), bench.ask("c")
    await settle()
    bench.finish("a")
    bench.gate._woken()  # dispatches b, whose task has not run yet
    assert "b" in bench.open
    gone.cancel()
    assert (await soon(next_one)).ticket == "c"
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert [made.ticket for made in bench.abandoned] == ["b"]


async def test_an_error_of_the_choice_goes_to_its_client_alone() -> None:
    bench = Bench()
    bench.ask("a")
    failing = bench.ask("b")
    await settle()
    bench.error = NoneLeft("no endpoints available for the given request")
    bench.finish("a")
    with pytest.raises(NoneLeft):
        await soon(failing)
    bench.error = KeyError("a bug")
    with pytest.raises(KeyError):
        await bench.gate.admit(request(id="c"))
    bench.error = None
    assert (await soon(bench.gate.admit(request(id="d")))).ticket == "d"
    assert (len(bench.gate.flow), bench.gate.errors) == (0, 0)


async def test_a_decision_that_fails_is_counted_and_made_again_at_the_next_change() -> None:
    bench = Bench()
    bench.gate.dispatcher.look = lambda now_s: candidates(1).with_columns({}).column("no such column")
    waiting = bench.ask("a")
    await settle()
    assert not waiting.done()
    assert bench.gate.errors == 1
    assert bench.gate.last_error.startswith("KeyError")
    bench.gate.dispatcher.look = bench.look
    bench.gate.wake()
    await soon(waiting)


async def test_at_the_stop_everybody_is_told() -> None:
    bench = Bench()
    bench.ask("a")
    waiting = [bench.ask("b"), bench.ask("c")]
    await settle()
    bench.gate.stop()
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert [(e.status, e.reason) for e in errors if isinstance(e, RequestError)] == [
        (503, "rejected-shutting-down")
    ] * 2
    with pytest.raises(RequestError, match="shutting down"):
        await bench.gate.admit(request(id="d"))
    assert bench.outcomes()["d"] is QueueOutcome.REJECTED_OTHER


async def test_each_decision_is_timed_when_somebody_listens() -> None:
    bench, took_s = Bench(), []
    bench.gate.on_cycle = took_s.append
    await bench.gate.admit(request())
    assert len(took_s) == 2  # the one that let it go, and the one that found nobody left
    assert min(took_s) >= 0


async def test_the_end_of_a_request_is_told_to_fairness() -> None:
    bench = Bench()
    served = []
    bench.gate.flow.served = lambda asked, tokens, now_s: served.append((asked.id, tokens))
    await bench.gate.admit(request(id="a"))
    bench.finish("a")
    assert served == [("a", 2.0 * 11)]  # completion tokens count double


async def test_what_is_dispatched_counts_until_metrics_show_it() -> None:
    bench = Bench()
    view = candidates(waiting=[3.0])
    bench.gate.dispatcher.look = lambda now_s: view  # read long ago, and not since
    bench.gate.dispatcher.detector = UtilizationDetector(queue_depth_threshold=5)
    bench.gate.dispatcher._stages = Stages(bench.gate.dispatcher.detector)
    view.columns["metrics_age_s"] = np.zeros(1)
    bench.gate._clock = lambda: 7.0
    tasks = [bench.ask(str(i)) for i in range(4)]
    await settle()
    assert list(bench.open) == ["0", "1"]
    bench.gate.stop()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_blocked_request_evicts_one_of_lower_priority() -> None:
    bench = Bench(limit=2, reclaimer=Reclaimer(grace_s=0.01))
    bench.ask("low")
    bench.ask("normal")
    high = bench.ask("high", priority=10)
    bench.ask("x", priority=-1)
    await settle()
    assert bench.evicted == []  # nothing in flight is sheddable
    bench.finish("low")
    await soon(high)
    bench.finish("normal")
    await until(lambda: "x" in bench.open)
    higher = bench.ask("higher", priority=10)
    await settle()
    assert bench.evicted == ["x"]
    bench.finish("x")
    assert (await soon(higher)).ticket == "higher"
    assert bench.gate.reclaimer is not None
    assert bench.gate.reclaimer.outcomes == {"confirmed": 1}


async def test_evictions_go_on_after_the_grace_without_any_other_event() -> None:
    bench = Bench(limit=3, reclaimer=Reclaimer(grace_s=0.02))
    for name in "xyz":
        bench.ask(name, priority=-1)
    await settle()
    bench.counts = [12.0]  # others hold places too
    high = bench.ask("high", priority=10)
    await settle()
    assert bench.evicted == ["z", "y"]
    bench.finish("z")
    bench.finish("y")
    await settle()
    assert bench.evicted == ["z", "y"]
    await until(lambda: bench.evicted == ["z", "y", "x"])
    assert not high.done()
    bench.gate.stop()
    with pytest.raises(RequestError):
        await high


async def test_an_eviction_that_cannot_be_done_is_counted() -> None:
    bench = Bench(reclaimer=Reclaimer(grace_s=0.01))
    bench.can_evict = False
    bench.ask("x", priority=-1)
    high = bench.ask("high", priority=10)
    await settle()
    assert bench.gate.reclaimer is not None
    assert (bench.gate.reclaimer.outcomes, bench.gate.reclaimer.pending) == ({"failed": 1}, 0)
    bench.finish("x")
    await soon(high)
