"""Label selectors as Kubernetes defines them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from llmd_sched.sched.labels import Requirement, check_key, check_value, matches


@pytest.mark.parametrize(
    ("operator", "values", "labels", "holds"),
    [
        ("In", ("a", "b"), {"k": "a"}, True),
        ("In", ("a", "b"), {"k": "b"}, True),
        ("In", ("a", "b"), {"k": "c"}, False),
        ("In", ("a", "b"), {}, False),
        ("In", ("",), {"k": ""}, True),
        ("In", ("",), {}, False),  # absent is not empty
        ("NotIn", ("a", "b"), {"k": "a"}, False),
        ("NotIn", ("a", "b"), {"k": "c"}, True),
        ("NotIn", ("a", "b"), {}, True),
        ("NotIn", ("a", "b"), {"other": "a"}, True),
        ("Exists", (), {"k": "a"}, True),
        ("Exists", (), {"k": ""}, True),
        ("Exists", (), {"other": "a"}, False),
        ("DoesNotExist", (), {"k": "a"}, False),
        ("DoesNotExist", (), {"k": ""}, False),
        ("DoesNotExist", (), {}, True),
    ],
)
def test_an_operator_looks_at_the_value_or_the_presence_of_a_label(
    operator: str, values: tuple[str, ...], labels: Mapping[str, str], holds: bool
) -> None:
    one = Requirement(key="k", operator=operator, values=values)
    one.check()
    assert one.holds(labels) is holds


GPU = Requirement(key="gpu", operator="In", values=("h100", "h200"))
NOT_OLD = Requirement(key="old", operator="DoesNotExist")


@pytest.mark.parametrize(
    ("equal", "requirements", "labels", "expected"),
    [
        ({}, (), {}, True),
        ({}, (), {"any": "thing"}, True),
        ({"app": "x"}, (), {"app": "x", "more": "y"}, True),
        ({"app": "x"}, (), {"app": "y"}, False),
        ({"app": "x"}, (), {}, False),
        ({"app": ""}, (), {}, False),
        ({"app": "x", "tier": "a"}, (), {"app": "x"}, False),
        ({"app": "x"}, (GPU,), {"app": "x", "gpu": "h100"}, True),
        ({"app": "x"}, (GPU,), {"app": "x", "gpu": "a100"}, False),
        ({"app": "x"}, (GPU,), {"app": "y", "gpu": "h100"}, False),
        ({}, (GPU, NOT_OLD), {"gpu": "h200"}, True),
        ({}, (GPU, NOT_OLD), {"gpu": "h200", "old": "1"}, False),
    ],
)
def test_all_of_a_selector_must_hold(
    equal: Mapping[str, str], requirements: tuple[Requirement, ...], labels: Mapping[str, str], expected: bool
) -> None:
    assert matches(equal, requirements, labels) is expected


@pytest.mark.parametrize(
    ("operator", "values", "message"),
    [
        ("in", ("a",), "operator 'in' of k: accepted are In, NotIn, Exists, DoesNotExist"),
        ("Gt", ("1",), "accepted are In, NotIn, Exists, DoesNotExist"),
        ("In", (), "operator In of k needs at least one of values"),
        ("NotIn", (), "operator NotIn of k needs at least one of values"),
        ("Exists", ("a",), "operator Exists of k takes no values"),
        ("DoesNotExist", ("a",), "operator DoesNotExist of k takes no values"),
        ("In", ("a", "b c"), "'b c' is not a label value"),
    ],
)
def test_a_requirement_that_cannot_be_met_or_read_is_refused(
    operator: str, values: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Requirement(key="k", operator=operator, values=values).check()


def test_a_requirement_checks_its_key() -> None:
    with pytest.raises(ValueError, match="'no/such/key' is not a label key"):
        Requirement(key="no/such/key", operator="Exists").check()


@pytest.mark.parametrize(
    "key", ["a", "A9", "a.b-c_d", "x" * 63, "llm-d.ai/role", "a.b.c/X_y", "1/2", "p" * 253 + "/name"]
)
def test_a_label_key_is_a_name_after_an_optional_dns_name(key: str) -> None:
    check_key(key)


@pytest.mark.parametrize(
    "key",
    [
        *("", "/", "a/", "/a", "-a", "a-", ".a", "a b", "x" * 64, "UPPER/a", "a_b/c", "-a/b", "a..b/c", "a\n", "ä"),
        "p" * 254 + "/name",
    ],
)
def test_anything_else_is_no_label_key(key: str) -> None:
    with pytest.raises(ValueError, match="is not a label key: accepted are"):
        check_key(key)


@pytest.mark.parametrize("value", ["", "a", "V1.0", "a_b-c.d", "x" * 63])
def test_a_label_value_is_empty_or_formed_like_a_name(value: str) -> None:
    check_value(value)


@pytest.mark.parametrize("value", [" ", "a b", "-a", "a-", "x" * 64, "a/b", "a\n", "ä"])
def test_anything_else_is_no_label_value(value: str) -> None:
    with pytest.raises(ValueError, match="is not a label value: accepted are"):
        check_value(value)
