"""Scheduling profiles and their handler, with the reference's defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping

from llmd_sched.catalog.declare import Declared, add, check_ref
from llmd_sched.config import EndpointPickerConfig, ProfilePlugin, SchedulingProfile
from llmd_sched.errors import ConfigError
from llmd_sched.plugin import Filter, Picker, Plugin, Scorer
from llmd_sched.sched.deciders import Decider
from llmd_sched.sched.handlers import HANDLERS, Handler

DEFAULT_PICKER = "max-score-picker"
DEFAULT_HANDLER = "single-profile-handler"


def resolved_profiles(
    config: EndpointPickerConfig, plugins: dict[str, Declared]
) -> tuple[tuple[SchedulingProfile, ...], str]:
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
        check_ref(one.plugin_ref, Plugin, plugins, f"{path}.plugins[{i}].pluginRef")
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
        add(plugins, DEFAULT_HANDLER)
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
        check_ref(decider, Decider, plugins, f"{path}.{field}")


def _with_picker(profile: SchedulingProfile, plugins: dict[str, Declared], path: str) -> SchedulingProfile:
    pickers = [p.plugin_ref for p in profile.plugins if isinstance(plugins[p.plugin_ref].plugin, Picker)]
    if len(pickers) > 1:
        raise ConfigError(f"more than one picker: {', '.join(pickers)}", f"{path}.plugins")
    if pickers:
        return profile
    declared = [n for n, d in plugins.items() if isinstance(d.plugin, Picker)]
    picker = declared[0] if declared else DEFAULT_PICKER
    add(plugins, picker)
    return SchedulingProfile(name=profile.name, plugins=(*profile.plugins, ProfilePlugin(plugin_ref=picker)))
