"""What KV events and lookups among what they told cost.

    python -m benchmarks.bench_kv_events [--endpoints 100] [--blocks 6000] [--rounds 30] [--json OUT]

Every endpoint holds a prompt of so many blocks, each a little less of it than all, among 10,000 blocks of its own.
Events are vLLM's array layout, decoded and applied in process: batches of one step of a decode (8 requests fill a
block, 8 blocks are evicted) and of a prefill (one event of 256 blocks); then the steps once more over a ZMQ connection
on loopback, sent by another process. A lookup is timed in the index alone and as the producer does it, from token ids
to columns. A figure is the median over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import count
from random import Random
from typing import Any

import msgspec
import numpy as np

from benchmarks.results import table, write_json
from llmd_sched.config import convert
from llmd_sched.prefix.blocks import Algorithm
from llmd_sched.prefix.precise import PrecisePrefixCache, PrecisePrefixCacheProducer, Publisher
from llmd_sched.prefix.subscriber import Subscribers
from llmd_sched.types import Candidates, Endpoint, Request

SEED = 7
BLOCK_TOKENS = 16
OWN_BLOCKS = 10_000
STEP_BLOCKS = 8
PREFILL_BLOCKS = 256
VOCABULARY = 150_000
TOPIC = b"kv@pod@m"
MEASURED_STEPS = 5_000
SENT_STEPS = 20_000


def opened(
    endpoints: list[Endpoint], algorithm: Algorithm = Algorithm.CBOR_FNV, **events: object
) -> PrecisePrefixCache:
    given = {"tokenProcessorConfig": {"hashAlgorithm": algorithm.value}, "kvEventsConfig": events}
    cache = convert(given, PrecisePrefixCacheProducer).open("precise")
    cache.endpoints_changed(endpoints)
    return cache


def stored(rng: np.random.Generator, names: Iterator[int], parent: int | None, blocks: int) -> list[object]:
    tokens = rng.integers(0, VOCABULARY, blocks * BLOCK_TOKENS).tolist()
    hashes = [next(names) for _ in range(blocks)]
    return ["BlockStored", hashes, parent, tokens, BLOCK_TOKENS, None, "GPU", None, None, 0, "full_attention"]


def prompt_events(tokens: list[int], blocks: int) -> bytes:
    hashes = list(range(1, blocks + 1))
    event = ["BlockStored", hashes, None, tokens[: blocks * BLOCK_TOKENS], BLOCK_TOKENS, None, "GPU"]
    return msgspec.msgpack.encode([0.0, [event], 0])


def steps(rng: np.random.Generator, number: int) -> list[bytes]:
    """Batches of a decode step each; what is evicted was stored 100 steps before."""
    names = count(1 << 40)
    made, live = [], []
    for _ in range(number):
        fresh = [stored(rng, names, None, 1) for _ in range(STEP_BLOCKS)]
        live.append([event[1][0] for event in fresh])  # type: ignore[index]
        evicted = [["BlockRemoved", live[-100], "GPU", 0]] if len(live) > 100 else []
        made.append(msgspec.msgpack.encode([0.0, fresh + evicted, 0]))
    return made


def applied_per_s(cache: PrecisePrefixCache, endpoint: Endpoint, batches: list[bytes]) -> float:
    """Batches decoded and applied in a second."""
    publisher = Publisher(endpoint.server)
    begin_s = time.perf_counter()
    for number, payload in enumerate(batches):
        cache.announce(publisher, TOPIC, number)
        cache.receive(publisher, number, payload)
    return len(batches) / (time.perf_counter() - begin_s)


def event_figures(rounds: int) -> dict[str, float]:
    rng = np.random.default_rng(SEED)
    endpoint = Endpoint("one", "10.0.0.1", 8000)
    decode, names = steps(rng, MEASURED_STEPS), count(1)
    prefill = [msgspec.msgpack.encode([0.0, [stored(rng, names, None, PREFILL_BLOCKS)], 0]) for _ in range(200)]
    decode_per_s, prefill_per_s = [], []
    for _ in range(max(3, rounds // 10)):
        decode_per_s.append(applied_per_s(opened([endpoint]), endpoint, decode))
        prefill_per_s.append(applied_per_s(opened([endpoint]), endpoint, prefill))
    return {
        "kv_decode_batches_applied_per_s": statistics.median(decode_per_s),
        "kv_decode_events_applied_per_s": (STEP_BLOCKS + 1) * statistics.median(decode_per_s),
        "kv_prefill_blocks_applied_per_s": PREFILL_BLOCKS * statistics.median(prefill_per_s),
    }


def filled(endpoints: list[Endpoint], tokens: list[int], blocks: int) -> PrecisePrefixCache:
    """The cache where each endpoint holds part of the prompt."""
    cache, random = opened(endpoints), Random(SEED)
    rng = np.random.default_rng(SEED)
    for endpoint in endpoints:
        publisher = Publisher(endpoint.server)
        own = msgspec.msgpack.encode([0.0, [stored(rng, count(1 << 40), None, OWN_BLOCKS)], 0])
        shared = prompt_events(tokens, random.randint(blocks // 2, blocks))
        for number, payload in enumerate((own, shared)):
            cache.announce(publisher, TOPIC, number)
            cache.receive(publisher, number, payload)
    return cache


def held_block_bytes(endpoints: list[Endpoint], tokens: list[int], blocks: int) -> float:
    """Memory for each block an endpoint holds."""
    tracemalloc.start()
    cache = filled(endpoints, tokens, blocks)
    used_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return used_bytes / cache.feed.counts.stored


def median_ms(rounds: int, call: Callable[[], object]) -> float:
    spent_ms = []
    for _ in range(rounds):
        begin_s = time.perf_counter()
        call()
        spent_ms.append(1e3 * (time.perf_counter() - begin_s))
    return statistics.median(spent_ms)


def lookup_figures(endpoint_count: int, blocks: int, rounds: int) -> dict[str, float]:
    endpoints = [Endpoint(f"e{i}", f"10.0.{i // 250}.{i % 250 + 1}", 8000) for i in range(endpoint_count)]
    tokens = np.random.default_rng(SEED + 1).integers(0, VOCABULARY, blocks * BLOCK_TOKENS).astype("<u4")
    cache = filled(endpoints, tokens.tolist(), blocks)
    chain = cache.keys.chain(tokens, cache.keys.root("m"))
    view = Candidates(endpoints, {})
    warm = Request(id="bench", target_model="m", prompts=(tokens.tobytes(),))
    cold = Request(id="bench", target_model="other", prompts=(tokens.tobytes(),))
    found = {
        "kv_lookup_ms_p50": median_ms(rounds, lambda: cache.index.match(chain, endpoint_count)),
        "kv_produce_cbor_fnv_ms_p50": median_ms(rounds, lambda: cache.produce(warm, view, 0.0)),
        "kv_produce_cold_ms_p50": median_ms(rounds, lambda: cache.produce(cold, view, 0.0)),
        "kv_held_block_bytes": held_block_bytes(endpoints[:10], tokens.tolist(), blocks),
    }
    xxh64 = opened(endpoints, Algorithm.XXH64)
    found["kv_hash_xxh64_ms_p50"] = median_ms(rounds, lambda: xxh64.keys.chain(tokens, 1))
    found["kv_hash_cbor_fnv_ms_p50"] = median_ms(rounds, lambda: cache.keys.chain(tokens, 1))
    for endpoint in range(0, endpoint_count, 3):
        cache.index.add(endpoint, "cpu", chain)
    return found | {"kv_lookup_two_tiers_ms_p50": median_ms(rounds, lambda: cache.index.match(chain, endpoint_count))}


def send(pipe: Any) -> None:
    """In a process of its own: tell the port, wait for the word, send everything."""
    import zmq

    batches = steps(np.random.default_rng(SEED), SENT_STEPS)
    with zmq.Context() as context, context.socket(zmq.PUB) as socket:
        socket.set(zmq.SNDHWM, 0)
        pipe.send(socket.bind_to_random_port("tcp://127.0.0.1"))
        number = 0
        while not pipe.poll(0.02):  # until it is heard
            socket.send_multipart([TOPIC, number.to_bytes(8, "big"), msgspec.msgpack.encode([0.0, [], 0])])
            number += 1
        for payload in batches:
            socket.send_multipart([TOPIC, number.to_bytes(8, "big"), payload])
            number += 1
        pipe.recv()


async def socket_figures() -> dict[str, float]:
    """Batches received and applied in a second of our own CPU time; the sender is faster than we are."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    sender = multiprocessing.get_context("spawn").Process(target=send, args=(there,))
    sender.start()
    endpoint = Endpoint("one", "127.0.0.1", 8000)
    cache = opened([endpoint], podDiscoveryConfig={"socketPort": await asyncio.to_thread(here.recv)})
    subscribers = Subscribers(cache)
    subscribers.follow([endpoint])
    counts = cache.feed.counts
    try:
        async with asyncio.timeout(120):
            while not counts.batches:
                await asyncio.sleep(0.01)
            here.send("go")
            first, begin_s, begin_cpu_s = counts.batches, time.perf_counter(), time.process_time()
            while counts.batches + counts.missed_batches < first + SENT_STEPS:
                await asyncio.sleep(0.01)
        taken = counts.batches - first
        cpu_s, wall_s = time.process_time() - begin_cpu_s, time.perf_counter() - begin_s
    finally:
        here.send("end")
        await subscribers.stop()
        sender.join(10)
    return {
        "kv_socket_batches_per_s": taken / wall_s,
        "kv_socket_cpu_us_per_batch": 1e6 * cpu_s / taken,
        "kv_socket_missed_batches_pct": 100 * counts.missed_batches / SENT_STEPS,
    }


def main() -> None:
    import uvloop

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--endpoints", type=int, default=100)
    p.add_argument("--blocks", type=int, default=6000, help="of the prompt that is looked up")
    p.add_argument("--rounds", type=int, default=30)
    p.add_argument("--json", metavar="OUT")
    args = p.parse_args()
    found = event_figures(args.rounds) | lookup_figures(args.endpoints, args.blocks, args.rounds)
    found |= uvloop.run(socket_figures())
    table(found)
    if args.json:
        config = {"endpoints": args.endpoints, "blocks": args.blocks, "rounds": args.rounds}
        write_json(args.json, config, SEED, found)


if __name__ == "__main__":
    main()
