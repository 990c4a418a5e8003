"""How fast flow control lets requests go, and what it costs while it holds them.

    python -m benchmarks.bench_flow [--requests 10000] [--flows 64] [--endpoints 100] [--idle-s 2] [--json OUT]

Requests of 8 bands and many flows are queued while the pool is full and then let go: by the controller alone, by a
dispatcher that measures the pool before each, and through the asyncio gate with a choice that only charges an
endpoint. Checked on the way: bands in order of priority, flows in turn, arrivals of one flow in order, and that the
concurrency limit is never exceeded while requests end one by one. ``idle``: all of them queued, and nothing happens.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from random import Random

import numpy as np

from benchmarks.results import table, write_json
from llmd_sched.flow.controller import FlowControl
from llmd_sched.flow.dispatch import Dispatcher
from llmd_sched.flow.gate import Gate
from llmd_sched.flow.policy import FcfsOrdering, GlobalStrictFairness, RoundRobinFairness
from llmd_sched.flow.program import ProgramAwareFairness
from llmd_sched.flow.queues import Item
from llmd_sched.flow.saturation import ConcurrencyDetector
from llmd_sched.flow.settings import BandSettings, FlowSettings
from llmd_sched.types import Candidates, Decision, End, Endpoint, Outcome, Request

SEED = 7
PRIORITIES = (100, 50, 10, 5, 1, 0, -1, -10)
COLUMN = "inflight_requests/inflight-load-producer"
DONE = Outcome(end=End.FINISHED, status=200, output_tokens=100)


class Pool:
    """Endpoints with a number of requests in flight each, charged in turn."""

    def __init__(self, endpoints: int, limit: int) -> None:
        self.endpoints = [Endpoint(f"e{i}", f"10.0.{i // 250}.{i % 250 + 1}", 8000) for i in range(endpoints)]
        self.limit = endpoints * limit
        self.detector = ConcurrencyDetector(max_concurrency=limit)
        self.counts = np.zeros(endpoints)
        self.in_flight = self.most = 0
        self.open: deque[Decision] = deque()
        self.order: list[Request] = []

    def look(self, now_s: float) -> Candidates:
        return Candidates(self.endpoints, {COLUMN: self.counts})

    def choose(self, request: Request, subset: Collection[str] | None, now_s: float) -> Decision:
        at = len(self.order) % len(self.endpoints)
        self.counts[at] += 1
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        self.order.append(request)
        made = Decision(
            ticket=request.id, request=request, picked=(self.endpoints[at],), scores={}, prediction=None, at_s=now_s
        )
        self.open.append(made)
        return made

    def fill(self) -> None:
        self.counts += self.limit / len(self.endpoints)

    def clear(self) -> None:
        self.counts *= 0.0

    def finish_one(self) -> Decision:
        done = self.open.popleft()
        self.counts[self.endpoints.index(done.picked[0])] -= 1
        self.in_flight -= 1
        return done


def requests(count: int, flows: int) -> list[Request]:
    """Of random bands and flows; the id counts arrivals."""
    random = Random(SEED)
    return [
        Request(
            id=str(i),
            model="m",
            target_model="m",
            priority=random.choice(PRIORITIES),
            fairness_id=f"flow-{random.randrange(flows)}",
            input_tokens=random.randint(10, 4000),
            size_bytes=4000,
        )
        for i in range(count)
    ]


def settings(fairness: str) -> FlowSettings:
    policy = {
        "strict": GlobalStrictFairness(), "round_robin": RoundRobinFairness(), "program_aware": ProgramAwareFairness()
    }[fairness]  # fmt: skip
    band = BandSettings(fairness=policy, ordering=FcfsOrdering(), max_requests=1_000_000)
    return FlowSettings(bands=dict.fromkeys(PRIORITIES, band))


def check_order(order: Sequence[Request], count: int, fairness: str) -> None:
    """Raises AssertionError unless everybody went once, in the order of bands, flows and arrivals."""
    assert len({r.id for r in order}) == len(order) == count
    assert [r.priority for r in order] == sorted((r.priority for r in order), reverse=True)
    for priority in PRIORITIES:
        band = [r for r in order if r.priority == priority]
        if fairness == "strict":
            assert [int(r.id) for r in band] == sorted(int(r.id) for r in band)
        for _, flow in by_flow(band):
            assert [int(r.id) for r in flow] == sorted(int(r.id) for r in flow)
        if fairness == "round_robin":
            check_turns(band)


def by_flow(band: Sequence[Request]) -> Iterator[tuple[str, list[Request]]]:
    flows: dict[str, list[Request]] = {}
    for request in band:
        flows.setdefault(request.fairness_id, []).append(request)
    return iter(flows.items())


def check_turns(band: Sequence[Request]) -> None:
    """Each round serves every flow that still has requests, once, in the order of their ids."""
    left = {name: len(flow) for name, flow in by_flow(band)}
    at = 0
    while left:
        names = sorted(left)
        assert [r.fairness_id for r in band[at : at + len(names)]] == names
        at += len(names)
        left = {name: n - 1 for name, n in left.items() if n > 1}


def controller_rates(asked: Sequence[Request], fairness: str) -> dict[str, float]:
    flow = FlowControl(settings(fairness))
    begin_s = time.perf_counter()
    for request in asked:
        flow.enqueue(request, 0.0)
    queued_s = time.perf_counter()
    order: list[Item] = []
    while (item := flow.next(0.0, 1.0)) is not None:
        order.append(item)
    end_s = time.perf_counter()
    check_order([item.request for item in order], len(asked), fairness)
    return {
        f"controller_{fairness}_enqueued_per_s": len(asked) / (queued_s - begin_s),
        f"controller_{fairness}_dispatched_per_s": len(asked) / (end_s - queued_s),
    }


def dispatcher_rate(asked: Sequence[Request], endpoints: int) -> float:
    pool = Pool(endpoints, len(asked))
    dispatcher = Dispatcher(FlowControl(settings("round_robin")), pool.detector, pool.look)
    for request in asked:
        dispatcher.flow.enqueue(request, 0.0)
    begin_s = time.perf_counter()
    while (item := dispatcher.step(1.0)) is not None:
        pool.choose(item.request, None, 1.0)
    spent_s = time.perf_counter() - begin_s
    check_order(pool.order, len(asked), "round_robin")
    return len(asked) / spent_s


async def queued(pool: Pool, asked: Sequence[Request]) -> tuple[Gate, list[asyncio.Task[Decision]]]:
    """A gate before a full pool, with everybody waiting at it."""
    dispatcher = Dispatcher(FlowControl(settings("round_robin")), pool.detector, pool.look)
    gate = Gate(dispatcher, pool.choose, abandon=lambda decision: None)
    pool.fill()
    tasks = [asyncio.create_task(gate.admit(request)) for request in asked]
    while len(gate.flow) < len(asked):
        await asyncio.sleep(0.0)
    pool.clear()
    gc.collect()
    gc.freeze()  # as the scheduler does before it serves
    return gate, tasks


async def gate_rate(asked: Sequence[Request], endpoints: int) -> dict[str, float]:
    """Everybody may go at once; a task beside it notes how long the event loop did not come round."""
    pool = Pool(endpoints, len(asked))
    gate, tasks = await queued(pool, asked)
    longest_s = 0.0
    begin_s = last_s = time.perf_counter()
    gate.wake()
    while gate.flow:
        await asyncio.sleep(0.0)
        now_s = time.perf_counter()
        longest_s, last_s = max(longest_s, now_s - last_s), now_s
    await asyncio.gather(*tasks)
    spent_s = time.perf_counter() - begin_s
    check_order(pool.order, len(asked), "round_robin")
    return {"gate_dispatched_per_s": len(asked) / spent_s, "gate_longest_hold_of_the_loop_ms": 1e3 * longest_s}


async def gate_at_the_limit(asked: Sequence[Request], endpoints: int) -> dict[str, float]:
    """Requests end in bursts of up to 24; each burst makes room for as many and no more."""
    pool = Pool(endpoints, 1)
    gate, tasks = await queued(pool, asked)
    random = Random(SEED)
    begin_s = time.perf_counter()
    gate.wake()
    while gate.flow or pool.open:
        await asyncio.sleep(0.0)
        for _ in range(min(random.randint(0, 24), len(pool.open))):
            gate.finished(pool.finish_one(), DONE)
    await asyncio.gather(*tasks)
    check_order(pool.order, len(asked), "round_robin")
    return {
        "gate_at_the_limit_dispatched_per_s": len(asked) / (time.perf_counter() - begin_s),
        "gate_overshoot_requests": float(pool.most - pool.limit),
    }


async def idle_cpu(asked: Sequence[Request], endpoints: int, idle_s: float) -> dict[str, float]:
    pool = Pool(endpoints, 100)
    gate, tasks = await queued(pool, asked)
    pool.fill()
    looks = 0
    look = pool.look

    def counted(now_s: float) -> Candidates:
        nonlocal looks
        looks += 1
        return look(now_s)

    gate.dispatcher.look = counted
    begin_cpu_s = time.process_time()
    await asyncio.sleep(idle_s)
    spent_s = time.process_time() - begin_cpu_s
    gate.stop()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {"idle_queued_cpu_pct": 100.0 * spent_s / idle_s, "idle_decisions_per_s": looks / idle_s}


def main() -> None:
    import uvloop

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--requests", type=int, default=10_000)
    p.add_argument("--flows", type=int, default=64)
    p.add_argument("--endpoints", type=int, default=100)
    p.add_argument("--idle-s", type=float, default=2.0)
    p.add_argument("--json", metavar="OUT")
    args = p.parse_args()
    asked = requests(args.requests, args.flows)
    found: dict[str, float] = {}
    for fairness in ("strict", "round_robin", "program_aware"):
        found |= controller_rates(asked, fairness)
    found["dispatcher_dispatched_per_s"] = dispatcher_rate(asked, args.endpoints)
    found |= uvloop.run(gate_rate(asked, args.endpoints))
    found |= uvloop.run(gate_at_the_limit(asked, args.endpoints))
    found |= uvloop.run(idle_cpu(asked, args.endpoints, args.idle_s))
    table(found)
    if args.json:
        config = {"requests": args.requests, "flows": args.flows, "endpoints": args.endpoints}
        write_json(args.json, config, SEED, found)


if __name__ == "__main__":
    main()
