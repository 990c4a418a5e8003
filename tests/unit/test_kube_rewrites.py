"""Which rewrite rule applies, which of its targets is chosen, and the priority an objective gives."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from llmd_sched.kube.objects import Objective, Ref, Rewrite, Rule, Target
from llmd_sched.kube.rewrites import Objects, Rewritten, choose, snapshot

OLD, NEW = "2025-01-01T00:00:00Z", "2026-01-01T00:00:00Z"
REF = Ref("pool")


def rewrite(name: str, created_at: str, *rules: tuple[str | None, str]) -> Rewrite:
    made = tuple(Rule(None if model is None else (model,), (Target(target),)) for model, target in rules)
    return Rewrite(name, created_at, made, REF)


@pytest.mark.parametrize(
    ("rewrites", "model", "expected"),
    [
        ([], "m", None),
        ([rewrite("r", OLD, ("m", "t"))], "other", None),
        ([rewrite("r", OLD, ("m", "t"))], "m", ("t", "r")),
        ([rewrite("r", OLD, (None, "t"))], "m", ("t", "r")),
        ([rewrite("generic", OLD, (None, "g")), rewrite("exact", NEW, ("m", "e"))], "m", ("e", "exact")),
        ([rewrite("generic", OLD, (None, "g")), rewrite("exact", NEW, ("m", "e"))], "n", ("g", "generic")),
        ([rewrite("a", NEW, ("m", "new")), rewrite("b", OLD, ("m", "old"))], "m", ("old", "b")),
        ([rewrite("a", NEW, (None, "new")), rewrite("b", OLD, (None, "old"))], "m", ("old", "b")),
        ([rewrite("b", OLD, ("m", "2")), rewrite("a", OLD, ("m", "1"))], "m", ("1", "a")),
        ([rewrite("r", OLD, ("m", "first"), ("m", "second"))], "m", ("first", "r")),
    ],
)
def test_exact_beats_generic_and_the_oldest_object_wins(
    rewrites: list[Rewrite], model: str, expected: tuple[str, str] | None
) -> None:
    assert snapshot([], rewrites).rewrite(model, Random(0)) == (expected and Rewritten(*expected))


def share(*weights: int | None) -> list[float]:
    rng, targets = Random(1), [Target(str(i), w) for i, w in enumerate(weights)]
    counts = Counter(choose(targets, rng) for _ in range(8000))
    return [round(counts[str(i)] / 8000, 1) for i in range(len(weights))]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([None], [1.0]),
        ([0], [1.0]),
        ([None, None], [0.5, 0.5]),
        ([0, 0], [0.5, 0.5]),
        ([1, 4], [0.2, 0.8]),
        ([None, 5], [0.0, 1.0]),
        ([0, 3, None, 3], [0.0, 0.5, 0.0, 0.5]),
        ([-1, 2], [0.0, 1.0]),
    ],
)
def test_targets_are_chosen_by_weight(weights: list[int | None], shares: list[float]) -> None:
    assert share(*weights) == shares


def test_a_choice_is_repeatable() -> None:
    targets = [Target(str(i), 1) for i in range(5)]
    picks = [[choose(targets, rng) for _ in range(20)] for rng in (Random(3), Random(3))]
    assert picks[0] == picks[1]


def test_an_objective_gives_its_priority_and_an_unknown_one_zero() -> None:
    objects = snapshot([Objective("high", 10, REF), Objective("low", -1, REF)], [])
    assert [objects.priority(name) for name in ("high", "low", "nobody", "")] == [10, -1, 0, 0]
    assert Objects().priority("high") == 0


def test_every_model_that_rules_mention_is_known() -> None:
    objects = snapshot([], [rewrite("r", OLD, ("a", "b"), (None, "c")), rewrite("hidden", NEW, (None, "d"))])
    assert objects.models == {"a", "b", "c"}
