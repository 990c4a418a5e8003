"""Measures prefill and decode steps on a GPU and fits the step-time coefficients of ``llmd_sched.sim.steptime``.

    python -m benchmarks.calibrate_gpu [--repeats 20] [--json OUT]

The model has the shapes of Qwen3-8B and random weights: how long a step takes depends on shapes alone. Needs PyTorch
with CUDA and 40 GB of GPU memory. Each cell of the sweep is captured as a CUDA graph, as servers do, and replayed; its
time is the median. What it leaves out: sampling, the scheduler, and everything before the first layer.

The fit is by non-negative least squares on relative errors, so a decode of 8 ms counts as much as a prefill of 800 ms.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from benchmarks.results import table, write_json

WARM_UPS = 3


class Shape(NamedTuple):
    """A decoder's shapes: what decides how long a step takes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int

    @property
    def weights(self) -> int:
        """Of the layers; embeddings are not part of a step here."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.feed_forward)

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * 2

    @property
    def attention_flops_per_pair(self) -> int:
        """A multiply and an add for the score, and for the weighted sum."""
        return 4 * self.layers * self.heads * self.head_dim


QWEN3_8B = Shape(layers=36, hidden=4096, heads=32, kv_heads=8, head_dim=128, feed_forward=12_288)


class Cell(NamedTuple):
    """One step to measure: a prompt chunk that finds ``context_tokens`` computed, or sequences that decode at them."""

    prefill_tokens: int
    decodes: int
    context_tokens: int

    @property
    def terms(self) -> tuple[float, float, float, float, float]:
        """1, P, Σ p(ctx + p/2), N, Σ ctx: the terms of the step-time formula."""
        chunk = self.prefill_tokens
        if chunk:
            return 1.0, float(chunk), chunk * (self.context_tokens + chunk / 2), 1.0, 0.0
        return 1.0, 0.0, 0.0, float(self.decodes), float(self.decodes * self.context_tokens)

    @property
    def kv_tokens(self) -> int:
        return self.prefill_tokens + max(self.decodes, 1) * self.context_tokens


COEFFICIENTS = (
    "step_base_s",
    "prefill_token_s",
    "attention_pair_s",
    "sequence_s",
    "decode_context_token_s",
)
"""Fields of ``Preset``, in the order of ``Cell.terms``."""

CHUNKS = (64, 256, 1024, 2048, 4096, 8192)
CHUNK_CONTEXTS = (0, 8192, 32_768)
BATCHES = (1, 8, 32, 64, 128, 256)
DECODE_CONTEXTS = (128, 512, 2048, 8192)
KV_TOKENS_MAX = 131_072
"""In one cell: 18 GiB of the model's KV cache."""


def sweep() -> list[Cell]:
    """Prefill chunks over contexts, decode batches over contexts; those that need more KV than fits are left out."""
    prefills = [Cell(chunk, 0, context) for chunk in CHUNKS for context in CHUNK_CONTEXTS]
    decodes = [Cell(0, batch, context) for batch in BATCHES for context in DECODE_CONTEXTS]
    return [cell for cell in prefills + decodes if cell.kv_tokens <= KV_TOKENS_MAX]


class Fit(NamedTuple):
    """``coefficients`` (5,) in seconds, none negative; ``errors`` (n,): fitted over measured, less 1."""

    coefficients: NDArray[np.float64]
    errors: NDArray[np.float64]


def fit(cells: Sequence[Cell], times_s: Sequence[float]) -> Fit:
    """Coefficients that meet the times with the least squared relative error.

    ValueError when a time is not positive or the cells do not tell the five terms apart.
    """
    measured_s = np.asarray(times_s, dtype=np.float64)
    if len(cells) != len(measured_s) or not (measured_s > 0).all():
        raise ValueError(f"{len(cells)} cells need as many positive times, not {list(times_s)}")
    terms = np.array([cell.terms for cell in cells])
    relative = terms / measured_s[:, None]
    scale = np.linalg.norm(relative, axis=0)  # the terms differ by ten orders of magnitude
    if not scale.all() or np.linalg.matrix_rank(relative / scale) < len(COEFFICIENTS):
        raise ValueError("the cells do not tell the five terms apart: vary chunk, batch and both contexts")
    scaled, _ = nnls(relative / scale, np.ones(len(measured_s)))
    coefficients = scaled / scale
    return Fit(coefficients, terms @ coefficients / measured_s - 1.0)


def figures(fitted: Fit) -> dict[str, float]:
    """What is reported: coefficients in seconds, and how well they meet the times."""
    errors_pct = 100 * np.abs(fitted.errors)
    made = dict(zip(COEFFICIENTS, fitted.coefficients.tolist(), strict=True))
    return {**made, "mean_error_pct": float(errors_pct.mean()), "max_error_pct": float(errors_pct.max())}


