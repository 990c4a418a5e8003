"""Custom metrics as scores and as filters, and the filter of the conformance tests."""

from __future__ import annotations

import math
from random import Random

import pytest

from llmd_sched.catalog import resolve
from llmd_sched.config import load
from llmd_sched.errors import ConfigError, NoneLeft
from llmd_sched.pool.pool import Load
from llmd_sched.sched.attributes import (
    OPERATORS,
    AdaptiveRange,
    EndpointAttributeFilter,
    EndpointAttributeScorer,
    FixedRange,
    Keeping,
    Normalization,
    Scoring,
    Threshold,
)
from llmd_sched.sched.testing import HeaderBasedTestingFilter
from llmd_sched.types import Candidates
from tests.builders import CONFIG_HEAD, candidates, endpoint, endpoints, pool_of, request, router_of

NAN = math.nan
COLUMN = "pressure/core-metrics-extractor"
LOWER, HIGHER = "linear_lower_is_better", "linear_higher_is_better"


def pressed(*values: float) -> Candidates:
    return candidates(**{COLUMN: values})


def scorer(kind: str, low: float | None = None, high: float = 0.0) -> EndpointAttributeScorer:
    fixed = None if low is None else FixedRange(min=low, max=high)
    algorithm = Scoring(type=kind, normalization=Normalization(fixed_range=fixed))
    made = EndpointAttributeScorer(attribute_key="pressure", algorithm=algorithm)
    made.check()
    return made


@pytest.mark.parametrize(
    ("values", "lower"),
    [
        ([0, 5, 10], [1.0, 0.5, 0.0]),
        ([2, 4], [1.0, 0.0]),
        ([-10, 0, 10], [1.0, 0.5, 0.0]),
        ([3, 3, 3], [1.0, 1.0, 1.0]),
        ([7], [1.0]),
        ([0, NAN, 10], [1.0, 0.0, 0.0]),
        ([4, NAN, 4], [1.0, 0.0, 1.0]),  # those without it take no part in the range
        ([NAN, NAN], [0.0, 0.0]),
    ],
)
def test_an_adaptive_range_is_that_of_the_candidates(values: list[float], lower: list[float]) -> None:
    known = [not math.isnan(value) for value in values]
    equal = len({value for value in values if not math.isnan(value)}) == 1
    higher = [score if equal or not has else 1 - score for score, has in zip(lower, known, strict=True)]
    assert scorer(LOWER).score(request(), pressed(*values)).tolist() == pytest.approx(lower)
    assert scorer(HIGHER).score(request(), pressed(*values)).tolist() == pytest.approx(higher)


@pytest.mark.parametrize(("value", "lower"), [(0, 1.0), (2, 1.0), (4, 0.75), (6, 0.5), (10, 0.0), (99, 0.0), (-5, 1.0)])
def test_a_fixed_range_clamps(value: float, lower: float) -> None:
    view = pressed(value, NAN)
    assert scorer(LOWER, 2, 10).score(request(), view).tolist() == [lower, 0.0]
    assert scorer(HIGHER, 2, 10).score(request(), view).tolist() == [1 - lower, 0.0]


def test_a_metric_nobody_ever_had_scores_nothing() -> None:
    assert scorer(LOWER).score(request(), candidates(2)).tolist() == [0.0, 0.0]


def test_another_extractors_metric_is_another_metric() -> None:
    one = EndpointAttributeScorer(attribute_key="pressure", producer="mine", algorithm=Scoring(type=LOWER))
    assert one.score(request(), pressed(1, 2)).tolist() == [0.0, 0.0]
    assert one.score(request(), candidates(**{"pressure/mine": [1, 2]})).tolist() == [1.0, 0.0]


def filtering(
    operator: str = "LessThan", value: float = 5.0, on_missing: str = "Pass", fallback: bool = False
) -> EndpointAttributeFilter:
    algorithm = Keeping(type="threshold", threshold=Threshold(operator=operator, value=value))
    made = EndpointAttributeFilter(
        attribute="pressure", algorithm=algorithm, on_missing=on_missing, fallback_on_empty=fallback
    )
    made.check()
    return made


def kept(one: EndpointAttributeFilter, view: Candidates) -> list[bool]:
    return one.keep(request(), view, Random(0)).tolist()


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("LessThan", [True, False, False]),
        ("LessThanOrEqual", [True, True, False]),
        ("GreaterThan", [False, False, True]),
        ("GreaterThanOrEqual", [False, True, True]),
        ("Equal", [False, True, False]),
        ("NotEqual", [True, False, True]),
    ],
)
def test_a_value_is_compared_as_asked(operator: str, expected: list[bool]) -> None:
    assert kept(filtering(operator), pressed(4, 5, 6)) == expected


def test_every_operator_is_tried_here() -> None:
    assert len(OPERATORS) == 6


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("on_missing", "stays"), [("Pass", True), ("Fail", False)])
def test_an_endpoint_without_the_metric_stays_or_goes_as_configured(
    operator: str, on_missing: str, stays: bool
) -> None:
    assert kept(filtering(operator, on_missing=on_missing), pressed(1, NAN, 9))[1] is stays
    assert kept(filtering(operator, on_missing=on_missing), candidates(2)) == [stays, stays]


