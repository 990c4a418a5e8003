"""The ``flowControl`` block: its references checked, its quantities read, its policies made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import msgspec

from llmd_sched.catalog.declare import Declared, add, check_ref
from llmd_sched.config import EndpointPickerConfig, FlowControl, PriorityBand, duration_s, quantity
from llmd_sched.errors import ConfigError
from llmd_sched.flow.limits import UsageLimits
from llmd_sched.flow.policy import Fairness, Ordering
from llmd_sched.flow.saturation import SaturationDetector
from llmd_sched.flow.settings import BandSettings, FlowSettings
from llmd_sched.plugin import Plugin

DEFAULT_DETECTOR = "utilization-detector"
DEFAULT_FAIRNESS = "global-strict-fairness-policy"
DEFAULT_ORDERING = "fcfs-ordering-policy"
DEFAULT_LIMITS = "static-usage-limit-policy"
DEFAULTS = (DEFAULT_FAIRNESS, DEFAULT_ORDERING, DEFAULT_LIMITS)
"""Policies that need no declaration."""

DEFAULT_TTL = "60s"
PATH = "$.flowControl"

P = TypeVar("P", bound=Plugin)


def detector(config: EndpointPickerConfig, plugins: dict[str, Declared]) -> str:
    """The newer of its two places wins; without any, utilization is what counts."""
    block = config.flow_control.saturation_detector if config.flow_control else None
    ref, path = block or config.saturation_detector, "$.saturationDetector.pluginRef"
    if ref is None:
        add(plugins, DEFAULT_DETECTOR)
        return DEFAULT_DETECTOR
    if block is not None:
        path = f"{PATH}.saturationDetector.pluginRef"
    if ref.plugin_ref == DEFAULT_DETECTOR:
        add(plugins, DEFAULT_DETECTOR)
    check_ref(ref.plugin_ref, SaturationDetector, plugins, path)
    return ref.plugin_ref


def flow_control(config: EndpointPickerConfig, plugins: dict[str, Declared], warnings: list[str]) -> FlowControl | None:
    """The block with its defaults; None when the gate is off, though what it says is checked all the same."""
    given, on = config.flow_control, config.gate("flowControl")
    if given is None and not on:
        return None
    block = with_defaults(given or FlowControl())
    scratch = plugins if on else dict(plugins)
    for reference in references(block):
        if reference.name in DEFAULTS:
            add(scratch, reference.name)
        check_ref(reference.name, reference.kind, scratch, reference.path)
    settings(block, {name: d.plugin for name, d in scratch.items()})
    if on:
        return msgspec.structs.replace(block, saturation_detector=None)
    if given != FlowControl(saturation_detector=given.saturation_detector if given else None):
        warnings.append(f"{PATH}: the feature gate flowControl is off, so only saturationDetector is used")
    return None


class Reference(NamedTuple):
    """A plugin the block names, where, and of what kind it must be."""

    name: str
    path: str
    kind: type[Plugin]


def with_defaults(block: FlowControl) -> FlowControl:
    """The same with nothing left to default; bands in the order they are written."""
    return msgspec.structs.replace(
        block,
        default_request_ttl=block.default_request_ttl or DEFAULT_TTL,
        usage_limit_policy_plugin_ref=block.usage_limit_policy_plugin_ref or DEFAULT_LIMITS,
        priority_bands=tuple(_band_with_defaults(band) for band in block.priority_bands),
        default_priority_band=_band_with_defaults(block.default_priority_band or PriorityBand()),
        default_negative_priority_band=(
            _band_with_defaults(block.default_negative_priority_band) if block.default_negative_priority_band else None
        ),
    )


def _band_with_defaults(band: PriorityBand) -> PriorityBand:
    usual = BandSettings()
    return msgspec.structs.replace(
        band,
        max_bytes=band.max_bytes or usual.max_bytes,
        max_requests=band.max_requests or usual.max_requests,
        fairness_policy_ref=band.fairness_policy_ref or DEFAULT_FAIRNESS,
        ordering_policy_ref=band.ordering_policy_ref or DEFAULT_ORDERING,
    )


def references(block: FlowControl) -> list[Reference]:
    """Of a block with its defaults."""
    found = [Reference(str(block.usage_limit_policy_plugin_ref), f"{PATH}.usageLimitPolicyPluginRef", UsageLimits)]
    for band, path in _bands(block):
        found.append(Reference(str(band.fairness_policy_ref), f"{path}.fairnessPolicyRef", Fairness))
        found.append(Reference(str(band.ordering_policy_ref), f"{path}.orderingPolicyRef", Ordering))
    return found


def _bands(block: FlowControl) -> list[tuple[PriorityBand, str]]:
    named = (
        (block.default_priority_band, f"{PATH}.defaultPriorityBand"),
        (block.default_negative_priority_band, f"{PATH}.defaultNegativePriorityBand"),
        *((band, f"{PATH}.priorityBands[{i}]") for i, band in enumerate(block.priority_bands)),
    )
    return [(band, path) for band, path in named if band is not None]


def settings(block: FlowControl, plugins: Mapping[str, Plugin]) -> FlowSettings:
    """Raises ConfigError with the path of a value that cannot be used."""
    made = FlowSettings(
        bands=_configured_bands(block, plugins),
        default_band=_band(block.default_priority_band or PriorityBand(), f"{PATH}.defaultPriorityBand", plugins),
        default_negative_band=(
            _band(block.default_negative_priority_band, f"{PATH}.defaultNegativePriorityBand", plugins)
            if block.default_negative_priority_band
            else None
        ),
        max_bytes=_quantity(block.max_bytes, f"{PATH}.maxBytes"),
        max_requests=_quantity(block.max_requests, f"{PATH}.maxRequests"),
        ttl_s=_ttl_s(block.default_request_ttl or DEFAULT_TTL, f"{PATH}.defaultRequestTTL"),
        no_endpoint_ttl_s=(
            _ttl_s(block.no_endpoint_request_ttl, f"{PATH}.noEndpointRequestTTL")
            if block.no_endpoint_request_ttl
            else None
        ),
        usage_limits=_named(UsageLimits, block.usage_limit_policy_plugin_ref, plugins),
    )
    try:
        made.check()
    except ValueError as e:
        raise ConfigError(str(e), PATH) from None
    return made


def _configured_bands(block: FlowControl, plugins: Mapping[str, Plugin]) -> dict[int, BandSettings]:
    bands: dict[int, BandSettings] = {}
    for i, band in enumerate(block.priority_bands):
        path = f"{PATH}.priorityBands[{i}]"
        if band.priority is None:
            raise ConfigError("a band needs a priority, a whole number", f"{path}.priority")
        if band.priority in bands:
            raise ConfigError(f"priority {band.priority} has a band already", f"{path}.priority")
        bands[band.priority] = _band(band, path, plugins)
    return bands


def _band(band: PriorityBand, path: str, plugins: Mapping[str, Plugin]) -> BandSettings:
    usual = BandSettings()
    return BandSettings(
        max_bytes=_quantity(band.max_bytes or 0, f"{path}.maxBytes") or usual.max_bytes,
        max_requests=_quantity(band.max_requests or 0, f"{path}.maxRequests") or usual.max_requests,
        fairness=_named(Fairness, band.fairness_policy_ref, plugins),
        ordering=_named(Ordering, band.ordering_policy_ref, plugins),
    )


def _named(kind: type[P], name: str | None, plugins: Mapping[str, Plugin]) -> P:
    plugin = plugins[name or ""]
    assert isinstance(plugin, kind)
    return plugin


def _quantity(value: Any, path: str) -> int:
    try:
        return quantity(value)
    except ValueError as e:
        raise ConfigError(str(e), path) from None


def _ttl_s(text: str, path: str) -> float:
    """0 is for ever."""
    try:
        return duration_s(text) or math.inf
    except ValueError as e:
        raise ConfigError(str(e), path) from None
