"""The literal table of plugin types: a new one is its class, a row in its family's table, and a test."""

from __future__ import annotations

from llmd_sched.parsers.registry import PARSERS
from llmd_sched.plugin import Plugin, ProducerPlugin
from llmd_sched.pool.discovery import FileDiscovery
from llmd_sched.pool.inflight import InFlightLoadProducer
from llmd_sched.predict.producer import PredictedLatencyProducer
from llmd_sched.prefix.approx import ApproxPrefixCacheProducer
from llmd_sched.sched.deciders import DECIDERS
from llmd_sched.sched.filters import FILTERS
from llmd_sched.sched.handlers import HANDLERS, NoHandler
from llmd_sched.sched.identities import IDENTITIES
from llmd_sched.sched.pickers import PICKERS
from llmd_sched.sched.scorers import SCORERS

PRODUCERS: dict[str, type[ProducerPlugin]] = {
    "approx-prefix-cache-producer": ApproxPrefixCacheProducer,
    "inflight-load-producer": InFlightLoadProducer,
    "predicted-latency-producer": PredictedLatencyProducer,
}
DISCOVERY: dict[str, type[Plugin]] = {"file-discovery": FileDiscovery}
IDLE: dict[str, type[Plugin]] = {
    "disagg-headers-handler": NoHandler,
    "prefill-header-handler": NoHandler,
}
"""Accepted, and without work here."""

TYPES: dict[str, type[Plugin]] = {
    **PARSERS, **PRODUCERS, **FILTERS, **SCORERS, **PICKERS, **HANDLERS, **DECIDERS, **IDENTITIES, **DISCOVERY, **IDLE,
}  # fmt: skip

ALPHA = frozenset({"agent-identity", "header-profile-handler", "session-id-producer", "utilization-filter"})
"""Refused without ``--allow-experimental-plugins``, as the reference does."""

DEPRECATED = {
    "by-label": "label-selector-filter",
    "data-parallel-profile-handler": "",
    "disagg-headers-handler": "disagg-profile-handler, which sets the headers",
    "pd-profile-handler": "disagg-profile-handler",
    "prefill-header-handler": "disagg-profile-handler, which sets the headers",
}
"""Type -> what to use instead; empty when there is nothing."""
