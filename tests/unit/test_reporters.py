"""Costs of a reply: what may be written, and what comes of it."""

from __future__ import annotations

import pytest

from llmd_sched.catalog import resolve
from llmd_sched.config import load
from llmd_sched.errors import ConfigError
from llmd_sched.sched.reporters import Key, ReportedAttribute, RequestAttributeReporter
from llmd_sched.sched.usage import MAX_CHARACTERS, MAX_DEPTH, condition, expression
from llmd_sched.types import End, Outcome
from tests.builders import CONFIG_HEAD

USED = Outcome(end=End.FINISHED, status=200, prompt_tokens=7, cached_tokens=4, output_tokens=10)
SILENT = Outcome(end=End.FINISHED, status=200)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("usage.prompt_tokens", 7),
        ("usage.completion_tokens", 10),
        ("usage.total_tokens", 17),
        ("usage.prompt_tokens_details.cached_tokens", 4),
        ("usage.prompt_token_details.cached_tokens", 4),
        ("usage.prompt_tokens + usage.completion_tokens", 17),
        ("  usage.prompt_tokens\n+ 2*usage.completion_tokens\n", 27),
        ("usage.completion_tokens * 2", 20),
        ("usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens", 3),
        ("usage.prompt_tokens - 2 - 1", 4),
        ("usage.prompt_tokens - (2 - 1)", 6),
        ("2 * (usage.prompt_tokens + 3) * 0.5", 10),
        ("-usage.prompt_tokens + 10", 3),
        ("--usage.prompt_tokens", 7),
        ("usage.prompt_tokens + usage.prompt_tokens", 14),
        ("2 + 3 * 4", 14),
        ("0.25 * usage.completion_tokens", 2.5),
        ("42", 42),
    ],
)
def test_sums_and_multiples_of_counts_are_computed(text: str, value: float) -> None:
    assert expression(text).value(USED) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "usage",
        "usage.tokens",
        "prompt_tokens",
        "usage.prompt_tokens *",
        "usage.prompt_tokens usage.completion_tokens",
        "usage.prompt_tokens * usage.completion_tokens",
        "(1 + usage.prompt_tokens) * usage.completion_tokens",
        "usage.prompt_tokens / 2",
        "usage.prompt_tokens % 2",
        "int(usage.prompt_tokens)",
        "(usage.prompt_tokens",
        "usage.prompt_tokens)",
        "usage.prompt_tokens > 3",
        "usage.prompt_tokens ? 1 : 2",
        "usage['prompt_tokens']",
        "1e3",
        "has(usage.prompt_tokens)",
        "__import__('os')",
    ],
)
def test_anything_else_is_refused_with_what_is_accepted(text: str) -> None:
    with pytest.raises(ValueError, match=r"unexpected .*; accepted are numbers, usage\.prompt_tokens"):
        expression(text)


def test_expressions_are_bounded_in_length_and_depth() -> None:
    with pytest.raises(ValueError, match=f"at most {MAX_CHARACTERS} are accepted"):
        expression("1" * (MAX_CHARACTERS + 1))
    assert expression("(" * MAX_DEPTH + "7" + ")" * MAX_DEPTH).value(USED) == 7
    assert expression(" + ".join(["(1)"] * 2 * MAX_DEPTH)).value(USED) == 2 * MAX_DEPTH
    for opening, closing in (("(", ")"), ("-", "")):
        with pytest.raises(ValueError, match="unexpected"):
            expression(opening * (MAX_DEPTH + 1) + "7" + closing * (MAX_DEPTH + 1))


