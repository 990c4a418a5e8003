"""Requests of one session stay with the endpoint that served the first of them.

Two ways to know the session: a token that names its endpoint, which the client got with the last reply and sends
back (nothing is kept here), or an identifier of the client's own, which is bound to an endpoint here.
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmd_sched.errors import ConfigError
from llmd_sched.headers import SESSION_ID, SESSION_TOKEN
from llmd_sched.plugin import DEFAULT_PRODUCER, Attribute, Filter, Producer, Reads, Scorer, Stateful, reads
from llmd_sched.sched import tokens
from llmd_sched.sched.identities import MAX_ID_CHARACTERS
from llmd_sched.types import Array, Candidates, Decision, Request

BY_TOKEN, BY_ID = "encoded_endpoint_header", "session_id"

AGENT_IDENTITY = "agent-identity"
"""Attribute and, unless configured otherwise, name of the plugin that makes it."""

MAX_SESSIONS = 100_000
"""Bound at once; beyond it the one unused for longest is forgotten."""

SWEPT_AT_ONCE = 1000
"""Expired sessions forgotten within one decision, so that none waits for many."""


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Base of what stands inside the parameters."""


class EncodedEndpointHeader(_Strict, frozen=True):
    """The header with the token. ``secretFile``: sign tokens with its first line, and take those signed with any;
    ``acceptUnsigned``: take plain ones too, while clients still hold some. Without a file tokens are plain base64, as
    the reference's."""

    header: str = SESSION_TOKEN
    secret_file: str = ""
    accept_unsigned: bool = False


class Source(_Strict, frozen=True):
    """A request header, or an attribute: SessionID of ``producer``, or agent-identity."""

    header: str = ""
    attribute: str = ""
    producer: str = ""

    def check(self) -> None:
        """Raises ValueError with what is accepted."""
        if bool(self.header) == bool(self.attribute):
            raise ValueError("each of sources must have exactly one of header and attribute")
        if self.attribute not in ("", Attribute.SESSION_ID, AGENT_IDENTITY):
            known = f"{Attribute.SESSION_ID.value} and {AGENT_IDENTITY}"
            raise ValueError(f"attribute {self.attribute!r} of a source: accepted are {known}")

    @property
    def identity(self) -> str:
        """Name of the plugin that tells whose a request is."""
        usual = AGENT_IDENTITY if self.attribute == AGENT_IDENTITY else DEFAULT_PRODUCER[Attribute.SESSION_ID]
        return self.producer or usual

    def of(self, request: Request) -> str:
        """Empty when nothing says."""
        told = request.headers.get(self.header.lower()) if self.header else request.identities.get(self.identity)
        return (told or "").strip()[:MAX_ID_CHARACTERS]


class SessionIds(_Strict, frozen=True):
    """Where the identifier is, the first that is there; how long a session unused stays bound; how often is looked."""

    sources: tuple[Source, ...] = ()
    eviction_ttl_seconds: float = 300.0
    eviction_sweep_seconds: float = 10.0

    def check(self) -> None:
        """Raises ValueError with what is accepted."""
        for source in self.sources:
            source.check()
        if not 0 < self.eviction_ttl_seconds < float("inf") or not 0 < self.eviction_sweep_seconds < float("inf"):
            raise ValueError("evictionTtlSeconds and evictionSweepSeconds must be more than 0, and finite")


DEFAULT_SOURCES = (Source(header=SESSION_ID),)


class SessionAffinity(Stateful, frozen=True):
    """Parameters of both, the filter and the scorer."""

    strategy: str = BY_TOKEN
    profile_name: str = ""
    encoded_endpoint_header_config: EncodedEndpointHeader = EncodedEndpointHeader()
    session_id_config: SessionIds = SessionIds()

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.session_id_config.sources or DEFAULT_SOURCES

    def check(self) -> None:
        if self.strategy not in (BY_TOKEN, BY_ID):
            raise ValueError(f"strategy {self.strategy!r}: accepted are {BY_TOKEN} and {BY_ID}")
        if self.strategy == BY_ID:
            self.session_id_config.check()
        token = self.encoded_endpoint_header_config
        if self.strategy == BY_TOKEN and not token.header:
            raise ValueError("encodedEndpointHeaderConfig.header must not be empty")
        if self.strategy == BY_TOKEN and token.accept_unsigned and not token.secret_file:
            raise ValueError("acceptUnsigned has no meaning without secretFile: all tokens are unsigned then")

    def headers(self) -> tuple[str, ...]:
        if self.strategy == BY_TOKEN:
            return (self.encoded_endpoint_header_config.header.lower(),)
        return tuple(source.header.lower() for source in self.sources if source.header)

    def reads(self) -> tuple[Reads, ...]:
        named = [s.identity for s in self.sources if s.attribute] if self.strategy == BY_ID else []
        return tuple(reads(Attribute.SESSION_ID, name) for name in named)

    def open(self, name: str) -> Affinity:
        """Raises ConfigError when the file of secrets cannot be used."""
        return TokenAffinity(name, self) if self.strategy == BY_TOKEN else BoundAffinity(name, self)


class SessionAffinityScorer(Scorer, SessionAffinity, frozen=True):
    """1 for the endpoint that serves the session, 0 for all others.

    ``strategy`` encoded_endpoint_header: a token in the header ``encodedEndpointHeaderConfig.header`` names it, which
    is set on every reply and to be sent back; with ``secretFile`` only signed ones count. ``strategy`` session_id: the
    client's own identifier, from the first of ``sessionIdConfig.sources`` that is there ({header} or {attribute,
    producer}), is bound to the endpoint, and forgotten when unused for ``evictionTtlSeconds``. ``profileName``: whose
    pick it is about; empty = the primary profile.
    """


