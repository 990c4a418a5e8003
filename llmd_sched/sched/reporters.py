"""Reporters: what the proxy is told of a reply that has ended, as dynamic metadata."""

from __future__ import annotations

import msgspec

from llmd_sched.headers import NAMESPACE_LB
from llmd_sched.plugin import Reporter
from llmd_sched.sched.usage import condition, expression, whole
from llmd_sched.types import Outcome


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Where in the dynamic metadata."""

    name: str
    namespace: str = NAMESPACE_LB


class ReportedAttribute(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """One number, and when to tell it; no ``condition`` = always."""

    key: Key
    expression: str
    condition: str = ""


class RequestAttributeReporter(Reporter, frozen=True):
    """Tells the proxy a whole number computed from a reply's token counts, as dynamic metadata.

    ``attributes`` has exactly one entry: ``key`` {``namespace``, envoy.lb by default, and ``name``}, ``expression``
    such as ``usage.prompt_tokens + 2 * usage.completion_tokens``, and optionally a ``condition`` such as
    ``has(usage.completion_tokens) && usage.prompt_tokens > 1000``. Counts are prompt_tokens, completion_tokens,
    total_tokens and prompt_tokens_details.cached_tokens of ``usage``; of the reference's CEL no more than sums,
    multiples by a number and comparisons is accepted. Nothing is told of a reply that lacks a count, nor of 0.
    """

    attributes: tuple[ReportedAttribute, ...]

    def check(self) -> None:
        if len(self.attributes) != 1:
            raise ValueError(f"attributes has {len(self.attributes)} entries; accepted is exactly one")
        (one,) = self.attributes
        if not one.key.name or not one.key.namespace:
            raise ValueError("attributes[0].key needs a name, and a namespace that is not empty")
        expression(one.expression)
        if one.condition:
            condition(one.condition)

    def report(self, outcome: Outcome) -> tuple[str, str, int] | None:
        (one,) = self.attributes
        if one.condition and not condition(one.condition).holds(outcome):
            return None
        value = whole(expression(one.expression).value(outcome))
        return (one.key.namespace, one.key.name, value) if value else None


REPORTERS: dict[str, type[Reporter]] = {"request-attribute-reporter": RequestAttributeReporter}
