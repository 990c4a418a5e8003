import numpy as np
import pytest

from llmd_sched.predict import features as f
from llmd_sched.types import Candidates, Endpoint, Request

REQUEST = Request(id="r", input_tokens=1000)


def candidates(**columns: list[float]) -> Candidates:
    count = len(next(iter(columns.values())))
    full = {name: np.zeros(count) for name in f.COLUMNS} | {name: np.array(col) for name, col in columns.items()}
    return Candidates([Endpoint(f"e{i}", "10.0.0.1", 8000 + i) for i in range(count)], full)


def test_a_row_has_every_feature_in_its_place() -> None:
    columns = {name: [float(10 + number)] for number, name in enumerate(f.COLUMNS)}
    columns |= {"metrics_age_s": [0.5], "uncached_tokens": [250.0]}
    row = f.rows(REQUEST, candidates(**columns), 77.0)[0]
    expected = {name: values[0] for name, values in columns.items()} | {
        "input_tokens": 1000.0,
        "expected_output_tokens": 77.0,
        "prefix_match": 0.75,
        "priority_class": 1.0,
    }
    assert dict(zip(f.FEATURES, row.tolist(), strict=True)) == expected


def test_the_index_names_match_the_order_of_the_features() -> None:
    assert f.FEATURES[f.UNCACHED] == "uncached_tokens"
    assert f.FEATURES[f.INFLIGHT_PREFILL] == "inflight_prefill_tokens"
    assert f.FEATURES[f.EXPECTED_OUTPUT] == "expected_output_tokens"
    assert all(len(signs) == len(f.FEATURES) for signs in f.MONOTONE.values())


@pytest.mark.parametrize(("priority", "expected"), [(-3, 0.0), (0, 1.0), (9, 2.0)])
def test_a_priority_is_one_of_three_classes(priority: int, expected: float) -> None:
    request = Request(id="r", input_tokens=10, priority=priority)
    assert f.rows(request, candidates(waiting=[0.0]), 1.0)[0, f.PRIORITY_CLASS] == expected


def test_an_empty_prompt_matches_nothing() -> None:
    assert f.rows(Request(id="r"), candidates(waiting=[0.0]), 1.0)[0, f.PREFIX_MATCH] == 0.0


def test_engine_classes_are_numbered_as_they_appear_and_the_unlabelled_is_number_0() -> None:
    classes = f.EngineClasses(("accelerator", "engine"))
    assert classes.code({"other": "x"}) == 0
    assert classes.code({"accelerator": "H100"}) == 1
    assert classes.code({"accelerator": "H100", "engine": "vllm"}) == 2
    assert classes.code({"engine": "", "accelerator": "H100"}) == 1
    assert classes.names == ("", "H100", "H100/vllm")
    assert f.EngineClasses(("accelerator",), classes.names).code({"accelerator": "H100"}) == 1


def test_engine_classes_beyond_the_limit_count_as_unlabelled() -> None:
    classes = f.EngineClasses(("a",))
    codes = [classes.code({"a": str(number)}) for number in range(40)]
    assert codes == [*range(1, f.MAX_CLASSES), *[0] * (41 - f.MAX_CLASSES)]
    assert len(classes.names) == f.MAX_CLASSES


def test_rows_follow_the_view_of_the_candidates() -> None:
    view = candidates(waiting=[1.0, 2.0, 3.0]).keep(np.array([True, False, True]))
    assert f.rows(REQUEST, view, 1.0)[:, f.WAITING].tolist() == [1.0, 3.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_unknown_value_is_as_bad_as_the_worst_known(bad: float) -> None:
    rows = f.rows(REQUEST, candidates(waiting=[2.0, bad, 7.0]), 1.0)
    assert rows[:, f.WAITING].tolist() == [2.0, 7.0, 7.0]


def test_when_nobody_knows_the_defaults_are_conservative() -> None:
    unknown = candidates(**{name: [np.nan, np.nan] for name in f.COLUMNS})
    rows = f.rows(REQUEST, unknown, np.nan)
    assert np.isfinite(rows).all()
    assert rows[:, f.UNCACHED].tolist() == [1000.0, 1000.0]
    assert rows[:, f.METRICS_AGE].tolist() == [f.METRICS_AGE_CAP_S] * 2


def test_the_age_of_metrics_is_capped_and_nothing_is_negative() -> None:
    rows = f.rows(REQUEST, candidates(metrics_age_s=[1e6], inflight_requests=[-1.0]), 1.0)
    assert rows[0, f.METRICS_AGE] == f.METRICS_AGE_CAP_S
    assert rows[0, f.INFLIGHT_REQUESTS] == 0.0


def test_a_candidate_column_is_never_written_to() -> None:
    ours = candidates(waiting=[np.nan, 1.0])
    f.rows(REQUEST, ours, 1.0)
    assert np.isnan(ours.columns["waiting"][0])


def test_no_candidates_give_no_rows() -> None:
    assert f.rows(REQUEST, candidates(waiting=[]), 1.0).shape == (0, len(f.FEATURES))


def test_a_missing_column_is_a_programming_error() -> None:
    with pytest.raises(KeyError):
        f.rows(REQUEST, Candidates([Endpoint("e", "10.0.0.1", 1)], {}), 1.0)
