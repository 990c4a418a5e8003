"""The recipe on rows recorded from Qwen3-32B on an H200; skipped where the recordings are not at hand."""

from typing import get_args

import pytest

from benchmarks.bench_predict import (
    TRACES,
    default_data_dir,
    prequential_mape_pct,
    read_trace,
    temporal_mape_pct,
    trace_path,
)
from llmd_sched.predict.base import TargetName
from llmd_sched.types import Sample


def recorded(trace: str) -> list[Sample]:
    path = trace_path(default_data_dir(), trace)
    if not path.exists():
        pytest.skip(f"no recording at {path}")
    return read_trace(path)


@pytest.mark.parametrize(
    ("trace", "target", "prequential_pct", "temporal_pct"),
    [
        ("sharegpt", "ttft", 14.0, 13.0),
        ("sharegpt", "tpot", 4.5, 4.0),
        ("bimodal", "ttft", 12.5, 3.0),
        ("bimodal", "tpot", 8.5, 8.0),
    ],
)
def test_the_error_on_recorded_rows_stays_below_its_bound(
    trace: str, target: TargetName, prequential_pct: float, temporal_pct: float
) -> None:
    samples = recorded(trace)
    assert prequential_mape_pct(samples, target) < prequential_pct
    assert temporal_mape_pct(samples, target) < temporal_pct


def test_every_trace_and_target_is_judged() -> None:
    assert set(TRACES) == {"sharegpt", "bimodal"}
    assert set(get_args(TargetName)) == {"ttft", "tpot"}
