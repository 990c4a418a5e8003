"""Reports: percentiles, failures, shares, prediction errors, and how they are shown and stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import results as benchmark_results
from llmd_sched.load.report import (
    Result,
    Window,
    mape_by_window,
    plot,
    render_mape,
    render_text,
    summarize,
)


def result(**changes: object) -> Result:
    fields: dict[str, object] = {
        "request_id": "r",
        "session": "s",
        "at_s": 0.0,
        "sent_s": 0.0,
        "schedule_delay_s": 0.0,
        "ttft_s": 0.1,
        "e2e_s": 1.0,
        "input_tokens": 100,
        "output_tokens": 10,
        "streaming": True,
        "chunks": 10,
        "status": 200,
        "endpoint": "pod-1",
    }
    return Result(**{**fields, **changes})  # type: ignore[arg-type]


def test_tpot_is_the_time_after_the_first_token_per_further_token() -> None:
    assert result().tpot_s == pytest.approx(0.1)
    assert result(completion_tokens=19).tpot_s == pytest.approx(0.05), "the server's count goes before the chunks"


@pytest.mark.parametrize("changes", [{"error": "timeout"}, {"streaming": False}, {"chunks": 1}, {"ttft_s": None}])
def test_a_reply_that_did_not_stream_two_tokens_has_no_tpot(changes: dict[str, object]) -> None:
    assert result(**changes).tpot_s is None


def test_percentiles_are_of_successful_requests_only() -> None:
    rows = [result(ttft_s=n / 1000) for n in range(1, 102)] + [result(ttft_s=60.0, error="truncated")]
    summary = summarize(rows)
    assert summary.ttft_ms is not None
    assert summary.ttft_ms == pytest.approx((51, 96, 100, 101))
    assert (summary.sent, summary.succeeded) == (102, 101)


def test_failures_are_counted_by_kind_without_their_detail() -> None:
    errors = ["timeout", "connection: A", "connection: B", None, "status 503"]
    assert summarize([result(error=error) for error in errors]).failures == {
        "connection": 2,
        "timeout": 1,
        "status 503": 1,
    }


def test_shares_of_endpoints_add_up_to_one_over_the_requests_that_name_one() -> None:
    names = ["b", "a", "b", "", "b"]
    assert summarize([result(endpoint=name) for name in names]).endpoint_share == {"a": 0.25, "b": 0.75}


def test_rates_count_from_the_first_request_sent() -> None:
    rows = [result(sent_s=5.0 + n, e2e_s=2.0, completion_tokens=30, schedule_delay_s=0.02) for n in range(9)]
    summary = summarize(rows)
    assert summary.wall_s == pytest.approx(10)
    assert summary.offered_rate_per_s == pytest.approx(1)
    assert summary.achieved_rate_per_s == pytest.approx(0.9)
    assert summary.output_tokens_per_s == pytest.approx(27)
    assert summary.schedule_delay_ms_p99 == pytest.approx(20)


def test_the_cached_share_leaves_out_servers_that_do_not_tell() -> None:
    rows = [result(prompt_tokens=100, cached_tokens=64), result(prompt_tokens=900)]
    assert summarize(rows).cached_tokens_share == pytest.approx(0.64)
    assert summarize(rows[1:]).cached_tokens_share is None


def test_a_replay_of_failures_alone_is_still_summarized() -> None:
    summary = summarize([result(error="timeout", ttft_s=None)])
    assert summary.ttft_ms is None
    assert summary.tpot_ms is None
    assert "failed: timeout" in render_text(summary)


def test_nothing_sent_is_nothing_to_report() -> None:
    with pytest.raises(ValueError, match="no request was sent"):
        summarize([])


ROWS = [(0.5, 110.0, 100.0), (9.9, 70.0, 100.0), (31.0, 10.0, 20.0), (3.0, 150.0, 100.0), (4.0, 5.0, 0.0)]


def test_errors_are_grouped_by_window_and_rows_without_an_actual_value_are_left_out() -> None:
    first, second = mape_by_window(ROWS, window_s=10)
    assert first == pytest.approx((0, 30, 30, 3))
    assert second == pytest.approx((30, 50, 50, 1))


def test_tables_show_every_figure_and_endpoint() -> None:
    text = render_text(summarize([result(endpoint=f"pod-{n}") for n in range(4)]), title="least loaded")
    for expected in ("least loaded", "TTFT", "100.0", "TPOT", "E2E", "1,000.0", "share of pod-3", "25.0%"):
        assert expected in text
    assert "\x1b" not in text
    errors = render_mape([Window(20, 12.34, 8.0, 1500)], "TTFT error")
    assert all(cell in errors for cell in ("TTFT error", "20", "12.3", "8.0", "1,500"))


@pytest.mark.parametrize("rows", [ROWS, []])
def test_a_picture_is_written_even_without_rows(tmp_path: Path, rows: list[tuple[float, float, float]]) -> None:
    plot(rows, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_benchmark_figures_are_stored_with_what_they_depend_on(tmp_path: Path) -> None:
    benchmark_results.write_json(tmp_path / "out.json", {"requests": 5}, 7, {"lean_cpu_ms_per_request": 0.5})
    stored = json.loads((tmp_path / "out.json").read_text())
    assert set(stored) == {"commit", "config", "seed", "host", "figures"}
    assert set(stored["host"]) == {"cpu", "cores"}
    assert (stored["config"], stored["seed"]) == ({"requests": 5}, 7)
    assert stored["figures"] == {"lean_cpu_ms_per_request": 0.5}


def test_benchmark_figures_are_printed_one_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark_results.table({"a_ms": 0.12345, "longer_bytes": 123456.0})
    assert capsys.readouterr().out == "a_ms           0.1235\nlonger_bytes  123,456\n"
