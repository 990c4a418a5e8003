"""What objectives and rewrites say of a request: its priority, and the model it is sent to.

A rule for the model beats a rule for every model; of several the one of the oldest object wins (then the first by
name, then the first in the object).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from random import Random

import msgspec

from llmd_sched.kube.objects import Objective, Rewrite, Rule, Target
from llmd_sched.types import Rewritten


class Objects(msgspec.Struct, frozen=True):
    """A snapshot, replaced as a whole: read it once for a request."""

    priorities: Mapping[str, int] = msgspec.field(default_factory=dict)
    """By name of the objective."""
    exact: Mapping[str, tuple[Rule, str]] = msgspec.field(default_factory=dict)
    """The rule of a model, and the name of its object."""
    generic: tuple[Rule, str] | None = None

    def priority(self, objective: str) -> int:
        """0 for one that is not known."""
        return self.priorities.get(objective, 0)

    def rewrite(self, model: str, rng: Random) -> Rewritten | None:
        """None when no rule is for the model."""
        found = self.exact.get(model, self.generic)
        return found and Rewritten(choose(found[0].targets, rng), found[1])

    @property
    def models(self) -> frozenset[str]:
        """Every model name a rule mentions: few, so they are safe as metric labels."""
        rules = [rule for rule, _ in [*self.exact.values(), *([self.generic] if self.generic else ())]]
        return frozenset(self.exact) | {target.model_rewrite for rule in rules for target in rule.targets}


def snapshot(objectives: Iterable[Objective], rewrites: Iterable[Rewrite]) -> Objects:
    exact: dict[str, tuple[Rule, str]] = {}
    generic = None
    for rewrite in sorted(rewrites, key=lambda r: (r.created_at, r.name)):
        for rule in rewrite.rules:
            if rule.models is None:
                generic = generic or (rule, rewrite.name)
            for model in rule.models or ():
                exact.setdefault(model, (rule, rewrite.name))
    return Objects({o.name: o.priority for o in objectives}, exact, generic)


def choose(targets: Sequence[Target], rng: Random) -> str:
    """By weight. Nobody has one: all are alike; some have one: the others are never chosen."""
    weights = [max(target.weight or 0, 0) for target in targets]
    if not any(weights):
        weights = [1] * len(targets)
    return rng.choices(targets, weights)[0].model_rewrite
