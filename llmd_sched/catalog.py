"""Every plugin type there is, what a configuration means, and the router it describes.

``TYPES`` is the literal table: a new plugin is its class, a row in its family's table, and a test.
``resolve`` applies the reference's defaulting rules and checks; ``build_router`` makes the live objects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from random import Random
from typing import Any

import msgspec

from llmd_sched.config import EndpointPickerConfig, PluginRef, PluginSpec, ProfilePlugin, SchedulingProfile, convert
from llmd_sched.errors import ConfigError
from llmd_sched.parsers.registry import PARSERS, ParserRegistry
from llmd_sched.plugin import (
    DEFAULT_PRODUCER,
    Filter,
    Handler,
    Parser,
    Picker,
    Plugin,
    Producer,
    ProducerPlugin,
    Scorer,
)
from llmd_sched.pool.discovery import FileDiscovery
from llmd_sched.pool.inflight import InFlightLoadProducer
from llmd_sched.pool.pool import Pool
from llmd_sched.predict.producer import PredictedLatencyProducer
from llmd_sched.prefix.approx import ApproxPrefixCacheProducer
from llmd_sched.router import Router
from llmd_sched.sched.filters import FILTERS
from llmd_sched.sched.handlers import HANDLERS
from llmd_sched.sched.pickers import PICKERS
from llmd_sched.sched.pipeline import Profile
from llmd_sched.sched.scorers import SCORERS

PRODUCERS: dict[str, type[ProducerPlugin]] = {
    "approx-prefix-cache-producer": ApproxPrefixCacheProducer,
    "inflight-load-producer": InFlightLoadProducer,
    "predicted-latency-producer": PredictedLatencyProducer,
}
DISCOVERY: dict[str, type[Plugin]] = {"file-discovery": FileDiscovery}

TYPES: dict[str, type[Plugin]] = {
    **PARSERS, **PRODUCERS, **FILTERS, **SCORERS, **PICKERS, **HANDLERS, **DISCOVERY,
}  # fmt: skip

DEFAULT_PARSERS = ("openai-parser", "passthrough-parser")
DEFAULT_PICKER = "max-score-picker"
DEFAULT_HANDLER = "single-profile-handler"


class Declared(msgspec.Struct, frozen=True):
    """One plugin of the resolved configuration."""

    type: str
    plugin: Plugin


class Resolved(msgspec.Struct, frozen=True):
    """A configuration with every default filled in and every reference checked."""

    api_version: str
    plugins: dict[str, Declared]
    """By name, in order of declaration; those added by default last."""
    profile: SchedulingProfile
    parsers: tuple[str, ...]
    discovery: str | None
    producers: tuple[str, ...]
    """In the order they run: whoever reads another's data comes after it."""

    def of(self, names: tuple[str, ...] | list[str]) -> list[Plugin]:
        return [self.plugins[name].plugin for name in names]

    def as_document(self) -> dict[str, Any]:
        """What ``check-config`` prints: an equivalent configuration with nothing left to default."""
        document: dict[str, Any] = {
            "apiVersion": self.api_version,
            "kind": "EndpointPickerConfig",
            "plugins": [
                {"type": d.type, "name": name, "parameters": msgspec.to_builtins(d.plugin)}
                for name, d in self.plugins.items()
            ],
            "schedulingProfiles": [msgspec.to_builtins(self.profile)],
            "requestHandler": {"parsers": [{"pluginRef": name} for name in self.parsers]},
        }
        if self.discovery:
            document["dataLayer"] = {"discovery": {"pluginRef": self.discovery}}
        return document


def resolve(config: EndpointPickerConfig) -> Resolved:
    """Raises ConfigError with the path of what is wrong."""
    plugins = _declared(config)
    profile = _profile(config, plugins)
    parsers = _parsers(config, plugins)
    discovery = _discovery(config, plugins)
    _add_missing_producers(plugins)
    return Resolved(config.api_version, plugins, profile, parsers, discovery, _producer_order(plugins))


