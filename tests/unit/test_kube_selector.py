"""Label selectors as text: what they match, how they are written for an API server, what is refused and why."""

from __future__ import annotations

import pytest

from llmd_sched.kube.selector import MAX_SELECTOR_CHARACTERS, Selector, from_labels, parse

LABELS = {"app": "vllm", "tier": "a", "llm-d.ai/role": "decode", "empty": ""}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("", True),
        ("app=vllm", True),
        ("app==vllm", True),
        ("app = vllm", True),
        ("app=vllm,tier=a", True),
        ("app=vllm,tier=b", False),
        ("app!=vllm", False),
        ("zone!=x", True),
        ("tier in (a, b)", True),
        ("tier in (b,c)", False),
        ("tier notin (b,c)", True),
        ("zone notin (b)", True),
        ("tier notin (a)", False),
        ("app", True),
        ("zone", False),
        ("!zone", True),
        ("!app", False),
        ("empty=", True),
        ("app=", False),
        ("llm-d.ai/role in (decode,both),app=vllm,!old", True),
        ("tier in (a,b),tier=b", False),
        ("tier=a,tier=b", False),
    ],
)
def test_a_selector_matches_as_kubernetes_says(text: str, holds: bool) -> None:
    assert parse(text).matches(LABELS) is holds
    assert parse(str(parse(text))) == parse(text)


def test_equalities_come_first_in_the_text_for_the_server() -> None:
    assert str(parse("b in (x,y),a=1,!c,d")) == "a=1,b in (x,y),!c,d"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("app=vllm,", "no label requirement"),
        (",", "no label requirement"),
        ("app>3", "not a label key"),
        ("app in (a", "no label requirement"),
        ("app in", "no label requirement"),
        ("a b", "no label requirement"),
        ("app=v/llm", "not a label value"),
        ("-app=x", "not a label key"),
        ("app in ()", None),
        ("x" * (MAX_SELECTOR_CHARACTERS + 1), "at most"),
    ],
)
def test_what_is_no_selector_is_refused(text: str, says: str | None) -> None:
    if says is None:  # one empty value, as Kubernetes reads it
        assert parse(text).matches({"app": ""})
    else:
        with pytest.raises(ValueError, match=says):
            parse(text)


def test_match_labels_make_a_selector_and_an_impossible_label_is_refused() -> None:
    assert from_labels({"app": "vllm"}) == Selector({"app": "vllm"}) == parse("app=vllm")
    with pytest.raises(ValueError, match="label value"):
        from_labels({"app": "no spaces"})
