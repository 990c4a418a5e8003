"""``EndpointPickerConfig``: the document as frozen structs, loaded strictly. Every error says where in the file.

Read once at start. What the document means (defaults, which plugin is what) is ``catalog``'s business.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
import yaml

from llmd_sched.errors import ConfigError

T = TypeVar("T")

API_VERSIONS = ("llm-d.ai/v1alpha1", "inference.networking.x-k8s.io/v1alpha1")
KIND = "EndpointPickerConfig"
MAX_CONFIG_BYTES = 1 << 20

FEATURE_GATES = {"flowControl": False, "haPopulateNonLeaderDatastore": True}

DEFAULT_CONFIG = """\
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: queue-scorer}
- {type: kv-cache-utilization-scorer}
- {type: prefix-cache-scorer}
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 2}
  - {pluginRef: kv-cache-utilization-scorer, weight: 2}
  - {pluginRef: prefix-cache-scorer, weight: 3}
"""
"""What runs when no configuration is given: the reference's built-in blend."""


class _Strict(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel", omit_defaults=True
):
    """Base: unknown fields are refused."""


class PluginRef(_Strict, frozen=True):
    plugin_ref: str


class ProfilePlugin(_Strict, frozen=True):
    plugin_ref: str
    weight: float | None = None


class PluginSpec(_Strict, frozen=True):
    type: str
    name: str = ""
    parameters: dict[str, Any] | None = None

    @property
    def ref(self) -> str:
        return self.name or self.type


class SchedulingProfile(_Strict, frozen=True):
    name: str
    plugins: tuple[ProfilePlugin, ...] = ()


class DataSource(_Strict, frozen=True):
    plugin_ref: str
    extractors: tuple[PluginRef, ...] = ()


class DataLayer(_Strict, frozen=True):
    inject_defaults: bool = True
    """Metrics are read though no source is given; false only if ``sources`` say what is."""
    sources: tuple[DataSource, ...] = ()
    discovery: PluginRef | None = None
    peer_discovery: PluginRef | None = None
    cross_replica_syncer_plugin_ref: str | None = None
    cross_replica_sync_interval: str = "200ms"


class PriorityBand(_Strict, frozen=True):
    """``maxBytes`` and ``maxRequests`` 0 or missing: the defaults of flow control."""

    priority: int | None = None
    max_bytes: str | int | None = None
    max_requests: str | int | None = None
    fairness_policy_ref: str | None = None
    ordering_policy_ref: str | None = None


class FlowControl(_Strict, frozen=True):
    """Quantities as Kubernetes writes them (``10Gi``, ``1k``), 0 = no limit; durations as Go does."""

    max_bytes: str | int = 0
    max_requests: str | int = 0
    default_request_ttl: str | None = msgspec.field(default=None, name="defaultRequestTTL")
    no_endpoint_request_ttl: str | None = msgspec.field(default=None, name="noEndpointRequestTTL")
    default_priority_band: PriorityBand | None = None
    default_negative_priority_band: PriorityBand | None = None
    priority_bands: tuple[PriorityBand, ...] = ()
    usage_limit_policy_plugin_ref: str | None = None
    saturation_detector: PluginRef | None = None
    enable_eviction: bool = False


class RequestHandler(_Strict, frozen=True):
    parsers: tuple[PluginRef, ...] = ()


class EndpointPickerConfig(_Strict, frozen=True):
    api_version: str
    kind: str
    feature_gates: tuple[str, ...] = ()
    plugins: tuple[PluginSpec, ...] = ()
    scheduling_profiles: tuple[SchedulingProfile, ...] = ()
    data_layer: DataLayer = DataLayer()
    flow_control: FlowControl | None = None
    request_handler: RequestHandler = RequestHandler()
    parser: PluginRef | None = None
    """Deprecated place of a single parser; ``requestHandler.parsers`` wins."""
    saturation_detector: PluginRef | None = None
    """Deprecated place; ``flowControl.saturationDetector`` wins."""

    def gate(self, name: str) -> bool:
        """Whether a feature gate is on; the last word on it counts."""
        on = FEATURE_GATES[name]
        for text in self.feature_gates:
            gate, _, value = text.partition("=")
            on = value != "false" if gate == name else on
        return on