def _declared(config: EndpointPickerConfig) -> dict[str, Declared]:
    plugins: dict[str, Declared] = {}
    for i, spec in enumerate(config.plugins):
        path = f"$.plugins[{i}]"
        if spec.ref in plugins:
            where = f"{path}.name" if spec.name else f"{path}.type"
            raise ConfigError(f"plugin name {spec.ref!r} is used twice", where)
        plugins[spec.ref] = _declare(spec, path)
    return plugins


def _declare(spec: PluginSpec, path: str) -> Declared:
    kind = TYPES.get(spec.type)
    if kind is None:
        known = ", ".join(sorted(TYPES))
        raise ConfigError(f"unknown plugin type {spec.type!r}; known: {known}", f"{path}.type")
    plugin = convert(spec.parameters or {}, kind, f"{path}.parameters")
    for field in msgspec.structs.fields(kind):
        value = getattr(plugin, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{value} is not a finite number", f"{path}.parameters.{field.encode_name}")
    try:
        plugin.check()
    except ValueError as e:
        raise ConfigError(str(e), f"{path}.parameters") from None
    return Declared(spec.type, plugin)


def _add(plugins: dict[str, Declared], name: str) -> None:
    """Declare a default plugin under its type's name, unless it is there."""
    if name not in plugins:
        plugins[name] = _declare(PluginSpec(type=name), f"$.plugins (default {name})")


def _profile(config: EndpointPickerConfig, plugins: dict[str, Declared]) -> SchedulingProfile:
    profiles = config.scheduling_profiles
    if len(profiles) > 1:
        raise ConfigError(f"{len(profiles)} profiles, but single-profile-handler runs one", "$.schedulingProfiles")
    if profiles:
        profile, path = profiles[0], "$.schedulingProfiles[0]"
        if not profile.name:
            raise ConfigError("name must not be empty", f"{path}.name")
        for i, one in enumerate(profile.plugins):
            _check_ref(one.plugin_ref, Plugin, plugins, f"{path}.plugins[{i}].pluginRef")
            if one.weight is not None and not math.isfinite(one.weight):
                raise ConfigError(f"{one.weight} is not a finite number", f"{path}.plugins[{i}].weight")
            if one.weight is not None and not isinstance(plugins[one.plugin_ref].plugin, Scorer):
                raise ConfigError("only a scorer takes a weight", f"{path}.plugins[{i}].weight")
    else:
        usable = (Filter, Scorer, Picker)
        refs = [n for n, d in plugins.items() if isinstance(d.plugin, usable)]
        path = "$.schedulingProfiles"
        profile = SchedulingProfile(name="default", plugins=tuple(ProfilePlugin(plugin_ref=n) for n in refs))
    return _with_handler_and_picker(profile, plugins, path)


def _with_handler_and_picker(profile: SchedulingProfile, plugins: dict[str, Declared], path: str) -> SchedulingProfile:
    handlers = [n for n, d in plugins.items() if isinstance(d.plugin, Handler)]
    if len(handlers) > 1:
        raise ConfigError(f"multiple profile handlers found: {', '.join(handlers)}", "$.plugins")
    if not handlers:
        _add(plugins, DEFAULT_HANDLER)
    pickers = [p.plugin_ref for p in profile.plugins if isinstance(plugins[p.plugin_ref].plugin, Picker)]
    if len(pickers) > 1:
        raise ConfigError(f"more than one picker: {', '.join(pickers)}", f"{path}.plugins")
    if pickers:
        return profile
    declared = [n for n, d in plugins.items() if isinstance(d.plugin, Picker)]
    picker = declared[0] if declared else DEFAULT_PICKER
    _add(plugins, picker)
    return SchedulingProfile(name=profile.name, plugins=(*profile.plugins, ProfilePlugin(plugin_ref=picker)))


def _check_ref(name: str, kind: type[Plugin], plugins: Mapping[str, Declared], path: str) -> None:
    if name not in plugins:
        raise ConfigError(f"undefined plugin {name!r}; declared: {', '.join(plugins) or 'none'}", path)
    if not isinstance(plugins[name].plugin, kind):
        raise ConfigError(f"plugin {name!r} is a {plugins[name].type}, which cannot stand here", path)


def _parsers(config: EndpointPickerConfig, plugins: dict[str, Declared]) -> tuple[str, ...]:
    """Referenced ones, added when they are a known type's name; without any reference the defaults."""
    refs = [(r, f"$.requestHandler.parsers[{i}].pluginRef") for i, r in enumerate(config.request_handler.parsers)]
    if not refs and config.parser is not None:
        refs = [(config.parser, "$.parser.pluginRef")]
    if not refs:
        refs = [(PluginRef(plugin_ref=name), "$") for name in DEFAULT_PARSERS]
    for ref, path in refs:
        if ref.plugin_ref in PARSERS:
            _add(plugins, ref.plugin_ref)
        _check_ref(ref.plugin_ref, Parser, plugins, path)
    return tuple(ref.plugin_ref for ref, _ in refs)


def _discovery(config: EndpointPickerConfig, plugins: dict[str, Declared]) -> str | None:
    ref = config.data_layer.discovery
    if ref is None:
        return None
    _check_ref(ref.plugin_ref, FileDiscovery, plugins, "$.dataLayer.discovery.pluginRef")
    return ref.plugin_ref


def _add_missing_producers(plugins: dict[str, Declared]) -> None:
    """Whatever a plugin must read and nobody makes gets its default producer, transitively."""
    pending = list(plugins)
    while pending:
        name = pending.pop()
        for need in plugins[name].plugin.reads():
            if need.producer in plugins:
                made = getattr(plugins[need.producer].plugin, "provides", None)
                if made is not need.attribute:
                    raise ConfigError(f"{name} reads {need.attribute} from {need.producer!r}, which does not make it")
            elif need.producer == DEFAULT_PRODUCER[need.attribute]:
                if need.required:
                    _add(plugins, need.producer)
                    pending.append(need.producer)
            else:
                raise ConfigError(f"{name} reads {need.attribute} from {need.producer!r}, which is not declared")


def _producer_order(plugins: Mapping[str, Declared]) -> tuple[str, ...]:
    """Readers after makers, optional reads too; otherwise as declared."""
    names = [n for n, d in plugins.items() if isinstance(d.plugin, ProducerPlugin)]
    graph = {n: [r.producer for r in plugins[n].plugin.reads() if r.producer in plugins] for n in names}
    try:
        return tuple(TopologicalSorter(graph).static_order())
    except CycleError as e:
        raise ConfigError(f"producers read each other in a circle: {' -> '.join(e.args[1])}", "$.plugins") from None


def build_router(resolved: Resolved, pool: Pool, rng: Random, *, ticket_prefix: str = "") -> Router:
    """The live router of a resolved configuration."""
    producers: list[Producer] = []
    for name in resolved.producers:
        plugin = resolved.plugins[name].plugin
        assert isinstance(plugin, ProducerPlugin)
        producers.append(plugin.open(name))
    return Router(pool, producers, _build_profile(resolved), rng, ticket_prefix=ticket_prefix)


def _build_profile(resolved: Resolved) -> Profile:
    used = [(resolved.plugins[p.plugin_ref].plugin, p.weight) for p in resolved.profile.plugins]
    return Profile(
        name=resolved.profile.name,
        filters=tuple(p for p, _ in used if isinstance(p, Filter)),
        scorers=tuple((p, 1.0 if w is None else w) for p, w in used if isinstance(p, Scorer)),
        picker=next(p for p, _ in used if isinstance(p, Picker)),
    )


def build_parsers(resolved: Resolved) -> ParserRegistry:
    return ParserRegistry([p for p in resolved.of(resolved.parsers) if isinstance(p, Parser)])
