import math

import msgspec
import pytest

from llmd_sched.predict.ledger import Ledger
from llmd_sched.types import End, Outcome, Prediction, Sample

PREDICTION = Prediction(row=(1.0, 2.0), ttft_ms=110.0, tpot_ms=18.0, model_version=4)
STREAMED = Outcome(
    end=End.FINISHED, status=200, ttft_ms=100.0, e2e_ms=300.0, output_tokens=11, streamed=True, prompt_tokens=5
)


def change(**fields: object) -> Outcome:
    kept = {name: getattr(STREAMED, name) for name in STREAMED.__struct_fields__}
    return Outcome(**{**kept, **fields})


def settled(outcome: Outcome) -> tuple[list[Sample], Ledger]:
    ledger = Ledger()
    ledger.open("t", PREDICTION, 1.0, explored=True)
    return ledger.settle("t", outcome, 2.0), ledger


def test_a_streamed_reply_becomes_a_sample_with_both_labels() -> None:
    ledger = Ledger()
    ledger.open("t", PREDICTION, 1.0, explored=True)
    (sample,) = ledger.settle("t", STREAMED, 2.0)
    assert (sample.row, sample.ttft_ms, sample.tpot_ms) == ((1.0, 2.0), 100.0, 20.0)
    assert (sample.predicted_ttft_ms, sample.predicted_tpot_ms, sample.model_version) == (110.0, 18.0, 4)
    assert (sample.at_s, sample.explored, len(ledger)) == (2.0, True, 0)


@pytest.mark.parametrize(
    ("outcome", "fate"),
    [
        (change(end=End.ABORTED), "aborted"),
        (change(end=End.UPSTREAM_FAILED), "aborted"),
        (change(end=End.LOST), "aborted"),
        (change(status=503), "failed"),
        (change(output_tokens=0), "empty"),
        (change(streamed=False), "unlabelled"),
        (change(ttft_ms=None), "unlabelled"),
        (change(ttft_ms=math.nan), "unlabelled"),
        (change(ttft_ms=0.0, output_tokens=1), "unlabelled"),
    ],
)
def test_an_outcome_that_teaches_nothing_is_counted_by_its_reason(outcome: Outcome, fate: str) -> None:
    samples, ledger = settled(outcome)
    assert samples == []
    assert ledger.counts == {fate: 1}
    assert len(ledger) == 0


def test_a_single_token_still_shows_its_ttft() -> None:
    (sample,), _ = settled(change(output_tokens=1))
    assert (sample.ttft_ms, sample.tpot_ms) == (100.0, None)


def test_where_two_endpoints_did_the_work_each_target_is_its_own_sample() -> None:
    ledger = Ledger()
    apart = msgspec.structs.replace(PREDICTION, endpoint="d", prefill_row=(3.0, 4.0), prefill_endpoint="p")
    ledger.open("t", apart, 1.0)
    ttft, tpot = ledger.settle("t", STREAMED, 2.0)
    assert (ttft.row, ttft.endpoint, ttft.ttft_ms, ttft.tpot_ms) == ((3.0, 4.0), "p", 100.0, None)
    assert (tpot.row, tpot.endpoint, tpot.ttft_ms, tpot.tpot_ms) == ((1.0, 2.0), "d", None, 20.0)
    ledger.open("short", apart, 1.0)
    assert [s.endpoint for s in ledger.settle("short", change(output_tokens=1), 2.0)] == ["p"]


def test_a_ticket_settles_once() -> None:
    _, ledger = settled(STREAMED)
    assert ledger.settle("t", STREAMED, 3.0) == []
    assert ledger.counts == {"settled": 1, "unknown": 1}


def test_beyond_the_cap_the_oldest_prediction_goes() -> None:
    ledger = Ledger(cap=2)
    for number, ticket in enumerate("abc"):
        ledger.open(ticket, PREDICTION, float(number))
    assert len(ledger) == 2
    assert ledger.settle("a", STREAMED, 9.0) == []
    assert len(ledger.settle("c", STREAMED, 9.0)) == 1
    assert ledger.counts["evicted"] == 1


