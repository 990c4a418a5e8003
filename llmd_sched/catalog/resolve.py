"""What a configuration means: the reference's defaulting rules and checks. Every error says where in the file."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from llmd_sched.catalog import data_layer, flow
from llmd_sched.catalog.declare import Declared, add, add_missing_producers, check_ref, declared, producer_order
from llmd_sched.catalog.profiles import resolved_profiles
from llmd_sched.config import DataSource, EndpointPickerConfig, FlowControl, PluginRef, SchedulingProfile
from llmd_sched.flow.settings import FlowSettings
from llmd_sched.parsers.registry import PARSERS
from llmd_sched.plugin import Parser, Plugin

DEFAULT_PARSERS = ("openai-parser", "anthropic-parser", "vllmhttp-parser", "passthrough-parser")

P = TypeVar("P")


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
    sources: tuple[DataSource, ...]
    producers: tuple[str, ...]
    """Plugins with state, in the order they run: whoever reads another's data comes after it."""
    detector: str
    """The saturation detector, which admission without flow control asks too."""
    flow_control: FlowControl | None = None
    """None = the gate is off."""
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
        document["dataLayer"] = {"sources": msgspec.to_builtins(self.sources)}
        if self.discovery:
            document["dataLayer"]["discovery"] = {"pluginRef": self.discovery}
        block = msgspec.to_builtins(self.flow_control) if self.flow_control else {}
        document["flowControl"] = {**block, "saturationDetector": {"pluginRef": self.detector}}
        return document

    def flow_settings(self) -> FlowSettings | None:
        """None when the gate is off."""
        if self.flow_control is None:
            return None
        return flow.settings(self.flow_control, self.kind(Plugin))


def resolve(config: EndpointPickerConfig, *, allow_experimental: bool = False) -> Resolved:
    """Raises ConfigError with the path of what is wrong."""
    warnings: list[str] = []
    plugins = declared(config, allow_experimental, warnings)
    profiles, handler = resolved_profiles(config, plugins)
    parsers = _parsers(config, plugins)
    discovery = data_layer.discovery(config, plugins)
    data_sources = data_layer.data_sources(config, plugins)
    detector = flow.detector(config, plugins)
    flow_control = flow.flow_control(config, plugins, warnings)
    add_missing_producers(plugins, allow_experimental)
    return Resolved(
        api_version=config.api_version,
        feature_gates=config.feature_gates,
        plugins=plugins,
        profiles=profiles,
        handler=handler,
        parsers=parsers,
        discovery=discovery,
        sources=data_sources,
        producers=producer_order(plugins),
        detector=detector,
        flow_control=flow_control,
        warnings=tuple(warnings),
    )


def _parsers(config: EndpointPickerConfig, plugins: dict[str, Declared]) -> tuple[str, ...]:
    """Referenced ones, added when they are a known type's name; without any reference the defaults."""
    refs = [(r, f"$.requestHandler.parsers[{i}].pluginRef") for i, r in enumerate(config.request_handler.parsers)]
    if not refs and config.parser is not None:
        refs = [(config.parser, "$.parser.pluginRef")]
    if not refs:
        refs = [(PluginRef(plugin_ref=name), "$") for name in DEFAULT_PARSERS]
    for ref, path in refs:
        if ref.plugin_ref in PARSERS:
            add(plugins, ref.plugin_ref)
        check_ref(ref.plugin_ref, Parser, plugins, path)
    return tuple(ref.plugin_ref for ref, _ in refs)