class SessionAffinityFilter(Filter, SessionAffinity, frozen=True):
    """Keep the endpoint that serves the session alone, if it is a candidate; else everybody.

    ``strategy`` encoded_endpoint_header: a token in the header ``encodedEndpointHeaderConfig.header`` names it, which
    is set on every reply and to be sent back; with ``secretFile`` only signed ones count. ``strategy`` session_id: the
    client's own identifier, from the first of ``sessionIdConfig.sources`` that is there ({header} or {attribute,
    producer}), is bound to the endpoint, and forgotten when unused for ``evictionTtlSeconds``. ``profileName``: whose
    pick it is about; empty = the primary profile.
    """


class Affinity(Producer):
    """The live side of either: knows which endpoint a request's session belongs to."""

    def __init__(self, name: str, params: SessionAffinity) -> None:
        super().__init__(name)
        self._profile = params.profile_name

    def bound(self, request: Request) -> str:
        """``namespace/name``; empty when there is no session, or none that is known."""
        raise NotImplementedError

    def score(self, request: Request, candidates: Candidates) -> Array:
        return self._there(request, candidates).astype(np.float64)

    def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
        there = self._there(request, candidates)
        return there if there.any() else ~there

    def _there(self, request: Request, candidates: Candidates) -> NDArray[np.bool_]:
        """True for the bound endpoint."""
        key, endpoints = self.bound(request), candidates.endpoints
        if not key:
            return np.zeros(len(candidates), dtype=bool)
        return np.array([endpoints[i].key == key for i in candidates.index.tolist()], dtype=bool)

    def _picked(self, candidates: Candidates, stages: Mapping[str, int]) -> str:
        """The endpoint its profile picked, empty when that did not run. The primary profile is the first of them."""
        position = stages.get(self._profile) if self._profile else next(iter(stages.values()))
        return "" if position is None else candidates.endpoints[position].key


class TokenAffinity(Affinity):
    """The client keeps the binding."""

    def __init__(self, name: str, params: SessionAffinity) -> None:
        super().__init__(name, params)
        token = params.encoded_endpoint_header_config
        self._header = token.header.lower()
        self._secrets = _secrets(token.secret_file) if token.secret_file else ()
        self._takes_unsigned = token.accept_unsigned or not self._secrets

    def bound(self, request: Request) -> str:
        token = request.headers.get(self._header, "")
        return (tokens.read(token, self._secrets, accept_unsigned=self._takes_unsigned) or "") if token else ""

    def reply_headers(self, request: Request, candidates: Candidates, stages: Mapping[str, int]) -> dict[str, str]:
        key = self._picked(candidates, stages)
        if not key:
            return {}
        plain = base64.b64encode(key.encode()).decode()
        return {self._header: tokens.sign(key, self._secrets[0]) if self._secrets else plain}


def _secrets(path: str) -> tuple[bytes, ...]:
    try:
        return tokens.secrets_of(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot use the session secrets: {getattr(e, 'strerror', None) or e}", path) from None


class _Binding(NamedTuple):
    """Which endpoint, and when it was last used."""

    key: str
    used_s: float


class BoundAffinity(Affinity):
    """The binding is kept here. It is made by the first request that is sent, and moves only when a request did not
    find its endpoint among the candidates."""

    def __init__(self, name: str, params: SessionAffinity) -> None:
        super().__init__(name, params)
        self._sources = params.sources
        self._ttl_s = params.session_id_config.eviction_ttl_seconds
        self._sweep_every_s = params.session_id_config.eviction_sweep_seconds
        self._sweep_at_s = -np.inf
        self._bindings: OrderedDict[str, _Binding] = OrderedDict()
        """By session, the one used last at the end."""
        self._lacked: Request | None = None
        """The request that looked last, if its endpoint was not among the candidates."""
        self._pick = ""
        """What the profile picked for the request being decided."""

    def __len__(self) -> int:
        return len(self._bindings)

    def produce(self, request: Request, candidates: Candidates, now_s: float) -> dict[str, Array]:
        if now_s >= self._sweep_at_s:
            self._sweep(now_s)
        return {}

    def _sweep(self, now_s: float) -> None:
        for _ in range(SWEPT_AT_ONCE):
            oldest = next(iter(self._bindings.values()), None)
            if oldest is None or now_s - oldest.used_s <= self._ttl_s:
                self._sweep_at_s = now_s + self._sweep_every_s
                return
            self._bindings.popitem(last=False)

    def _session(self, request: Request) -> str:
        return next((session for source in self._sources if (session := source.of(request))), "")

    def bound(self, request: Request) -> str:
        binding = self._bindings.get(self._session(request))
        return binding.key if binding else ""

    def _there(self, request: Request, candidates: Candidates) -> NDArray[np.bool_]:
        there = super()._there(request, candidates)
        self._lacked = None if there.any() else request
        return there

    def reply_headers(self, request: Request, candidates: Candidates, stages: Mapping[str, int]) -> dict[str, str]:
        """None. It is told here what each profile picked, the primary one too, just before it is ``chosen``."""
        self._pick = self._picked(candidates, stages)
        return {}

    def chosen(self, decision: Decision, candidates: Candidates, position: int, now_s: float) -> None:
        session, picked = self._session(decision.request), self._pick
        if not session or not picked:
            return
        binding = self._bindings.get(session)
        if binding is not None and binding.key != picked and self._lacked is not decision.request:
            return
        self._bindings[session] = _Binding(picked, now_s)
        self._bindings.move_to_end(session)
        if len(self._bindings) > MAX_SESSIONS:
            self._bindings.popitem(last=False)
