"""How good the predictions are on recorded latencies, ours beside the reference's recipe, in one run.

    python -m benchmarks.bench_accuracy [--trace FILE ...] [--protocol prequential|temporal|random ...] [--json OUT]

A trace is a file of recorded rows (JSON lines as the reference's trainer takes them); a row with one target 0 teaches
only the other. All of it goes through the window, gate and drift watch that serve.

prequential   refit every 100 rows, judged on the next 100; all rows after the first 300 count
temporal      fitted on the first 80 %, judged on the last 20 %
random        fitted on 90 %, judged on the other 10 %, five times

Coverage is the share of rows at most as long as the predicted 90 % quantile. ``coverage`` lets the calibrator learn
from each row once it was judged, as the scheduler does when a reply ends; ``frozen_coverage`` lets it learn only when
the model is refitted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from benchmarks import recorded
from benchmarks.recorded import Record, ReferenceRecipe
from benchmarks.results import table, write_json
from llmd_sched.predict.base import TargetName
from llmd_sched.predict.calibrate import Calibrator, group_of
from llmd_sched.predict.fit import DEFAULT
from llmd_sched.predict.inline import InlineTrainer
from llmd_sched.predict.model import Model
from llmd_sched.types import QUANTILES, Array, Sample

EVERY = 100
SKIPPED = 300
SEEDS = range(5)
P90 = QUANTILES.index(0.9)


class Judged(NamedTuple):
    """Rows of one target that were predicted before they were learned, (n,) each."""

    at: Array
    measured_ms: Array
    predicted_ms: Array
    p90_ms: Array
    frozen_p90_ms: Array
    reference_ms: Array
    reference_p90_ms: Array


class Ours:
    """The trainer and the calibrator as they serve, with the refits in the protocol's hands."""

    def __init__(self, preset: str = "default") -> None:
        self.trainer = InlineTrainer(Model.cold(preset), interval_s=0.0, first_samples=1, least_new=1)
        self.calibrator = Calibrator()
        self._next_fit_s = 0.0

    def refit(self) -> None:
        self._next_fit_s += 1.0
        model = self.trainer.tick(self._next_fit_s)
        if model is not None:
            self.calibrator.publish(model)

    def judge(self, records: list[Record], numbers: list[int]) -> dict[TargetName, NDArray[np.float64]]:
        """(rows, at | measured | predicted | p90 | frozen p90) by target; learns nothing but the calibration."""
        rows = np.array([recorded.row(record) for record in records])
        predicted = dict(zip(get_args(TargetName), self.trainer.model.predict(rows), strict=True))
        judged: dict[TargetName, list[tuple[float, ...]]] = {name: [] for name in get_args(TargetName)}
        frozen_ms = {
            name: point_ms * self.calibrator.factor(name, P90, rows, point_ms) for name, point_ms in predicted.items()
        }
        for i, record in enumerate(records):
            for name, lines in judged.items():
                if record[f"actual_{name}_ms"]:
                    point_ms = float(predicted[name][i])
                    p90_ms = point_ms * self.calibrator.factors(name, group_of(rows[i], point_ms))[P90]
                    lines.append((numbers[i], record[f"actual_{name}_ms"], point_ms, p90_ms, float(frozen_ms[name][i])))
            self.calibrator.learn(self._sample(record, numbers[i], predicted, i))
        return {name: np.array(lines).reshape(-1, 5) for name, lines in judged.items()}

    def learn(self, records: list[Record], numbers: list[int]) -> None:
        """Take in rows as the scheduler would have: with what it predicted of them."""
        rows = np.array([recorded.row(record) for record in records])
        predicted = dict(zip(get_args(TargetName), self.trainer.model.predict(rows), strict=True))
        for i, record in enumerate(records):
            self.trainer.add(self._sample(record, numbers[i], predicted, i))

    def _sample(self, record: Record, number: int, predicted: dict[TargetName, Array], i: int) -> Sample:
        ttft_ms, tpot_ms = float(predicted["ttft"][i]), float(predicted["tpot"][i])
        return recorded.sample(record, number, ttft_ms, tpot_ms, self.trainer.model.version)


def prequential(records: list[Record]) -> Iterator[tuple[list[int], list[int]]]:
    """(rows to learn, rows to judge then), in turn."""
    for begin in range(0, len(records), EVERY):
        numbers = list(range(begin, min(begin + EVERY, len(records))))
        yield list(range(max(0, begin - EVERY), begin)), numbers


def temporal(records: list[Record]) -> Iterator[tuple[list[int], list[int]]]:
    cut = int(0.8 * len(records))
    yield list(range(cut)), list(range(cut, len(records)))


