"""Small builders the tests share: requests, endpoints, candidates with columns, pools, and a vLLM metrics page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from random import Random

import msgspec
import numpy as np
from hypothesis import HealthCheck, settings

from llmd_sched.catalog import build_router, resolve
from llmd_sched.config import load
from llmd_sched.pool.pool import Load, Pool
from llmd_sched.router import Router
from llmd_sched.types import Candidates, Decision, End, Endpoint, Outcome, Prediction, Request

PREFIX = "approx-prefix-cache-producer"
INFLIGHT = "inflight-load-producer"
LATENCY = "predicted-latency-producer"

COLUMNS = {
    "match": f"prefix_match_blocks/{PREFIX}",
    "total": f"prefix_total_blocks/{PREFIX}",
    "block": f"prefix_block_tokens/{PREFIX}",
    "pressure": f"prefix_pressure/{PREFIX}",
    "inflight_requests": f"inflight_requests/{INFLIGHT}",
    "inflight_tokens": f"inflight_tokens/{INFLIGHT}",
    "inflight_prefill_tokens": f"inflight_prefill_tokens/{INFLIGHT}",
    "admission_wait_ms": f"admission_wait_ms/{INFLIGHT}",
    "resident_tokens": f"resident_tokens/{INFLIGHT}",
    "generated_tokens": f"generated_tokens/{INFLIGHT}",
    "prefilling_requests": f"prefilling_requests/{INFLIGHT}",
    "uncached_tokens": f"uncached_tokens/{INFLIGHT}",
    "ttft_ms": f"ttft_ms/{LATENCY}",
    "tpot_ms": f"tpot_ms/{LATENCY}",
    "ttft_headroom_ms": f"ttft_headroom_ms/{LATENCY}",
    "tpot_headroom_ms": f"tpot_headroom_ms/{LATENCY}",
    "dispatched": f"dispatched/{LATENCY}",
    "expected_output_tokens": f"expected_output_tokens/{LATENCY}",
    "prefill_ms": f"prefill_ms/{LATENCY}",
    "copy_ms": f"copy_ms/{LATENCY}",
    "slowdown_ms": f"slowdown_ms/{LATENCY}",
    "smooth_tpot_ms": f"smooth_tpot_ms/{LATENCY}",
    "slo_losses": f"slo_losses/{LATENCY}",
}
"""Short names of the columns the default producers make."""

SCRAPED = ("waiting", "running", "kv_usage", "block_tokens", "cache_blocks", "metrics_age_s")

CONFIG_HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"

HARVEST = """
plugins:
- type: batch-headroom-producer
  parameters: {mode: harvest, kvTokens: 100000}
