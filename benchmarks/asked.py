"""What a user of the scenarios may ask for: their names, arms, rates, limits and durations, checked."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import clairvoyant
from benchmarks.comparison import Step
from benchmarks.measures import TIMES, Window
from benchmarks.workloads import SCENARIOS, Scenario
from llmd_sched.catalog import resolve
from llmd_sched.config import load
from llmd_sched.errors import ConfigError

ARMS = Path(__file__).parents[1] / "configs" / "arms"
LIMIT_NAMES = tuple(f"{name}_ms" for name in TIMES)
DEFAULT_LIMITS = {"ttft_ms": 2000.0, "tpot_ms": 50.0}
MIN_WINDOW_S = 1.0


def known_arms() -> dict[str, Path]:
    return {path.stem: path for path in sorted(ARMS.glob("*.yaml"))}


def arm_texts(asked: Sequence[str]) -> dict[str, str]:
    """Arm -> its configuration, checked; ConfigError for one that is unknown or no configuration, or whose name
    another has. ``clairvoyant`` is no configuration: its text is that of a router which leaves the choice to it."""
    known = known_arms()
    texts: dict[str, str] = {}
    paths: dict[str, Path] = {}
    for arm in asked:
        if arm == clairvoyant.NAME:
            texts[arm] = clairvoyant.CONFIG
            continue
        path = Path(arm) if arm.endswith(".yaml") else known.get(arm)
        if path is None or not path.is_file():
            told_known = ", ".join([*known, clairvoyant.NAME])
            raise ConfigError(f"no such arm: {arm}; known are {told_known}, and files ending in .yaml", "--arms")
        if path.stem == clairvoyant.NAME:
            raise ConfigError(f"an arm of its own has the name {path.stem}: {path} needs another", "--arms")
        if paths.setdefault(path.stem, path) != path:
            raise ConfigError(f"two arms named {path.stem}: {paths[path.stem]} and {path}", "--arms")
        text = path.read_text(encoding="utf-8")
        try:
            resolve(load(text), allow_experimental=True)
        except ConfigError as error:
            raise ConfigError(str(error), str(path)) from error
        texts[path.stem] = text
    return texts


def asked_for(name: str) -> tuple[Scenario, list[Step]]:
    """A scenario with all its steps, or the one step of this name; ConfigError lists the known ones."""
    for scenario in SCENARIOS.values():
        steps = [Step(point.rate_per_s, point.name) for point in scenario.ladder]
        if name == scenario.name:
            return scenario, steps
        if found := [step for step in steps if step.name == name]:
            return scenario, found
    known = (f"{one.name} ({', '.join(point.name for point in one.ladder)})" for one in SCENARIOS.values())
    raise ConfigError(f"no such scenario: {name}; known are, with their steps, {', '.join(known)}", "--scenario")


def measured_window(args: argparse.Namespace, usual: Window) -> Window:
    """``usual`` with the duration and the warm-up that were asked for; a shorter run warms up for as large a share."""
    to_s = usual.to_s if args.duration is None else args.duration
    from_s = usual.from_s * min(1.0, to_s / usual.to_s) if args.warm_up is None else args.warm_up
    if not 0 <= from_s <= to_s - MIN_WINDOW_S:
        told = f"{from_s:g} s of warm-up leave less than {MIN_WINDOW_S:g} s of {to_s:g} s to measure"
        raise ConfigError(told, "--warm-up, --duration")
    return Window(from_s, to_s)


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def rates(text: str) -> list[float]:
    return [above_0(rate) for rate in names(text)]


def limits(text: str) -> dict[str, float]:
    """``name=ms`` by comma."""
    made = {}
    for part in names(text):
        name, _, value = part.partition("=")
        try:
            made[name] = float(value)
        except ValueError:
            made[name] = math.nan
        if name not in LIMIT_NAMES or not made[name] > 0:
            raise argparse.ArgumentTypeError(f"{part!r} is not name=milliseconds with one of {', '.join(LIMIT_NAMES)}")
    return made


def above_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def told(of_limits: Mapping[str, float]) -> str:
    return ",".join(f"{name}={value:g}" for name, value in of_limits.items())
