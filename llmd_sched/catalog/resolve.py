"""What a configuration means: the reference's defaulting rules and checks. Every error says where in the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeVar

import msgspec

from llmd_sched.catalog import table
from llmd_sched.config import EndpointPickerConfig, PluginRef, PluginSpec, ProfilePlugin, SchedulingProfile, convert
from llmd_sched.errors import ConfigError
from llmd_sched.parsers.registry import PARSERS
from llmd_sched.plugin import DEFAULT_PRODUCER, Filter, Parser, Picker, Plugin, Scorer, Stateful
from llmd_sched.pool.discovery import FileDiscovery
from llmd_sched.sched.deciders import Decider
from llmd_sched.sched.handlers import HANDLERS, Handler

P = TypeVar("P")

DEFAULT_PARSERS = ("openai-parser", "anthropic-parser", "vllmhttp-parser", "passthrough-parser")
DEFAULT_PICKER = "max-score-picker"
DEFAULT_HANDLER = "single-profile-handler"


class Declared(msgspec.Struct, frozen=True):
    """One plugin of the resolved configuration."""

    type: str
    plugin: Plugin


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration with every default filled in and every reference checked."""

    api_version: str
    feature_gates: tuple[str, ...]
    plugins: dict[str, Declared]
    """By name, in order of declaration; those added by default last."""
    profiles: tuple[SchedulingProfile, ...]
    handler: str
    parsers: tuple[str, ...]
    discovery: str | None
    producers: tuple[str, ...]
    """Plugins with state, in the order they run: whoever reads another's data comes after it."""
    warnings: tuple[str, ...] = ()

    def of(self, names: tuple[str, ...] | list[str]) -> list[Plugin]:
        return [self.plugins[name].plugin for name in names]

    def kind(self, base: type[P]) -> dict[str, P]:
        """The plugins of a kind, by name."""
        return {name: d.plugin for name, d in self.plugins.items() if isinstance(d.plugin, base)}

    def as_document(self) -> dict[str, Any]:
        """What ``check-config`` prints: an equivalent configuration with nothing left to default."""
        document: dict[str, Any] = {
            "apiVersion": self.api_version,
            "kind": "EndpointPickerConfig",
            "featureGates": list(self.feature_gates),
            "plugins": [
                {"type": d.type, "name": name, "parameters": msgspec.to_builtins(d.plugin)}
                for name, d in self.plugins.items()
            ],
            "schedulingProfiles": [msgspec.to_builtins(profile) for profile in self.profiles],
            "requestHandler": {"parsers": [{"pluginRef": name} for name in self.parsers]},
        }
        if self.discovery:
            document["dataLayer"] = {"discovery": {"pluginRef": self.discovery}}
        return document


def resolve(config: EndpointPickerConfig, *, allow_experimental: bool = False) -> Resolved:
    """Raises ConfigError with the path of what is wrong."""
    warnings: list[str] = []
    plugins = _declared(config, allow_experimental, warnings)
    profiles, handler = _profiles(config, plugins)
    parsers = _parsers(config, plugins)
    discovery = _discovery(config, plugins)
    _add_missing_producers(plugins, allow_experimental)
    return Resolved(
        api_version=config.api_version,
        feature_gates=config.feature_gates,
        plugins=plugins,
        profiles=profiles,
        handler=handler,
        parsers=parsers,
        discovery=discovery,
        producers=_producer_order(plugins),
        warnings=tuple(warnings),
    )


def _declared(config: EndpointPickerConfig, allow_experimental: bool, warnings: list[str]) -> dict[str, Declared]:
    plugins: dict[str, Declared] = {}
    for i, spec in enumerate(config.plugins):
        path = f"$.plugins[{i}]"
        if spec.ref in plugins:
            where = f"{path}.name" if spec.name else f"{path}.type"
            raise ConfigError(f"plugin name {spec.ref!r} is used twice", where)
        plugins[spec.ref] = _declare(spec, path)
        if spec.type in table.ALPHA and not allow_experimental:
            raise ConfigError(
                f"{spec.type} is experimental (Alpha); start with --allow-experimental-plugins", f"{path}.type"
            )
        if spec.type in table.DEPRECATED:
            instead = table.DEPRECATED[spec.type]
            warnings.append(f"{path}.type: {spec.type} is deprecated{f'; use {instead}' if instead else ''}")
    return plugins


