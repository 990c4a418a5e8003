"""The formulas, row by row."""

from __future__ import annotations

import numpy as np
import pytest

from llmd_sched.catalog import resolve
from llmd_sched.config import load
from llmd_sched.errors import ConfigError
from llmd_sched.plugin import Scorer
from llmd_sched.pool.pool import Load
from llmd_sched.sched.scorers import (
    ActiveRequestScorer,
    ContextLengthAware,
    KvCacheUtilizationScorer,
    LatencyScorer,
    LoadAwareScorer,
    LoraAffinityScorer,
    PrefixCacheScorer,
    QueueScorer,
    RunningRequestsSizeScorer,
    TokenLoadScorer,
)
from llmd_sched.types import Adapters, Candidates
from tests.builders import CONFIG_HEAD, candidates, endpoint, endpoints, labelled, pool_of, predicted, request


def scored(scorer: Scorer, view: Candidates) -> list[float]:
    return scorer.score(request(), view).tolist()


@pytest.mark.parametrize(
    ("values", "scores"),
    [
        ([0, 5, 10], [1.0, 0.5, 0.0]),
        ([3, 3, 3], [1.0, 1.0, 1.0]),
        ([0, 0], [1.0, 1.0]),
        ([7], [1.0]),
        ([2, 4], [1.0, 0.0]),
        ([1, 2, 5], [1.0, 0.75, 0.0]),
    ],
)
@pytest.mark.parametrize(("scorer", "column"), [(QueueScorer(), "waiting"), (RunningRequestsSizeScorer(), "running")])
def test_fewer_requests_score_higher_between_least_and_most(
    scorer: Scorer, column: str, values: list[float], scores: list[float]
) -> None:
    assert scored(scorer, candidates(**{column: values})) == pytest.approx(scores)


@pytest.mark.parametrize(
    ("threshold", "waiting", "score"),
    [
        (128, 0, 0.5),
        (128, 32, 0.375),
        (128, 64, 0.25),
        (128, 127, 0.5 / 128),
        (128, 128, 0.0),
        (128, 1000, 0.0),
        (10, 1, 0.45),
        (1, 1, 0.0),
        (0, 64, 0.25),  # 0 or less means the default
        (-3, 64, 0.25),
    ],
)
def test_load_aware_scores_half_for_an_empty_queue_and_less_to_the_threshold(
    threshold: int, waiting: float, score: float
) -> None:
    assert scored(LoadAwareScorer(threshold=threshold), candidates(waiting=[waiting])) == pytest.approx([score])


def test_load_aware_scores_each_alone() -> None:
    assert scored(LoadAwareScorer(), candidates(waiting=[0, 64, 128])) == [0.5, 0.25, 0.0]


def test_kv_utilization_scores_what_is_free() -> None:
    assert scored(KvCacheUtilizationScorer(), candidates(kv_usage=[0, 0.25, 1])) == [1.0, 0.75, 0.0]


