"""Which candidates stay."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import pytest

from llmd_sched.catalog import resolve
from llmd_sched.config import load
from llmd_sched.errors import ConfigError, NoneLeft
from llmd_sched.plugin import Filter
from llmd_sched.sched.filters import (
    ROLE_LABEL,
    ByLabel,
    Condition,
    DecodeFilter,
    EncodeFilter,
    LabelSelectorFilter,
    PrefillFilter,
    PrefixCacheAffinityFilter,
    SloHeadroomTierFilter,
    UtilizationFilter,
)
from llmd_sched.sched.labels import Requirement
from llmd_sched.sched.scorers import ContextLengthAware
from llmd_sched.types import Candidates
from tests.builders import CONFIG_HEAD, candidates, endpoint, labelled, pool_of, predicted, request, router_of


class Draw(Random):
    """Draws one number, again and again, and counts."""

    def __init__(self, value: float) -> None:
        super().__init__(0)
        self.value, self.drawn = value, 0

    def random(self) -> float:
        self.drawn += 1
        return self.value


def kept(one: Filter, view: Candidates, draw: float = 0.999) -> list[bool]:
    return one.keep(request(), view, Draw(draw)).tolist()


@pytest.mark.parametrize(
    ("match", "threshold", "expected"),
    [
        ([10, 0, 8], 0.8, [True, False, True]),
        ([7, 0, 5], 0.8, [True, True, True]),  # nobody reaches it
        ([10, 9, 8], 0.8, [True, True, True]),
        ([10, 9.9, 0], 0.99, [True, True, False]),
        ([10, 0, 0], 1.0, [True, False, False]),
        ([10, 0, 0], 0.0, [True, True, True]),  # off
        ([10, 0, 0], -1.0, [True, True, True]),
        ([0], 0.8, [True]),
        ([10], 0.8, [True]),
    ],
)
def test_endpoints_with_enough_of_the_prompt_are_kept_alone(
    match: list[float], threshold: float, expected: list[bool]
) -> None:
    view = candidates(match=match, total=[10] * len(match))
    assert kept(PrefixCacheAffinityFilter(affinity_threshold=threshold), view) == expected


def test_without_match_information_everything_stays() -> None:
    assert kept(PrefixCacheAffinityFilter(), candidates(3)) == [True, True, True]
    assert kept(PrefixCacheAffinityFilter(), candidates(match=[0, 0], total=[0, 0])) == [True, True]


@pytest.mark.parametrize(
    ("sticky_tokens", "other_tokens", "penalty_ms", "sticks"),
    [
        (0, 0, 1000, True),
        (1000, 0, 1000, True),  # exactly the penalty is not more
        (1001, 0, 1000, False),
        (5000, 4000, 1000, True),
        (5001, 4000, 1000, False),
        (9_999_999, 0, 0, True),  # 0: always stay
        (0, 5000, 1000, True),
    ],
)
def test_affinity_gives_way_when_its_best_is_too_far_behind(
    sticky_tokens: float, other_tokens: float, penalty_ms: float, sticks: bool
) -> None:
    one = PrefixCacheAffinityFilter(max_ttft_penalty_ms=penalty_ms, peak_prefill_throughput=1000.0)
    tokens = [sticky_tokens, sticky_tokens + 7, other_tokens, other_tokens + 9]
    view = candidates(match=[9, 9, 0, 0], total=[10] * 4, inflight_tokens=tokens)
    assert kept(one, view) == ([True, True, False, False] if sticks else [True] * 4)


def test_the_default_gap_is_that_of_the_reference() -> None:
    def view(tokens: float) -> Candidates:
        return candidates(match=[10, 0], total=[10, 10], inflight_tokens=[tokens, 0])

    assert kept(PrefixCacheAffinityFilter(), view(286_700)) == [True, False]
    assert kept(PrefixCacheAffinityFilter(), view(286_710)) == [True, True]


@pytest.mark.parametrize(("ttft_ms", "sticks"), [([5000, 1000], True), ([6100, 1000], False)])
def test_affinity_can_ask_the_prediction(ttft_ms: list[float], sticks: bool) -> None:
    one = PrefixCacheAffinityFilter(ttft_source="latencyPredictor", max_ttft_penalty_ms=5000)
    view = candidates(match=[10, 0], total=[10, 10], ttft_ms=ttft_ms, inflight_tokens=[9e9, 0])
    assert kept(one, view) == [True, not sticks]


@pytest.mark.parametrize("source", ["prefillThroughput", "latencyPredictor"])
def test_affinity_sticks_when_nobody_knows_the_wait(source: str) -> None:
    view = candidates(match=[10, 0], total=[10, 10])
    assert kept(PrefixCacheAffinityFilter(ttft_source=source), view) == [True, False]


@pytest.mark.parametrize(("draw", "expected"), [(0.09, [True, True]), (0.11, [True, False])])
def test_affinity_explores_with_its_probability(draw: float, expected: list[bool]) -> None:
    one = PrefixCacheAffinityFilter(exploration_probability=0.1)
    assert kept(one, candidates(match=[10, 0], total=[10, 10]), draw) == expected


def test_affinity_without_exploration_draws_nothing() -> None:
    dice = Draw(0.0)
    PrefixCacheAffinityFilter().keep(request(), candidates(match=[10, 0], total=[10, 10]), dice)
    assert dice.drawn == 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"affinity_threshold": 1.1}, "at most 1"),
        ({"exploration_probability": -0.1}, "between 0 and 1"),
        ({"exploration_probability": 1.1}, "between 0 and 1"),
        ({"max_ttft_penalty_ms": -1.0}, "0 or more"),
        ({"ttft_source": "guess"}, "prefillThroughput or latencyPredictor"),
        ({"peak_prefill_throughput": 0.0}, "must be positive"),
    ],
)
def test_affinity_checks_its_parameters(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixCacheAffinityFilter(**parameters).check()


def test_the_throughput_matters_only_when_it_is_used() -> None:
    PrefixCacheAffinityFilter(ttft_source="latencyPredictor", peak_prefill_throughput=0.0).check()


@pytest.mark.parametrize(
    ("ttft", "tpot", "draw", "expected"),
    [
        ([5, -5, 0], [0, 0, 0], 0.5, [True, False, True]),
        ([5, 5, 5], [1, -1, 0], 0.5, [True, False, True]),
        ([5, -5, 0], [0, 0, 0], 0.005, [False, True, False]),
        ([5, -5, 0], [0, 0, 0], 0.01, [True, False, True]),  # strictly below epsilon
        ([5, 5], [0, 0], 0.0, [True, True]),
        ([-5, -5], [0, 0], 0.0, [True, True]),
        ([-5], [0], 0.5, [True]),
    ],
)
def test_the_tier_that_keeps_both_slos_is_preferred(
    ttft: list[float], tpot: list[float], draw: float, expected: list[bool]
) -> None:
    assert kept(SloHeadroomTierFilter(), predicted(ttft, tpot), draw) == expected


def test_without_predictions_no_tier_is_dropped() -> None:
    assert kept(SloHeadroomTierFilter(), candidates(3), 0.0) == [True, True, True]


@pytest.mark.parametrize("epsilon", [-0.1, 1.1, float("nan")])
def test_the_tier_filter_checks_its_parameter(epsilon: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        SloHeadroomTierFilter(epsilon_explore_neg=epsilon).check()


def test_a_filter_sees_only_the_candidates_still_in_view() -> None:
    whole = candidates(match=[10, 0, 0], total=[10, 10, 10])
    view = whole.keep(~(whole.column("prefix_match_blocks/approx-prefix-cache-producer") == 10))
    assert kept(PrefixCacheAffinityFilter(), view) == [True, True]


PODS: tuple[Mapping[str, str], ...] = (
    {"app": "nginx", "version": "v1.0", "tier": "frontend"},
    {"app": "nginx", "version": "v1.1", "tier": "frontend"},
    {"app": "redis", "tier": "backend", "deprecated": "true"},
    {"app": "unknown"},
    {},
)


def staying(one: Filter, *labels: Mapping[str, str]) -> list[int]:
    return [i for i, stays in enumerate(kept(one, labelled(*labels))) if stays]


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (LabelSelectorFilter(), [0, 1, 2, 3, 4]),
        (LabelSelectorFilter(match_labels={"app": "nginx"}), [0, 1]),
        (LabelSelectorFilter(match_labels={"app": "nginx", "version": "v1.1"}), [1]),
        (LabelSelectorFilter(match_labels={"app": "none"}), []),
        (
            LabelSelectorFilter(match_expressions=(Requirement(key="app", operator="In", values=("redis", "nginx")),)),
            [0, 1, 2],
        ),
        (
            LabelSelectorFilter(
                match_labels={"app": "nginx"},
                match_expressions=(Requirement(key="version", operator="NotIn", values=("v1.0",)),),
            ),
            [1],
        ),
    ],
)
def test_a_label_selector_keeps_what_it_matches(one: Filter, expected: list[int]) -> None:
    assert staying(one, *PODS) == expected


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (ByLabel(label="app", valid_values=("nginx",)), [0, 1]),
        (ByLabel(label="version", valid_values=("v1.0",)), [0]),
        (ByLabel(label="tier", allows_no_label=True), [3, 4]),
        (ByLabel(label="tier", valid_values=("frontend", "backend")), [0, 1, 2]),
        (ByLabel(label="tier", valid_values=("backend",), allows_no_label=True), [2, 3, 4]),
        (ByLabel(label="tier", valid_values=("",)), [3, 4]),  # absent reads as empty
        (ByLabel(label="rack", valid_values=("a",)), []),
    ],
)
def test_by_label_keeps_the_values_it_lists(one: Filter, expected: list[int]) -> None:
    assert staying(one, *PODS) == expected


ROLES = ("decode", "prefill", "encode", "prefill-decode", "both", "encode-prefill", "encode-prefill-decode", "", "all")


@pytest.mark.parametrize(
    ("one", "roles", "unlabelled"),
    [
        (DecodeFilter(), {"decode", "prefill-decode", "both", "encode-prefill-decode"}, True),
        (PrefillFilter(), {"prefill", "encode-prefill", "prefill-decode", "both", "encode-prefill-decode"}, False),
        (EncodeFilter(), {"encode", "encode-prefill", "encode-prefill-decode"}, False),
    ],
)
def test_a_role_filter_keeps_those_that_can_do_its_stage(one: Filter, roles: set[str], unlabelled: bool) -> None:
    stays = staying(one, *({ROLE_LABEL: role} for role in ROLES))
    assert {ROLES[i] for i in stays} == roles
    assert kept(one, labelled({"app": "x"})) == [unlabelled]


@pytest.mark.parametrize("one", [DecodeFilter(), PrefillFilter(), EncodeFilter(), LabelSelectorFilter()])
def test_a_label_filter_marks_nobody_when_there_is_nobody(one: Filter) -> None:
    assert kept(one, candidates(0)) == []


def caps(*conditions: tuple[str, float], fallback: bool = False) -> UtilizationFilter:
    made = tuple(Condition(metric=metric, max_value=most) for metric, most in conditions)
    return UtilizationFilter(conditions=made, fallback_on_empty=fallback)


@pytest.mark.parametrize(
    ("metric", "column"),
    [
        ("active-requests", "inflight_requests"),
        ("running-requests", "running"),
        ("waiting-queue", "waiting"),
        ("kv-cache-utilization", "kv_usage"),
    ],
)
@pytest.mark.parametrize(
    ("values", "most", "expected"),
    [
        ([0, 0.5, 0.6], 0.5, [True, True, False]),  # exactly the cap stays
        ([0, 0.5, 0.6], 1, [True, True, True]),
        ([0, 0.5, 0.6], 0, [True, False, False]),
        ([1, 1, 1], 0.9, [False, False, False]),
    ],
)
def test_an_endpoint_above_the_cap_is_dropped(
    metric: str, column: str, values: list[float], most: float, expected: list[bool]
) -> None:
    assert kept(caps((metric, most)), candidates(**{column: values})) == expected


def test_any_cap_exceeded_is_enough() -> None:
    view = candidates(waiting=[0, 9, 0, 9], kv_usage=[0.1, 0.1, 0.95, 0.95])
    assert kept(caps(("waiting-queue", 5), ("kv-cache-utilization", 0.9)), view) == [True, False, False, False]
    assert kept(caps(("waiting-queue", 5), ("waiting-queue", 20)), view) == [True, False, True, False]


@pytest.mark.parametrize(("waiting", "expected"), [([9, 9], [True, True]), ([9, 5], [False, True])])
def test_with_the_fallback_everybody_stays_when_nobody_would(waiting: list[float], expected: list[bool]) -> None:
    assert kept(caps(("waiting-queue", 5), fallback=True), candidates(waiting=waiting)) == expected


def test_requests_that_nobody_counts_are_none() -> None:
    assert kept(caps(("active-requests", 0)), candidates(2)) == [True, True]


def test_utilization_needs_the_in_flight_producer_only_for_active_requests() -> None:
    assert caps(("waiting-queue", 5)).reads() == ()
    (need,) = caps(("waiting-queue", 5), ("active-requests", 5)).reads()
    assert need.producer == "inflight-load-producer"


RANGE = "llm-d.ai/context-length-range"


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, [0, 3]), (100, [0, 1, 3]), (101, [1, 3]), (1000, [1, 3]), (1001, [3])]
)
def test_context_length_filters_when_it_is_told_to(tokens: int, expected: list[int]) -> None:
    view = labelled({RANGE: "0-100"}, {RANGE: "100-1000"}, {RANGE: "many"}, {})
    asked = request(input_tokens=tokens)
    stays = ContextLengthAware(enable_filtering=True).keep(asked, view, Random(0)).tolist()
    assert [i for i, keep in enumerate(stays) if keep] == expected
    assert ContextLengthAware().keep(asked, view, Random(0)).all()


CONTEXT_LENGTH = "plugins: [{type: context-length-aware, parameters: {enableFiltering: %s}}]"


def test_in_a_profile_context_length_both_filters_and_scores() -> None:
    pool = pool_of([endpoint(0, labels={RANGE: "0-100"}), endpoint(1, labels={RANGE: "0-9000"})])
    filters, scores = (router_of(CONTEXT_LENGTH % on, pool) for on in ("true", "false"))
    short, long = request(input_tokens=50), request(input_tokens=500)
    assert {filters.choose(short, None, 0.0).picked[0].name for _ in range(5)} == {"e0"}
    assert [len(r.choose(long, None, 0.0).scores) for r in (filters, scores)] == [1, 2]


def test_filters_that_leave_nobody_end_the_request() -> None:
    router = router_of("plugins: [{type: prefill-filter}]", pool_of([endpoint(0)]))
    with pytest.raises(NoneLeft):
        router.choose(request(), None, 0.0)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("{type: label-selector-filter, parameters: {matchLabel: {}}}", "accepted: matchLabels, matchExpressions"),
        ("{type: label-selector-filter, parameters: {matchLabels: {a: 1}}}", "Expected `str`, got `int`"),
        ("{type: label-selector-filter, parameters: {matchLabels: {a b: x}}}", "'a b' is not a label key: accepted"),
        ("{type: label-selector-filter, parameters: {matchLabels: {a: x y}}}", "'x y' is not a label value: accepted"),
        (
            "{type: label-selector-filter, parameters: {matchExpressions: [{key: a, operator: Is}]}}",
            "operator 'Is' of a: accepted are In, NotIn, Exists, DoesNotExist",
        ),
        (
            "{type: label-selector-filter, parameters: {matchExpressions: [{key: a, operator: In, value: x}]}}",
            "unknown field `value`; accepted: key, operator, values",
        ),
        ("{type: label-selector-filter, parameters: {matchExpressions: [{key: a}]}}", "missing required field"),
        ("{type: by-label}", "missing required field `label`"),
        ("{type: by-label, parameters: {label: '', validValues: [a]}}", "label must not be empty"),
        ("{type: by-label, parameters: {label: a}}", "validValues must name at least one value, or allowsNoLabel"),
        ("{type: by-label, parameters: {label: a, validValues: b}}", "Expected `array`, got `str`"),
        ("{type: by-label, parameters: {label: a, allowsNoLabel: 'true'}}", "Expected `bool`, got `str`"),
        ("{type: decode-filter, parameters: {label: a}}", "this takes no parameters"),
        ("{type: prefill-filter, parameters: {label: a}}", "this takes no parameters"),
        ("{type: encode-filter, parameters: {label: a}}", "this takes no parameters"),
        ("{type: utilization-filter}", "missing required field `conditions`"),
        ("{type: utilization-filter, parameters: {conditions: []}}", "at least one entry, of metric and maxValue"),
        (
            "{type: utilization-filter, parameters: {conditions: [{metric: load, maxValue: 1}]}}",
            "metric 'load' of a condition: accepted are active-requests, running-requests, waiting-queue, kv-cache-",
        ),
        (
            "{type: utilization-filter, parameters: {conditions: [{metric: waiting-queue, maxValue: -1}]}}",
            "maxValue of waiting-queue must be a finite number, 0 or more",
        ),
        (
            "{type: utilization-filter, parameters: {conditions: [{metric: waiting-queue, maxValue: .nan}]}}",
            "maxValue of waiting-queue must be a finite number, 0 or more",
        ),
        (
            "{type: utilization-filter, parameters: {conditions: [{metric: kv-cache-utilization, maxValue: 90}]}}",
            "between 0 and 1",
        ),
        (
            "{type: utilization-filter, parameters: {conditions: [{metric: waiting-queue, max: 1}]}}",
            "unknown field `max`; accepted: metric, maxValue",
        ),
        ("{type: utilization-filter, parameters: {conditions: [{metric: waiting-queue}]}}", "field `maxValue`"),
        (
            "{type: utilization-filter, parameters: {maxRequests: 1, conditions: []}}",
            "accepted: conditions, fallbackOnEmpty, inFlightLoadProducerName",
        ),
    ],
)
def test_a_wrong_parameter_of_a_filter_is_refused_with_what_is_accepted(plugin: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(load(CONFIG_HEAD + f"plugins: [{plugin}]"), allow_experimental=True)
    assert message in str(error.value)
    assert error.value.path.startswith("$.plugins[0].parameters")
