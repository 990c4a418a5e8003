"""The live driver against simulated engines behind real HTTP on loopback, and the records made of what it saw."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import live
from benchmarks.measures import Window
from benchmarks.workloads import WORKLOADS
from llmd_sched.load.report import Result
from llmd_sched.sim.engine import EngineConfig
from llmd_sched.sim.openai import parse_completion
from llmd_sched.sim.scenario import Arrival, arrival
from llmd_sched.sim.server import ServerConfig, SimServer
from llmd_sched.sim.steptime import PRESETS

PRESET = PRESETS["llama-3-8b-h100"]
WINDOW = Window(0.0, 2.0)


@pytest.fixture
async def url() -> AsyncIterator[str]:
    config = ServerConfig(engine=EngineConfig(preset=PRESET), host="127.0.0.1", port=0, name="pod-a", speedup=50.0)
    server = SimServer(config)
    yield f"http://127.0.0.1:{await server.start()}"
    await server.close()


def requests() -> Iterator[Arrival]:
    """Forty in two seconds of one document's questions: all but the first find most of it cached."""
    for number in range(40):
        text = b"word" * 640 + f"{number:04d}".encode() * 16
        yield arrival(number / 20, text, 5, id=f"q{number}")


async def drive(url: str, arrivals: Iterator[Arrival]) -> list[Result]:
    seen: list[Result] = []
    results = await live.drive(
        url, arrivals, model=PRESET.model, concurrency_limit=100, timeout_s=30.0, on_result=seen.append
    )
    assert seen == results
    return results


async def test_a_workload_is_sent_in_full_and_measured_as_in_simulation(url: str) -> None:
    figures, report = live.summary(await drive(url, requests()), WINDOW, 20.0, {"ttft_ms": 1e5})
    assert report["failures"]["count"] == 0
    assert report["successes"]["count"] == figures["measured_requests"] + figures["failed_requests"] > 0
    assert 0 < figures["ttft_p50_ms"] <= figures["e2e_p50_ms"]
    assert figures["ntpot_mean_ms"] == pytest.approx(figures["e2e_mean_ms"] / 5)
    assert figures["hit_rate_pct"] > 80
    assert (figures["imbalance_ratio"], figures["goodput_pct"]) == (1, 100)
    assert report["successes"]["prompt_len"]["max"] == 656
    assert report["successes"]["output_len"]["mean"] == 5


async def test_what_the_generator_was_late_is_reported(url: str) -> None:
    results = await drive(url, requests())
    figures, report = live.summary(results, WINDOW, 20.0, {})
    assert figures["schedule_delay_p99_ms"] >= figures["schedule_delay_p50_ms"] >= 0
    latest_s = max(one.schedule_delay_s for one in results if one.sent_s < WINDOW.to_s)
    assert report["load_summary"]["schedule_delay"]["max"] == latest_s


async def test_a_server_that_is_not_there_is_counted_and_no_exception() -> None:
    results = await drive("http://127.0.0.1:1", requests())
    figures, report = live.summary(results, Window(0.0, math.inf), 20.0, {})
    assert (figures["measured_requests"], figures["failed_requests"]) == (0, 40)
    assert report["failures"]["by_label"] == {"connection 0": {"count": 40}}


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_the_body_holds_the_very_prompt_that_is_simulated(name: str) -> None:
    one = next(WORKLOADS[name].arrivals(5.0, 30.0, seed=3))
    ask = parse_completion(live.sent(one).body("m"))
    assert ask.prompt == one.request.prompts[0]
    assert (ask.max_tokens, ask.stream) == (one.output_tokens, one.request.streaming)


def test_token_ids_are_sent_as_ids() -> None:
    ids = [7, 151_643, 0, 65_536]
    raw = b"".join(number.to_bytes(4, "little") for number in ids)
    assert json.loads(live.sent(arrival(0.0, raw, 3)).body("m"))["prompt"] == ids


def result(**changes: Any) -> Result:
    made = {"request_id": "r", "session": "s", "at_s": 1.0, "sent_s": 1.5, "schedule_delay_s": 0.5, "e2e_s": 2.0}
    made |= {"input_tokens": 90, "output_tokens": 9, "streaming": True, "ttft_s": 0.25, "chunks": 8, "status": 200}
    return Result(**{**made, **changes})


def test_the_servers_word_on_tokens_goes_before_the_workloads() -> None:
    plain, told = (live.record(result(**words)) for words in ({}, {"prompt_tokens": 95, "completion_tokens": 6}))
    assert (plain.input_tokens, plain.output_tokens, plain.arrival_s, plain.ttft_ms) == (90, 8, 1.5, 250.0)
    assert (told.input_tokens, told.output_tokens) == (95, 6)


@pytest.mark.parametrize(
    ("changes", "end", "status"),
    [
        ({"error": "status 503", "status": 503}, "status 503", 503),
        ({"error": "connection: Refused", "status": None, "ttft_s": None}, "connection", 0),
        ({"error": "truncated"}, "truncated", 200),
    ],
)
def test_a_failure_keeps_its_kind_and_has_no_output(changes: dict[str, Any], end: str, status: int) -> None:
    found = live.record(result(**changes))
    assert (found.end, found.status, found.output_tokens) == (end, status, 0)


def test_the_command_line_writes_what_it_measured(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    flags = ["--url", "http://127.0.0.1:1", "--model", "m", "--scenario", "sharegpt", "--rate", "20"]
    flags += ["--duration", "1.5", "--warm-up", "0", "--json", str(path)]
    assert live.main(flags) == 1, "no request was answered"
    written = json.loads(path.read_text())
    assert written["figures"]["failed_requests"] > 0
    assert written["reports"][0]["load_summary"]["requested_rate"] == 20


def test_an_unknown_scenario_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        live.main(["--url", "http://127.0.0.1:1", "--model", "m", "--scenario", "nope"])
    assert "no such scenario: nope; known are, with their steps, b2b (b2b10" in capsys.readouterr().err
