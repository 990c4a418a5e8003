"""What both data paths share: headers and body to a Request, the choice, and its end.

The outcome log, when asked for, has one JSON line per finished request: what was predicted, by which model version,
and what was measured. It is the record against which anyone can check our numbers.
"""

from __future__ import annotations

import logging
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from google.protobuf.struct_pb2 import Struct

from llmd_sched import headers as names
from llmd_sched.errors import BadRequest, RequestError, UnsupportedMode
from llmd_sched.extproc.session import Route
from llmd_sched.parsers.openai import with_model
from llmd_sched.parsers.registry import ParserRegistry
from llmd_sched.plugin import Identity, Parsed, Reporter
from llmd_sched.prefix.hashing import BYTES_PER_TOKEN
from llmd_sched.router import Router
from llmd_sched.telemetry import Series, Telemetry
from llmd_sched.types import Decision, End, Endpoint, Outcome, Request

log = logging.getLogger(__name__)

DEFAULT_FLOW = "default-flow"

MAX_SLO_MS = 86_400_000.0
"""A day; anything beyond is a mistake, not a target."""


_CANNOT_REWRITE = (
    "the model name is to be rewritten, which changes content-length; send such requests with request_header_mode SEND"
)


class Routed(NamedTuple):
    """A choice, and the body to send upstream."""

    decision: Decision
    body: bytes
    body_changed: bool


Admit = Callable[[Request, Collection[str] | None], Awaitable[Decision]]
"""Waits until there is room for a request, then chooses. Raises RequestError."""

Tokenize = Callable[[str, bytes], Awaitable[tuple[bytes, ...] | None]]
"""Path and body -> the prompts' token ids, as ``Request.prompts`` has them; None = nobody could tell."""


class EndpointPicker:
    """One per process. ``clock`` is the time everything in it is measured on, in seconds.

    ``identities`` by name, and ``plugin_headers`` (lower case): the request headers plugins look at.
    """

    def __init__(
        self,
        router: Router,
        parsers: ParserRegistry,
        telemetry: Telemetry,
        *,
        clock: Callable[[], float] = time.monotonic,
        outcome_log: logging.Logger | None = None,
        admit: Admit | None = None,
        tokenize: Tokenize | None = None,
        identities: Mapping[str, Identity] | None = None,
        reporters: Sequence[Reporter] = (),
        plugin_headers: Collection[str] = (),
    ) -> None:
        self.router = router
        self.parsers = parsers
        self.telemetry = telemetry
        self.clock = clock
        self._outcome_log = outcome_log
        self._admit = admit or self._choose
        self._tokenize = tokenize
        self._identities = identities or {}
        self._reporters = tuple(reporters)
        self._plugin_headers = tuple(plugin_headers)

    async def _choose(self, request: Request, subset: Collection[str] | None) -> Decision:
        return self.router.choose(request, subset, self.clock())

    async def route(self, route: Route, body: bytes) -> Routed:
        """Raises RequestError."""
        path = _path(route.headers)
        parsed = self.parsers.parse(path, body)
        if self._tokenize is not None and parsed.prompts:
            prompts = await self._tokenize(path, body)
            parsed = parsed if prompts is None else msgspec.structs.replace(parsed, prompts=prompts)
        request = self._request(route.headers, parsed, len(body))
        changed = parsed.names_model and request.target_model != parsed.model
        if changed:
            if not route.may_rewrite:
                raise UnsupportedMode(_CANNOT_REWRITE)
            body = with_model(body, request.target_model)
        series = self._series(request)
        series.requests.inc()
        series.size_bytes.observe(request.size_bytes)
        began_s = time.perf_counter()
        try:
            decision = await self._admit(request, route.subset)
        except RequestError as error:
            self.telemetry.errors.labels(*series.labels, error.code).inc()
            self.telemetry.attempts.labels("failure", series.labels[1], "", "", "").inc()
            raise
        self.telemetry.scheduler_s.observe(time.perf_counter() - began_s)
        self._observe_choice(decision, series)
        return Routed(decision, body, changed)

    def route_blindly(self, route: Route) -> tuple[Endpoint, str]:
        """For a request without a body: an endpoint, and a request id to add if it has none."""
        return self.router.choose_any(route.subset, self.clock()), _new_id()

    def _request(self, headers: Mapping[str, str], parsed: Parsed, size_bytes: int) -> Request:
        target = _first(headers, names.MODEL_REWRITE) or parsed.model
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
            fairness_id=_first(headers, names.FAIRNESS_ID) or self._flow(identities),
            ttft_slo_ms=self._slo_ms(headers, names.TTFT_SLO_MS),
            tpot_slo_ms=self._slo_ms(headers, names.TPOT_SLO_MS),
            size_bytes=size_bytes,
            media=parsed.media,
            skip_reply=parsed.skip_reply,
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
        self.telemetry.ignored_headers.labels(which[0]).inc()
        return None

    def _series(self, request: Request) -> Series:
        return self.telemetry.series(request.model, request.target_model, request.fairness_id, request.priority)

    def _observe_choice(self, decision: Decision, series: Series) -> None:
        best = decision.picked[0]
        self.telemetry.attempts.labels("success", series.labels[1], best.name, best.namespace, str(best.port)).inc()
        if decision.prediction is not None:
            p = decision.prediction
            series.predictions.observe(p.producer, p.ttft_ms / 1e3, p.tpot_ms / 1e3, p.took_s)

    def first_token(self, ticket: str) -> None:
        self.router.first_token(ticket, self.clock())

    def expect_first_token(self, decision: Decision) -> None:
        """The lean path does not show it; take the prediction's word."""
        if decision.prediction is not None:
            self.router.expect_first_token(decision.ticket, decision.at_s + decision.prediction.ttft_ms / 1e3)

    def report(self, outcome: Outcome) -> Struct | None:
        """What the reporters tell the proxy of a reply that has ended."""
        told = [found for one in self._reporters if (found := one.report(outcome)) is not None]
        metadata = Struct()
        for namespace, key, value in told:
            metadata.fields[namespace].struct_value.fields[key].number_value = value
        return metadata if told else None

    def finish(self, ticket: str, outcome: Outcome) -> None:
        now_s = self.clock()
        decision = self.router.finish(ticket, outcome, now_s)
        if decision is not None:
            self._observe_end(decision, outcome, now_s)
            if self._outcome_log is not None:
                self._outcome_log.info("%s", outcome_line(decision, outcome, now_s))

    def _observe_end(self, decision: Decision, outcome: Outcome, now_s: float) -> None:
        series = self._series(decision.request)
        series.duration_s.observe(now_s - decision.at_s)
        if outcome.end is not End.FINISHED or outcome.status >= 400:
            code = "ModelServerError" if outcome.end is End.FINISHED else outcome.end.value
            self.telemetry.errors.labels(*series.labels, code).inc()
            return
        for histogram, value in (
            (series.input_tokens, outcome.prompt_tokens or decision.request.input_tokens),
            (series.output_tokens, outcome.output_tokens),
            (series.cached_tokens, outcome.cached_tokens),
            (series.response_bytes, outcome.response_bytes),
        ):
            if value:
                histogram.observe(value)
        if outcome.ttft_ms is not None:
            series.ttft_s[outcome.streamed].observe(outcome.ttft_ms / 1e3)
        if outcome.tpot_ms is not None:
            series.tpot_s.observe(outcome.tpot_ms / 1e3)
        if decision.prediction is not None and outcome.streamed:
            plugin, request = decision.prediction.producer, decision.request
            for target, measured_ms, slo_ms in (
                ("ttft", outcome.ttft_ms, request.ttft_slo_ms),
                ("tpot", outcome.tpot_ms, request.tpot_slo_ms),
            ):
                if measured_ms is not None:
                    series.predictions.measure(plugin, target, measured_ms, slo_ms)


