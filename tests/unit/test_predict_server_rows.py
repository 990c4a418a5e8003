"""The rows of llm-d's predictor API: what is accepted, and what our features and samples make of it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest

from llmd_sched.predict import features as f
from llmd_sched.predict_server.rows import (
    MAX_ROWS,
    POD_TYPES,
    TPOT,
    TTFT,
    BadRow,
    Bulk,
    Entry,
    LooseBulk,
    Row,
    Training,
    check,
    feature_rows,
    read_each,
    samples,
)

ROW = {
    "kv_cache_percentage": 0.5,
    "input_token_length": 1000,
    "num_request_waiting": 2,
    "num_request_running": 3,
    "num_tokens_generated": 25,
    "prefix_cache_score": 0.25,
    "pod_type": "decode",
    "prefill_tokens_in_flight": 4000,
    "decode_tokens_in_flight": 5000,
    "encoder_matched_size": 6,
    "encoder_input_size": 7,
}
ENTRY = {**ROW, "actual_ttft_ms": 120.0, "actual_tpot_ms": 0}
REQUIRED = list(ROW)[:6]


def decoded(kind: Any, body: Any) -> Any:
    return msgspec.json.decode(json.dumps(body), type=kind, strict=False)


def row(**changes: Any) -> Row:
    return decoded(Row, {**ROW, **changes})


def entry(**changes: Any) -> Entry:
    return decoded(Entry, {**ENTRY, **changes})


def features_of(one: Row, target: int) -> dict[str, float]:
    return dict(zip(f.FEATURES, feature_rows([one])[target, 0].tolist(), strict=True))


EXPECTED = {
    "uncached_tokens": (750.0, 1000.0),
    "input_tokens": (1000.0, 1000.0),
    "prefix_match": (0.25, 0.0),
    "waiting": (2.0, 2.0),
    "running": (3.0, 3.0),
    "kv_usage": (0.5, 0.5),
    "metrics_age_s": (0.0, 0.0),
    "inflight_requests": (3.0, 3.0),
    "inflight_prefill_tokens": (4000.0, 4000.0),
    "resident_tokens": (5000.0, 5000.0),
    "expected_output_tokens": (0.0, 25.0),
    "priority_class": (1.0, 1.0),
    "lora": (0.0, 0.0),
    "engine_class": (2.0, 2.0),
}
"""Feature: in the row of TTFT, in the row of TPOT."""


@pytest.mark.parametrize("feature", f.FEATURES)
def test_each_feature_of_each_target_comes_from_its_field(feature: str) -> None:
    assert (features_of(row(), TTFT)[feature], features_of(row(), TPOT)[feature]) == EXPECTED.get(feature, (0.0, 0.0))


def test_many_rows_become_one_block_in_their_order() -> None:
    both = feature_rows([row(input_token_length=n) for n in range(5)])
    assert both.shape == (2, 5, len(f.FEATURES))
    assert both.flags.c_contiguous
    assert both[TTFT, :, f.INPUT].tolist() == both[TPOT, :, f.INPUT].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("pod_type", "engine_class"), [("", 0), (None, 0), ("prefill", 1), ("decode", 2), ("gpu", 0)])
def test_a_role_is_an_engine_class_and_an_unknown_one_is_none(pod_type: str | None, engine_class: int) -> None:
    assert features_of(row(pod_type=pod_type), TTFT)["engine_class"] == engine_class
    assert engine_class < len(POD_TYPES)


def test_the_constants_of_training_and_of_prediction_give_the_same_tpot_row() -> None:
    trained = row(num_tokens_generated=0, prefix_cache_score=0.0)
    asked = row(num_tokens_generated=1, prefix_cache_score=0.9)
    assert features_of(trained, TPOT) == features_of(asked, TPOT)


def test_generated_tokens_count_for_tpot_and_never_for_ttft() -> None:
    few, many = row(num_tokens_generated=1), row(num_tokens_generated=500)
    assert features_of(few, TTFT) == features_of(many, TTFT)
    assert features_of(few, TPOT) != features_of(many, TPOT)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"kv_cache_percentage": 1.1}, "Expected `float` <= 1.0 - at `$.requests[1].kv_cache_percentage`"),
        ({"kv_cache_percentage": -0.1}, "Expected `float` >= 0.0 - at `$.requests[1].kv_cache_percentage`"),
        ({"kv_cache_percentage": "nan"}, "Expected `float` >= 0.0 - at `$.requests[1].kv_cache_percentage`"),
        ({"prefix_cache_score": 2}, "Expected `float` <= 1.0 - at `$.requests[1].prefix_cache_score`"),
        ({"input_token_length": -1}, "Expected `int` >= 0 - at `$.requests[1].input_token_length`"),
        ({"input_token_length": 1.5}, "Expected `int`, got `float` - at `$.requests[1].input_token_length`"),
        ({"input_token_length": 10**400}, "Expected `int` <= 9007199254740992 - at `$.requests[1].input_token_length`"),
        ({"num_request_waiting": "many"}, "Expected `int`, got `str` - at `$.requests[1].num_request_waiting`"),
        ({"num_request_running": None}, "Expected `int`, got `null` - at `$.requests[1].num_request_running`"),
        ({"num_tokens_generated": -5}, "Expected `int` >= 0 - at `$.requests[1].num_tokens_generated`"),
        ({"prefill_tokens_in_flight": -1}, "Expected `int` >= 0 - at `$.requests[1].prefill_tokens_in_flight`"),
        ({"decode_tokens_in_flight": -1}, "Expected `int` >= 0 - at `$.requests[1].decode_tokens_in_flight`"),
        ({"encoder_input_size": -1}, "Expected `int` >= 0 - at `$.requests[1].encoder_input_size`"),
        ({"encoder_matched_size": []}, "Expected `int`, got `array` - at `$.requests[1].encoder_matched_size`"),
        ({"pod_type": 3}, "Expected `str | null`, got `int` - at `$.requests[1].pod_type`"),
    ],
)
def test_a_value_that_is_not_accepted_is_refused_by_row_and_field(changes: dict, error: str) -> None:
    with pytest.raises(msgspec.ValidationError) as refused:
        decoded(Bulk, {"requests": [ROW, {**ROW, **changes}]})
    assert str(refused.value) == error


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_named(field: str) -> None:
    body = {"requests": [{name: value for name, value in ROW.items() if name != field}]}
    with pytest.raises(msgspec.ValidationError, match=rf"missing required field `{field}` - at `\$\.requests\[0\]`"):
        decoded(Bulk, body)


@pytest.mark.parametrize("field", ["actual_ttft_ms", "actual_tpot_ms"])
@pytest.mark.parametrize("value", [-1, "inf", None, 1e300])
def test_a_latency_that_is_none_is_refused(field: str, value: Any) -> None:
    with pytest.raises(msgspec.ValidationError, match=rf"at `\$\.entries\[0\]\.{field}`"):
        decoded(Training, {"entries": [{**ENTRY, field: value}]})


@pytest.mark.parametrize("kind", [Bulk, LooseBulk])
@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"requests": []}, "Expected `array` of length >= 1 - at `$.requests`"),
        ({"requests": [ROW] * (MAX_ROWS + 1)}, f"Expected `array` of length <= {MAX_ROWS} - at `$.requests`"),
        ({}, "Object missing required field `requests`"),
        ([], "Expected `object`, got `array`"),
    ],
)
def test_a_bulk_has_one_to_ten_thousand_rows(kind: Any, body: Any, error: str) -> None:
    with pytest.raises(msgspec.ValidationError) as refused:
        decoded(kind, body)
    assert str(refused.value) == error


def test_the_longest_bulk_is_read() -> None:
    assert len(decoded(Bulk, {"requests": [ROW] * MAX_ROWS}).requests) == MAX_ROWS


def test_only_six_fields_are_required_and_others_than_ours_are_ignored() -> None:
    least = {name: ROW[name] for name in REQUIRED}
    assert decoded(Row, {**least, "prefill_density": 0.4, "timestamp": "?"}) == decoded(Row, least)
    assert decoded(Row, least).pod_type == ""


def test_numbers_are_read_as_leniently_as_the_reference_does() -> None:
    assert row(input_token_length="1000", num_request_waiting=2.0, kv_cache_percentage="0.5") == row()


def test_an_encoder_match_beyond_its_input_is_refused() -> None:
    with pytest.raises(BadRow) as refused:
        check([row(), row(encoder_matched_size=8)], "requests")
    said = "Expected encoder_matched_size <= encoder_input_size (7), got 8 - at `$.requests[1]`"
    assert str(refused.value) == said


def test_rows_read_one_by_one_keep_their_places() -> None:
    raws = [msgspec.Raw(json.dumps(one).encode()) for one in (ROW, {}, {**ROW, "encoder_matched_size": 8}, ROW, 7)]
    rows, errors = read_each(raws)
    assert list(rows) == [0, 3]
    assert rows[3] == row()
    assert errors == {
        1: "Object missing required field `kv_cache_percentage`",
        2: "Expected encoder_matched_size <= encoder_input_size (7), got 8 - at `$`",
        4: "Expected `object`, got `int`",
    }


def test_each_label_is_a_sample_with_the_row_of_its_target_and_zero_is_none() -> None:
    entries = [entry(), entry(actual_ttft_ms=0), entry(actual_tpot_ms=9.5)]
    both = feature_rows(entries)
    predicted = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    made = list(samples(entries, both, predicted, 7, np.array([0.5, 0.6, 0.7])))
    assert [(s.ttft_ms, s.tpot_ms, s.at_s) for s in made] == [(120.0, None, 0.5), (120.0, None, 0.7), (None, 9.5, 0.7)]
    assert [s.predicted_ttft_ms for s in made[:2]] == [1.0, 3.0]
    assert made[2].predicted_tpot_ms == 6.0
    assert {s.model_version for s in made} == {7}
    assert made[0].row == tuple(both[TTFT, 0].tolist())
    assert made[2].row == tuple(both[TPOT, 2].tolist())