@pytest.mark.parametrize(
    ("match", "total", "weight", "scale", "score"),
    [
        (3, 4, 0.0, 8192, 0.75),
        (0, 4, 0.0, 8192, 0.0),
        (4, 4, 0.0, 8192, 1.0),
        (0, 0, 0.0, 8192, 0.0),
        (0, 0, 1.0, 8192, 0.0),
        (64, 128, 1.0, 8192, 0.25),  # 4096 of 8192 tokens, squared
        (64, 128, 0.5, 8192, 0.375),
        (128, 128, 1.0, 8192, 1.0),
        (256, 1024, 1.0, 8192, 1.0),  # capped
        (256, 1024, 0.5, 8192, 0.625),
        (1, 2, 0.2, 640, 0.2 * 0.01 + 0.8 * 0.5),
    ],
)
def test_prefix_cache_blends_length_and_share(
    match: float, total: float, weight: float, scale: float, score: float
) -> None:
    scorer = PrefixCacheScorer(match_length_weight=weight, match_length_scale_tokens=scale)
    assert scored(scorer, candidates(match=[match], total=[total], block=[64])) == pytest.approx([score])


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_prefix_cache_without_information_scores_nothing(weight: float) -> None:
    assert scored(PrefixCacheScorer(match_length_weight=weight), candidates(2)) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"match_length_weight": -0.1}, "between 0 and 1"),
        ({"match_length_weight": 1.1}, "between 0 and 1"),
        ({"match_length_weight": 0.5, "match_length_scale_tokens": 0}, "must be positive"),
    ],
)
def test_prefix_cache_checks_its_parameters(parameters: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixCacheScorer(**parameters).check()
    PrefixCacheScorer(match_length_weight=0, match_length_scale_tokens=0).check()


@pytest.mark.parametrize(
    ("in_flight", "uncached", "threshold", "score"),
    [
        (0, 0, 1000, 1.0),
        (250, 250, 1000, 0.5),
        (1000, 0, 1000, 0.0),
        (5000, 0, 1000, 0.0),
        (-50, 0, 1000, 1.0),
        (2097152, 0, 0, 0.5),  # 0 or less means the default
        (2097152, 0, -1, 0.5),
        (0, 4194304, 4194304, 0.0),
    ],
)
def test_token_load_counts_what_is_in_flight_and_what_this_request_lacks(
    in_flight: float, uncached: float, threshold: float, score: float
) -> None:
    view = candidates(inflight_tokens=[in_flight], uncached_tokens=[uncached])
    assert scored(TokenLoadScorer(queue_threshold_tokens=threshold), view) == pytest.approx([score])


@pytest.mark.parametrize(
    ("counts", "idle", "busy", "scores"),
    [
        ([0, 0], 0, 1.0, [1.0, 1.0]),
        ([0, 2, 4], 0, 1.0, [1.0, 0.5, 0.0]),
        ([1, 2, 4], 1, 1.0, [1.0, 0.5, 0.0]),
        ([4, 4], 0, 1.0, [0.0, 0.0]),
        ([0, 2, 4], 0, 0.5, [1.0, 0.25, 0.0]),
        ([0, 2, 4], 2, 0.0, [1.0, 1.0, 0.0]),
        ([0, 2, 4], 0, 1.5, [1.0, 0.5, 0.0]),  # outside [0, 1] is ignored
        ([0, 2, 4], 0, -1.0, [1.0, 0.5, 0.0]),
        ([3], 5, 1.0, [1.0]),
    ],
)
def test_active_request_prefers_idle_then_least_busy(
    counts: list[float], idle: int, busy: float, scores: list[float]
) -> None:
    scorer = ActiveRequestScorer(idle_threshold=idle, max_busy_score=busy)
    assert scored(scorer, candidates(inflight_requests=counts)) == pytest.approx(scores)


@pytest.mark.parametrize("scorer", [TokenLoadScorer(), ActiveRequestScorer()])
def test_load_that_nobody_counts_is_no_load(scorer: Scorer) -> None:
    assert scored(scorer, candidates(2)) == [1.0, 1.0]


LEAST, MOST = LatencyScorer(), LatencyScorer(headroom_selection_strategy="most")


@pytest.mark.parametrize(
    ("scorer", "ttft", "tpot", "scores"),
    [
        # The best end is 1.01 and the worst 0.01.
        (LEAST, [10, 20], [0, 0], [1.01, 0.01]),
        (MOST, [10, 20], [0, 0], [0.01, 1.01]),
        (LEAST, [0, 50, 100], [0, 50, 100], [1.01, 0.51, 0.01]),
        (MOST, [0, 50, 100], [0, 50, 100], [0.01, 0.51, 1.01]),
        # Truncated to hundredths, then one is added.
        (LEAST, [0, 1, 3], [0, 0, 0], [1.01, 0.67, 0.01]),
        (MOST, [0, 1, 3], [0, 0, 0], [0.01, 0.34, 1.01]),
        # No range at all: one half.
        (LEAST, [7], [3], [0.51]),
        (MOST, [7, 7], [3, 3], [0.51, 0.51]),
        (LEAST, [7, 7 + 1e-10], [3, 3], [0.51, 0.51]),
        # A dimension without range has no say.
        (LEAST, [5, 5, 5], [0, 5, 20], [1.01, 0.76, 0.01]),
        (LEAST, [0, 5, 20], [5, 5, 5], [1.01, 0.76, 0.01]),
        # Both: 0.8 and 0.2 by default.
        (MOST, [0, 100], [50, 0], [0.21, 0.81]),
        # Those that keep both SLOs are scored alone.
        (LEAST, [-1, 10, 20], [5, 0, 0], [0.0, 1.01, 0.01]),
        (LEAST, [30, 10, 20], [-5, 0, 0], [0.0, 1.01, 0.01]),
        (LEAST, [0, -3], [0, 3], [0.51, 0.0]),
    ],
)
def test_headrooms_that_are_kept_are_scored_in_their_range(
    scorer: LatencyScorer, ttft: list[float], tpot: list[float], scores: list[float]
) -> None:
    assert scored(scorer, predicted(ttft, tpot)) == pytest.approx(scores, abs=1e-9)


@pytest.mark.parametrize(
    ("ttft", "tpot", "dispatched", "scores"),
    [
        # Idle ones first, and the least deficit of them.
        ([-10, -20, -5], [0, 0, 0], [0, 0, 3], [1.01, 0.01, 0.0]),
        ([-10, -20], [-5, -5], [4, 0], [0.0, 0.51]),
        # An idle one that misses both comes before a busy one that misses only TPOT.
        ([-10, 20], [-5, -5], [0, 1], [0.51, 0.0]),
        # Only TPOT missed before only TTFT missed before both.
        ([5, -1, -1], [-9, 2, -2], [1, 1, 1], [0.51, 0.0, 0.0]),
        ([-7, -1], [2, -2], [1, 1], [0.51, 0.0]),
        ([-10, -30], [0, 0], [1, 1], [1.01, 0.01]),
        ([-10, -30], [-10, -30], [1, 1], [1.01, 0.01]),
    ],
)
@pytest.mark.parametrize("scorer", [LEAST, MOST])
def test_without_any_kept_headroom_the_smallest_deficit_wins_whatever_the_strategy(
    scorer: LatencyScorer, ttft: list[float], tpot: list[float], dispatched: list[float], scores: list[float]
) -> None:
    assert scored(scorer, predicted(ttft, tpot, dispatched)) == pytest.approx(scores, abs=1e-9)


@pytest.mark.parametrize(
    ("ttft_weight", "tpot_weight", "scores"),
    [
        (0.0, 0.0, [1.01, 0.01]),  # TTFT alone
        (1.0, 0.0, [1.01, 0.01]),
        (0.0, 1.0, [0.01, 1.01]),
        (8.0, 2.0, [0.81, 0.21]),  # normalised
        (1.0, 1.0, [0.51, 0.51]),
    ],
)
def test_the_two_targets_are_blended_by_normalised_weights(
    ttft_weight: float, tpot_weight: float, scores: list[float]
) -> None:
    scorer = LatencyScorer(ttft_weight=ttft_weight, tpot_weight=tpot_weight)
    # Truncation may fall to either side of a hundredth that binary fractions cannot hold.
    assert scored(scorer, predicted([0, 10], [10, 0])) == pytest.approx(scores, abs=0.0101)


def test_without_an_slo_the_lowest_prediction_wins() -> None:
    assert np.argmax(LEAST.score(request(), predicted([-300, -100, -200], [-9, -9, -9]))) == 1


@pytest.mark.parametrize(
    ("kv", "queue", "prefix", "scores"),
    [
        (1, 1, 1, [0.75, 0.25]),  # (0.75 + 1 + 0.5) / 3 and (0.75 + 0 + 0) / 3
        (0, 0, 0, [0.75, 0.75]),
        (1, 0, 0, [0.75, 0.75]),
        (0, 5, 0, [1.0, 0.0]),
        (0, 0, 2, [0.5, 0.0]),
        (0, 2, 1, [0.83, 0.0]),
    ],
)
def test_without_predictions_load_and_prefix_are_blended(
    kv: float, queue: float, prefix: float, scores: list[float]
) -> None:
    scorer = LatencyScorer(composite_kv_weight=kv, composite_queue_weight=queue, composite_prefix_weight=prefix)
    view = candidates(kv_usage=[0.25, 0.25], waiting=[0, 4], match=[1, 0], total=[2, 2])
    assert scored(scorer, view) == pytest.approx(scores)


@pytest.mark.parametrize(
    ("kv_usage", "score"), [(0.625, 0.38), (0.375, 0.63), (0.125, 0.88), (0.874, 0.13), (0.876, 0.12)]
)
def test_the_blend_is_rounded_to_hundredths_with_halves_upwards(kv_usage: float, score: float) -> None:
    scorer = LatencyScorer(composite_queue_weight=0, composite_prefix_weight=0)
    assert scored(scorer, candidates(kv_usage=[kv_usage])) == pytest.approx([score])


@pytest.mark.parametrize(("waiting", "scores"), [([0, 0], [1.0, 1.0]), ([2, 8], [0.75, 0.0]), ([5, 5], [0.0, 0.0])])
def test_the_blend_measures_queues_by_the_longest(waiting: list[float], scores: list[float]) -> None:
    scorer = LatencyScorer(composite_kv_weight=0, composite_prefix_weight=0)
    assert scored(scorer, candidates(waiting=waiting)) == pytest.approx(scores)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"headroom_selection_strategy": "best"}, "least or most"),
        ({"ttft_weight": -1}, "finite and 0 or more"),
        ({"composite_kv_weight": float("nan")}, "finite and 0 or more"),
        ({"tpot_weight": float("inf")}, "finite and 0 or more"),
    ],
)
def test_the_latency_scorer_checks_its_parameters(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatencyScorer(**parameters).check()


def adapters(running: str = "", waiting: str = "", most: int = 0) -> Adapters:
    return Adapters(frozenset(running.split()), frozenset(waiting.split()), most)


@pytest.mark.parametrize(
    ("there", "score"),
    [
        (adapters("poet"), 1.0),
        (adapters("poet coder", "", 2), 1.0),  # in use, though there is no room for another
        (adapters("poet", "poet", 1), 1.0),
        (adapters("", "", 1), 0.8),
        (adapters("coder", "", 2), 0.8),
        (adapters("coder", "poet", 3), 0.8),  # room comes before waiting
        (adapters("coder", "coder", 2), 0.8),  # one that runs and waits takes one place
        (adapters("coder", "poet", 2), 0.6),
        (adapters("a b", "c poet", 2), 0.6),
        (adapters("", "poet", 0), 0.6),
        (adapters("coder", "", 1), 0.0),
        (adapters("coder", "other", 2), 0.0),
        (adapters("", "", 0), 0.0),  # nothing known: no room
        (adapters("po", "et", 2), 0.0),
    ],
)
def test_lora_affinity_prefers_the_adapter_in_use_then_room_then_one_that_waits(there: Adapters, score: float) -> None:
    plain = candidates(2)
    view = Candidates(plain.endpoints, plain.columns, None, [Adapters(), there])
    assert LoraAffinityScorer().score(request(target_model="poet"), view).tolist() == [0.0, score]


def test_lora_affinity_asks_for_the_name_sent_upstream() -> None:
    plain = candidates(1)
    view = Candidates(plain.endpoints, plain.columns, None, [adapters("poet")])
    assert LoraAffinityScorer().score(request(model="alias", target_model="poet"), view).tolist() == [1.0]
    assert LoraAffinityScorer().score(request(model="poet", target_model="base"), view).tolist() == [0.0]


def test_the_pool_tells_of_the_adapters_that_were_read_last() -> None:
    members = endpoints(3)
    pool = pool_of(members)
    asked = request(target_model="poet")

    def affinities() -> list[float]:
        return LoraAffinityScorer().score(asked, pool.candidates(None, 0.0)).tolist()

    assert pool.candidates(None, 0.0).adapters == ()
    pool.record(members[1], Load(adapters=frozenset(), max_adapters=2.0), 0.0)
    assert affinities() == [0.0, 0.8, 0.0]
    pool.record(members[1], Load(adapters=frozenset({"a", "b"}), waiting_adapters=frozenset({"poet"})), 0.0)
    assert affinities() == [0.0, 0.6, 0.0]
    pool.record(members[2], Load(adapters=frozenset({"poet"})), 0.0)
    assert affinities() == [0.0, 0.6, 1.0]
    pool.record(members[2], Load(waiting=1.0), 0.0)  # a page without them changes nothing
    assert affinities() == [0.0, 0.6, 1.0]
    pool.apply([members[2], members[0], members[1]])
    assert affinities() == [1.0, 0.0, 0.6]
    assert LoraAffinityScorer().score(asked, pool.candidates({members[1].hostport}, 0.0)).tolist() == [0.6]
    pool.apply([members[0], endpoint(2, port=8001)])  # another server, of which nothing is known
    assert pool.candidates(None, 0.0).adapters == ()


def test_lora_affinity_scores_nothing_where_nobody_tells_of_adapters() -> None:
    assert scored(LoraAffinityScorer(), candidates(2)) == [0.0, 0.0]


RANGE = "llm-d.ai/context-length-range"


@pytest.mark.parametrize(
    ("text", "tokens", "score"),
    [
        (None, 100, 0.5),
        # In range, both ends included.
        ("0-10000", 0, 0.3 + 0.7 * (0.7 / 2 + 0.3)),
        ("0-10000", 5000, 0.3 + 0.7 * (0.7 / 2 + 0.15)),
        ("0-10000", 10000, 0.3 + 0.7 * (0.7 / 2)),
        ("2000-4000", 2000, 0.3 + 0.7 * (0.7 / 1.2 + 0.3)),
        ("2000-4000", 3500, 0.3 + 0.7 * (0.7 / 1.2 + 0.3 * 0.25)),
        (" 2000 - 4000 ", 3500, 0.3 + 0.7 * (0.7 / 1.2 + 0.3 * 0.25)),
        # No width.
        ("100-100", 100, 1.0),
        ("0-0", 0, 1.0),
        # Outside, by the distance to the nearer end.
        ("0-2000", 2001, 0.3 / 1.001),
        ("0-2000", 3000, 0.15),
        ("4000-8000", 1000, 0.3 / 4),
        ("100-100", 99, 0.3 / 1.001),
        # Not a range.
        ("", 0, 0.0),
        ("-", 0, 0.0),
        ("100", 100, 0.0),
        ("0-100-200", 50, 0.0),
        ("-5-100", 50, 0.0),
        ("200-100", 150, 0.0),
        ("a-b", 0, 0.0),
        ("0-1e4", 0, 0.0),
        ("0-1_000", 0, 0.0),
        ("0-\u0661", 0, 0.0),  # digits, but not ASCII ones
        ("0-" + "9" * 5000, 0, 0.0),
    ],
)
def test_context_length_scores_how_well_the_labelled_range_fits(text: str | None, tokens: int, score: float) -> None:
    view = labelled({} if text is None else {RANGE: text})
    assert ContextLengthAware().score(request(input_tokens=tokens), view).tolist() == pytest.approx([score])


@pytest.mark.parametrize("tokens", [0, 1, 1000, 50_000, 1_000_000])
def test_a_fitting_range_beats_any_that_does_not_fit(tokens: int) -> None:
    view = labelled({RANGE: "0-1000000"}, {RANGE: f"{tokens + 1}-{tokens + 2}"})
    scores = ContextLengthAware().score(request(input_tokens=tokens), view)
    assert scores[0] > 0.3 > scores[1]


def test_context_length_reads_the_label_it_is_told_to() -> None:
    view = labelled({"size": "10-10", RANGE: "0-0"}, {RANGE: "10-10"})
    assert ContextLengthAware(label="size").score(request(input_tokens=10), view).tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("{type: load-aware-scorer, parameters: {threshold: high}}", "Expected `int`, got `str`"),
        ("{type: load-aware-scorer, parameters: {treshold: 1}}", "unknown field `treshold`; accepted: threshold"),
        ("{type: lora-affinity-scorer, parameters: {most: 1}}", "this takes no parameters"),
        ("{type: context-length-aware, parameters: {label: ''}}", "label must not be empty"),
        ("{type: context-length-aware, parameters: {enableFiltering: yes please}}", "Expected `bool`, got `str`"),
        ("{type: context-length-aware, parameters: {min: 1}}", "accepted: label, enableFiltering"),
    ],
)
def test_a_wrong_parameter_of_a_scorer_is_refused_with_what_is_accepted(plugin: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(load(CONFIG_HEAD + f"plugins: [{plugin}]"), allow_experimental=True)
    assert message in str(error.value)
    assert error.value.path.startswith("$.plugins[0].parameters")