def replay(
    records: list[Record], steps: Iterator[tuple[list[int], list[int]]], skipped: int
) -> dict[TargetName, Judged]:
    """Learn, refit, judge; rows before ``skipped`` are judged and not counted."""
    ours = Ours()
    references = {name: ReferenceRecipe(name) for name in get_args(TargetName)}
    judged: dict[TargetName, list[NDArray[np.float64]]] = {name: [] for name in references}
    for learned, numbers in steps:
        if learned:
            ours.learn([records[i] for i in learned], learned)
            ours.refit()
        for reference in references.values():
            for i in learned:
                reference.add(records[i])
            if learned and numbers[-1] >= skipped:
                reference.fit()
        block = [records[i] for i in numbers]
        for name, lines in ours.judge(block, numbers).items():
            own = [record for record in block if record[f"actual_{name}_ms"]]
            judged[name].append(np.column_stack([lines, *references[name].predict(own)]))
    return {name: _judged(np.concatenate(blocks), skipped) for name, blocks in judged.items()}


def _judged(lines: NDArray[np.float64], skipped: int) -> Judged:
    return Judged(*lines[lines[:, 0] >= skipped].T)


def random_splits(records: list[Record]) -> dict[TargetName, Judged]:
    """All five tenths together."""
    parts = []
    for seed in SEEDS:
        order = np.random.default_rng(seed).permutation(len(records))
        held_out, learned = sorted(order[: len(order) // 10].tolist()), sorted(order[len(order) // 10 :].tolist())
        parts.append(replay(records, iter([(learned, held_out)]), 0))
    return {name: Judged(*np.hstack([np.array(part[name]) for part in parts])) for name in get_args(TargetName)}


PROTOCOLS: dict[str, Callable[[list[Record]], dict[TargetName, Judged]]] = {
    "prequential": lambda records: replay(records, prequential(records), SKIPPED),
    "temporal": lambda records: replay(records, temporal(records), 0),
    "random": random_splits,
}


def mape_pct(predicted_ms: Array, measured_ms: Array) -> float:
    return float(100.0 * np.mean(np.abs(predicted_ms - measured_ms) / measured_ms))


def coverage_pct(limit_ms: Array, measured_ms: Array) -> float:
    return float(100.0 * np.mean(measured_ms <= limit_ms))


def figures_of(judged: Judged, suffix: str, target: TargetName) -> dict[str, float]:
    y_ms = judged.measured_ms
    return {
        f"{target}_mape_{suffix}_pct": mape_pct(judged.predicted_ms, y_ms),
        f"{target}_p90_coverage_{suffix}_pct": coverage_pct(judged.p90_ms, y_ms),
        f"{target}_p90_frozen_coverage_{suffix}_pct": coverage_pct(judged.frozen_p90_ms, y_ms),
        f"reference_{target}_mape_{suffix}_pct": mape_pct(judged.reference_ms, y_ms),
        f"reference_{target}_p90_coverage_{suffix}_pct": coverage_pct(judged.reference_p90_ms, y_ms),
    }


def plot(path: Path, all_judged: dict[str, Judged]) -> None:
    """One panel per trace, protocol and target: the running error of both, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(all_judged), 1, figsize=(9, 2.4 * len(all_judged)), squeeze=False)
    for axis, (title, judged) in zip(axes[:, 0], all_judged.items(), strict=True):
        order = np.argsort(judged.at, kind="stable")
        for name, predicted in (("ours", judged.predicted_ms), ("reference recipe", judged.reference_ms)):
            error = 100.0 * (np.abs(predicted - judged.measured_ms) / judged.measured_ms)[order]
            width = min(50, len(error))
            axis.plot(judged.at[order][width - 1 :], np.convolve(error, np.ones(width) / width, "valid"), label=name)
        axis.set(title=title, ylabel="mean error, %", yscale="log")
        axis.legend(loc="upper right")
    axes[-1, 0].set_xlabel("row of the recording (running mean over 50 rows of the target)")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, action="append", help="recorded rows; may be given several times")
    parser.add_argument("--protocol", choices=list(PROTOCOLS), action="append", help="may be given several times")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the running error")
    options = parser.parse_args()
    traces, protocols = options.trace or recorded.default_traces(), options.protocol or list(PROTOCOLS)
    if not traces:
        sys.exit("no recorded traces are at hand; name them with --trace FILE")
    figures: dict[str, float] = {}
    all_judged: dict[str, Judged] = {}
    for path in traces:
        try:
            records = recorded.read(path)
        except (OSError, ValueError) as e:
            sys.exit(f"cannot read the trace: {e}")
        for protocol in protocols:
            print(f"{recorded.label(path)}, {protocol} ...", file=sys.stderr)
            for target, judged in PROTOCOLS[protocol](records).items():
                figures |= figures_of(judged, f"{protocol}_{recorded.label(path)}", target)
                all_judged[f"{recorded.label(path)}, {protocol}, {target.upper()}"] = judged
    table(figures)
    if options.plot:
        plot(options.plot, all_judged)
    if options.json:
        write_json(options.json, asdict(DEFAULT), 0, figures)


if __name__ == "__main__":
    main()
