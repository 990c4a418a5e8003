"""Step times against the published and recorded figures they were taken from."""

from __future__ import annotations

import msgspec
import pytest

from llmd_sched.sim.steptime import PRESETS, Preset, preset

PER_TERM = Preset(
    model="m",
    step_base_s=1.0,
    prefill_token_s=10.0,
    attention_pair_s=100.0,
    sequence_s=1_000.0,
    decode_context_token_s=10_000.0,
    request_overhead_s=0.0,
    kv_blocks=1,
)


def alone_s(chosen: Preset, prompt_tokens: int) -> float:
    """TTFT of a prompt that meets an empty engine: overhead plus one step per chunk."""
    total_s, done = chosen.request_overhead_s, 0
    while done < prompt_tokens:
        chunk = min(chosen.max_num_batched_tokens, prompt_tokens - done)
        total_s += chosen.step_s(chunk, chunk * (done + chunk / 2), 1, 0)
        done += chunk
    return total_s


def test_each_term_counts_its_own_quantity() -> None:
    assert PER_TERM.step_s(0, 0.0, 0, 0) == 1
    assert PER_TERM.step_s(2, 3.0, 4, 5) == 1 + 20 + 300 + 4_000 + 50_000


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'tpu'; known: llama-3-8b-h100, qwen3-32b-h100x2, qwen3-32b"):
        preset("tpu")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_frozen_positive_and_found_by_name(name: str) -> None:
    chosen = preset(name)
    assert all(value > 0 for value in msgspec.structs.astuple(chosen)[1:])
    with pytest.raises(AttributeError):
        chosen.kv_blocks = 1  # type: ignore[misc]


@pytest.mark.parametrize("prompt_tokens", [8192, 8200, 12_000, 16_384, 20_000, 32_768, 65_536, 100_000, 155_000])
def test_qwen_on_two_h100_meets_the_single_request_fit_within_5_percent(prompt_tokens: int) -> None:
    fit_s = 42.5e-6 * prompt_tokens + 443.2e-12 * prompt_tokens**2
    assert alone_s(PRESETS["qwen3-32b-h100x2"], prompt_tokens) == pytest.approx(fit_s, rel=0.05)


@pytest.mark.parametrize("uncached_tokens", [20, 167, 500, 1000])
def test_qwen_on_one_h200_meets_the_recorded_idle_ttft_within_5_percent(uncached_tokens: int) -> None:
    recorded_s = 41.6e-3 + 98e-6 * uncached_tokens
    assert alone_s(PRESETS["qwen3-32b-h200"], uncached_tokens) == pytest.approx(recorded_s, rel=0.05)


@pytest.mark.parametrize(("running", "recorded_ms"), [(3, 19.3), (10, 19.7), (22, 20.3)])
def test_qwen_on_one_h200_meets_the_recorded_time_per_token_within_2_percent(running: int, recorded_ms: float) -> None:
    step_s = PRESETS["qwen3-32b-h200"].step_s(0, 0.0, running, running * 300)
    assert step_s * 1e3 == pytest.approx(recorded_ms, rel=0.02)


def test_qwen_on_one_h200_saturates_near_101_us_per_token() -> None:
    # One step: 40 decodes at 3,500 tokens of context, and the rest of the budget for two prompts of about 4,000 tokens.
    prompt = (8192 - 40) // 2
    step_s = PRESETS["qwen3-32b-h200"].step_s(2 * prompt, 2 * prompt * prompt / 2, 42, 40 * 3500)
    assert step_s / (2 * prompt) == pytest.approx(101e-6, rel=0.05)