- type: batch-headroom-filter
- type: random-picker
"""
"""Any endpoint, as far as batch and interactive requests may go there."""

fuzzed = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
"""Seeded and without a wall clock, so a run is the same everywhere."""


def endpoint(number: int = 0, **fields: object) -> Endpoint:
    made = {"name": f"e{number}", "address": f"10.0.{number // 250}.{number % 250 + 1}", "port": 8000}
    return Endpoint(**{**made, **fields})


def endpoints(count: int) -> list[Endpoint]:
    return [endpoint(i) for i in range(count)]


def request(**fields: object) -> Request:
    return Request(**{"id": "r", "model": "m", "target_model": "m", **fields})


def prompt(blocks: int, seed: int = 0, block_tokens: int = 64) -> bytes:
    """Bytes of exactly so many blocks, different for each seed."""
    return Random(seed).randbytes(4 * block_tokens * blocks)


def asking(text: bytes, **fields: object) -> Request:
    """A request for this prompt, its tokens counted as the parser does."""
    return request(prompts=(text,), input_tokens=-(-len(text) // 4), **fields)


def candidates(count: int | None = None, **columns: Sequence[float]) -> Candidates:
    """Candidates with these columns, by the short names of COLUMNS; scraped ones are 0 unless given."""
    n = count if count is not None else len(next(iter(columns.values())))
    made = {name: np.zeros(n) for name in SCRAPED}
    made |= {COLUMNS.get(name, name): np.array(values, dtype=np.float64) for name, values in columns.items()}
    return Candidates(endpoints(n), made)


def labelled(*labels: Mapping[str, str], **columns: Sequence[float]) -> Candidates:
    """Candidates with these labels, one mapping each."""
    plain = candidates(len(labels), **columns)
    return Candidates([endpoint(i, labels=one) for i, one in enumerate(labels)], plain.columns)


def predicted(
    ttft_headroom_ms: Sequence[float], tpot_headroom_ms: Sequence[float], dispatched: Sequence[float] | None = None
) -> Candidates:
    """Candidates with predictions; all of them busy unless ``dispatched`` says otherwise."""
    return candidates(
        ttft_headroom_ms=ttft_headroom_ms,
        tpot_headroom_ms=tpot_headroom_ms,
        dispatched=[1.0] * len(ttft_headroom_ms) if dispatched is None else dispatched,
    )


def full_candidates(count: int, seed: int = 0) -> Candidates:
    """Every column there is, with plausible random values."""
    rng = np.random.default_rng(seed)
    high = {"waiting": 20, "running": 64, "kv_usage": 1, "block_tokens": 1, "cache_blocks": 5000, "metrics_age_s": 2}
    columns = {name: rng.uniform(0, high[name], count) for name in SCRAPED}
    columns |= {long: rng.uniform(0, 400, count) for long in COLUMNS.values()}
    columns[COLUMNS["total"]] = np.full(count, 400.0)
    columns[COLUMNS["block"]] = np.full(count, 64.0)
    columns[COLUMNS["match"]] = np.floor(columns[COLUMNS["match"]])
    for name in ("ttft_headroom_ms", "tpot_headroom_ms"):
        columns[COLUMNS[name]] -= 200.0
    columns[COLUMNS["dispatched"]] = np.floor(columns[COLUMNS["dispatched"]] / 100)
    return Candidates(endpoints(count), columns)


def pool_of(members: Iterable[Endpoint], loads: Mapping[str, Load] | None = None, now_s: float = 0.0) -> Pool:
    """A pool whose members were all read at ``now_s``; those without a load given were idle."""
    pool = Pool()
    pool.apply(members)
    for one in pool.endpoints:
        pool.record(one, (loads or {}).get(one.name, Load(0.0, 0.0, 0.0)), now_s)
    return pool


def router_of(text: str, pool: Pool, seed: int = 0) -> Router:
    """The router of a configuration without its head."""
    return build_router(resolve(load(CONFIG_HEAD + text), allow_experimental=True), pool, Random(seed))


def decision(ticket: str, asked: Request, picked: Endpoint, prediction: Prediction | None = None) -> Decision:
    return Decision(ticket=ticket, request=asked, picked=(picked,), scores={}, prediction=prediction, at_s=0.0)


def streamed(**fields: object) -> Outcome:
    """A complete streamed reply of 11 tokens: TTFT 100 ms, TPOT 20 ms."""
    made = {"end": End.FINISHED, "status": 200, "ttft_ms": 100.0, "e2e_ms": 300.0, "output_tokens": 11}
    return Outcome(**{**made, "streamed": True, **fields})


def as_builtins(value: object) -> object:
    """As YAML would hold it: no tuples."""
    return msgspec.json.decode(msgspec.json.encode(value))


def vllm_page(
    waiting: Sequence[str] = ("6.0",),
    running: Sequence[str] = ("3.0",),
    kv_usage: Sequence[str] = ("0.25",),
    blocks: str = "1024",
    before: int = 60,
    between: int = 5,
    after: int = 380,
    model: str = "tiny",
) -> bytes:
    """A page shaped like vLLM's, one value per engine: about 50 KB with the gauges near the start, cache facts last.

    ``before``, ``between`` and ``after`` are lines of other families around the gauges.
    """
    lines = _other("python_gc_objects", before)
    lines += _gauge("vllm:num_requests_running", "Requests in the batch.", running, model)
    lines += _gauge("vllm:num_requests_waiting", "Requests in the queue.", waiting, model)
    reasons = [f',reason="{reason}"' for reason in ("capacity", "deferred")]
    lines += [
        "# HELP vllm:num_requests_waiting_by_reason Requests in the queue, by reason.",
        "# TYPE vllm:num_requests_waiting_by_reason gauge",
        *(f'vllm:num_requests_waiting_by_reason{{engine="0",model_name="{model}"{r}}} 1000.0' for r in reasons),
    ]
    lines += _other("vllm:engine_state", between)
    lines += _gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use.", kv_usage, model)
    lines += _other("vllm:request_latency_seconds_bucket", after)
    lines += [
        "# HELP vllm:cache_config_info What the cache is made of.",
        "# TYPE vllm:cache_config_info gauge",
        f"vllm:cache_config_info{{{_cache_labels(blocks)}}} 1.0",
    ]
    lines += _other("vllm:request_tokens_bucket", 40)
    return ("\n".join(lines) + "\n").encode()


def _gauge(name: str, text: str, values: Sequence[str], model: str) -> list[str]:
    samples = [f'{name}{{engine="{i}",model_name="{model}"}} {value}' for i, value in enumerate(values)]
    return [f"# HELP {name} {text}", f"# TYPE {name} gauge", *samples] if samples else []


def _other(name: str, count: int) -> list[str]:
    return [
        f'{name}{{engine="0",le="{i / 8}",model_name="tiny",quantile="{i % 7}",role="any"}} {i * 3}.0'
        for i in range(count)
    ]


def _cache_labels(blocks: str) -> str:
    labels = {f"{letter}_option_of_the_cache": "None" for letter in "acdefhijklmopqrstuvwxyz"}
    labels |= {"_block_size_resolved": "True", "mamba_block_size": "7", "user_specified_block_size": "True"}
    labels |= {"block_size": "128", "num_cpu_blocks": "9", "num_gpu_blocks": blocks, "num_gpu_blocks_override": "None"}
    return ",".join(f'{name}="{value}"' for name, value in sorted(labels.items()))