@pytest.mark.parametrize(
    ("text", "of_used", "of_silent"),
    [
        ("has(usage.prompt_tokens)", True, False),
        ("!has(usage.prompt_tokens)", False, True),
        ("has(usage.prompt_tokens) && has(usage.completion_tokens)", True, False),
        ("usage.prompt_tokens > 6", True, False),
        ("usage.prompt_tokens > 7", False, False),
        ("usage.prompt_tokens >= 7", True, False),
        ("usage.prompt_tokens < 8", True, False),
        ("usage.prompt_tokens <= 6", False, False),
        ("usage.prompt_tokens == 7", True, False),
        ("usage.prompt_tokens != 7", False, False),
        ("2 * usage.prompt_tokens > usage.completion_tokens + 3", True, False),
        ("(usage.prompt_tokens + 1) * 2 == 16", True, False),
        ("1 < 2", True, True),
        ("1 > 2 || has(usage.prompt_tokens)", True, False),
        ("1 > 2 || 1 < 2 && has(usage.prompt_tokens)", True, False),
        ("1 < 2 || 1 > 2 && has(usage.prompt_tokens)", True, True),
    ],
)
def test_conditions_compare_counts_and_join(text: str, of_used: bool, of_silent: bool) -> None:
    assert (condition(text).holds(USED), condition(text).holds(SILENT)) == (of_used, of_silent)


@pytest.mark.parametrize(
    "text",
    [
        "usage.prompt_tokens",
        "has(usage.tokens)",
        "has usage.prompt_tokens",
        "!usage.prompt_tokens",
        "1 < 2 &&",
        "&& 1 < 2",
        "1 < 2 < 3",
        "1 = 2",
        "(1 < 2)",
        "true",
    ],
)
def test_any_other_condition_is_refused_with_what_is_accepted(text: str) -> None:
    with pytest.raises(ValueError, match="a condition compares two of them"):
        condition(text)


def reporter(text: str, when: str = "", **key: str) -> RequestAttributeReporter:
    one = ReportedAttribute(key=Key(**{"name": "cost", **key}), expression=text, condition=when)
    made = RequestAttributeReporter(attributes=(one,))
    made.check()
    return made


@pytest.mark.parametrize(
    ("text", "when", "outcome", "value"),
    [
        ("usage.total_tokens", "", USED, 17),
        ("usage.total_tokens", "", SILENT, None),
        ("usage.prompt_tokens + usage.completion_tokens", "", Outcome(end=End.FINISHED, prompt_tokens=7), None),
        ("0 * usage.prompt_tokens", "", USED, None),  # 0 is not told
        ("0.01 * usage.prompt_tokens", "", USED, None),
        ("1.99 * usage.completion_tokens", "", USED, 19),  # without its fraction
        ("0 - usage.prompt_tokens", "", USED, -7),
        ("usage.total_tokens", "usage.prompt_tokens > 6", USED, 17),
        ("usage.total_tokens", "usage.prompt_tokens > 7", USED, None),
        ("5", "", SILENT, 5),
        ("9" * 400, "", USED, None),  # no number any more
    ],
)
def test_a_whole_number_is_told_unless_it_is_nothing(text: str, when: str, outcome: Outcome, value: int | None) -> None:
    told = reporter(text, when).report(outcome)
    assert told == (None if value is None else ("envoy.lb", "cost", value))


def test_the_namespace_can_be_another() -> None:
    assert reporter("1", namespace="billing", name="units").report(USED) == ("billing", "units", 1)


ENTRY = "{key: {name: x-gateway-inference-request-cost}, expression: usage.completion_tokens}"


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ("[]", "attributes has 0 entries; accepted is exactly one"),
        (f"[{ENTRY}, {ENTRY}]", "attributes has 2 entries; accepted is exactly one"),
        ("[{key: {name: ''}, expression: '1'}]", "key needs a name"),
        ("[{key: {name: a, namespace: ''}, expression: '1'}]", "key needs a name, and a namespace"),
        ("[{key: {name: a}, expression: 'usage.x'}]", "unexpected usage.x; accepted are numbers"),
        ("[{key: {name: a}, expression: '1', condition: 'usage.x'}]", "unexpected usage.x; a condition compares"),
        ("[{key: {name: a}, expression: '1', when: x}]", "unknown field `when`; accepted: key, expression, condition"),
    ],
)
def test_a_configuration_error_says_what_is_accepted(attributes: str, says: str) -> None:
    plugin = f"plugins: [{{type: request-attribute-reporter, parameters: {{attributes: {attributes}}}}}]"
    with pytest.raises(ConfigError) as error:
        resolve(load(CONFIG_HEAD + plugin), allow_experimental=True)
    assert says in str(error.value)
    assert error.value.path.startswith("$.plugins[0].parameters")
