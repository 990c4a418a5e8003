"""The words all else shares: five nouns, each made once, frozen, and handed forward.

    bytes -> Request -> Candidates -> Decision -> (headers)
    chunks or an access-log entry -> Outcome -> Sample -> trainer

A column is a float64 array with one entry per candidate. Columns made for one request by a producer carry the
producer's name, ``attribute/producer``, so that two producers of one kind can stand side by side.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One inference request as its parser and headers describe it."""

    id: str
    """``x-request-id``: the client's name for it. Not unique, so it is never a key of ours."""
    model: str = ""
    """The model name the client asked for; empty when the parser cannot tell (pass-through)."""
    target_model: str = ""
    """The name sent upstream: ``model`` unless the request is rewritten."""
    prompts: tuple[bytes, ...] = ()
    """Prompt text as UTF-8, or token ids as little-endian uint32 when the client sent ids. Four bytes are one
    token (the reference's estimate), so both forms are hashed alike."""
    input_tokens: int = 0
    max_output_tokens: int | None = None
    streaming: bool = False
    cache_salt: str = ""
    priority: int = 0
    fairness_id: str = "default-flow"
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    size_bytes: int = 0
    only_if_cached: bool = False
    """Refuse it unless the chosen endpoint holds some of the prompt."""
    media: int = 0
    """Images, videos and sounds in the prompt."""
    media_hashes: tuple[int, ...] = ()
    """What tells them apart, of as many as are looked at."""
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    """Of those a plugin asked for, the ones the request has: lower-case name -> value."""
    identities: Mapping[str, str] = msgspec.field(default_factory=dict)
    """Name of a plugin that tells whose a request is -> what it said; absent when it said nothing."""


class Rewritten(msgspec.Struct, frozen=True):
    """``model``: the name a request is sent upstream under; ``by``: the name of the object that says so."""

    model: str
    by: str


class Endpoint(msgspec.Struct, frozen=True, dict=True):
    """One ``address:port`` of a model server. Its identity everywhere is ``namespace/name``."""

    name: str
    address: str
    """An IP address, ready for the destination header (host names are resolved by discovery)."""
    port: int
    namespace: str = "default"
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @cached_property
    def server(self) -> tuple[str, str]:
        """Identity and address: one of the same name at another address is another server, which starts empty."""
        return self.key, self.hostport

    @cached_property
    def hostport(self) -> str:
        """``ip:port``, IPv6 in brackets: the value of the destination header."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


class Adapters(msgspec.Struct, frozen=True):
    """The LoRA adapters of one endpoint, by name."""

    running: frozenset[str] = frozenset()
    """Loaded: requests of theirs are being served."""
    waiting: frozenset[str] = frozenset()
    """Some of their requests wait; an adapter may run as well."""
    most: int = 0
    """How many may be loaded at once (``max_lora``); 0 when unknown, or when it serves none."""


class Candidates:
    """The endpoints one request may go to, as aligned columns.

    ``columns`` is shared by all views of one decision; ``index`` says which rows this view keeps, so a filter costs
    one small array and untouched columns are never copied. Missing columns are a programming error (KeyError):
    what a plugin reads is checked when the profile is built.
    """

    __slots__ = ("adapters", "columns", "endpoints", "index")

    def __init__(
        self,
        endpoints: list[Endpoint],
        columns: dict[str, Array],
        index: NDArray[np.intp] | None = None,
        adapters: Sequence[Adapters] = (),
    ) -> None:
        self.endpoints = endpoints
        self.columns = columns
        self.adapters = adapters
        """The LoRA adapters of each endpoint, one entry per row of the columns; empty when nothing is known of any."""
        self.index = _everyone(len(endpoints)) if index is None else index

    def __len__(self) -> int:
        return len(self.index)

    def column(self, name: str) -> Array:
        """The named column for the endpoints in view, shape (len(self),)."""
        values = self.columns[name]
        return values if len(self.index) == len(values) else values[self.index]

    def get(self, name: str) -> Array | None:
        """The named column, or None when nothing produced it (a producer failed, or is not configured)."""
        return self.column(name) if name in self.columns else None

    def compact(self) -> Candidates:
        """The same candidates as a decision of their own: columns hold these endpoints and no others."""
        endpoints = [self.endpoints[i] for i in self.index]
        adapters = [self.adapters[i] for i in self.index] if self.adapters else ()
        columns = {name: values[self.index] for name, values in self.columns.items()}
        return Candidates(endpoints, columns, None, adapters)

    def with_columns(self, columns: Mapping[str, Array]) -> Candidates:
        """A view with more columns (full length: one entry per endpoint of the decision)."""
        return Candidates(self.endpoints, {**self.columns, **columns}, self.index, self.adapters)

    def keep(self, mask: NDArray[np.bool_]) -> Candidates:
        """The view of the endpoints where ``mask`` (aligned with this view) is true."""
        return self if mask.all() else Candidates(self.endpoints, self.columns, self.index[mask], self.adapters)


@cache
def _everyone(count: int) -> NDArray[np.intp]:
    """0 .. count - 1; shared, so not to be written to."""
    index = np.arange(count)
    index.setflags(write=False)
    return index


QUANTILES = (0.5, 0.9)
"""The levels at which latencies are predicted beside the point forecast."""


class Prediction(msgspec.Struct, frozen=True):
    """What the model said of the chosen endpoint. ``row`` is the feature row it was computed from."""

    row: tuple[float, ...]
    ttft_ms: float
    tpot_ms: float
    model_version: int
    ttft_quantiles_ms: tuple[float, ...] = ()
    """At ``QUANTILES``; empty where nobody keeps them."""
    tpot_quantiles_ms: tuple[float, ...] = ()
    endpoint: str = ""
    """Identity of the endpoint, ``namespace/name``."""
    producer: str = ""
    """Name of the plugin that predicted."""
    prefill_row: tuple[float, ...] | None = None
    """The row of TTFT where another endpoint computes the prompt; ``row`` is TPOT's alone then."""
    prefill_endpoint: str = ""
    """Identity of that endpoint."""
    took_s: float = 0.0
    """How long the prediction took, all candidates and both targets."""


