"""What a prediction costs.

    python -m benchmarks.bench_predict [--endpoints 10,100,1000] [--trees 150] [--leaves 31] [--json OUT]

Both targets of one decision for so many endpoints: the model as shipped (base and trees), its trees alone, and
LightGBM's ``Booster.predict`` of the same trees, interleaved on the same rows. What the serving process pays to take
over a new model, its first prediction included. CPU of fitting both targets, as shipped, to 20,000 samples and to the
window as shipped. All rows are made up.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, get_args

import lightgbm as lgb
import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.results import table, write_json
from llmd_sched.predict import features as f
from llmd_sched.predict.base import TargetName
from llmd_sched.predict.forest import parse
from llmd_sched.predict.inline import InlineTrainer
from llmd_sched.predict.model import Model
from llmd_sched.predict.window import Caps, Window
from llmd_sched.types import Sample

SEED = 7
TRAINING_ROWS = 8_000
FIT_SAMPLES = 20_000
WARM_UP_ROUNDS = 20  # they compile and fill caches

SCALE = {
    "input_tokens": 2e3,
    "waiting": 4.0,
    "running": 30.0,
    "metrics_age_s": 0.1,
    "inflight_requests": 30.0,
    "inflight_prefill_tokens": 2e4,
    "resident_tokens": 5e4,
    "expected_output_tokens": 300.0,
}
"""Of features drawn from half a bell; those of WHOLE are rounded. All others come from 0 .. 1."""
WHOLE = ("waiting", "running", "inflight_requests")
LEVELS = {"priority_class": 3, "lora": 3, "engine_class": 4}
OF_THE_REQUEST = ("input_tokens", "expected_output_tokens", "priority_class")
COLD_SHARE = 0.8
"""How many endpoints hold nothing of a prompt."""

Rows = NDArray[np.float64]


def made_up_rows(count: int, rng: np.random.Generator, *, one_request: bool = False) -> Rows:
    """(count, F) rows of no engine in particular, either each of a request of its own or all of the same."""
    X = np.empty((count, len(f.FEATURES)))
    for at, name in enumerate(f.FEATURES):
        draws = 1 if one_request and name in OF_THE_REQUEST else count
        if name in LEVELS:
            X[:, at] = rng.integers(0, LEVELS[name], draws)
        elif name in SCALE:
            X[:, at] = SCALE[name] * np.abs(rng.normal(size=draws))
        else:
            X[:, at] = rng.random(draws)
        if name in WHOLE:
            X[:, at] = X[:, at].round()
    X[rng.random(count) < COLD_SHARE, f.PREFIX_MATCH] = 0.0
    X[:, f.UNCACHED] = (1.0 - X[:, f.PREFIX_MATCH]) * X[:, f.INPUT]
    return X


def made_up_labels(X: Rows, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """TTFT and TPOT in ms of engines whose classes differ in speed and which stall when full, with 8 % noise."""
    slower = (1.0 + 0.5 * X[:, f.ENGINE_CLASS]) * np.where(X[:, f.KV_USAGE] > 0.8, 1.7, 1.0)
    noise = np.exp(0.08 * rng.normal(size=(2, len(X))))
    prefill_ms = 0.1 * X[:, f.UNCACHED] + 0.08 * X[:, f.INFLIGHT_PREFILL]
    ttft_ms = (40.0 + prefill_ms + 3.0 * X[:, f.WAITING] ** 1.3) * slower * noise[0]
    tpot_ms = (15.0 + 0.1 * X[:, f.RUNNING] + 1e-4 * X[:, f.RESIDENT]) * slower * noise[1]
    return ttft_ms, tpot_ms


def made_up_samples(count: int, seed: int) -> list[Sample]:
    """Both labels known, a second apart."""
    rng = np.random.default_rng(seed)
    X = made_up_rows(count, rng)
    labels = np.stack(made_up_labels(X, rng), axis=1).tolist()
    return [
        Sample(tuple(row), ttft_ms, tpot_ms, ttft_ms, tpot_ms, 0, float(i))
        for i, (row, (ttft_ms, tpot_ms)) in enumerate(zip(X.tolist(), labels, strict=True))
    ]


def trained(trees: int, leaves: int) -> tuple[Model, list[lgb.Booster]]:
    """A model with as many trees and leaves per target, and the boosters they come from."""
    rng = np.random.default_rng(SEED)
    X = made_up_rows(TRAINING_ROWS, rng)
    settings: dict[str, Any] = {"objective": "regression_l1", "num_leaves": leaves, "max_bin": 63}
    settings |= {"verbosity": -1, "num_threads": 1}
    boosters = [
        lgb.train(settings, lgb.Dataset(X, np.log(y_ms), categorical_feature=list(f.CATEGORICAL)), trees)
        for y_ms in made_up_labels(X, rng)
    ]
    cold = Model.cold()
    targets = {
        name: msgspec.structs.replace(cold.target(name), trees=parse(booster.model_to_string()))
        for name, booster in zip(get_args(TargetName), boosters, strict=True)
    }
    return msgspec.structs.replace(cold, version=1, **targets), boosters


def predict_figures(model: Model, boosters: list[lgb.Booster], endpoints: int) -> dict[str, float]:
    def booster_predict(rows: Rows) -> None:
        for booster in boosters:
            booster.predict(rows, raw_score=True, num_threads=1)

    contenders: dict[str, Callable[[Rows], object]] = {
        "": model.predict,
        "_trees_kernel": model.forest.predict,
        "_trees_booster": booster_predict,
    }
    spent_ms = interleaved(list(contenders.values()), endpoints, rounds=2000 if endpoints <= 100 else 300)
    prefix = f"predict_{endpoints}_endpoints"
    figures: dict[str, float] = {}
    for name, times in zip(contenders, spent_ms, strict=True):
        figures |= percentiles(f"{prefix}{name}_ms", times, (50, 99))
    _, kernel, theirs = spent_ms
    return {**figures, f"{prefix}_trees_booster_over_kernel_ratio": float(np.median(theirs) / np.median(kernel))}


def interleaved(contenders: list[Callable[[Rows], object]], endpoints: int, rounds: int) -> list[list[float]]:
    """Milliseconds per call of each contender, every round on another decision's rows.

    They take turns at coming first, because one finds the caches as the one before left them.
    """
    rng = np.random.default_rng(SEED)
    spent_ms: list[list[float]] = [[] for _ in contenders]
    for number in range(rounds + WARM_UP_ROUNDS):
        rows = made_up_rows(endpoints, rng, one_request=True)
        for turn in range(len(contenders)):
            which = (number + turn) % len(contenders)
            begin_s = time.perf_counter()
            contenders[which](rows)
            if number >= WARM_UP_ROUNDS:
                spent_ms[which].append(1e3 * (time.perf_counter() - begin_s))
    return spent_ms


def percentiles(name: str, values: list[float], which: tuple[int, ...]) -> dict[str, float]:
    return {f"{name}_p{p}": float(np.percentile(values, p)) for p in which}


def publish_figures(model: Model, rounds: int = 1000) -> dict[str, float]:
    """What the event loop stands still for when a model arrives: to read and check it, and to use it once."""
    blob, rows = model.to_bytes(), made_up_rows(100, np.random.default_rng(SEED), one_request=True)
    spent_ms = []
    for _ in range(rounds + WARM_UP_ROUNDS):
        begin_s = time.perf_counter()
        Model.from_bytes(blob).predict(rows)
        spent_ms.append(1e3 * (time.perf_counter() - begin_s))
    stall_ms = spent_ms[WARM_UP_ROUNDS:]
    return {
        **percentiles("publish_stall_ms", stall_ms, (50, 99)),
        "publish_stall_ms_max": max(stall_ms),
        "publish_model_kb": len(blob) / 1e3,
    }


def fit_figures() -> dict[str, float]:
    """CPU of one fit of both targets with the recipe as shipped."""
    samples = made_up_samples(FIT_SAMPLES, SEED)
    everything = Caps(FIT_SAMPLES, FIT_SAMPLES, FIT_SAMPLES)
    return {
        f"fit_{FIT_SAMPLES}_samples_cpu_s": fit_cpu_s(Window(everything), samples),
        "fit_full_window_cpu_s": fit_cpu_s(Window(), samples),
    }


def fit_cpu_s(window: Window, samples: list[Sample], rounds: int = 3) -> float:
    """The median of first fits, nothing known before."""
    for sample in samples:
        window.add(sample)
    spent_s = []
    for _ in range(rounds):
        trainer = InlineTrainer(window=window, first_samples=0)
        begin_s = time.process_time()
        trainer.tick(samples[-1].at_s)
        spent_s.append(time.process_time() - begin_s)
    return float(np.median(spent_s))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--endpoints", default="10,100,1000", help="counts, separated by commas")
    p.add_argument("--trees", type=int, default=150, help="per target")
    p.add_argument("--leaves", type=int, default=31, help="of each tree, at most 64")
    p.add_argument("--json", metavar="OUT")
    args = p.parse_args()
    counts = [int(text) for text in args.endpoints.split(",")]
    model, boosters = trained(args.trees, args.leaves)
    figures: dict[str, float] = {}
    for endpoints in counts:
        figures |= predict_figures(model, boosters, endpoints)
    figures |= {**publish_figures(model), **fit_figures()}
    table(figures)
    if args.json:
        write_json(args.json, {"endpoints": counts, "trees": args.trees, "leaves": args.leaves}, SEED, figures)


if __name__ == "__main__":
    main()
