"""Where each engine's metrics page says what: the literal table, and the two ways a page can say it.

An endpoint's engine is the value of its label ENGINE_LABEL (or the legacy one), vLLM without any, unless a
``core-metrics-extractor`` says otherwise (``sources.py``). A metric is written ``name`` or ``name{label=value,...}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

import msgspec

ENGINE_LABEL, LEGACY_ENGINE_LABEL = "llm-d.ai/engine-type", "inference.networking.k8s.io/engine-type"
DEFAULT_ENGINE = "vllm"

_SPEC = re.compile(r"\s*([a-zA-Z_:][a-zA-Z0-9_:]*)\s*(?:\{(.*)\})?\s*")
_CONDITION = re.compile(r'\s*([a-zA-Z_]\w*)\s*=\s*(?:"([^"]*)"|([^",{}]*?))\s*', re.ASCII)


class Series:
    """The samples of one family whose labels meet every condition."""

    __slots__ = ("_conditions", "line", "name", "starts")

    def __init__(self, spec: str) -> None:
        """Raises ValueError for what is no ``name{label=value,...}``."""
        parsed = _SPEC.fullmatch(spec)
        conditions = [_CONDITION.fullmatch(c) for c in parsed[2].split(",")] if parsed and parsed[2] else []
        if parsed is None or not all(conditions):
            raise ValueError(f"metric {spec!r}: expected name or name{{label=value,...}}")
        self.name = parsed[1].encode()
        self.line = b"\n" + self.name
        self.starts = (self.name + b"{", self.name + b" ")
        """How a sample of the family can start, so that no longer name is taken for it."""
        pairs = [(c[1], c[3] if c[2] is None else c[2]) for c in conditions if c]
        # Inside a value a quote is escaped, so what looks like the label there never matches.
        self._conditions = tuple(
            re.compile(rb"[{,]\s*%s=\"%s\"" % (label.encode(), re.escape(value.encode()))) for label, value in pairs
        )

    def wants(self, labels: bytes) -> bool:
        """``labels`` as on the page, in braces; empty for a sample without any."""
        return all(condition.search(labels) for condition in self._conditions)


class InfoLabel:
    """A whole number that is a label of an info line, whose own value says nothing."""

    __slots__ = ("digits", "series")

    def __init__(self, spec: str, label: str) -> None:
        self.series = Series(spec)
        self.digits = re.compile(rb'[{,]\s*%s="(\d+)"' % re.escape(label.encode()))


class Engine(msgspec.Struct, frozen=True):
    """None: the engine's page does not have it."""

    waiting: Series | None
    running: Series | None
    kv_usage: Series | None = None
    """Share of the KV cache in use, 0..1."""
    block_tokens: InfoLabel | Series | None = None
    cache_blocks: InfoLabel | Series | None = None
    lora: Series | None = None
    running_only_grows: bool = False
    """``running`` is a counter, so it is no sign of traffic unless it changes."""
    custom: tuple[tuple[str, Series], ...] = ()
    """Columns of the pool to fill beyond the usual ones, and from which series."""


ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        "vllm": Engine(
            waiting=Series("vllm:num_requests_waiting"),
            running=Series("vllm:num_requests_running"),
            kv_usage=Series("vllm:kv_cache_usage_perc"),
            block_tokens=InfoLabel("vllm:cache_config_info", "block_size"),
            cache_blocks=InfoLabel("vllm:cache_config_info", "num_gpu_blocks"),
            lora=Series("vllm:lora_requests_info"),
        ),
        "sglang": Engine(
            waiting=Series("sglang:num_queue_reqs"),
            running=Series("sglang:num_running_reqs"),
            kv_usage=Series("sglang:token_usage"),
            block_tokens=InfoLabel("sglang:cache_config_info", "page_size"),
            cache_blocks=InfoLabel("sglang:cache_config_info", "num_pages"),
        ),
        "trtllm-serve": Engine(
            waiting=Series("trtllm_num_requests_waiting"),
            running=Series("trtllm_num_requests_running"),
            kv_usage=Series("trtllm_kv_cache_utilization"),
            block_tokens=Series("trtllm_kv_cache_tokens_per_block"),
            cache_blocks=Series("trtllm_kv_cache_max_blocks"),
        ),
        "triton-tensorrt-llm": Engine(
            waiting=Series("nv_trt_llm_request_metrics{request_type=waiting}"),
            running=Series("nv_trt_llm_request_metrics{request_type=scheduled}"),
            kv_usage=Series("nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=fraction}"),
            block_tokens=Series("nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=tokens_per}"),
            cache_blocks=Series("nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=max}"),
        ),
        # The reference takes Triton's count of executions so far for those running, and so do we.
        "triton": Engine(
            waiting=Series("nv_inference_pending_request_count"),
            running=Series("nv_inference_exec_count"),
            running_only_grows=True,
        ),
    }
)


def engine_name(labels: Mapping[str, str], label: str = ENGINE_LABEL, default: str = DEFAULT_ENGINE) -> str:
    """What an endpoint's labels say, known or not. The legacy name stands in for the usual one only."""
    legacy = labels.get(LEGACY_ENGINE_LABEL) if label == ENGINE_LABEL else ""
    return labels.get(label) or legacy or default
