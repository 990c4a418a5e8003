"""What a vLLM V1 server says of itself on /metrics, for one simulated engine: the same names, labels and buckets.

Rendered by hand: a scrape every 50 ms from several servers on one machine must cost next to nothing, and nearly all of
the text is the same each time. Times are in seconds as a client of the server would measure them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from llmd_sched.sim.engine import Engine
from llmd_sched.sim.kvcache import BLOCK_TOKENS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0,
    30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
ITERATION_TOKENS = (1.0, *(float(2**power) for power in range(3, 15)))

FINISHED_REASONS = ("stop", "length", "abort")


def one_two_five(limit: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 ... up to ``limit``: the buckets of token counts."""
    series = (float(mantissa * 10**power) for power in range(len(str(limit))) for mantissa in (1, 2, 5))
    return tuple(bound for bound in series if bound <= limit)


class Histogram:
    """Counts per bucket (upper bounds inclusive, one more for the rest) and the sum of what was observed."""

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.help_text = help_text
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        if times:
            self.counts[bisect_left(self.bounds, value)] += times
            self.total += value * times

    def lines(self, labels: str) -> Iterator[str]:
        yield f"# HELP {self.name} {self.help_text}"
        yield f"# TYPE {self.name} histogram"
        cumulative = list(accumulate(self.counts))
        for bound, seen in zip((*self.bounds, "+Inf"), cumulative, strict=True):
            yield f'{self.name}_bucket{{{labels},le="{bound}"}} {seen}'
        yield f"{self.name}_count{{{labels}}} {cumulative[-1]}"
        yield f"{self.name}_sum{{{labels}}} {self.total!r}"


class Exposition:
    """The metrics of one server: histograms it feeds, and the engine's gauges and counters read when scraped."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._labels = f'engine="0",model_name="{_escaped(model)}"'
        self.finished = dict.fromkeys(FINISHED_REASONS, 0)
        self.behind_s = 0.0
        """How late the host is with the step in flight, and in total what it could not make up for."""
        self.behind_total_s = 0.0
        counts = one_two_five(engine.config.longest_tokens)
        self.ttft_s = Histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", TTFT_S)
        self.inter_token_s = Histogram("vllm:inter_token_latency_seconds", "Token to token.", TOKEN_S)
        self.mean_token_s = Histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per token after the first, by request.", TOKEN_S
        )
        self.e2e_s = Histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", REQUEST_S)
        self.queue_s = Histogram("vllm:request_queue_time_seconds", "Time in WAITING.", REQUEST_S)
        self.inference_s = Histogram("vllm:request_inference_time_seconds", "Scheduled to last token.", REQUEST_S)
        self.prefill_s = Histogram("vllm:request_prefill_time_seconds", "Scheduled to first token.", REQUEST_S)
        self.decode_s = Histogram("vllm:request_decode_time_seconds", "First to last token.", REQUEST_S)
        self.prompt_tokens = Histogram("vllm:request_prompt_tokens", "Prompt tokens by request.", counts)
        self.generation_tokens = Histogram("vllm:request_generation_tokens", "Output tokens by request.", counts)
        self.iteration_tokens = Histogram("vllm:iteration_tokens_total", "Tokens per engine step.", ITERATION_TOKENS)

    def render(self) -> bytes:
        """The whole page in Prometheus text format 0.0.4."""
        lines = [*self._gauges(), *self._cache_config(), *self._counters()]
        for histogram in vars(self).values():
            if isinstance(histogram, Histogram):
                lines.extend(histogram.lines(self._labels))
        return ("\n".join(lines) + "\n").encode()

    def _gauges(self) -> Iterator[str]:
        engine = self._engine
        for name, help_text, value in (
            ("vllm:num_requests_running", "Requests in execution batches.", engine.running),
            ("vllm:num_requests_waiting", "Requests waiting to be scheduled.", engine.waiting),
            ("vllm:kv_cache_usage_perc", "Share of KV-cache blocks in use, 0 to 1.", engine.kv_usage),
            ("sim:behind_seconds", "How late the host is with the modelled schedule.", self.behind_s),
        ):
            yield from _family(name, help_text, "gauge")
            yield f"{name}{{{self._labels}}} {value!r}"

    def _cache_config(self) -> Iterator[str]:
        labels = {
            "block_size": BLOCK_TOKENS,
            "cache_dtype": "auto",
            "enable_prefix_caching": True,
            "engine": 0,
            "num_gpu_blocks": self._engine.config.preset.kv_blocks,
        }
        yield from _family("vllm:cache_config_info", "The KV cache's configuration, as labels.", "gauge")
        rendered = ",".join(f'{name}="{value}"' for name, value in labels.items())
        yield f"vllm:cache_config_info{{{rendered}}} 1"

    def _counters(self) -> Iterator[str]:
        counters = self._engine.counters
        for name, help_text, value in (
            ("vllm:prefix_cache_queries_total", "Prompt tokens looked up.", counters.prefix_queries_tokens),
            ("vllm:prefix_cache_hits_total", "Prompt tokens found cached.", counters.prefix_hits_tokens),
            ("vllm:prompt_tokens_total", "Prompt tokens processed.", counters.prompt_tokens),
            ("vllm:generation_tokens_total", "Tokens generated.", counters.generation_tokens),
            ("vllm:num_preemptions_total", "Preemptions.", counters.preemptions),
            ("sim:behind_seconds_total", "Time the host lost against the modelled schedule.", self.behind_total_s),
        ):
            yield from _family(name, help_text, "counter")
            yield f"{name}{{{self._labels}}} {value!r}"
        yield from _family("vllm:request_success_total", "Requests processed.", "counter")
        for reason, number in self.finished.items():
            yield f'vllm:request_success_total{{{self._labels},finished_reason="{reason}"}} {number}'


def _family(name: str, help_text: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {help_text}"
    yield f"# TYPE {name} {kind}"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
