"""What one decision costs: with a trainer beside it, idle or at work, and for very long prompts.

    python -m benchmarks.bench_choose [--endpoints 100] [--rounds 12] [--json OUT]

``Router.choose`` as ``configs/predicted-latency.yaml`` builds it, on an event loop that serves a real trainer's pipes
between the calls. Prompts of 4,000 tokens, some of which share their head; every endpoint has requests in flight whose
first tokens and ends come as they would. In blocks of a second, in turn: the trainer gets no samples and is idle; it
gets every sample and fits as often as it may. Only ``choose`` is timed. A figure is the median over the blocks of one
condition, a ratio that over neighbouring blocks, so that a burst of noise from elsewhere on the machine counts once.

Then the default configuration with prompts of 100,000 tokens, half of which share a head with others, on full caches:
each decision is timed from ``choose`` to ``finish``, hashing included, or (``hashed``) after the prompt was looked up
once, as for a request that waited. Hashing alone is timed between the decisions.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from benchmarks.bench_predict import made_up_labels
from benchmarks.results import table, write_json
from llmd_sched import catalog, config
from llmd_sched.pool.pool import Load, Pool
from llmd_sched.predict.producer import CLASS_LABELS, PredictedLatency
from llmd_sched.predict.trainer import Settings, TrainerProcess
from llmd_sched.prefix.approx import MIN_BLOCK_TOKENS, ApproxPrefixCache
from llmd_sched.prefix.hashing import block_hashes
from llmd_sched.router import Router
from llmd_sched.stack import cpu_s
from llmd_sched.types import Decision, End, Endpoint, Outcome, Request, Sample

CONFIG = Path(__file__).parents[1] / "configs" / "predicted-latency.yaml"
SEED = 7
BLOCK_S = 1.0
WARM_UP_CALLS = 4_000  # fills the prefix index, so that it evicts, and the trainer's window
OPEN_PER_ENDPOINT = 8
SCRAPE_EVERY_S = 0.05
PROMPT_TOKENS = 4_000
SHARED_HEADS = 16
SHARED_SHARE = 0.3
CLASSES = ("A100", "H100", "H200", "L40S")
CACHE_BLOCKS, BLOCK_TOKENS = 8_000.0, 16.0
LONG_PROMPT_BYTES = 400_000
LONG_CACHE_BLOCKS = 32_000.0  # of 16 tokens: five such prompts
LONG_WARM_UP_CALLS, LONG_CALLS = 1_500, 1_000


class Traffic:
    """Requests without end, one ``step`` each, and what becomes of them."""

    def __init__(self, router: Router, seed: int) -> None:
        self.router = router
        self._random, self._rng = Random(seed), np.random.default_rng(seed)
        half_bytes = 2 * PROMPT_TOKENS  # four bytes are a token
        self._heads = [self._random.randbytes(half_bytes // 2).hex().encode() for _ in range(SHARED_HEADS)]
        self._text = self._random.randbytes(half_bytes).hex().encode()
        self._open: deque[Decision] = deque()
        self._count = 0
        self._scrape_due_s = 0.0

    def step(self) -> float:
        """Decide on one request; returns the milliseconds it took."""
        now_s = time.monotonic()
        if now_s >= self._scrape_due_s:
            self._scrape(now_s)
        request = self._request()
        begin_s = time.perf_counter()
        decision = self.router.choose(request, None, now_s)
        spent_ms = 1e3 * (time.perf_counter() - begin_s)
        self.router.assume_first_token(decision)
        self._open.append(decision)
        if len(self._open) > OPEN_PER_ENDPOINT * len(self.router.pool):
            self._finish(self._open.popleft())
        return spent_ms

    def _request(self) -> Request:
        self._count += 1
        own = b"%016x" % self._count
        shares = self._random.random() < SHARED_SHARE
        prompt = self._random.choice(self._heads) + own if shares else own
        prompt += self._text[len(prompt) :]
        return Request(
            id="bench", model="m", target_model="m", prompts=(prompt,), input_tokens=len(prompt) // 4, streaming=True
        )

    def _finish(self, decision: Decision) -> None:
        assert decision.prediction is not None
        ttft_ms, tpot_ms = (float(y[0]) for y in made_up_labels(np.array([decision.prediction.row]), self._rng))
        tokens = self._random.randint(50, 400)
        outcome = Outcome(
            end=End.FINISHED,
            status=200,
            ttft_ms=ttft_ms,
            e2e_ms=ttft_ms + tpot_ms * (tokens - 1),
            output_tokens=tokens,
            streamed=True,
        )
        self.router.finish(decision.ticket, outcome, time.monotonic())

    def _scrape(self, now_s: float) -> None:
        self._scrape_due_s = now_s + SCRAPE_EVERY_S
        pool = self.router.pool
        running = self._rng.poisson(OPEN_PER_ENDPOINT, len(pool)).tolist()
        for endpoint, count in zip(pool.endpoints, running, strict=True):
            load = Load(
                float(max(0, count - 10)),
                float(count),
                min(1.0, count / (1.5 * OPEN_PER_ENDPOINT)),
                BLOCK_TOKENS,
                CACHE_BLOCKS,
            )
            pool.record(endpoint, load, now_s)


class Block(NamedTuple):
    """What was measured in a second or so."""

    spent_ms: list[float]
    trainer_cores: float


class Bench:
    """The router, its traffic and its trainer."""

    def __init__(self, endpoints: int) -> None:
        resolved = catalog.resolve(config.load(CONFIG.read_text(encoding="utf-8")))
        pool = Pool()
        self.router = catalog.build_router(resolved, pool, Random(SEED))
        pool.apply(
            Endpoint(
                f"e{i}", f"10.0.{i // 250}.{i % 250 + 1}", 8000, labels={CLASS_LABELS[0]: CLASSES[i % len(CLASSES)]}
            )
            for i in range(endpoints)
        )
        self.producer = next(p for p in self.router.producers if isinstance(p, PredictedLatency))
        self.producer.timer = time.perf_counter
        self.producer.warm_up()
        self.traffic = Traffic(self.router, SEED)
        self.trainer = TrainerProcess(
            self.producer.model,
            on_model=self.producer.publish,
            settings=Settings(interval_s=0.0),  # as often as the trainer lets itself
            classes=lambda: self.producer.classes.names,
        )
        self._recent: deque[Sample] = deque(maxlen=1000)

    async def warm_up(self) -> None:
        await self.trainer.start()
        self.producer.on_sample = self.trainer.add
        for _ in range(WARM_UP_CALLS):
            self.traffic.step()
            await asyncio.sleep(0.0)
        await until(lambda: self.producer.model.version > 0, 30.0)
        gc.collect()
        gc.freeze()  # as the scheduler does before it serves

    async def idle_block(self) -> Block:
        self.producer.on_sample = self._recent.append
        for _ in range(20):  # until what it was still sent is fitted, and the rest it takes after a fit is over
            before_s = cpu_s(self._pid)
            await asyncio.sleep(2.0)
            if cpu_s(self._pid) - before_s < 0.02:
                break
        return await self._block()

    async def training_block(self) -> Block:
        self.producer.on_sample = self.trainer.add
        while self._recent:
            self.trainer.add(self._recent.popleft())
        fits = self.trainer.counts.fits
        await until(lambda: self.trainer.counts.fits > fits, 30.0)
        return await self._block()

    async def _block(self) -> Block:
        spent_ms = []
        begin_s, begin_cpu_s = time.monotonic(), cpu_s(self._pid)
        while time.monotonic() < begin_s + BLOCK_S:
            spent_ms.append(self.traffic.step())
            await asyncio.sleep(0.0)
        return Block(spent_ms, (cpu_s(self._pid) - begin_cpu_s) / (time.monotonic() - begin_s))

    @property
    def _pid(self) -> int:
        assert self.trainer.pid is not None
        return self.trainer.pid


class LongPrompts:
    """Decisions of the default configuration on prompts of 100,000 tokens."""

    def __init__(self, endpoints: int) -> None:
        self.pool = Pool()
        self.router = catalog.build_router(catalog.resolve(config.load(config.DEFAULT_CONFIG)), self.pool, Random(SEED))
        self.pool.apply(Endpoint(f"e{i}", f"10.0.{i // 250}.{i % 250 + 1}", 8000) for i in range(endpoints))
        self.prefix = next(p for p in self.router.producers if isinstance(p, ApproxPrefixCache))
        self._random = Random(SEED)
        self._heads = [self._random.randbytes(LONG_PROMPT_BYTES // 2) for _ in range(SHARED_HEADS)]
        self._text = self._random.randbytes(LONG_PROMPT_BYTES)
        self._count = 0

    def figures(self) -> dict[str, float]:
        for _ in range(LONG_WARM_UP_CALLS):
            self._decide(self._request())
        spent_ms: dict[str, list[float]] = {"choose_finish_100k": [], "choose_finish_100k_hashed": [], "hash_100k": []}
        cpu_ms = []
        for _ in range(LONG_CALLS):
            spent_ms["choose_finish_100k"].append(self._decide(self._request()))
            request = self._request()
            self.prefix.produce(request, self.pool.candidates(None, float(self._count)), float(self._count))
            begin_cpu_s = time.process_time()
            spent_ms["choose_finish_100k_hashed"].append(self._decide(request))
            cpu_ms.append(1e3 * (time.process_time() - begin_cpu_s))
            spent_ms["hash_100k"].append(self._hash(request))
        found = {f"{n}_ms_p{q}": float(np.percentile(ms, q)) for n, ms in spent_ms.items() for q in (50, 99)}
        return found | {"choose_finish_100k_hashed_cpu_ms": statistics.mean(cpu_ms)}

    def _decide(self, request: Request) -> float:
        """Milliseconds of one decision and its end."""
        now_s = float(self._count)
        begin_s = time.perf_counter()
        decision = self.router.choose(request, None, now_s)
        self.router.finish(decision.ticket, Outcome(end=End.FINISHED, status=200), now_s)
        return 1e3 * (time.perf_counter() - begin_s)

    def _hash(self, request: Request) -> float:
        begin_s = time.perf_counter()
        block_hashes(request.prompts[0], request.target_model, MIN_BLOCK_TOKENS, LONG_PROMPT_BYTES)
        return 1e3 * (time.perf_counter() - begin_s)

    def _request(self) -> Request:
        """The next one; the pool has been read since the last."""
        self._count += 1
        self._scrape(float(self._count))
        shares = self._random.random() < 0.5
        prompt = (self._random.choice(self._heads) if shares else b"") + b"%016x" % self._count
        prompt += self._text[len(prompt) :]
        return Request(id="bench", model="m", target_model="m", prompts=(prompt,), input_tokens=len(prompt) // 4)

    def _scrape(self, now_s: float) -> None:
        for endpoint in self.pool.endpoints:
            waiting, usage = float(self._random.randint(0, 5)), self._random.random()
            self.pool.record(endpoint, Load(waiting, 8.0, usage, BLOCK_TOKENS, LONG_CACHE_BLOCKS), now_s)


async def until(condition: Callable[[], bool], timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


async def run(endpoints: int, rounds: int) -> dict[str, float]:
    bench = Bench(endpoints)
    idle, training = [], []
    try:
        await bench.warm_up()
        for done in range(rounds):
            idle.append(await bench.idle_block())
            training.append(await bench.training_block())
            sys.stderr.write(f"\r{done + 1}/{rounds} rounds" + ("\n" if done + 1 == rounds else ""))
    finally:
        await bench.trainer.stop()
    return figures(f"choose_{endpoints}_endpoints", idle, training)


def figures(prefix: str, idle: list[Block], training: list[Block]) -> dict[str, float]:
    found: dict[str, float] = {}
    for percent in (50, 99):
        quiet, busy = (
            np.array([np.percentile(block.spent_ms, percent) for block in blocks]) for blocks in (idle, training)
        )
        found |= {
            f"{prefix}_idle_ms_p{percent}": float(np.median(quiet)),
            f"{prefix}_training_ms_p{percent}": float(np.median(busy)),
            f"{prefix}_training_over_idle_p{percent}_ratio": float(np.median(busy / quiet)),
        }
    for name, blocks in (("idle", idle), ("training", training)):
        found[f"trainer_{name}_cores"] = statistics.median(block.trainer_cores for block in blocks)
    return found


def main() -> None:
    import uvloop

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--endpoints", type=int, default=100)
    p.add_argument("--rounds", type=int, default=12, help="blocks of a second in each condition")
    p.add_argument("--json", metavar="OUT")
    args = p.parse_args()
    found = LongPrompts(args.endpoints).figures() | uvloop.run(run(args.endpoints, args.rounds))
    table(found)
    if args.json:
        write_json(args.json, {"endpoints": args.endpoints, "rounds": args.rounds}, SEED, found)


if __name__ == "__main__":
    main()
