"""What both data paths share: headers and body to a Request, the choice, and its end."""

from __future__ import annotations

import asyncio
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from random import Random
from types import MappingProxyType
from typing import NamedTuple, Protocol

import msgspec
from google.protobuf.struct_pb2 import Struct

from llmd_sched import headers as names
from llmd_sched.errors import BadRequest, RequestError, UnsupportedMode
from llmd_sched.extproc.observer import Observer
from llmd_sched.extproc.session import Ended, Route
from llmd_sched.extproc.trust import TrustedSources, strip
from llmd_sched.parsers.registry import ParserRegistry
from llmd_sched.parsers.rewrite import with_model
from llmd_sched.parsers.said import said
from llmd_sched.plugin import Identity, Parsed, Producer, Reporter
from llmd_sched.prefix.hashing import BYTES_PER_TOKEN
from llmd_sched.router import Router
from llmd_sched.sched.timing import Timing, timed
from llmd_sched.types import Decision, End, Endpoint, Outcome, Request, Rewritten

DEFAULT_FLOW = "default-flow"

MAX_SLO_MS = 86_400_000.0
"""A day; anything beyond is a mistake, not a target."""


_CANNOT_REWRITE = (
    "the model name is to be rewritten, which changes content-length; send such requests with "
    "request_header_mode SEND (envoy-config --send-headers)"
)


_CANNOT_SET_HEADERS = (
    "the profile handler sets request headers; configure request_header_mode SEND (envoy-config --config-file)"
)


class Routed(NamedTuple):
    """A choice, and the body to send upstream."""

    decision: Decision
    body: bytes
    body_changed: bool
    remove: Sequence[str] = ()
    """Request headers that must not go on."""
    headers: Mapping[str, str] = MappingProxyType({})
    """Request headers to set beside the decision's."""


class _Choice(NamedTuple):
    """When a decision was made, on ``time.perf_counter``, and what its plugins took where that was timed."""

    began_s: float
    ended_s: float
    timings: tuple[Timing, ...]


class Objects(Protocol):
    """What the operator's objects say: a snapshot, read once for each request."""

    @property
    def priorities(self) -> Mapping[str, int]:
        """By name of the objective."""
        ...

    @property
    def models(self) -> Collection[str]:
        """Every model name a rewrite mentions."""
        ...

    def priority(self, objective: str) -> int:
        """0 for one that is not known."""
        ...

    def rewrite(self, model: str, rng: Random) -> Rewritten | None:
        """``model`` may be empty: then only a rule for every model applies."""
        ...


class _NoObjects:
    priorities: Mapping[str, int] = MappingProxyType({})
    models: Collection[str] = ()

    def priority(self, objective: str) -> int:
        return 0

    def rewrite(self, model: str, rng: Random) -> Rewritten | None:
        return None


NO_OBJECTS: Objects = _NoObjects()

Admit = Callable[[Request, Collection[str] | None], Awaitable[Decision]]
"""Waits until there is room for a request, then chooses. Raises RequestError."""


class Tokenize(Protocol):
    """The prompts' token ids, as ``Request.prompts`` has them; None = nobody could tell."""

    async def __call__(self, path: str, body: bytes, *, media: bool = False) -> tuple[bytes, ...] | None: ...


