"""What the live batch benchmark makes of its observations, and what it asks for."""

from __future__ import annotations

import json
from itertools import islice

import msgspec
import pytest

from batchgw.lines import Limits, Scanner
from benchmarks.batch_live import LAWS, Asked, config, figures, lines, main, overlap
from benchmarks.batch_traffic import SCENARIOS
from llmd_sched.catalog import resolve
from llmd_sched.config import load

SHORT = msgspec.structs.replace(SCENARIOS["L8A"], phase_s=10.0, cycles=2)


@pytest.mark.parametrize(
    ("from_s", "to_s", "tokens"), [(0.0, 10.0, 100.0), (2.0, 3.0, 25.0), (5.0, 9.0, 25.0), (6.0, 9.0, 0.0)]
)
def test_tokens_of_a_request_are_spread_over_its_decode(from_s: float, to_s: float, tokens: float) -> None:
    assert overlap(Asked(1.0, 2.0, 6.0, 100), from_s, to_s) == pytest.approx(tokens)


def test_figures_are_of_the_second_cycle_and_batch_is_what_no_user_got() -> None:
    warm = Asked(1.0, 9.0, 10.0, 11)
    idle, burst = Asked(40.0, 40.1, 41.1, 11), Asked(60.0, 60.2, 62.2, 11)  # at half speed phases are of 20 s
    counts = [0.0, 500.0, 500.0, 1511.0, 1722.0]
    found = figures([warm, idle, burst], counts, SHORT, engines=1, slower=2.0)
    assert found["burst_ttft_p95_ms"] == pytest.approx(200.0)
    assert found["burst_itl_p50_ms"] == pytest.approx(200.0)
    assert found["all_itl_p50_ms"] == pytest.approx(150.0)
    assert found["idle_generated_tokens_per_s"] == pytest.approx(100.0)
    assert found["burst_generated_tokens_per_s"] == pytest.approx(20.0)


@pytest.mark.parametrize("mode", LAWS)
def test_the_scheduler_is_told_what_it_understands(mode: str) -> None:
    text = json.dumps(config(mode, 12.0, slower=2.0))
    assert "batch-headroom-producer" in resolve(load(text)).plugins


def test_the_input_file_is_valid() -> None:
    scanner = Scanner(Limits())
    for line in islice(lines(), 30):
        scanner.feed(line)
    scan, _ = scanner.finish()
    assert (scan.lines, scan.error_count) == (30, 0)


@pytest.mark.parametrize("given", [("--laws", "flood"), ("--slower", "0"), ("--phase", "0.5")])
def test_what_cannot_be_measured_is_refused(given: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(given)
    assert "laws are protect, harvest; --slower must be above 0" in capsys.readouterr().err