def test_what_stays_open_too_long_is_forgotten() -> None:
    ledger = Ledger(ttl_s=10.0)
    for number, ticket in enumerate("abc"):
        ledger.open(ticket, PREDICTION, float(number))
    assert ledger.expire(11.5) == 2
    assert ledger.expire(11.5) == 0
    assert (len(ledger), ledger.counts["expired"]) == (1, 2)


def test_accuracy_is_kept_in_all_and_by_version() -> None:
    _, ledger = settled(STREAMED)
    assert ledger.accuracy.ttft.mape_pct == pytest.approx(10.0)
    assert ledger.accuracy.tpot.mape_pct == pytest.approx(10.0)
    assert ledger.accuracy_by_version[4].ttft.count == 1


def test_old_versions_accuracy_is_dropped_and_recent_errors_outweigh_old_ones() -> None:
    ledger = Ledger()
    for version in range(50):
        for number in range(40):
            predicted = 200.0 if version < 25 else 100.0
            ledger.open("t", Prediction((), predicted, 20.0, version), float(number))
            ledger.settle("t", STREAMED, float(number))
    assert len(ledger.accuracy_by_version) <= 8
    assert 49 in ledger.accuracy_by_version
    assert ledger.accuracy.ttft.mape_pct < 5.0


def test_without_a_settled_prediction_there_is_no_accuracy() -> None:
    assert math.isnan(Ledger().accuracy.ttft.mape_pct)


def test_the_share_of_outcomes_within_each_quantile_is_kept() -> None:
    ledger = Ledger()
    for number in range(10):
        prediction = Prediction(
            row=(1.0,),
            ttft_ms=100.0,
            tpot_ms=20.0,
            model_version=1,
            ttft_quantiles_ms=(90.0, 100.0 + number % 2 * -50.0),
        )
        ledger.open(str(number), prediction, 1.0)
        ledger.settle(str(number), STREAMED, 2.0)
    assert ledger.accuracy.ttft.coverage_pct == [0.0, pytest.approx(50.0)]
    assert all(math.isnan(share) for share in ledger.accuracy.tpot.coverage_pct)


def test_a_sample_says_who_answered() -> None:
    ledger = Ledger()
    ledger.open("t", msgspec.structs.replace(PREDICTION, endpoint="default/pod-3"), 1.0)
    (sample,) = ledger.settle("t", STREAMED, 2.0)
    assert sample.endpoint == "default/pod-3"


def test_a_first_token_that_was_seen_is_a_sample_at_once_and_not_again_at_the_end() -> None:
    ledger = Ledger()
    ledger.open("t", PREDICTION, 1.0)
    first = ledger.first_token("t", 120.0, 1.2)
    assert first is not None
    assert (first.ttft_ms, first.tpot_ms, first.row) == (120.0, None, PREDICTION.row)
    assert ledger.first_token("t", 120.0, 1.3) is None
    (last,) = ledger.settle("t", STREAMED, 2.0)
    assert (last.ttft_ms, last.tpot_ms) == (None, 20.0)
    assert ledger.accuracy.ttft.count == ledger.accuracy.tpot.count == 1


def test_a_first_token_belongs_to_the_endpoint_that_prefilled() -> None:
    ledger = Ledger()
    apart = msgspec.structs.replace(PREDICTION, endpoint="d", prefill_row=(3.0, 4.0), prefill_endpoint="p")
    ledger.open("t", apart, 1.0)
    first = ledger.first_token("t", 120.0, 1.2)
    assert first is not None
    assert (first.row, first.endpoint) == ((3.0, 4.0), "p")
    assert [(s.endpoint, s.ttft_ms) for s in ledger.settle("t", STREAMED, 2.0)] == [("d", None)]


@pytest.mark.parametrize("ttft_ms", [0.0, -1.0, math.nan])
def test_a_first_token_without_a_time_teaches_nothing(ttft_ms: float) -> None:
    ledger = Ledger()
    ledger.open("t", PREDICTION, 1.0)
    assert ledger.first_token("t", ttft_ms, 1.2) is None
    assert ledger.first_token("nobody", 100.0, 1.2) is None
    assert len(ledger.settle("t", STREAMED, 2.0)) == 1