@pytest.mark.parametrize(("fallback", "stay"), [(True, True), (False, False)])
def test_when_nobody_would_stay_everybody_does_if_that_is_configured(fallback: bool, stay: bool) -> None:
    assert kept(filtering(fallback=fallback), pressed(6, 7)) == [stay, stay]
    assert kept(filtering(fallback=fallback), pressed(1, 7)) == [True, False]


THRESHOLD = "{type: threshold, threshold: {operator: LessThan, value: 1}}"


@pytest.mark.parametrize(
    ("kind", "parameters", "says"),
    [
        ("scorer", "{attributeKey: a/b, algorithm: {type: linear_lower_is_better}}", "without '/'; producer names"),
        ("scorer", "{attributeKey: '', algorithm: {type: linear_lower_is_better}}", "expected a name without '/'"),
        (
            "scorer",
            "{attributeKey: a, producer: '', algorithm: {type: linear_lower_is_better}}",
            "name of the extractor",
        ),
        ("scorer", "{attributeKey: a}", "missing required field `algorithm`"),
        ("scorer", "{attributeKey: a, algorithm: {type: linear}}", "accepted are linear_lower_is_better and linear_h"),
        (
            "scorer",
            "{attributeKey: a, algorithm: {type: linear_lower_is_better, "
            "normalization: {fixedRange: {min: 1, max: 1}}}}",
            "a finite min below a finite max",
        ),
        (
            "scorer",
            "{attributeKey: a, algorithm: {type: linear_lower_is_better, "
            "normalization: {fixedRange: {min: 0, max: 1}, adaptiveRange: {}}}}",
            "fixedRange or adaptiveRange, not both",
        ),
        ("filter", f"{{attribute: a/b, algorithm: {THRESHOLD}}}", "without '/'"),
        ("filter", f"{{attribute: a, onMissing: Skip, algorithm: {THRESHOLD}}}", "accepted are Pass and Fail"),
        ("filter", "{attribute: a, algorithm: {type: topK}}", "accepted is threshold"),
        ("filter", "{attribute: a, algorithm: {type: threshold}}", "needs a finite value and an operator"),
        (
            "filter",
            "{attribute: a, algorithm: {type: threshold, threshold: {operator: '<', value: 1}}}",
            "operators are LessThan, LessThanOrEqual,",
        ),
    ],
)
def test_a_configuration_error_says_what_is_accepted(kind: str, parameters: str, says: str) -> None:
    text = f"plugins: [{{type: endpoint-attribute-{kind}, parameters: {parameters}}}]"
    with pytest.raises(ConfigError) as error:
        resolve(load(CONFIG_HEAD + text), allow_experimental=True)
    assert says in str(error.value)


def test_an_adaptive_range_can_be_written_out() -> None:
    Normalization(adaptive_range=AdaptiveRange()).check()


def test_a_router_follows_a_custom_metric() -> None:
    loads = {f"e{i}": Load(0.0, 0.0, 0.0, custom={COLUMN: value}) for i, value in enumerate((5.0, 1.0, 3.0))}
    router = router_of(
        "plugins: [{type: endpoint-attribute-scorer, "
        f"parameters: {{attributeKey: pressure, algorithm: {{type: {LOWER}}}}}}}]",
        pool_of(endpoints(4), loads),
    )
    decision = router.choose(request(), None, 0.0)
    assert list(decision.scores.values()) == [0.0, 1.0, 0.5, 0.0]


NAMED = [endpoint(0), endpoint(1), endpoint(2, address="10.0.0.2", port=9000), endpoint(3, address="fd00::1")]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("10.0.0.1", ["e0"]),
        ("10.0.0.2", ["e1", "e2"]),
        ("10.0.0.2:9000", ["e2"]),
        ("10.0.0.1:8000, 10.0.0.2:9000", ["e0", "e2"]),
        ("fd00::1", ["e3"]),
        ("[fd00::1]:8000", ["e3"]),
        ("10.0.0.1:8001", []),
        ("10.0.0", []),
        ("", []),
        (" , ", []),
        (None, []),
    ],
)
def test_a_conformance_test_names_its_endpoints_in_a_header(header: str | None, expected: list[str]) -> None:
    headers = {} if header is None else {"test-epp-endpoint-selection": header}
    mask = HeaderBasedTestingFilter().keep(request(headers=headers), Candidates(NAMED, {}), Random(0))
    assert [one.name for one, keep in zip(NAMED, mask, strict=True) if keep] == expected
    assert HeaderBasedTestingFilter().headers() == ("test-epp-endpoint-selection",)


def test_without_that_header_no_endpoint_is_left() -> None:
    router = router_of("plugins: [{type: header-based-testing-filter}]", pool_of(endpoints(2)))
    with pytest.raises(NoneLeft):
        router.choose(request(), None, 0.0)
    asked = request(headers={"test-epp-endpoint-selection": "10.0.0.2"})
    assert router.choose(asked, None, 0.0).picked[0].name == "e1"