def load(text: str) -> EndpointPickerConfig:
    """Raises ConfigError naming the path of what is wrong."""
    document = read_yaml(text)
    if not isinstance(document, dict):
        raise ConfigError(f"expected a mapping with apiVersion and kind, got {type(document).__name__}")
    config = convert(document, EndpointPickerConfig)
    if config.api_version not in API_VERSIONS:
        accepted = ", ".join(API_VERSIONS)
        raise ConfigError(f"unknown apiVersion {config.api_version!r}; accepted: {accepted}", "$.apiVersion")
    if config.kind != KIND:
        raise ConfigError(f"unknown kind {config.kind!r}; accepted: {KIND}", "$.kind")
    for i, gate in enumerate(config.feature_gates):
        _check_gate(gate, f"$.featureGates[{i}]")
    return config


def _check_gate(gate: str, path: str) -> None:
    name, _, value = gate.partition("=")
    if name not in FEATURE_GATES:
        raise ConfigError(f"unknown feature gate {name!r}; known: {', '.join(sorted(FEATURE_GATES))}", path)
    if value not in ("", "true", "false"):
        raise ConfigError(f"{gate!r}: the value must be true or false", path)


def read_yaml(text: str, source: str = "$") -> Any:
    """Parse YAML or JSON; a key given twice is an error, as is more than MAX_CONFIG_BYTES. Errors name ``source``."""
    size_bytes = len(text.encode(errors="replace"))
    if size_bytes > MAX_CONFIG_BYTES:
        raise ConfigError(f"the document has {size_bytes} bytes; at most {MAX_CONFIG_BYTES} are accepted", source)
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"not valid YAML: {getattr(e, 'problem', None) or e}{where}", source) from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        # The library's own constructors raise these for values such as 2001-13-45 or !!int x.
        raise ConfigError(f"not valid YAML: {type(e).__name__}: {e}", source) from None


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def convert(value: Any, kind: type[T], path: str = "$") -> T:
    """``value`` as ``kind``; raises ConfigError with the path and, for an unknown field, what is accepted."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as e:
        message, _, at = str(e).partition(" - at `$")
        raise ConfigError(message + _accepted(message, kind, at.rstrip("`")), path + at.rstrip("`")) from None
    except (UnicodeEncodeError, RecursionError) as e:
        raise ConfigError(f"not usable text: {e}", path) from None


def _accepted(message: str, kind: Any, at: str) -> str:
    """For an unknown field: the fields of the struct it was found in."""
    if "unknown field" not in message:
        return ""
    for name in re.findall(r"\.(\w+)", at):
        fields = {f.encode_name: f.type for f in msgspec.structs.fields(kind)}
        kind = _struct_in(fields[name])
    names = kind.__struct_encode_fields__
    return f"; accepted: {', '.join(names)}" if names else "; this takes no parameters"


_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|us|ns|h|m|s)")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def duration_s(text: str) -> float:
    """Go's notation: ``5m``, ``1h30m``, ``200ms``; ``0`` too. Raises ValueError saying so."""
    parts = _DURATION_PART.findall(text)
    if not text or (text != "0" and "".join(number + unit for number, unit in parts) != text):
        raise ValueError(f"{text!r} is not a duration such as 500ms, 30s, 5m or 1h30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|)")
_POWERS = {"": (1, 0)} | {u: (1000, i) for i, u in enumerate("kMGTPE", 1)}
_POWERS |= {f"{u}i": (1024, i) for i, u in enumerate("KMGTPE", 1)}


def quantity(value: str | int) -> int:
    """A whole number as Kubernetes writes it: ``10Gi``, ``500M``, ``1k``. Raises ValueError saying so."""
    found = _QUANTITY.fullmatch(str(value))
    if not found:
        raise ValueError(f"{value!r} is not a quantity such as 1000, 1k, 500M or 10Gi, 0 or more")
    base, power = _POWERS[found[2]]
    factor = int(base**power)
    return round(float(found[1]) * factor) if "." in found[1] else int(found[1]) * factor


def _struct_in(annotation: Any) -> Any:
    """The struct inside ``tuple[Struct, ...]`` or ``Struct | None``."""
    inner = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, msgspec.Struct)]
    return inner[0] if inner else annotation
