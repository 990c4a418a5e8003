"""The literal table of plugin types: a new one is its class, a row in its family's table, and a test."""

from __future__ import annotations

from llmd_sched.flow.limits import LIMITS
from llmd_sched.flow.policy import ORDERING
from llmd_sched.flow.program import FAIRNESS
from llmd_sched.flow.saturation import DETECTORS
from llmd_sched.headroom.producer import BatchHeadroomProducer
from llmd_sched.headroom.routing import BatchHeadroomFilter
from llmd_sched.parsers.producer import TokenProducer
from llmd_sched.parsers.registry import PARSERS
from llmd_sched.plugin import Filter, Picker, Plugin, ProducerPlugin, Scorer
from llmd_sched.pool.discovery import FileDiscovery
from llmd_sched.pool.dns import DnsDiscovery
from llmd_sched.pool.inflight import InFlightLoadProducer
from llmd_sched.pool.sources import EXTRACTORS, SOURCES
from llmd_sched.predict.producer import PredictedLatencyProducer
from llmd_sched.prefix.approx import ApproxPrefixCacheProducer
from llmd_sched.prefix.precise import PrecisePrefixCacheProducer
from llmd_sched.sched.admitters import ADMITTERS
from llmd_sched.sched.attributes import EndpointAttributeFilter, EndpointAttributeScorer
from llmd_sched.sched.cost import RequestCostScorer
from llmd_sched.sched.deciders import DECIDERS
from llmd_sched.sched.embeddings import MmEmbeddingsCacheProducer, MmEmbeddingsCacheScorer
from llmd_sched.sched.filters import FILTERS, LabelSelectorFilter
from llmd_sched.sched.handlers import HANDLERS, NoHandler
from llmd_sched.sched.identities import IDENTITIES
from llmd_sched.sched.lru import NoHitLruScorer
from llmd_sched.sched.objects import OBJECTS
from llmd_sched.sched.pickers import PICKERS
from llmd_sched.sched.reporters import REPORTERS
from llmd_sched.sched.rivals import DynamoCostScorer, PowerOfTwoPicker, RoundRobinScorer, SglangCacheAwareScorer
from llmd_sched.sched.scorers import SCORERS
from llmd_sched.sched.sessions import SessionAffinityFilter, SessionAffinityScorer
from llmd_sched.sched.testing import HeaderBasedTestingFilter

PRODUCERS: dict[str, type[ProducerPlugin]] = {
    "approx-prefix-cache-producer": ApproxPrefixCacheProducer,
    "batch-headroom-producer": BatchHeadroomProducer,
    "inflight-load-producer": InFlightLoadProducer,
    "mm-embeddings-cache-producer": MmEmbeddingsCacheProducer,
    "precise-prefix-cache-producer": PrecisePrefixCacheProducer,
    "predicted-latency-producer": PredictedLatencyProducer,
}
MORE_FILTERS: dict[str, type[Filter]] = {
    "batch-headroom-filter": BatchHeadroomFilter,
    "by-label-selector": LabelSelectorFilter,
    "endpoint-attribute-filter": EndpointAttributeFilter,
    "header-based-testing-filter": HeaderBasedTestingFilter,
    "session-affinity-filter": SessionAffinityFilter,
}
MORE_SCORERS: dict[str, type[Scorer]] = {
    "dynamo-cost-scorer": DynamoCostScorer,
    "endpoint-attribute-scorer": EndpointAttributeScorer,
    "mm-embeddings-cache-scorer": MmEmbeddingsCacheScorer,
    "no-hit-lru-scorer": NoHitLruScorer,
    "request-cost-scorer": RequestCostScorer,
    "round-robin-scorer": RoundRobinScorer,
    "session-affinity-scorer": SessionAffinityScorer,
    "sglang-cache-aware-scorer": SglangCacheAwareScorer,
}
MORE_PICKERS: dict[str, type[Picker]] = {"power-of-two-picker": PowerOfTwoPicker}
TOKENS: dict[str, type[Plugin]] = {"token-producer": TokenProducer, "tokenizer": TokenProducer}
DISCOVERY: dict[str, type[Plugin]] = {"file-discovery": FileDiscovery, "dns-discovery": DnsDiscovery}
IDLE: dict[str, type[Plugin]] = {
    "disagg-headers-handler": NoHandler,
    "prefill-header-handler": NoHandler,
}
"""Accepted, and without work here."""

TYPES: dict[str, type[Plugin]] = {
    **PARSERS, **PRODUCERS, **FILTERS, **SCORERS, **PICKERS, **HANDLERS, **DECIDERS, **IDENTITIES, **DISCOVERY, **IDLE,
    **FAIRNESS, **ORDERING, **LIMITS, **DETECTORS, **OBJECTS, **TOKENS, **MORE_FILTERS, **MORE_SCORERS, **MORE_PICKERS,
    **ADMITTERS, **REPORTERS, **SOURCES, **EXTRACTORS,
}  # fmt: skip

ALPHA = frozenset(
    {
        "agent-identity",
        "endpoint-attribute-filter",
        "endpoint-attribute-scorer",
        "header-profile-handler",
        "priority-holdback-policy",
        "request-attribute-reporter",
        "session-affinity-filter",
        "session-affinity-scorer",
        "session-id-producer",
        "soft-reflective-ceiling-policy",
        "utilization-filter",
    }
)
"""Refused without ``--allow-experimental-plugins``, as the reference does."""

PRECISE_SCORER = "precise-prefix-cache-scorer"
"""Stands for two plugins: precise-prefix-cache-producer, whose parameters it takes, and prefix-cache-scorer."""

DEPRECATED = {
    "by-label": "label-selector-filter",
    "by-label-selector": "label-selector-filter",
    "data-parallel-profile-handler": "",
    "disagg-headers-handler": "disagg-profile-handler, which sets the headers",
    "pd-profile-handler": "disagg-profile-handler",
    PRECISE_SCORER: "precise-prefix-cache-producer and prefix-cache-scorer",
    "prefill-header-handler": "disagg-profile-handler, which sets the headers",
    "tokenizer": "token-producer",
}
"""Type -> what to use instead; empty when there is nothing."""
