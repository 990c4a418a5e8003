"""Plugins as they are declared, those added by default, and references to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter

import msgspec

from llmd_sched.catalog import table
from llmd_sched.config import EndpointPickerConfig, PluginSpec, convert
from llmd_sched.errors import ConfigError
from llmd_sched.plugin import DEFAULT_PRODUCER, Plugin, Reads, Stateful
from llmd_sched.sched.scorers import PrefixCacheScorer


class Declared(msgspec.Struct, frozen=True):
    """One plugin of the resolved configuration."""

    type: str
    plugin: Plugin


def declared(config: EndpointPickerConfig, allow_experimental: bool, warnings: list[str]) -> dict[str, Declared]:
    plugins: dict[str, Declared] = {}
    for i, spec in enumerate(config.plugins):
        path = f"$.plugins[{i}]"
        if spec.ref in plugins:
            where = f"{path}.name" if spec.name else f"{path}.type"
            raise ConfigError(f"plugin name {spec.ref!r} is used twice", where)
        plugins |= _made(spec, path)
        if spec.type in table.ALPHA and not allow_experimental:
            raise ConfigError(
                f"{spec.type} is experimental (Alpha); start with --allow-experimental-plugins", f"{path}.type"
            )
        if spec.type in table.DEPRECATED:
            instead = table.DEPRECATED[spec.type]
            warnings.append(f"{path}.type: {spec.type} is deprecated{f'; use {instead}' if instead else ''}")
    return plugins


def _made(spec: PluginSpec, path: str) -> dict[str, Declared]:
    """The plugin by its name; two for the deprecated scorer that owns its producer."""
    if spec.type != table.PRECISE_SCORER:
        return {spec.ref: declare(spec, path)}
    producer = f"{spec.ref}/producer"
    scorer = PrefixCacheScorer(prefix_match_info_producer_name=producer)
    made = declare(msgspec.structs.replace(spec, type="precise-prefix-cache-producer"), path)
    return {producer: made, spec.ref: Declared("prefix-cache-scorer", scorer)}


def declare(spec: PluginSpec, path: str) -> Declared:
    kind = table.TYPES.get(spec.type)
    if kind is None:
        known = ", ".join(sorted([*table.TYPES, table.PRECISE_SCORER]))
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


def add(plugins: dict[str, Declared], name: str) -> None:
    """Declare a default plugin under its type's name, unless it is there."""
    if name not in plugins:
        plugins[name] = declare(PluginSpec(type=name), f"$.plugins (default {name})")


def check_ref(
    name: str, kind: type[Plugin] | tuple[type[Plugin], ...], plugins: Mapping[str, Declared], path: str
) -> None:
    if name not in plugins:
        raise ConfigError(f"undefined plugin {name!r}; declared: {', '.join(plugins) or 'none'}", path)
    if not isinstance(plugins[name].plugin, kind):
        raise ConfigError(f"plugin {name!r} is a {plugins[name].type}, which cannot stand here", path)


def add_missing_producers(plugins: dict[str, Declared], allow_experimental: bool) -> None:
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
                    _add_for(name, need, plugins)
                    pending.append(need.producer)
            else:
                raise ConfigError(f"{name} reads {need.attribute} from {need.producer!r}, which is not declared")


def _add_for(reader: str, need: Reads, plugins: dict[str, Declared]) -> None:
    try:
        add(plugins, need.producer)
    except ConfigError as e:
        raise ConfigError(
            f"{reader} reads {need.attribute} from {need.producer}, which has no defaults and must be declared ({e})",
            "$.plugins",
        ) from None


def producer_order(plugins: Mapping[str, Declared]) -> tuple[str, ...]:
    """Readers after makers, optional reads too; otherwise as declared."""
    names = [n for n, d in plugins.items() if isinstance(d.plugin, Stateful)]
    graph = {n: [r.producer for r in plugins[n].plugin.reads() if r.producer in names] for n in names}
    try:
        return tuple(TopologicalSorter(graph).static_order())
    except CycleError as e:
        raise ConfigError(f"producers read each other in a circle: {' -> '.join(e.args[1])}", "$.plugins") from None
