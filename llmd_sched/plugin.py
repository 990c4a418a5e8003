"""What a plugin is.

A plugin is one small frozen struct. Its fields are its YAML parameters (camelCase in YAML, unknown ones refused), its
docstring is its manual with units. It has one pure verb that gets all candidates at once and returns one aligned
array; randomness is an argument. Filters, scorers and pickers are used as they are; a producer and anything else
that owns state is *opened* once per process.

What a plugin reads that another produces is declared in ``reads`` and checked when the profile is built.
"""

from __future__ import annotations

import enum
from random import Random
from typing import ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmd_sched.types import Array, Candidates, Decision, Endpoint, Outcome, Prediction, Request


class Attribute(enum.StrEnum):
    """What producers make; the value is the reference's name of the data key."""

    PREFIX_MATCH = "PrefixCacheMatchInfo"
    INFLIGHT_LOAD = "InFlightLoad"
    LATENCY = "LatencyPredictionInfo"


DEFAULT_PRODUCER = {
    Attribute.PREFIX_MATCH: "approx-prefix-cache-producer",
    Attribute.INFLIGHT_LOAD: "inflight-load-producer",
    Attribute.LATENCY: "predicted-latency-producer",
}
"""The plugin that is added by itself when something needs the attribute and nothing makes it."""


class Reads(msgspec.Struct, frozen=True):
    """One attribute a plugin consumes, and from whom."""

    attribute: Attribute
    producer: str
    required: bool = True


def reads(attribute: Attribute, producer: str, *, required: bool = True) -> Reads:
    """``producer`` as configured; empty means the attribute's default producer."""
    return Reads(attribute, producer or DEFAULT_PRODUCER[attribute], required)


class Plugin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Base of all plugins: parameters only."""

    def reads(self) -> tuple[Reads, ...]:
        return ()

    def check(self) -> None:
        """Raise ValueError when parameters are each valid but not together."""


class Filter(Plugin, frozen=True):
    def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
        """True for every candidate that stays."""
        raise NotImplementedError


class Scorer(Plugin, frozen=True):
    def score(self, request: Request, candidates: Candidates) -> Array:
        """One score per candidate; the pipeline clamps it to [0, 1] and applies the weight."""
        raise NotImplementedError


class Picker(Plugin, frozen=True):
    max_num_of_endpoints: int = 1

    def check(self) -> None:
        if self.max_num_of_endpoints < 1:
            raise ValueError("maxNumOfEndpoints must be at least 1")

    def order(self, scores: Array, rng: Random) -> NDArray[np.intp]:
        """Positions from most to least preferred; the pipeline takes the first ``max_num_of_endpoints``."""
        raise NotImplementedError


class Handler(Plugin, frozen=True):
    """Decides which profiles run."""


class Parser(Plugin, frozen=True):
    """Bytes of a request body -> what is asked. Chosen by path suffix; no suffixes = the fallback."""

    suffixes: ClassVar[tuple[str, ...]] = ()

    def parse(self, path: str, body: bytes) -> Parsed:
        """Raises BadRequest with what is wrong."""
        raise NotImplementedError


class Parsed(msgspec.Struct, frozen=True, kw_only=True):
    """What a body says, before headers have their say."""

    model: str = ""
    prompts: tuple[bytes, ...] = ()
    max_output_tokens: int | None = None
    streaming: bool = False
    cache_salt: str = ""
    names_model: bool = True
    """False when the format has no model field; then its absence is no error."""


class Producer:
    """An opened producer: makes columns for each request, and may follow the request to its end.

    Hooks are called exactly once each, in the order produce, chosen, (first_token), finished; ``finished`` comes for
    every chosen request, aborted ones too.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def produce(self, request: Request, candidates: Candidates, now_s: float) -> dict[str, Array]:
        return {}

    def predicted(self, candidates: Candidates, position: int) -> Prediction | None:
        """What was predicted for the endpoint at ``position`` of the full column."""
        return None

    def chosen(self, decision: Decision, candidates: Candidates, position: int, now_s: float) -> None: ...

    def first_token(self, ticket: str, now_s: float) -> None: ...

    def finished(self, ticket: str, outcome: Outcome, now_s: float) -> None: ...

    def endpoints_changed(self, endpoints: list[Endpoint]) -> None:
        """The pool's members after an addition or removal."""


class ProducerPlugin(Plugin, frozen=True):
    """Parameters of a producer; ``open`` makes the live one."""

    provides: ClassVar[Attribute]

    def open(self, name: str) -> Producer:
        raise NotImplementedError
