"""The working set of reused blocks, by sampling."""

from __future__ import annotations

import numpy as np
import pytest

from llmd_sched.prefix.reuse import MAX_SAMPLES, SAMPLED, WINDOW_S, WorkingSet
from tests.builders import asking, candidates, decision, endpoints, prompt
from tests.unit.test_approx import opened


def hashes(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, count).astype(np.uint64)


def test_what_is_asked_once_is_no_working_set() -> None:
    made = WorkingSet()
    for seed in range(20):
        made.asked(hashes(1000, seed), 0.0)
    assert made.blocks == 0


def test_what_is_asked_again_is_counted_once_and_about_right() -> None:
    made = WorkingSet()
    for i in range(30):
        made.asked(hashes(8000, i % 3), float(i))
    assert made.blocks == pytest.approx(24_000, rel=0.1)


def test_what_comes_once_a_window_is_still_reused() -> None:
    made = WorkingSet()
    made.asked(hashes(8000, 0), 0.0)
    made.asked(hashes(8000, 0), WINDOW_S + 1)
    assert made.blocks == pytest.approx(8000, rel=0.1)


def test_what_is_not_asked_any_more_is_forgotten_after_two_windows() -> None:
    made = WorkingSet()
    for at_s in (0.0, 1.0):
        made.asked(hashes(8000, 0), at_s)
    for turn in (1, 2):
        made.asked(hashes(10, turn), turn * WINDOW_S + 1)
        assert bool(made.blocks) == (turn == 1)


def test_it_stops_counting_at_its_bound() -> None:
    made = WorkingSet()
    for seed in range(12):
        made.asked(hashes(MAX_SAMPLES, seed), 0.0)
    assert len(made._seen) <= MAX_SAMPLES + 2 * MAX_SAMPLES // SAMPLED


def test_pressure_is_the_working_set_over_what_an_endpoint_holds() -> None:
    live = opened(endpoints(2))
    live.detailed = True
    view = candidates(block_tokens=[16.0, 16.0], cache_blocks=[4000.0, 8000.0])
    for i in range(4):
        asked = asking(prompt(800, seed=i % 2))
        live.produce(asked, view, 0.0)
        live.chosen(decision(str(i), asked, view.endpoints[0]), view, 0, 0.0)
    pressure = live.produce(asking(prompt(1, seed=9)), view, 0.0)[f"prefix_pressure/{live.name}"]
    assert pressure.tolist() == pytest.approx([1600 / 1000, 1600 / 2000], rel=0.25)
