"""The parts of the GPU calibration that need no GPU: shapes, the sweep, and the fit on made-up times."""

from __future__ import annotations

import random
import sys
import types

import numpy as np
import pytest

from benchmarks import calibrate_gpu
from benchmarks.calibrate_gpu import COEFFICIENTS, KV_TOKENS_MAX, QWEN3_8B, Cell, figures, fit, sweep
from llmd_sched.sim.steptime import PRESETS, Preset


def step_s(preset: Preset, cell: Cell) -> float:
    """What the simulator says of the cell."""
    chunk, decodes = cell.prefill_tokens, cell.decodes
    pairs = chunk * (cell.context_tokens + chunk / 2)
    return preset.step_s(chunk, pairs, decodes or 1, decodes * cell.context_tokens)


def test_the_shapes_are_those_of_an_8b_model() -> None:
    assert QWEN3_8B.weights == pytest.approx(6.95e9, rel=0.01)  # 8.2e9 less 1.2e9 of embeddings
    assert QWEN3_8B.kv_bytes_per_token == 147_456
    assert QWEN3_8B.attention_flops_per_pair == 589_824


@pytest.mark.parametrize(
    ("cell", "terms"),
    [
        (Cell(64, 0, 0), (1, 64, 64 * 32, 1, 0)),
        (Cell(64, 0, 100), (1, 64, 64 * 132, 1, 0)),
        (Cell(0, 8, 100), (1, 0, 0, 8, 800)),
    ],
)
def test_a_cells_terms_are_those_of_the_step_time_formula(cell: Cell, terms: tuple[float, ...]) -> None:
    assert cell.terms == terms
    coefficients = [getattr(PRESETS["qwen3-32b-h200"], name) for name in COEFFICIENTS]
    assert np.dot(cell.terms, coefficients) == pytest.approx(step_s(PRESETS["qwen3-32b-h200"], cell))


def test_the_sweep_fits_into_memory_repeats_nothing_and_spans_both_kinds() -> None:
    cells = sweep()
    assert len(set(cells)) == len(cells) == 36
    assert max(cell.kv_tokens for cell in cells) <= KV_TOKENS_MAX
    assert all(bool(cell.prefill_tokens) != bool(cell.decodes) for cell in cells)
    assert {cell.decodes for cell in cells} == {0, *calibrate_gpu.BATCHES}
    assert {cell.prefill_tokens for cell in cells} == {0, *calibrate_gpu.CHUNKS}


@pytest.mark.parametrize("name", PRESETS)
def test_exact_times_give_the_coefficients_back(name: str) -> None:
    fitted = fit(sweep(), [step_s(PRESETS[name], cell) for cell in sweep()])
    wanted = [getattr(PRESETS[name], field) for field in COEFFICIENTS]
    assert fitted.coefficients.tolist() == pytest.approx(wanted, rel=1e-6)
    assert np.abs(fitted.errors).max() < 1e-6


def test_noisy_times_give_them_back_roughly_and_the_report_says_how_well() -> None:
    preset, rng = PRESETS["qwen3-32b-h100x2"], random.Random(1)
    times_s = [step_s(preset, cell) * rng.uniform(0.97, 1.03) for cell in sweep()]
    found = figures(fit(sweep(), times_s))
    for name in COEFFICIENTS:
        assert found[name] == pytest.approx(getattr(preset, name), rel=0.25), name
    assert 0 < found["mean_error_pct"] < found["max_error_pct"] < 4


def test_no_coefficient_is_negative_even_where_that_would_fit_better() -> None:
    # The more context, the faster: nonsense that plain least squares would follow.
    times_s = [0.01 + 1e-5 * cell.prefill_tokens - 1e-10 * cell.terms[4] for cell in sweep()]
    assert (fit(sweep(), times_s).coefficients >= 0).all()


@pytest.mark.parametrize(
    ("cells", "times_s", "message"),
    [
        ([Cell(64, 0, 0)], [], "as many positive times"),
        ([Cell(64, 0, 0)], [0.0], "as many positive times"),
        ([Cell(64, 0, 0), Cell(128, 0, 0)], [1.0, 2.0], "tell the five terms apart"),
        ([Cell(2**i, 0, 0) for i in range(8)], [1.0] * 8, "tell the five terms apart"),
    ],
)
def test_times_that_cannot_be_fitted_are_refused(cells: list[Cell], times_s: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(cells, times_s)


def test_without_a_gpu_one_line_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert calibrate_gpu.main([]) == 1
    without_torch = capsys.readouterr().err
    blind = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", blind)
    assert calibrate_gpu.main([]) == 1
    without_gpu = capsys.readouterr().err
    assert "needs PyTorch with CUDA" in without_torch
    assert "PyTorch finds none" in without_gpu
    assert without_torch.count("\n") == without_gpu.count("\n") == 1