def _declare(spec: PluginSpec, path: str) -> Declared:
    kind = table.TYPES.get(spec.type)
    if kind is None:
        known = ", ".join(sorted(table.TYPES))
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


def _profiles(config: EndpointPickerConfig, plugins: dict[str, Declared]) -> tuple[tuple[SchedulingProfile, ...], str]:
    """The profiles, each with a picker, and the handler's name."""
    given = config.scheduling_profiles or (_everything(plugins),)
    seen: set[str] = set()
    for i, profile in enumerate(config.scheduling_profiles):
        path = f"$.schedulingProfiles[{i}]"
        if not profile.name:
            raise ConfigError("name must not be empty", f"{path}.name")
        if profile.name in seen:
            raise ConfigError(f"profile name {profile.name!r} is used twice", f"{path}.name")
        seen.add(profile.name)
        _check_profile(profile, plugins, path)
    handler = _handler(plugins, [p.name for p in given])
    return tuple(_with_picker(p, plugins, f"$.schedulingProfiles[{i}]") for i, p in enumerate(given)), handler


def _everything(plugins: Mapping[str, Declared]) -> SchedulingProfile:
    usable = (Filter, Scorer, Picker)
    refs = [n for n, d in plugins.items() if isinstance(d.plugin, usable)]
    return SchedulingProfile(name="default", plugins=tuple(ProfilePlugin(plugin_ref=n) for n in refs))


def _check_profile(profile: SchedulingProfile, plugins: Mapping[str, Declared], path: str) -> None:
    for i, one in enumerate(profile.plugins):
        _check_ref(one.plugin_ref, Plugin, plugins, f"{path}.plugins[{i}].pluginRef")
        if one.weight is not None and not math.isfinite(one.weight):
            raise ConfigError(f"{one.weight} is not a finite number", f"{path}.plugins[{i}].weight")
        if one.weight is not None and not isinstance(plugins[one.plugin_ref].plugin, Scorer):
            raise ConfigError("only a scorer takes a weight", f"{path}.plugins[{i}].weight")


def _handler(plugins: dict[str, Declared], profiles: list[str]) -> str:
    handlers = [n for n, d in plugins.items() if isinstance(d.plugin, Handler)]
    if len(handlers) > 1:
        raise ConfigError(f"multiple profile handlers found: {', '.join(handlers)}", "$.plugins")
    if not handlers and len(profiles) > 1:
        raise ConfigError(
            f"no profile handler for {len(profiles)} profiles; declare one: {', '.join(HANDLERS)}", "$.plugins"
        )
    if not handlers:
        _add(plugins, DEFAULT_HANDLER)
    name = handlers[0] if handlers else DEFAULT_HANDLER
    _check_handler(name, plugins, profiles)
    return name


def _check_handler(name: str, plugins: Mapping[str, Declared], profiles: list[str]) -> None:
    handler = plugins[name].plugin
    assert isinstance(handler, Handler)
    path = f"$.plugins[{list(plugins).index(name)}].parameters"
    try:
        handler.check_profiles(profiles)
    except ValueError as e:
        raise ConfigError(str(e), "$.schedulingProfiles") from None
    for field, profile in handler.needs().items():
        if profile not in profiles:
            raise ConfigError(f"undefined profile {profile!r}; declared: {', '.join(profiles)}", f"{path}.{field}")
    for field, decider in handler.asks().items():
        _check_ref(decider, Decider, plugins, f"{path}.{field}")


def _with_picker(profile: SchedulingProfile, plugins: dict[str, Declared], path: str) -> SchedulingProfile:
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


def _add_missing_producers(plugins: dict[str, Declared], allow_experimental: bool) -> None:
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
                if need.required and (allow_experimental or need.producer not in table.ALPHA):
                    _add(plugins, need.producer)
                    pending.append(need.producer)
            else:
                raise ConfigError(f"{name} reads {need.attribute} from {need.producer!r}, which is not declared")


def _producer_order(plugins: Mapping[str, Declared]) -> tuple[str, ...]:
    """Readers after makers, optional reads too; otherwise as declared."""
    names = [n for n, d in plugins.items() if isinstance(d.plugin, Stateful)]
    graph = {n: [r.producer for r in plugins[n].plugin.reads() if r.producer in names] for n in names}
    try:
        return tuple(TopologicalSorter(graph).static_order())
    except CycleError as e:
        raise ConfigError(f"producers read each other in a circle: {' -> '.join(e.args[1])}", "$.plugins") from None
