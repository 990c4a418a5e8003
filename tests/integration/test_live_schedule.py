"""The live server and the virtual engine: the same arrivals, the same steps, one by one.

The server plans in engine time, so its steps can be compared exactly however late the host's timers are. Nothing is
asserted about the wall clock; the overhead before a request may be scheduled is long enough for a slow host.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import aiohttp
import pytest

from llmd_sched.sim import realtime
from llmd_sched.sim.engine import Engine, EngineConfig, Policy, Refusal, SimRequest, Step
from llmd_sched.sim.server import ServerConfig, SimServer
from llmd_sched.sim.steptime import Preset

SPEEDUP = 4.0
PRESET = Preset(
    model="m",
    step_base_s=0.08,
    prefill_token_s=0.001,
    attention_pair_s=1e-6,
    sequence_s=0.01,
    decode_context_token_s=1e-5,
    request_overhead_s=2.0,
    kv_blocks=20,
    max_num_batched_tokens=64,
    max_num_seqs=6,
)
REQUESTS = 24
BOUND_S = 60.0


class Recorder:
    """What a server's engine was asked, in order, and the steps it made of that."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[SimRequest] = []
        self.steps: list[Step] = []
        self._submit: Callable[[SimRequest], Refusal | None] = engine.submit
        self._step: Callable[[float], Step | None] = engine.step
        monkeypatch.setattr(engine, "submit", self.submit)
        monkeypatch.setattr(engine, "step", self.step)

    def submit(self, request: SimRequest) -> Refusal | None:
        self.requests.append(request)
        return self._submit(request)

    def step(self, now_s: float) -> Step | None:
        step = self._step(now_s)
        if step is not None:
            self.steps.append(step)
        return step


def virtual(config: EngineConfig, requests: list[SimRequest]) -> list[Step]:
    """The steps of the same requests without a clock."""
    machine, steps = Engine(config, random.Random(0)), []
    for request in requests:
        assert machine.submit(request) is None
    now_s = machine.next_ready_s
    while now_s is not None:
        step = machine.step(now_s)
        if step is not None:
            steps.append(step)
        now_s = step.end_s if step is not None else machine.next_ready_s
    return steps


def bodies() -> list[dict[str, object]]:
    """Of 4 to 120 tokens, half of them with a shared start; small enough a cache that decodes preempt each other."""
    rng = random.Random(3)
    made: list[dict[str, object]] = []
    for number in range(REQUESTS):
        shared = "s" * 128 if number % 2 else ""
        own = f"{number:4d}" * rng.randint(1, 88)
        made.append(
            {
                "prompt": shared + own,
                "max_tokens": rng.randint(1, 30),
                "ignore_eos": True,
                "priority": rng.randint(0, 2),
                "stream": number % 3 == 0,
            }
        )
    return made


async def served(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Post all bodies to a real server, at times of its clock that nobody controls, and let them finish."""
    server = SimServer(ServerConfig(engine=config, port=0, model="m", speedup=SPEEDUP))
    recorder = Recorder(server.engine, monkeypatch)
    port = await server.start()
    gaps = random.Random(5)

    async def ask(session: aiohttp.ClientSession, body: dict[str, object]) -> None:
        async with session.post("/v1/completions", json=body) as reply:
            assert reply.status == 200
            await reply.read()

    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session, asyncio.TaskGroup() as group:
            for body in bodies():
                group.create_task(ask(session, body))
                await asyncio.sleep(gaps.expovariate(30.0))
    finally:
        await server.close()
    return recorder


@pytest.mark.parametrize(("policy", "noise_sigma"), [(Policy.FCFS, 0.0), (Policy.PRIORITY, 0.05)])
async def test_the_live_server_makes_the_schedule_of_the_virtual_engine(
    policy: Policy, noise_sigma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A host this late would move the live schedule, as it should, and then there is nothing to compare.
    monkeypatch.setattr(realtime, "MAX_BEHIND_S", BOUND_S)
    config = EngineConfig(preset=PRESET, policy=policy, noise_sigma=noise_sigma)
    async with asyncio.timeout(BOUND_S):
        live = await served(config, monkeypatch)
    expected = virtual(config, live.requests)
    for kind in ("admitted", "first", "finished", "preempted", "tokens"):
        assert [getattr(step, kind) for step in live.steps] == [getattr(step, kind) for step in expected], kind
    assert live.steps == expected
    # And there was something to compare: hits, preemptions, steps of several requests.
    admitted = [pair for step in live.steps for pair in step.admitted]
    assert len(admitted) == REQUESTS
    assert any(cached_tokens for _, cached_tokens in admitted)
    assert any(step.preempted for step in live.steps)
    assert max(len(step.tokens) for step in live.steps) > 1
