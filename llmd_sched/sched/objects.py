"""Objectives and model rewrites from the configuration, for where there is no Kubernetes. Ours."""

from __future__ import annotations

from random import Random

import msgspec

from llmd_sched.plugin import Plugin
from llmd_sched.types import Rewritten

MIN_PRIORITY, MAX_PRIORITY = -(1 << 31), (1 << 31) - 1


class StaticRewrite(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Requests for ``model`` (empty = any) are sent to one of ``targets``, by weight."""

    targets: dict[str, float]
    model: str = ""


class StaticObjects(Plugin, frozen=True):
    """What InferenceObjectives and InferenceModelRewrites say in Kubernetes.

    ``objectives``: name in the request's header -> priority, below 0 = sheddable. ``rewrites``: entries of ``model``
    (left out = every model without an entry of its own) and ``targets``, model name -> weight.
    """

    objectives: dict[str, int] = msgspec.field(default_factory=dict)
    rewrites: tuple[StaticRewrite, ...] = ()

    def check(self) -> None:
        for name, priority in self.objectives.items():
            if not name or not MIN_PRIORITY <= priority <= MAX_PRIORITY:
                raise ValueError(f"objective {name!r}: a name and a priority of 32 bits are accepted")
        models = [one.model for one in self.rewrites]
        for one in self.rewrites:
            if not one.targets or not all(one.targets) or not all(0 < w < 1e9 for w in one.targets.values()):
                raise ValueError(f"rewrite of {one.model or 'any model'}: targets needs names with positive weights")
            if models.count(one.model) > 1:
                raise ValueError(f"two rewrites of {one.model or 'any model'}")

    @property
    def priorities(self) -> dict[str, int]:
        return self.objectives

    @property
    def models(self) -> set[str]:
        return {model for one in self.rewrites for model in (one.model, *one.targets) if model}

    def priority(self, objective: str) -> int:
        return self.objectives.get(objective, 0)

    def rewrite(self, model: str, rng: Random) -> Rewritten | None:
        exact = next((one for one in self.rewrites if one.model == model), None)
        rule = exact or next((one for one in self.rewrites if not one.model), None)
        if rule is None:
            return None
        return Rewritten(rng.choices(list(rule.targets), list(rule.targets.values()))[0], rule.model or "any")


OBJECTS: dict[str, type[Plugin]] = {"static-objectives": StaticObjects}
