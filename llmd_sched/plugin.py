"""What a plugin is.

A plugin is one small frozen struct. Its fields are its YAML parameters (camelCase in YAML, unknown ones refused), its
docstring is its manual with units. It has one pure verb that gets all candidates at once and returns one aligned
array; randomness is an argument. What owns no state is used as it is; a ``Stateful`` plugin is *opened* once per
process, and the live object it makes, a ``Producer``, acts in its place.

What a plugin reads that another produces is declared in ``reads`` and checked when the profile is built.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from random import Random
from typing import ClassVar, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmd_sched.types import Array, Candidates, Decision, Endpoint, Outcome, Prediction, Request


class Attribute(enum.StrEnum):
    """What producers make; the value is the reference's name of the data key."""

    PREFIX_MATCH = "PrefixCacheMatchInfo"
    INFLIGHT_LOAD = "InFlightLoad"
    LATENCY = "LatencyPredictionInfo"
    SESSION_ID = "SessionID"
    ENCODER_CACHE = "EncoderCacheMatchInfo"
    HEADROOM = "HeadroomInfo"


DEFAULT_PRODUCER = {
    Attribute.PREFIX_MATCH: "approx-prefix-cache-producer",
    Attribute.INFLIGHT_LOAD: "inflight-load-producer",
    Attribute.LATENCY: "predicted-latency-producer",
    Attribute.SESSION_ID: "session-id-producer",
    Attribute.ENCODER_CACHE: "mm-embeddings-cache-producer",
    Attribute.HEADROOM: "batch-headroom-producer",
}
"""The plugin that is added by itself when something needs the attribute and nothing makes it."""


PREFILL = "prefill"
"""The profile that is known by its name to pick who computes the prompt, as in the reference."""


class Reads(msgspec.Struct, frozen=True):
    """One attribute a plugin consumes, and from whom."""

    attribute: Attribute
    producer: str
    required: bool = True
    detailed: bool = False
    """The columns too that a producer only makes where somebody reads them."""


def reads(attribute: Attribute, producer: str, *, required: bool = True, detailed: bool = False) -> Reads:
    """``producer`` as configured; empty means the attribute's default producer."""
    return Reads(attribute, producer or DEFAULT_PRODUCER[attribute], required, detailed)


class Plugin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Base of all plugins: parameters only."""

    def reads(self) -> tuple[Reads, ...]:
        return ()

    def check(self) -> None:
        """Raise ValueError when parameters are each valid but not together."""

    def headers(self) -> tuple[str, ...]:
        """Request headers it looks at, lower case, beyond those every scheduler reads."""
        return ()


class Keeps(Protocol):
    """What filters, or the live object of one that has state."""

    def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]: ...


class Scoring(Protocol):
    """What scores, or the live object of a scorer that has state."""

    def score(self, request: Request, candidates: Candidates) -> Array: ...


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


class Admitter(Plugin, frozen=True):
    """Has the last word before a request is scheduled."""

    def refusal(self, request: Request, candidates: Candidates, rng: Random) -> str:
        """Why the request is not admitted; empty when it is."""
        raise NotImplementedError


class Identity(Plugin, frozen=True):
    """Reads from a request's headers whose it is."""

    names_flow: ClassVar[bool] = False
    """Its value is the request's fairness id where no header gives one."""

    def of(self, headers: Mapping[str, str]) -> str:
        """Empty when nothing says."""
        raise NotImplementedError


class Reporter(Plugin, frozen=True):
    """Tells the proxy something of each reply that has ended, as dynamic metadata."""

    def report(self, outcome: Outcome) -> tuple[str, str, int] | None:
        """Metadata namespace, key and value; None when there is nothing to tell."""
        raise NotImplementedError


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
    media: int = 0
    """Images, videos and sounds in the prompt."""
    media_hashes: tuple[int, ...] = ()
    """What tells them apart, of as many as are looked at."""


class Producer:
    """An opened plugin: may make columns for each request, and follow the request to its end.

    Hooks are called exactly once each, in the order produce, chosen, (first_token), finished; ``finished`` comes for
    every chosen request, aborted ones too.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.detailed = False
        """Somebody reads the columns that are dear to make."""

    def produce(self, request: Request, candidates: Candidates, now_s: float) -> dict[str, Array]:
        return {}

    def load(self, candidates: Candidates, now_s: float) -> dict[str, Array]:
        """Columns of what is in flight on each endpoint, of no request in particular."""
        return {}

    def predicted(self, candidates: Candidates, position: int, prefill: int | None = None) -> Prediction | None:
        """What was predicted for the endpoint at ``position`` of the full column; ``prefill`` is that of the endpoint
        which computes the prompt, where it is another."""
        return None

    def reply_headers(self, request: Request, candidates: Candidates, stages: Mapping[str, int]) -> Mapping[str, str]:
        """Headers to add to the reply. ``stages``: profile -> position of the endpoint it picked first."""
        return {}

    def chosen(self, decision: Decision, candidates: Candidates, position: int, now_s: float) -> None: ...

    def first_token_due_ms(self, ticket: str) -> float:
        """How long after its choice the first token of a request is to be expected; 0 when it cannot tell."""
        return 0.0

    def first_token(self, ticket: str, now_s: float) -> None: ...

    def first_token_seen(self, ticket: str, ttft_ms: float, now_s: float) -> None:
        """The same where it was measured rather than assumed."""

    def learn_reply(self, ticket: str, said: bytes) -> None:
        """Before ``finished``, of a good reply whose text was seen: what the next turn's prompt adds to this one's."""

    def finished(self, ticket: str, outcome: Outcome, now_s: float) -> None: ...

    def endpoints_changed(self, endpoints: list[Endpoint]) -> None:
        """The pool's members after an addition or removal."""

    def state(self) -> Mapping[str, object]:
        """What it holds, for whoever looks into the running process: numbers, and the first of many entries."""
        return {}


class Stateful(Plugin, frozen=True):
    """Parameters of a plugin that owns state; ``open`` makes the live one, which filters or scores if this does."""

    def open(self, name: str) -> Producer:
        raise NotImplementedError


class ProducerPlugin(Stateful, frozen=True):
    """Parameters of a producer."""

    provides: ClassVar[Attribute]
