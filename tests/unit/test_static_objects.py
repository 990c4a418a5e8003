"""Objectives and rewrites from the configuration: what they say of a request, and what is refused."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest

from llmd_sched.catalog import resolve
from llmd_sched.config import load
from llmd_sched.errors import ConfigError
from llmd_sched.sched.objects import StaticObjects
from llmd_sched.types import Rewritten
from tests.builders import CONFIG_HEAD


def static(parameters: str) -> StaticObjects:
    """As a configuration declares it."""
    text = f"{CONFIG_HEAD}plugins: [{{type: static-objectives, parameters: {parameters}}}]\n"
    (made,) = resolve(load(text), allow_experimental=True).kind(StaticObjects).values()
    return made


def test_an_objective_has_its_priority_and_one_nobody_knows_has_none() -> None:
    made = static("{objectives: {chat: 10, batch: -1, lowest: -2147483648, highest: 2147483647}}")
    assert [made.priority(name) for name in ("chat", "batch", "", "other")] == [10, -1, 0, 0]
    assert set(made.priorities.values()) == {10, -1, -(1 << 31), (1 << 31) - 1}


def test_without_parameters_it_says_nothing() -> None:
    made = static("{}")
    assert (made.priorities, made.models, made.rewrite("m", Random(0))) == ({}, set(), None)


def test_a_rewrite_of_the_model_beats_one_of_every_model() -> None:
    made = static("{rewrites: [{targets: {rest: 1}}, {model: m, targets: {m-v2: 1}}]}")
    assert made.rewrite("m", Random(0)) == Rewritten("m-v2", "m")
    assert made.rewrite("other", Random(0)) == Rewritten("rest", "any")
    assert made.rewrite("", Random(0)) == Rewritten("rest", "any")
    assert made.models == {"m", "m-v2", "rest"}


def test_a_model_without_a_rewrite_stays() -> None:
    assert static("{rewrites: [{model: m, targets: {m-v2: 1}}]}").rewrite("other", Random(0)) is None


def test_targets_are_drawn_by_weight() -> None:
    made, rng = static("{rewrites: [{model: m, targets: {often: 9, seldom: 1}}]}"), Random(1)
    drawn = Counter(found.model for _ in range(2000) if (found := made.rewrite("m", rng)))
    assert 120 < drawn["seldom"] < 280
    assert sum(drawn.values()) == 2000


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ("{objectives: {chat: 2147483648}}", "objective 'chat': a name and a priority of 32 bits are accepted"),
        ("{objectives: {'': 1}}", "objective '': a name"),
        ("{objectives: {chat: high}}", "Expected `int`"),
        ("{rewrites: [{model: m, targets: {}}]}", "rewrite of m: targets needs names with positive weights"),
        ("{rewrites: [{targets: {'': 1}}]}", "rewrite of any model: targets needs names"),
        ("{rewrites: [{model: m, targets: {a: 0}}]}", "rewrite of m: targets needs names with positive weights"),
        ("{rewrites: [{model: m, targets: {a: .inf}}]}", "rewrite of m: targets needs names with positive weights"),
        ("{rewrites: [{model: m, targets: {a: .nan}}]}", "rewrite of m: targets needs names with positive weights"),
        ("{rewrites: [{targets: {a: 1}}, {targets: {b: 1}}]}", "two rewrites of any model"),
        ("{rewrites: [{model: m, targets: {a: 1}}, {model: m, targets: {b: 1}}]}", "two rewrites of m"),
        ("{rewrites: [{model: m}]}", "missing required field `targets`"),
        ("{rewrites: [{model: m, targets: {a: 1}, weight: 1}]}", "unknown field `weight`"),
        ("{priorities: {chat: 1}}", "unknown field `priorities`"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(parameters: str, said: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        static(parameters)
    assert refusal.value.path.startswith("$.plugins[0].parameters")
    assert said in str(refusal.value)
