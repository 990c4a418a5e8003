"""Dumps of plugins' state: bounded, and never a reason for the page to fail."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from llmd_sched.admin.dump import MAX_DEPTH, MAX_ENTRIES, MAX_TEXT_CHARS, plugin_states


def shown(state: object) -> dict:
    made = plugin_states({"p": {"type": "t", "state": state}})["p"]
    msgspec.json.encode(made)
    assert made["type"] == "t"
    return made


@pytest.mark.parametrize(
    "state",
    [
        {str(i): i for i in range(1000)},
        list(range(1000)),
        set(range(1000)),
        np.arange(1000),
        np.zeros((1000, 3)),
        {"inner": [list(range(1000))]},
        "x" * 5000,
        b"x" * 5000,
    ],
    ids=lambda state: type(state).__name__,
)
def test_a_long_state_is_cut_and_says_so(state: object) -> None:
    made = shown(state)
    assert made["truncated"] is True
    assert _longest(made["state"]) in (MAX_ENTRIES, MAX_TEXT_CHARS)


def _longest(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return max([len(value), *(_longest(one) for one in inner)])
    return 0


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"a": [1, 2.5, None, True, "x"]}, {"a": [1, 2.5, None, True, "x"]}),
        ((1, 2), [1, 2]),
        (np.array([1.5, 2.5]), [1.5, 2.5]),
        (np.float64(1.5), 1.5),
        (np.int64(3), 3),
        ({("a", 1): 2}, {"('a', 1)": 2}),
        (b"\x01\xff", "01ff"),
        (list(range(MAX_ENTRIES)), list(range(MAX_ENTRIES))),
        (ValueError("odd"), "odd"),
    ],
)
def test_a_short_state_is_told_whole(state: object, told: object) -> None:
    assert shown(state) == {"type": "t", "state": told}


def test_what_contains_itself_ends() -> None:
    state: dict = {}
    state["me"] = state
    text = str(shown(state)["state"])
    assert text.count("me") <= MAX_DEPTH + 1


def test_a_plugin_without_state_says_why() -> None:
    entry = {"type": "t", "message": "keeps nothing"}
    assert plugin_states({"p": entry}) == {"p": entry}