class Scores(Mapping[str, float]):
    """``ip:port`` -> total score, for every candidate that was scored; made when somebody looks."""

    __slots__ = ("_endpoints", "_index", "_made", "_values")

    def __init__(self, endpoints: Sequence[Endpoint], index: NDArray[np.intp], values: Array) -> None:
        """``values`` (n,) are those of ``endpoints[index[i]]``."""
        self._endpoints, self._index, self._values = endpoints, index, values
        self._made: dict[str, float] | None = None

    def _all(self) -> dict[str, float]:
        if self._made is None:
            rows = zip(self._index.tolist(), self._values.tolist(), strict=True)
            self._made = {self._endpoints[i].hostport: score for i, score in rows}
        return self._made

    def __getitem__(self, hostport: str) -> float:
        return self._all()[hostport]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._index)


class Stage(msgspec.Struct, frozen=True):
    """What one more profile picked, beside the primary one."""

    profile: str
    picked: tuple[Endpoint, ...]
    position: int
    """Of the first one among the candidates."""


class Verdict(msgspec.Struct, frozen=True):
    """What one filter left, as rows of the candidates' columns."""

    filter: str
    kept: NDArray[np.intp]


class Trace(msgspec.Struct, frozen=True):
    """How a decision came about, rendered when somebody asks."""

    endpoints: Sequence[Endpoint]
    columns: Mapping[str, Array]
    """What producers said of each endpoint."""
    verdicts: tuple[Verdict, ...] = ()
    position: int = 0
    """Of the first endpoint picked."""

    def as_json(self) -> dict[str, object]:
        keys = [e.key for e in self.endpoints]
        produced = {
            name: dict(zip(keys, (round(v, 4) for v in values.tolist()), strict=True))
            for name, values in self.columns.items()
        }
        filters = [{"filter": v.filter, "kept": [keys[i] for i in v.kept.tolist()]} for v in self.verdicts]
        return {"produced": produced, "filters": filters}


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request goes, and why."""

    ticket: str
    """Our own key of the request, unique in this process; rides through Envoy as dynamic metadata."""
    request: Request
    picked: tuple[Endpoint, ...]
    """In order of preference; the first is the one that is charged."""
    profile: str = ""
    """The one whose pick this is."""
    stages: tuple[Stage, ...] = ()
    """Endpoints that do part of the work (prefill, encode), by profile."""
    elsewhere: str = ""
    """The destination where it is not simply the endpoints picked."""
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    """To set on the request."""
    reply_headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    """To set on the reply."""
    trace: Trace | None = None

    @property
    def destination(self) -> str:
        """``ip:port``, or several in order of preference, comma separated."""
        return self.elsewhere or ",".join(e.hostport for e in self.picked)

    scores: Mapping[str, float]
    """``ip:port`` -> total score, for every candidate that was scored."""
    prediction: Prediction | None
    explored: bool = False
    at_s: float


class End(enum.StrEnum):
    """How a request ended."""

    FINISHED = "finished"
    """The reply was complete; its status may still be an error."""
    ABORTED = "aborted"
    """The client went away, or the stream broke off and nobody can say on which side."""
    UPSTREAM_FAILED = "upstream-failed"
    """The model server could not be reached, or broke off in mid-reply."""
    EVICTED = "evicted"
    """We ended it ourselves, to make room."""
    LOST = "lost"
    """No outcome was ever reported (the proxy died, an access-log entry was lost)."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a request. Times are relative to when it was sent upstream; None = not observed."""

    end: End
    status: int = 0
    ttft_ms: float | None = None
    e2e_ms: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    streamed: bool = False
    """The reply came in more than one event, so its first chunk is its first token."""
    response_bytes: int = 0

    @property
    def tpot_ms(self) -> float | None:
        """(e2e - ttft) / (tokens - 1); None unless the reply streamed at least two tokens."""
        tokens = self.output_tokens or 0
        if not self.streamed or self.ttft_ms is None or self.e2e_ms is None or tokens < 2:
            return None
        return (self.e2e_ms - self.ttft_ms) / (tokens - 1)


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One labelled row for the trainer. A label that was not observed is None."""

    row: tuple[float, ...]
    ttft_ms: float | None
    tpot_ms: float | None
    predicted_ttft_ms: float
    predicted_tpot_ms: float
    model_version: int
    at_s: float
    explored: bool = False
    endpoint: str = ""
    """Identity of the endpoint that answered; empty = not known, so nothing is learned of it in particular."""
