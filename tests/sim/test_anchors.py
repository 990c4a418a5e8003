"""What others measured, within the band that holds. ``python -m benchmarks.validate`` prints all of it.

The bands wanted are 8 % (Llama), 5 % (Qwen on two H100), 10 % (H200) and the published ranges (b2b-saas); where one of
``benchmarks.validate`` is wider, ``benchmarks/README.md`` says why.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import validate
from benchmarks.validate import Anchor, anchor

WANTED = {"llama": 0.08, "qwen": 0.05, "h200": 0.1}


@pytest.fixture(scope="module")
def anchors() -> dict[str, list[Anchor]]:
    """By group. The cluster is a quarter of the published one, at a quarter of the load."""
    made = {name: list(validate.GROUPS[name]()) for name in WANTED}
    return {**made, "b2b": list(validate.b2b(engines=2))}


@pytest.mark.parametrize("group", WANTED)
def test_published_figures_are_met_within_the_bands_stated(anchors: dict[str, list[Anchor]], group: str) -> None:
    assert not [f"{one.name}: {one.ours:.5g}, {one.deviation:+.1%}" for one in anchors[group] if not one.holds]


@pytest.mark.parametrize(("group", "wanted"), WANTED.items())
def test_the_bands_stated_are_those_wanted_but_for_the_known_exceptions(
    anchors: dict[str, list[Anchor]], group: str, wanted: float
) -> None:
    wider = {one.name: one.within for one in anchors[group] if one.within > wanted}
    known = {
        "llama_plain_1_per_s_ttft_ms": 0.11,
        "llama_plain_31.2_per_s_ttft_ms": 0.11,
        "llama_plain_91.4_per_s_ttft_ms": 0.12,
    }
    assert wider == (known if group == "llama" else {})


def test_b2b_saas_is_served_as_published_but_for_round_robin_which_is_too_fast(
    anchors: dict[str, list[Anchor]],
) -> None:
    affinity, round_robin = anchors["b2b"]
    assert (affinity.within, round_robin.within) == (0.0, 0.1)
    # Two engines balance less well than eight, so each band is a little wider here.
    assert abs(affinity.deviation) < 0.04
    assert 0 <= round_robin.deviation < 0.14
    assert affinity.ours > 1.45 * round_robin.ours


@pytest.mark.parametrize(
    ("ours", "deviation", "holds"), [(95.0, 0.0, True), (110.0, 0.1, True), (112.0, 0.12, False), (80.0, -0.2, False)]
)
def test_a_deviation_counts_from_the_nearer_end_of_what_was_published(
    ours: float, deviation: float, holds: bool
) -> None:
    one = Anchor("a", 90.0, 100.0, ours, 0.101)
    assert one.deviation == pytest.approx(deviation if ours > 90 else ours / 90 - 1)
    assert one.holds is holds


def test_a_single_figure_is_a_range_of_one() -> None:
    assert anchor("a", 50.0, 45.0, 0.1).deviation == pytest.approx(-0.1)


def test_figures_are_written_with_their_deviations_and_unknown_groups_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate.main(["--only", "qwen", "--json", str(tmp_path / "out.json")]) == 0
    assert '"qwen_8192_tokens_ttft_ms_deviation_pct"' in (tmp_path / "out.json").read_text()
    assert "qwen_8192_tokens_ttft_ms" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        validate.main(["--only", "tpu"])
    assert "llama, qwen, h200, b2b, not tpu" in capsys.readouterr().err
