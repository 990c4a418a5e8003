"""What a prediction costs and how good it is: `python -m benchmarks.bench_predict [--data DIR] [--json OUT]`.

Latency of one decision's prediction (both targets) for 10 and 100 endpoints, our kernel against LightGBM's own
``Booster.predict``, interleaved in one run; CPU of a fit on 5,000 rows; and, where the recorded traces are, the error
on them: prequential (refit every 100 rows, judged on the next 100) and temporal (first 80 %, judged on the rest).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import lightgbm as lgb
import msgspec
import numpy as np
from numpy.typing import NDArray

from llmd_sched.predict import features as f
from llmd_sched.predict.base import COLD_START, TargetName
from llmd_sched.predict.fit import DEFAULT, fit
from llmd_sched.predict.forest import parse
from llmd_sched.predict.model import Model, Target
from llmd_sched.predict.window import Window
from llmd_sched.types import Array, Sample

TRACES = ("sharegpt", "bimodal")
SEED = 7


def default_data_dir() -> Path:
    """``LLMD_TRACES``, or ``../shared/data`` next to the repository."""
    return Path(os.environ.get("LLMD_TRACES", Path(__file__).parents[2] / "shared" / "data"))


def trace_path(data: Path, trace: str) -> Path:
    return data / f"qwen3_32b_h200_{trace}.jsonl"


def read_trace(path: Path) -> list[Sample]:
    """The recorded rows as samples in recorded order; a label of 0 was not observed."""
    return [_sample(number, json.loads(line)) for number, line in enumerate(path.read_text().splitlines())]


def _sample(number: int, recorded: dict[str, float]) -> Sample:
    row = [0.0] * len(f.FEATURES)
    row[f.INPUT] = recorded["input_token_length"]
    row[f.UNCACHED] = (1.0 - recorded["prefix_cache_score"]) * recorded["input_token_length"]
    row[f.WAITING] = recorded["num_request_waiting"]
    row[f.RUNNING] = row[f.INFLIGHT_REQUESTS] = recorded["num_request_running"]
    row[f.KV_USAGE] = recorded["kv_cache_percentage"]
    row[f.INFLIGHT_PREFILL] = recorded["prefill_tokens_in_flight"]
    return Sample(
        row=tuple(row),
        ttft_ms=recorded["actual_ttft_ms"] or None,
        tpot_ms=recorded["actual_tpot_ms"] or None,
        predicted_ttft_ms=0.0,
        predicted_tpot_ms=0.0,
        model_version=0,
        at_s=float(number),
    )


def one_target(samples: list[Sample], target: TargetName) -> tuple[list[Sample], NDArray[np.float64], Array]:
    """The samples with a label of the target, their rows (n, F) and labels (n,)."""
    labelled = [sample for sample in samples if getattr(sample, f"{target}_ms") is not None]
    return (
        labelled,
        np.array([sample.row for sample in labelled]),
        np.array([getattr(sample, f"{target}_ms") for sample in labelled]),
    )


def predict(model: Model, X: NDArray[np.float64], target: TargetName) -> Array:
    ttft_ms, tpot_ms = model.predict(X)
    return ttft_ms if target == "ttft" else tpot_ms


def mape_pct(predicted: Array, measured: Array) -> float:
    return float(100.0 * np.mean(np.abs(predicted - measured) / measured))


def prequential_mape_pct(samples: list[Sample], target: TargetName, every: int = 100, preset: str = "default") -> float:
    """Refit every ``every`` rows through window and gate, each time judged on the rows that follow."""
    labelled, X, y_ms = one_target(samples, target)
    window, model = Window(), Model.cold(preset)
    predicted = np.zeros(len(y_ms))
    for begin in range(0, len(labelled), every):
        block = slice(begin, begin + every)
        predicted[block] = predict(model, X[block], target)
        for sample in labelled[block]:
            window.add(sample)
        model = fit(window, model, model.version + 1, now_s=float(begin)) or model
    return mape_pct(predicted[every:], y_ms[every:])


def temporal_mape_pct(samples: list[Sample], target: TargetName, preset: str = "default") -> float:
    """Fitted once on the first 80 % of the rows, judged on the last 20 %."""
    labelled, X, y_ms = one_target(samples, target)
    cut = int(0.8 * len(labelled))
    window = Window()
    for sample in labelled[:cut]:
        window.add(sample)
    model = fit(window, Model.cold(preset), version=1, now_s=0.0) or Model.cold(preset)
    return mape_pct(predict(model, X[cut:], target), y_ms[cut:])


def synthetic_samples(count: int, seed: int) -> list[Sample]:
    """Rows of a made-up engine with 8 % noise, both labels known."""
    rng = np.random.default_rng(seed)
    X = np.abs(rng.normal(size=(count, len(f.FEATURES)))) * [1e3, 2e3, 4, 30, 0.4, 1, 30, 2e4, 5e4, 300]
    noise = np.exp(0.08 * rng.normal(size=(2, count)))
    ttft_ms = (40.0 + 0.1 * X[:, f.UNCACHED] + 0.08 * X[:, f.INFLIGHT_PREFILL] + 3.0 * X[:, f.WAITING] ** 1.3) * noise[
        0
    ]
    tpot_ms = (15.0 + 0.1 * X[:, f.RUNNING] + 1e-4 * X[:, f.RESIDENT]) * noise[1]
    return [
        Sample(tuple(X[i].tolist()), float(ttft_ms[i]), float(tpot_ms[i]), 0.0, 0.0, 0, float(i)) for i in range(count)
    ]


def accuracy_figures(data: Path) -> dict[str, float]:
    figures = {}
    for trace in TRACES:
        path = trace_path(data, trace)
        if not path.exists():
            continue
        samples = read_trace(path)
        for target in get_args(TargetName):
            figures[f"{target}_mape_prequential_{trace}_pct"] = prequential_mape_pct(samples, target)
            figures[f"{target}_mape_temporal_{trace}_pct"] = temporal_mape_pct(samples, target)
    return figures


def fit_figures() -> dict[str, float]:
    """CPU of one refit of both targets on a full window."""
    window = Window(cap=5000, cap_per_stratum=5000)
    for sample in synthetic_samples(5000, SEED):
        window.add(sample)
    spent_ms = []
    for _ in range(5):
        begin_s = time.process_time()
        fit(window, None, version=1, now_s=0.0)
        spent_ms.append(1e3 * (time.process_time() - begin_s))
    return {"fit_5000_rows_cpu_ms": float(np.median(spent_ms))}


def latency_figures(rounds: int = 1000) -> dict[str, float]:
    """Wall time of one prediction, with as many trees as the recipe grows at most."""
    window_rows = np.array([sample.row for sample in synthetic_samples(3000, SEED)])
    boosters = [_booster(window_rows, target) for target in get_args(TargetName)]
    start = COLD_START["default"]
    ttft, tpot = (
        Target(np.array(coefficients), parse(booster.model_to_string()))
        for coefficients, booster in zip((start.ttft, start.tpot), boosters, strict=True)
    )
    model = Model(version=1, ttft=ttft, tpot=tpot)
    figures: dict[str, float] = {}
    for endpoints in (10, 100):
        ours, kernel, theirs = _interleaved(
            [
                model.predict,
                model.forest.predict,
                lambda rows: [booster.predict(rows, raw_score=True, num_threads=1) for booster in boosters],
            ],
            window_rows,
            endpoints,
            rounds,
        )
        prefix = f"predict_{endpoints}_endpoints"
        figures |= {
            f"{prefix}_ms_p50": float(np.percentile(ours, 50)),
            f"{prefix}_ms_p99": float(np.percentile(ours, 99)),
            f"{prefix}_trees_kernel_ms_p50": float(np.percentile(kernel, 50)),
            f"{prefix}_trees_booster_ms_p50": float(np.percentile(theirs, 50)),
            f"{prefix}_trees_booster_over_kernel_ratio": float(np.median(theirs) / np.median(kernel)),
        }
    return figures


def _booster(rows: NDArray[np.float64], target: TargetName) -> lgb.Booster:
    y = np.log1p(rows[:, f.UNCACHED] + rows[:, f.INFLIGHT_PREFILL] + 50.0 * rows[:, f.RUNNING])
    settings = {"objective": "regression_l1", "num_leaves": DEFAULT.leaves, "verbosity": -1, "num_threads": 1}
    return lgb.train(settings, lgb.Dataset(rows, y if target == "ttft" else 0.3 * y), DEFAULT.trees)


def _interleaved(
    contenders: list[Callable[[NDArray[np.float64]], object]],
    rows: NDArray[np.float64],
    endpoints: int,
    rounds: int,
) -> list[list[float]]:
    """Milliseconds per call of each contender, every round on fresh rows and all contenders on the same."""
    rng = np.random.default_rng(SEED)
    spent_ms: list[list[float]] = [[] for _ in contenders]
    for number in range(rounds + 20):
        batch = rows[rng.integers(0, len(rows), endpoints)]
        for times, contender in zip(spent_ms, contenders, strict=True):
            begin_s = time.perf_counter()
            contender(batch)
            if number >= 20:  # the first rounds compile and fill caches
                times.append(1e3 * (time.perf_counter() - begin_s))
    return spent_ms


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, default=default_data_dir(), help="folder of the recorded traces")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    figures = {**latency_figures(), **fit_figures(), **accuracy_figures(options.data)}
    for name, value in figures.items():
        print(f"{name:60s} {value:10.3f}")
    if options.json:
        result = {
            "commit": _commit(),
            "config": {field: getattr(DEFAULT, field) for field in DEFAULT.__dataclass_fields__},
            "seed": SEED,
            "host": f"{platform.machine()}, {os.cpu_count()} cores",
            "figures": figures,
        }
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result)))


if __name__ == "__main__":
    main()
