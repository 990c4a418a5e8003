"""The recipe on rows recorded from Qwen3-32B on an H200; skipped where the recordings are not at hand."""

from pathlib import Path

import pytest

from benchmarks import recorded
from benchmarks.bench_accuracy import PROTOCOLS, coverage_pct, mape_pct

BOUNDS = {  # mean error %: prequential, temporal; a tenth above what was measured when they were set
    ("sharegpt", "ttft"): (13.3, 11.9),
    ("sharegpt", "tpot"): (4.2, 3.6),
    ("bimodal", "ttft"): (8.5, 3.5),
    ("bimodal", "tpot"): (7.8, 7.6),
}


def trace(name: str) -> Path:
    found = [path for path in recorded.default_traces() if recorded.label(path) == name]
    if not found:
        pytest.skip(f"no recording of {name} at hand")
    return found[0]


@pytest.mark.parametrize("name", ["sharegpt", "bimodal"])
def test_the_error_on_recorded_rows_stays_below_its_bound_and_the_references(name: str) -> None:
    records = recorded.read(trace(name))
    for protocol, bound in (("prequential", 0), ("temporal", 1)):
        for target, judged in PROTOCOLS[protocol](records).items():
            error_pct = mape_pct(judged.predicted_ms, judged.measured_ms)
            assert error_pct < BOUNDS[name, target][bound], (protocol, target)
            assert error_pct < mape_pct(judged.reference_ms, judged.measured_ms), (protocol, target)


@pytest.mark.parametrize("name", ["sharegpt", "bimodal"])
def test_the_upper_quantile_covers_what_it_says(name: str) -> None:
    records = recorded.read(trace(name))
    for target, judged in PROTOCOLS["prequential"](records).items():
        assert 87.0 <= coverage_pct(judged.p90_ms, judged.measured_ms) <= 93.0, target


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"input_token_length": 3}\n')
    with pytest.raises(ValueError, match=r"trace\.jsonl:1: not a recorded row: KeyError"):
        recorded.read(path)
