"""The live objects a resolved configuration describes."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import cast

from llmd_sched.catalog.resolve import Resolved
from llmd_sched.config import SchedulingProfile
from llmd_sched.parsers.producer import TokenProducer
from llmd_sched.parsers.registry import ParserRegistry
from llmd_sched.plugin import Admitter, Filter, Keeps, Parser, Picker, Plugin, Producer, Scorer, Scoring, Stateful
from llmd_sched.pool.pool import Pool
from llmd_sched.router import Router
from llmd_sched.sched.deciders import Decider
from llmd_sched.sched.handlers import Handler, Scheduling
from llmd_sched.sched.pipeline import Profile


def build_router(resolved: Resolved, pool: Pool, rng: Random, *, ticket_prefix: str = "") -> Router:
    live: dict[str, Producer] = {}
    stateful = resolved.kind(Stateful)
    for name in resolved.producers:
        live[name] = stateful[name].open(name)
    for plugin in resolved.kind(Plugin).values():
        for need in plugin.reads():
            if need.detailed and need.producer in live:
                live[need.producer].detailed = True
    scheduling = Scheduling(
        {p.name: _profile(p, resolved, live) for p in resolved.profiles},
        resolved.kind(Handler)[resolved.handler],
        resolved.kind(Decider),
    )
    admitters, producers = list(resolved.kind(Admitter).values()), list(live.values())
    return Router(pool, producers, scheduling, rng, admitters=admitters, ticket_prefix=ticket_prefix)


def _profile(profile: SchedulingProfile, resolved: Resolved, live: Mapping[str, Producer]) -> Profile:
    """A plugin that is both filter and scorer is used as both; one with state by its live object."""
    used = [(p.plugin_ref, resolved.plugins[p.plugin_ref].plugin, p.weight) for p in profile.plugins]
    filters = [(name, live.get(name, plugin)) for name, plugin, _ in used if isinstance(plugin, Filter)]
    scorers = [(name, live.get(name, plugin), weight) for name, plugin, weight in used if isinstance(plugin, Scorer)]
    picker_name, picker = next((name, plugin) for name, plugin, _ in used if isinstance(plugin, Picker))
    return Profile(
        name=profile.name,
        filters=tuple(cast(Keeps, one) for _, one in filters),
        scorers=tuple((cast(Scoring, one), 1.0 if weight is None else weight) for _, one, weight in scorers),
        picker=picker,
        names=tuple(name for name, _ in filters),
        scorer_names=tuple(name for name, _, _ in scorers),
        picker_name=picker_name,
    )


def build_parsers(resolved: Resolved) -> ParserRegistry:
    tokens = next(iter(resolved.kind(TokenProducer).values()), None)
    parsers = [p for p in resolved.of(resolved.parsers) if isinstance(p, Parser)]
    return ParserRegistry(parsers, tokens.estimate if tokens else None)
