"""Latencies recorded from real servers by the reference's trainer, as rows of ours and as rows of the reference's."""

from __future__ import annotations

import json
import os
from collections import deque
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray

from llmd_sched.predict import features as f
from llmd_sched.predict.base import TargetName
from llmd_sched.types import Array, Sample

Record = dict[str, float]


def default_traces() -> list[Path]:
    """The recordings in ``LLMD_TRACES``, or in ``../shared/data`` next to the repository."""
    folder = Path(os.environ.get("LLMD_TRACES", Path(__file__).parents[2] / "shared" / "data"))
    return sorted(folder.glob("qwen3_32b_h200_*.jsonl"))


def read(path: Path) -> list[Record]:
    """ValueError naming file and line for what is no record."""
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            sample(record, 0)
        except (ValueError, TypeError, KeyError) as e:
            raise ValueError(f"{path}:{number}: not a recorded row: {type(e).__name__}: {e}") from None
        records.append(record)
    return records


def label(path: Path) -> str:
    """Short name of a trace in figures: what its file name ends in."""
    return path.stem.rpartition("_")[2]


def row(record: Record) -> NDArray[np.float64]:
    """Our feature row (F,). What the recording does not have is at its neutral value."""
    made = np.zeros(len(f.FEATURES))
    made[f.INPUT] = record["input_token_length"]
    made[f.PREFIX_MATCH] = record["prefix_cache_score"]
    made[f.UNCACHED] = (1.0 - record["prefix_cache_score"]) * record["input_token_length"]
    made[f.WAITING] = record["num_request_waiting"]
    made[f.RUNNING] = made[f.INFLIGHT_REQUESTS] = record["num_request_running"]
    made[f.KV_USAGE] = record["kv_cache_percentage"]
    made[f.INFLIGHT_PREFILL] = record["prefill_tokens_in_flight"]
    made[f.PRIORITY_CLASS] = 1.0
    return made


def sample(
    record: Record, number: int, predicted_ttft_ms: float = 0.0, predicted_tpot_ms: float = 0.0, version: int = 0
) -> Sample:
    """The record with what was predicted of it; a label of 0 was not observed. ``number`` serves as its time."""
    return Sample(
        row=tuple(row(record).tolist()),
        ttft_ms=record["actual_ttft_ms"] or None,
        tpot_ms=record["actual_tpot_ms"] or None,
        predicted_ttft_ms=predicted_ttft_ms,
        predicted_tpot_ms=predicted_tpot_ms,
        model_version=version,
        at_s=float(number),
    )


class ReferenceRecipe:
    """The reference's trainer on one target: its features, buckets and LightGBM settings, raw milliseconds.

    Left out, to its advantage: the tenth of all rows it holds out. Left out as well: the pair of models it switches
    between by whether anything waits, once all four parts have 200 rows.
    """

    BUCKET_ROWS = 500
    LEAST_ROWS = 20

    def __init__(self, target: TargetName) -> None:
        self._target = target
        self._buckets: dict[tuple[int, int, int], deque[Record]] = {}
        self._boosters: dict[str, lgb.Booster] = {}

    def add(self, record: Record) -> None:
        if record[f"actual_{self._target}_ms"]:
            queue = int(np.searchsorted([1, 3, 6, 11], record["num_request_waiting"], side="right"))
            kv = min(int(record["kv_cache_percentage"] * 20), 19)
            prefix = min(int(record["prefix_cache_score"] * 4), 3)
            self._buckets.setdefault((queue, kv, prefix), deque(maxlen=self.BUCKET_ROWS)).append(record)

    def fit(self) -> None:
        records = [record for bucket in self._buckets.values() for record in bucket]
        if len(records) < self.LEAST_ROWS:
            return
        X = self._features(records)
        y_ms = np.array([record[f"actual_{self._target}_ms"] for record in records])
        for name, objective in (
            ("mean", {"objective": "regression"}),
            ("p90", {"objective": "quantile", "alpha": 0.9}),
        ):
            settings: dict[str, Any] = {
                **objective,
                "max_depth": 6,
                "num_leaves": 31,
                "learning_rate": 0.05,
                "feature_fraction": 0.8,
                "min_data_in_leaf": 20,
                "lambda_l1": 0.1,
                "lambda_l2": 0.1,
                "force_col_wise": True,
                "seed": 42,
                "num_threads": 1,
                "verbosity": -1,
            }
            categorical = [9] if self._target == "ttft" else []
            data = lgb.Dataset(X, y_ms, categorical_feature=categorical, params={"verbosity": -1})
            self._boosters[name] = lgb.train(settings, data, 200)

    def predict(self, records: list[Record]) -> tuple[Array, Array]:
        """(mean, p90) in ms, each (n,); 10 ms before anything was learned, as its stub says."""
        if not self._boosters:
            return np.full(len(records), 10.0), np.full(len(records), 10.0)
        X = self._features(records)
        mean, p90 = (np.maximum(self._boosters[name].predict(X, num_threads=1), 0.0) for name in ("mean", "p90"))
        return np.asarray(mean), np.asarray(p90)

    def _features(self, records: list[Record]) -> NDArray[np.float64]:
        table = []
        for r in records:
            shared = [
                float(r["num_request_waiting"] > 0),
                *(r["kv_cache_percentage"], r["input_token_length"], r["num_request_waiting"]),
                *(r["num_request_running"], r["prefill_tokens_in_flight"], r["decode_tokens_in_flight"]),
            ]
            prefix = r["prefix_cache_score"]
            uncached = (1.0 - prefix) * r["input_token_length"]
            own = [prefix, uncached, min(int(prefix * 4), 3)] if self._target == "ttft" else [0.0]
            table.append(shared + own)
        return np.array(table)