class RandomModel:
    """Layers with random weights on the GPU; ``step_of`` makes one step of a cell as a callable."""

    def __init__(self, torch: Any, shape: Shape) -> None:
        self._torch = torch
        self._shape = shape
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self._layers = [
            {
                "qkv": self._random(queries + 2 * keys, shape.hidden),
                "out": self._random(shape.hidden, queries),
                "gate_up": self._random(2 * shape.feed_forward, shape.hidden),
                "down": self._random(shape.hidden, shape.feed_forward),
            }
            for _ in range(shape.layers)
        ]
        self._norm = self._random(shape.hidden)

    def _random(self, *size: int) -> Any:
        return self._torch.randn(*size, device="cuda", dtype=self._torch.bfloat16) * 0.02

    def step_of(self, cell: Cell) -> Callable[[], Any]:
        tokens = cell.prefill_tokens or cell.decodes
        hidden = self._random(tokens, self._shape.hidden)
        attend = self._chunk_attention(cell) if cell.prefill_tokens else self._decode_attention(cell)

        def step() -> Any:
            out = hidden
            for number, layer in enumerate(self._layers):
                out = self._layer(layer, out, partial(attend, number))
            return out

        return step

    def _layer(self, weights: dict[str, Any], hidden: Any, attend: Callable[[Any], Any]) -> Any:
        f, shape = self._torch.nn.functional, self._shape
        qkv = f.linear(f.rms_norm(hidden, (shape.hidden,), self._norm), weights["qkv"])
        hidden = hidden + f.linear(attend(qkv[:, : shape.heads * shape.head_dim]), weights["out"])
        gate, up = f.linear(f.rms_norm(hidden, (shape.hidden,), self._norm), weights["gate_up"]).chunk(2, dim=-1)
        return hidden + f.linear(f.silu(gate) * up, weights["down"])

    def _chunk_attention(self, cell: Cell) -> Callable[[int, Any], Any]:
        # Keys and values as wide as the queries: all backends take that, and a chunk is bound by compute, not by them.
        shape, f = self._shape, self._torch.nn.functional
        chunk, total = cell.prefill_tokens, cell.context_tokens + cell.prefill_tokens
        keys, values = (self._random(1, shape.heads, total, shape.head_dim) for _ in range(2))
        mask = importlib.import_module("torch.nn.attention.bias").causal_lower_right(chunk, total)

        def attend(_: int, q: Any) -> Any:
            q = q.reshape(1, chunk, shape.heads, shape.head_dim).transpose(1, 2)
            mixed = f.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            return mixed.transpose(1, 2).reshape(chunk, -1)

        return attend

    def _decode_attention(self, cell: Cell) -> Callable[[int, Any], Any]:
        # One query per sequence: those that share a key head stand in for positions, so each key is read once. Every
        # layer has a cache of its own, or the second would find it in L2.
        shape, f = self._shape, self._torch.nn.functional
        size = cell.decodes, shape.kv_heads, cell.context_tokens, shape.head_dim
        caches = [(self._random(*size), self._random(*size)) for _ in range(shape.layers)]

        def attend(layer: int, q: Any) -> Any:
            q = q.reshape(cell.decodes, shape.kv_heads, -1, shape.head_dim)
            return f.scaled_dot_product_attention(q, *caches[layer]).reshape(cell.decodes, -1)

        return attend


def time_s(torch: Any, step: Callable[[], Any], repeats: int) -> float:
    """Median of the step's replays as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants a warm-up outside the default stream
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times_ms: list[float] = []
    for _ in range(WARM_UPS + repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_ms.append(begin.elapsed_time(end))
    return statistics.median(times_ms[WARM_UPS:]) / 1e3


def measure(torch: Any, cells: Sequence[Cell], repeats: int) -> list[float]:
    """Seconds per cell, printed as they come."""
    times_s = []
    with torch.inference_mode():
        model = RandomModel(torch, QWEN3_8B)
        for cell in cells:
            times_s.append(time_s(torch, model.step_of(cell), repeats))
            torch.cuda.empty_cache()
            print(f"{cell}: {1e3 * times_s[-1]:.3f} ms", flush=True)
    return times_s


def cuda() -> Any:
    """PyTorch with a GPU; RuntimeError says what is missing."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise RuntimeError(
            "calibrate_gpu needs PyTorch with CUDA: pip install torch, on a machine with a GPU"
        ) from None
    if not torch.cuda.is_available():
        raise RuntimeError("calibrate_gpu needs a CUDA GPU, and PyTorch finds none")
    return torch


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.calibrate_gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=20, help="replays per cell (default: 20)")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args(arguments)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {args.repeats}")
    try:
        torch = cuda()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    cells = sweep()
    found = figures(fit(cells, measure(torch, cells, args.repeats)))
    table(found)
    if args.json:
        config = {"shape": QWEN3_8B._asdict(), "repeats": args.repeats, "gpu": torch.cuda.get_device_name()}
        write_json(args.json, config, 0, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
