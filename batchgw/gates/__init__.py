"""Gates by their names in the reference; with them batchgw works behind any router.

A gate is written as ``{type: prometheus-saturation, inferencePool: pool-a}``. A type not in ``GATES`` is refused at
start: a gate that is open because its name was misspelt protects nobody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from batchgw.errors import ConfigError
from batchgw.gates.aimd import Aimd
from batchgw.gates.base import Gate, Spec, Tools
from batchgw.gates.local import All, Composite, Constant, LocalMaxConcurrency
from batchgw.gates.prometheus import PrometheusBudget, PrometheusQuery, PrometheusSaturation
from batchgw.gates.redis import Redis, RedisQuota
from batchgw.gates.scrape import EndpointScrape

GATES: Mapping[str, type[Spec]] = {
    "constant": Constant,
    "redis": Redis,
    "redis-quota": RedisQuota,
    "local-max-concurrency": LocalMaxConcurrency,
    "prometheus-saturation": PrometheusSaturation,
    "prometheus-budget": PrometheusBudget,
    "prometheus-query": PrometheusQuery,
    "endpoint-scrape": EndpointScrape,
    "composite": Composite,
    "aimd": Aimd,
}

MAX_DEPTH = 4
"""Of composites in composites."""


def gate(written: Mapping[str, Any], tools: Tools, path: str = "$.gate", depth: int = 0) -> Gate:
    """A live gate, not opened. Raises ConfigError with the place and what is accepted."""
    spec = parse(written, tools, path)
    if not isinstance(spec, Composite):
        return spec.make(tools)
    if depth == MAX_DEPTH:
        raise ConfigError(f"composites may hold each other {MAX_DEPTH} deep", path)
    return All([gate(one, tools, f"{path}.gates[{i}]", depth + 1) for i, one in enumerate(spec.gates)])


def parse(written: Mapping[str, Any], tools: Tools, path: str = "$.gate") -> Spec:
    """The parameters, checked. Numbers may be written as strings, names in snake_case: the reference has both."""
    name = written.get("type")
    known = GATES.get(name) if isinstance(name, str) else None
    if known is None:
        raise ConfigError(f"unknown gate {name!r}; known are {', '.join(sorted(GATES))}", f"{path}.type")
    parameters = {_camel(key): value for key, value in written.items() if key != "type"}
    try:
        spec = msgspec.convert(parameters, known, strict=False)
        spec.check(tools)
    except msgspec.ValidationError as e:
        fields = ", ".join(field.encode_name for field in msgspec.structs.fields(known)) or "none"
        raise ConfigError(f"gate {name}: {e}; parameters are: {fields}", path) from None
    except ValueError as e:
        raise ConfigError(f"gate {name}: {e}", path) from None
    return spec


def _camel(name: str) -> str:
    return re.sub("_([a-z])", lambda found: found[1].upper(), name)
