"""The distributions that workloads are described with: of tokens, turns and seconds."""

from __future__ import annotations

import math
import random
from typing import NamedTuple, Protocol

from llmd_sched.load.workload import LogNormal

__all__ = ["Draw", "Fixed", "LogNormal", "Normal", "Uniform", "whole"]


class Draw(Protocol):
    """``mean`` is that before any clamping."""

    @property
    def mean(self) -> float: ...

    def draw(self, rng: random.Random) -> float: ...


class Fixed(NamedTuple):
    """Always the same. Takes nothing from the generator."""

    mean: float

    def draw(self, rng: random.Random) -> float:
        return self.mean


class Normal(NamedTuple):
    """Normal with this mean and standard deviation, then clamped to ``[low, high]``."""

    mean: float
    sd: float
    low: float = 1.0
    high: float = math.inf

    def draw(self, rng: random.Random) -> float:
        return min(max(rng.gauss(self.mean, self.sd), self.low), self.high)


class Uniform(NamedTuple):
    low: float
    high: float

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2

    def draw(self, rng: random.Random) -> float:
        return rng.uniform(self.low, self.high)


def whole(draw: Draw, rng: random.Random) -> int:
    """One draw, rounded: a number of tokens or turns, at least 1."""
    return max(1, round(draw.draw(rng)))
