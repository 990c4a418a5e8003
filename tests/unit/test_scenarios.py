"""The comparison of arms end to end, with little load: what may be asked, what is run, what is written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from benchmarks import asked, scenarios
from benchmarks.measures import Window
from benchmarks.workloads import SCENARIOS, Workload
from llmd_sched.errors import ConfigError
from llmd_sched.sim.scenario import Arrival, Slow, arrival
from tests.builders import CONFIG_HEAD, prompt

LEAST = CONFIG_HEAD + "plugins: [{type: active-request-scorer}, {type: max-score-picker}]\n"
DRAWN = CONFIG_HEAD + "plugins: [{type: random-picker}]\n"


class Steady(Workload, frozen=True, kw_only=True):
    """Short requests at equal distances, every second one with objectives that cannot be kept."""

    def arrivals(self, rate_per_s: float, duration_s: float, seed: int) -> Iterator[Arrival]:
        for number in range(int(rate_per_s * duration_s)):
            slos = {"ttft_slo_ms": 0.001, "tpot_slo_ms": 0.001} if number % 2 else {}
            ids = {"id": f"{self.name}-{number}"}
            yield arrival(number / rate_per_s, prompt(2, 1000 * seed + number), 20, **ids, **slos)


@pytest.fixture
def arms(tmp_path: Path) -> str:
    """What to give ``--arms``."""
    for name, text in (("least", LEAST), ("drawn", DRAWN)):
        (tmp_path / f"{name}.yaml").write_text(text)
    return f"{tmp_path}/least.yaml,{tmp_path}/drawn.yaml"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scenario of three engines under a light load."""
    usual = SCENARIOS["slowing"]
    changes = {"workload": Steady(name="steady"), "engines": usual.engines[:3], "duration_s": 4.0, "warm_up_s": 1.0}
    events = (Slow(3.0, "engine-0", 2.0),)
    monkeypatch.setitem(SCENARIOS, "tiny", msgspec.structs.replace(usual, name="tiny", events=events, **changes))


def plan(*flags: str) -> list[scenarios.Task]:
    return scenarios.plan(scenarios.arguments().parse_args(flags))


def test_a_task_is_a_scenario_a_step_an_arm_and_a_seed_in_this_order(arms: str) -> None:
    tasks = plan("--scenario", "B,D5", "--arms", arms, "--seeds", "2", "--first-seed", "11")
    steps = {"B": ("B8", "B15"), "D": ("D5",)}
    assert [(t.scenario.name, t.step.name, t.arm, t.seed) for t in tasks] == [
        (name, step, arm, seed) for name in steps for step in steps[name] for arm in ("least", "drawn")
        for seed in (11, 12)
    ]  # fmt: skip
    assert {task.window for task in tasks} == {Window(20.0, 100.0)}


def test_by_default_scenarios_are_those_that_are_not_for_tuning_and_arms_a_few() -> None:
    tasks = plan()
    assert {task.scenario.role for task in tasks} == {"report"}
    assert {task.arm for task in tasks} == set(scenarios.DEFAULT_ARMS) < set(asked.known_arms())
    assert {task.arm for task in plan("--arms", "all")} == set(asked.known_arms())
    assert {task.seed for task in tasks} == {11, 12, 13}


def test_quick_is_a_small_part_and_every_flag_beside_it_wins(arms: str) -> None:
    assert len(plan("--quick")) * 10 < len(plan())
    tasks = plan("--quick", "--arms", arms, "--scenario", "D", "--rates", "3,1", "--seeds", "1", "--duration", "30")
    assert [(t.arm, t.step) for t in tasks] == [
        (arm, step) for step in ((1.0, "1_per_s"), (3.0, "3_per_s")) for arm in ("least", "drawn")
    ]
    assert tasks[0].window.to_s == 30


def test_what_is_asked_for_twice_is_run_once(arms: str) -> None:
    assert plan("--scenario", "D5,D,D9", "--arms", arms) == plan("--scenario", "D", "--arms", arms)


def test_two_arms_of_one_name_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "random.yaml"
    other.write_text(LEAST)
    with pytest.raises(ConfigError, match=r"two arms named random: .*random\.yaml and "):
        asked.arm_texts(["random", str(other)])