def outcome_line(decision: Decision, outcome: Outcome, now_s: float) -> str:
    """One request as a JSON object: the decision's trace beside what became of it."""
    p = decision.prediction
    record: dict[str, Any] = {
        "time_s": round(time.time(), 3),
        "request_id": decision.request.id,
        "model": decision.request.target_model,
        "endpoint": decision.picked[0].key,
        "destination": decision.picked[0].hostport,
        "scores": {hostport: round(score, 4) for hostport, score in decision.scores.items()},
        "explored": decision.explored,
        "model_version": p.model_version if p else None,
        "predicted_ttft_ms": round(p.ttft_ms, 3) if p else None,
        "predicted_tpot_ms": round(p.tpot_ms, 3) if p else None,
        "predicted_ttft_quantiles_ms": [round(value, 3) for value in p.ttft_quantiles_ms] if p else None,
        "predicted_tpot_quantiles_ms": [round(value, 3) for value in p.tpot_quantiles_ms] if p else None,
        "end": outcome.end.value,
        "status": outcome.status,
        "ttft_ms": _rounded(outcome.ttft_ms),
        "tpot_ms": _rounded(outcome.tpot_ms),
        "e2e_ms": _rounded(outcome.e2e_ms),
        "input_tokens": decision.request.input_tokens,
        "prompt_tokens": outcome.prompt_tokens,
        "cached_tokens": outcome.cached_tokens,
        "output_tokens": outcome.output_tokens,
        "open_s": round(now_s - decision.at_s, 4),
    }
    if decision.stages:
        record["stages"] = {stage.profile: stage.picked[0].key for stage in decision.stages}
    return msgspec.json.encode(record).decode()


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _first(headers: Mapping[str, str], which: tuple[str, ...]) -> str:
    """Canonical name first, then its aliases."""
    return next((headers[name] for name in which if name in headers), "")


def _path(headers: Mapping[str, str]) -> str:
    return _first(headers, names.PATHS)


def _new_id() -> str:
    return str(uuid.uuid4())