class EndpointPicker:
    """One per process. ``clock`` is the time everything in it is measured on, in seconds.

    ``identities`` by name; ``plugin_headers`` (lower case): the request headers plugins look at; ``plugin_types``: name
    of a plugin -> its type, where some decisions are to be timed plugin by plugin.
    """

    def __init__(
        self,
        router: Router,
        parsers: ParserRegistry,
        observer: Observer,
        *,
        clock: Callable[[], float] = time.monotonic,
        identities: Mapping[str, Identity] | None = None,
        reporters: Sequence[Reporter] = (),
        objects: Callable[[], Objects] = lambda: NO_OBJECTS,
        trusted: TrustedSources | None = None,
        plugin_headers: Collection[str] = (),
        plugin_types: Mapping[str, str] | None = None,
    ) -> None:
        self.router = router
        self.parsers = parsers
        self.observer = observer
        self.clock = clock
        self.admit: Admit = self._at_once
        types = plugin_types or {}
        self.timings: list[Timing] = []
        self._choices: dict[str, _Choice] = {}
        """Of requests that are traced and not sent on yet."""
        router.sampled = timed(router.scheduling, types, time.perf_counter, self.timings) if types else None
        self.tokenize: Tokenize | None = None
        self._identities = identities or {}
        self._reporters = tuple(reporters)
        self._objects = objects
        self._trusted = trusted
        self._rng = Random()
        self._plugin_headers = tuple(plugin_headers)
        self._learners = tuple(p for p in router.producers if type(p).learn_reply is not Producer.learn_reply)

    async def _at_once(self, request: Request, subset: Collection[str] | None) -> Decision:
        return self.choose(request, subset, self.clock())

    def choose(self, request: Request, subset: Collection[str] | None, now_s: float) -> Decision:
        """What ``admit`` ends in. Raises RequestError."""
        began_s = time.perf_counter()
        decision = self.router.choose(request, subset, now_s)
        ended_s = time.perf_counter()
        self.observer.telemetry.scheduler_s.observe(ended_s - began_s)
        if self.observer.traces:
            self._choices[decision.ticket] = _Choice(began_s, ended_s, tuple(self.timings))
        if self.timings:
            self.observer.telemetry.observe_plugins(self.timings)
            self.timings.clear()
        return decision

    async def route(self, route: Route, body: bytes) -> Routed:
        """Raises RequestError."""
        span = self.observer.tracer.request(route.headers)
        try:
            routed = await self._route(route, body)
        except RequestError as error:
            span.refused(error.code, error.status)
            raise
        except asyncio.CancelledError:
            span.refused("aborted", 0)
            raise
        choice = self._choices.pop(routed.decision.ticket, None)
        if choice is not None:
            span.profile(routed.decision.profile, *choice)
        span.decided(routed.decision.ticket, {"endpoint": routed.decision.picked[0].key})
        return routed._replace(headers=span.headers) if span.headers else routed

    async def _route(self, route: Route, body: bytes) -> Routed:
        headers, remove = self._believed(route)
        parsed = await self._parse(headers, body)
        request = self._request(headers, parsed, len(body))
        changed = parsed.names_model and request.target_model != parsed.model
        if not route.may_rewrite and (changed or self.router.scheduling.handler.own_headers):
            raise UnsupportedMode(_CANNOT_REWRITE if changed else _CANNOT_SET_HEADERS)
        if changed:
            body = with_model(body, request.target_model)
        self.observer.received(request)
        try:
            decision = await self.admit(request, route.subset)
        except RequestError as error:
            self.observer.refused(request, error)
            raise
        self.observer.chosen(decision)
        return Routed(decision, body, changed, remove)

    async def _parse(self, headers: Mapping[str, str], body: bytes) -> Parsed:
        path = path_of(headers)
        parsed = self.parsers.parse(path, body, headers)
        if self.tokenize is None or not parsed.prompts:
            return parsed
        prompts = await self.tokenize(path, body, media=parsed.media > 0)
        return parsed if prompts is None else msgspec.structs.replace(parsed, prompts=prompts)

    def _believed(self, route: Route) -> tuple[Mapping[str, str], Sequence[str]]:
        """The headers without those that only trusted peers may set, and the names of these."""
        if self._trusted is None or self._trusted.trusts(route.peer):
            return route.headers, ()
        return strip(route.headers)

    def route_blindly(self, route: Route) -> tuple[Endpoint, str]:
        """For a request without a body: an endpoint, and a request id to add if it has none."""
        return self.router.choose_any(route.subset, self.clock()), _new_id()

    def _request(self, headers: Mapping[str, str], parsed: Parsed, size_bytes: int) -> Request:
        objects = self._objects()
        rewritten = objects.rewrite(parsed.model, self._rng) if parsed.names_model else None
        if rewritten is not None:
            self.observer.rewritten(parsed.model, rewritten)
        target = rewritten.model if rewritten else _first(headers, names.MODEL_REWRITE) or parsed.model
        identities = {name: value for name, one in self._identities.items() if (value := one.of(headers))}
        if parsed.names_model and not target:
            raise BadRequest("model not found in request body")
        return Request(
            id=headers.get(names.REQUEST_ID) or _new_id(),
            model=parsed.model,
            target_model=target,
            prompts=parsed.prompts,
            input_tokens=sum(-(-len(p) // BYTES_PER_TOKEN) for p in parsed.prompts),
            max_output_tokens=parsed.max_output_tokens,
            streaming=parsed.streaming,
            cache_salt=parsed.cache_salt,
            priority=objects.priority(_first(headers, names.OBJECTIVE)),
            fairness_id=_first(headers, names.FAIRNESS_ID) or self._flow(identities),
            ttft_slo_ms=self._slo_ms(headers, names.TTFT_SLO_MS),
            tpot_slo_ms=self._slo_ms(headers, names.TPOT_SLO_MS),
            size_bytes=size_bytes,
            media=parsed.media,
            media_hashes=parsed.media_hashes,
            headers={name: headers[name] for name in self._plugin_headers if name in headers},
            identities=identities,
            only_if_cached=names.PREFER_CACHED in re.split(r"[,;\s]+", headers.get(names.PREFER, "").lower()),
        )

    def _flow(self, identities: Mapping[str, str]) -> str:
        """The first of the identities that name flows."""
        named = (value for name, value in identities.items() if self._identities[name].names_flow)
        return next(named, DEFAULT_FLOW)

    def _slo_ms(self, headers: Mapping[str, str], which: tuple[str, ...]) -> float | None:
        """A positive, finite number of milliseconds; anything else is counted and asks for nothing."""
        text = _first(headers, which)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if 0 < value <= MAX_SLO_MS:
            return value
        self.observer.ignored(which[0])
        return None

    def first_token(self, ticket: str) -> None:
        self.router.first_token(ticket, self.clock())

    def report(self, outcome: Outcome) -> Struct | None:
        """What the reporters tell the proxy of a reply that has ended."""
        told = [found for one in self._reporters if (found := one.report(outcome)) is not None]
        metadata = Struct()
        for namespace, key, value in told:
            metadata.fields[namespace].struct_value.fields[key].number_value = value
        return metadata if told else None

    @property
    def learns_replies(self) -> bool:
        return bool(self._learners)

    def learn(self, ticket: str, path: str, ended: Ended) -> None:
        """The next turn's prompt will hold this reply, and its endpoint has that in cache already."""
        outcome = ended.outcome
        if ended.reply and outcome.end is End.FINISHED and outcome.status == 200:
            text = said(path, ended.reply, streamed=outcome.streamed)
            for learner in self._learners if text else ():
                learner.learn_reply(ticket, text)

    def finish(self, ticket: str, outcome: Outcome) -> None:
        now_s = self.clock()
        self._choices.pop(ticket, None)
        decision = self.router.finish(ticket, outcome, now_s)
        if decision is not None:
            self.observer.ended(decision, outcome, now_s)


def _first(headers: Mapping[str, str], which: tuple[str, ...]) -> str:
    """Canonical name first, then its aliases."""
    return next((headers[name] for name in which if name in headers), "")


def path_of(headers: Mapping[str, str]) -> str:
    return _first(headers, names.PATHS)


def _new_id() -> str:
    return str(uuid.uuid4())