def test_a_shorter_run_warms_up_for_as_large_a_share() -> None:
    args = argparse.Namespace(duration=50.0, warm_up=None)
    assert asked.measured_window(args, Window(20.0, 100.0)) == (10.0, 50.0)
    args.warm_up = 30.0
    assert asked.measured_window(args, Window(20.0, 100.0)) == (30.0, 50.0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scenario", "nope"], ["no such scenario: nope", "D (D5, D9)", "sharegpt"]),
        (["--arms", "nope"], ["no such arm: nope", "round-robin", "load-prefix-322"]),
        (["--arms", "nope.yaml"], ["no such arm: nope.yaml"]),
        (["--slo", "ttft=3"], ["ttft=3", "ttft_ms, tpot_ms, ntpot_ms, e2e_ms"]),
        (["--slo", "ttft_ms=-3"], ["'ttft_ms=-3'"]),
        (["--rates", "3,-1"], ["'-1' is not a number above 0"]),
        (["--seeds", "0"], ["'0' is not a whole number above 0"]),
        (["--duration", "10", "--warm-up", "9.5"], ["9.5 s of warm-up leave less than 1 s of 10 s"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_what_cannot_be_run_is_refused_with_what_is_accepted(
    flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        scenarios.main(flags)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert not [word for word in words if word not in told]


def test_an_arm_that_is_no_configuration_is_refused_by_file_and_path(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(CONFIG_HEAD + "plugins: [{type: no-such-picker}]\n")
    with pytest.raises(ConfigError, match=r"wrong\.yaml: \$\.plugins\[0\].*no-such-picker"):
        asked.arm_texts([str(path)])


@pytest.mark.usefixtures("tiny")
def test_a_comparison_prints_tables_and_writes_figures_and_reports(
    arms: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--scenario", "tiny", "--rates", "5,10", "--arms", arms, "--seeds", "2", "--jobs", "1"]
    assert scenarios.main([*flags, "--json", str(tmp_path / "out.json")]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written) == ["commit", "commits", "config", "seeds", "host", "figures", "reports", "broken", "cost"]
    assert written["seeds"] == [11, 12]
    figures = written["figures"]
    assert figures["tiny.5_per_s.least.measured_requests"] == 15
    assert figures["tiny.5_per_s.least.ttft_p90_ms"] > 0
    assert figures["tiny.5_per_s.least.goodput_pct"] == pytest.approx(50, abs=4), "half carry impossible objectives"
    assert figures["tiny.least.knee_per_s"] == 10
    assert figures["summary.drawn.ttft_p90_worst_ratio"] >= 1
    assert [(one["step"], one["arm"], one["seed"]) for one in written["reports"][:3]] == [
        ("5_per_s", "least", 11), ("5_per_s", "least", 12), ("5_per_s", "drawn", 11)
    ]  # fmt: skip
    assert written["reports"][0]["report"]["load_summary"]["requested_rate"] == 5
    printed = capsys.readouterr().out
    assert "10_per_s drawn" in printed
    assert "least ≥ 10" in printed


@pytest.mark.usefixtures("tiny")
def test_events_come_sooner_in_a_shorter_run(arms: str) -> None:
    (usual,) = plan("--scenario", "tiny", "--rates", "20", "--arms", arms.partition(",")[0], "--seeds", "1")
    short = msgspec.structs.replace(usual, window=Window(0.5, 2.0))
    unchanging = msgspec.structs.replace(short, scenario=msgspec.structs.replace(short.scenario, events=()))
    assert scenarios.measure(short).figures != scenarios.measure(unchanging).figures


@pytest.mark.usefixtures("tiny")
def test_a_run_that_breaks_is_told_and_costs_the_others_nothing(
    arms: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = scenarios._measure

    def broken(task: scenarios.Task) -> scenarios.Run:
        if task.arm == "drawn":
            raise RuntimeError("a producer failed")
        return whole(task)

    monkeypatch.setattr(scenarios, "_measure", broken)
    flags = ["--scenario", "tiny", "--rates", "5", "--arms", arms, "--seeds", "1", "--jobs", "1"]
    assert scenarios.main([*flags, "--json", str(tmp_path / "out.json")]) == 1
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["broken"] == {"tiny at 5_per_s, drawn, seed 11": "RuntimeError: a producer failed"}
    assert "tiny.5_per_s.least.e2e_mean_ms" in written["figures"]
    assert "broke: tiny at 5_per_s, drawn, seed 11" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_runs_that_are_kept_are_not_made_again_and_broken_ones_are(
    arms: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, made = scenarios._measure, []

    def noted(task: scenarios.Task) -> scenarios.Run:
        made.append((task.arm, task.seed))
        if len(made) == 2:
            raise RuntimeError("a producer failed")
        return whole(task)

    monkeypatch.setattr(scenarios, "_measure", noted)

    def figures(seeds: str) -> dict[str, float]:
        flags = ["--scenario", "tiny", "--rates", "5", "--arms", arms, "--seeds", seeds, "--jobs", "1"]
        scenarios.main([*flags, "--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "out.json")])
        return json.loads((tmp_path / "out.json").read_text())["figures"]

    figures("1")
    again = figures("1")
    figures("2")
    assert made == [("least", 11), ("drawn", 11), ("drawn", 11), ("least", 12), ("drawn", 12)]
    assert figures("1") == again
    assert len(made) == 5


@pytest.mark.usefixtures("tiny")
def test_a_file_that_is_no_run_is_named(arms: str, tmp_path: Path) -> None:
    flags = ["--scenario", "tiny", "--rates", "5", "--arms", arms, "--seeds", "1", "--jobs", "1", "--runs"]
    scenarios.main([*flags, str(tmp_path)])
    path = min(tmp_path.iterdir())
    path.write_bytes(b"spoilt")
    with pytest.raises(ValueError, match=f"{path.name} holds no run .*remove it"):
        scenarios.main([*flags, str(tmp_path)])


def test_the_figures_are_the_same_bit_by_bit_for_any_number_of_jobs() -> None:
    arms = "load-prefix-322,llmd-predicted-latency"
    tasks = plan("--scenario", "sharegpt", "--rates", "30,60", "--arms", arms, "--seeds", "1", "--duration", "3")
    done: list[str] = []
    alone, together = (scenarios.run_all(tasks, jobs, lambda task: done.append(task.title)) for jobs in (1, 2))
    assert [msgspec.structs.replace(run, cpu_s=0.0) for run in alone] == [
        msgspec.structs.replace(run, cpu_s=0.0) for run in together
    ]
    assert not [run.error for run in alone if run.error]
    assert sorted(done) == sorted([task.title for task in tasks] * 2)
    assert alone[0].figures["measured_requests"] > 50


@pytest.mark.usefixtures("tiny")
def test_pictures_are_drawn_of_each_scenario_and_of_its_predictions(tmp_path: Path) -> None:
    flags = ["--scenario", "tiny", "--rates", "5,10", "--arms", "random,llmd-predicted-latency", "--seeds", "1"]
    assert scenarios.main([*flags, "--jobs", "1", "--plots", str(tmp_path / "new" / "plots")]) == 0
    drawn = sorted((tmp_path / "new" / "plots").iterdir())
    assert [path.name for path in drawn] == ["tiny-predictions.png", "tiny.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
