"""How a benchmark reports: a table for people and one JSON file for comparison between commits.

A figure's name is flat and ends in its unit (``lean_cpu_ms_per_request``, ``..._pct``, ``..._ratio``).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path


def write_json(path: str | Path, config: Mapping[str, object], seed: int, figures: Mapping[str, float]) -> None:
    """Writes commit, config, seed, host and figures; OSError when the file cannot be written."""
    report = {"commit": commit(), "config": config, "seed": seed, "host": host(), "figures": figures}
    Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def table(figures: Mapping[str, float]) -> None:
    """Prints one figure per line, numbers aligned to the right."""
    cells = {name: f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}" for name, value in figures.items()}
    name_width = max(map(len, cells), default=0)
    cell_width = max(map(len, cells.values()), default=0)
    for name, cell in cells.items():
        print(f"{name:<{name_width}}  {cell:>{cell_width}}")


def commit() -> str | None:
    """The full id of the commit these sources are at, ``-dirty`` when they differ from it; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def host() -> dict[str, object]:
    """What the figures depend on, and nothing that tells one machine from another of its kind."""
    return {"cpu": _cpu_model(), "cores": os.cpu_count()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
