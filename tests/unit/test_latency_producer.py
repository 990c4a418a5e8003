"""Predictions as columns, what they leave of an SLO, and the labels they get in the end."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from llmd_sched.plugin import Attribute
from llmd_sched.predict.base import TargetName
from llmd_sched.predict.features import ENGINE_CLASS, FEATURES, LORA
from llmd_sched.predict.model import Model, Target
from llmd_sched.predict.producer import FIRST_OUTPUT_GUESS_TOKENS, PredictedLatency, PredictedLatencyProducer
from llmd_sched.types import Adapters, Candidates, Decision, End, Endpoint, Request, Sample
from tests.builders import (
    COLUMNS,
    INFLIGHT,
    LATENCY,
    PREFIX,
    asking,
    decision,
    endpoint,
    endpoints,
    full_candidates,
    pool_of,
    prompt,
    request,
    router_of,
    streamed,
)


class Fixed:
    """A model that always says the same, and keeps the rows it was asked about."""

    def __init__(self, ttft_ms: Sequence[float], tpot_ms: Sequence[float], version: int = 3) -> None:
        self.answer = np.array(ttft_ms), np.array(tpot_ms)
        self.version = version
        self.rows = np.zeros((0, 0))
        self.ttft, self.tpot = Model.cold().ttft, Model.cold().tpot

    def predict(self, rows: np.ndarray, log_bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.rows = rows.copy()
        return self.answer

    def bias(self, endpoints: Sequence[str]) -> np.ndarray:
        return np.zeros((2, len(endpoints)))

    def target(self, name: TargetName) -> Target:
        return Model.cold().target(name)


class Bench:
    """An opened producer in front of a fixed model."""

    def __init__(
        self,
        ttft_ms: Sequence[float] = (100.0, 300.0),
        tpot_ms: Sequence[float] = (10.0, 30.0),
        members: list[Endpoint] | None = None,
        **parameters: object,
    ) -> None:
        self.live: PredictedLatency = PredictedLatencyProducer(**{"streaming_mode": True, **parameters}).open(LATENCY)
        self.model = Fixed(ttft_ms, tpot_ms)
        self.live.publish(self.model)  # type: ignore[arg-type]
        self.members = endpoints(len(ttft_ms)) if members is None else members
        self.live.endpoints_changed(self.members)
        self.samples: list[Sample] = []
        self.live.on_sample = self.samples.append
        self.plain = Candidates(self.members, full_candidates(len(self.members)).columns)
        self.view = self.plain

    def produce(self, **fields: object) -> Request:
        asked = request(**{"input_tokens": 100, **fields})
        self.view = self.plain.with_columns(self.live.produce(asked, self.plain, 0.0))
        return asked

    def column(self, name: str) -> list[float]:
        return self.view.column(COLUMNS[name]).tolist()

    def headrooms(self, **slos: object) -> tuple[list[float], list[float]]:
        self.produce(**slos)
        return self.column("ttft_headroom_ms"), self.column("tpot_headroom_ms")

    def send(self, ticket: str, position: int = 0, **fields: object) -> Decision:
        asked = self.produce(**fields)
        made = decision(ticket, asked, self.members[position], self.live.predicted(self.view, position))
        self.live.chosen(made, self.view, position, 0.0)
        return made


@pytest.mark.parametrize(
    ("slos", "ttft", "tpot"),
    [
        # None: minus the prediction, so that the lowest is best.
        ({}, [-100, -300], [-10, -30]),
        # One: the other asks for nothing.
        ({"ttft_slo_ms": 200.0}, [100, -100], [0, 0]),
        ({"tpot_slo_ms": 20.0}, [0, 0], [10, -10]),
        ({"ttft_slo_ms": 200.0, "tpot_slo_ms": 20.0}, [100, -100], [10, -10]),
        ({"ttft_slo_ms": 100.0, "tpot_slo_ms": 10.0}, [0, -200], [0, -20]),
    ],
)
def test_headroom_is_what_the_prediction_leaves_of_the_slo(
    slos: dict[str, float], ttft: list[float], tpot: list[float]
) -> None:
    assert Bench().headrooms(**slos) == (ttft, tpot)


@pytest.mark.parametrize(
    "slos", [{}, {"ttft_slo_ms": 200.0}, {"tpot_slo_ms": 5.0}, {"ttft_slo_ms": 200.0, "tpot_slo_ms": 5.0}]
)
def test_without_streaming_tpot_never_decides(slos: dict[str, float]) -> None:
    assert Bench(streaming_mode=False).headrooms(**slos)[1] == [0, 0]


@pytest.mark.parametrize(("factor", "tpot"), [(1.0, [10, -10]), (0.5, [0, -20]), (2.0, [30, 10])])
def test_the_buffer_factor_scales_the_tpot_limit_alone(factor: float, tpot: list[float]) -> None:
    bench = Bench(slo_buffer_factor=factor)
    assert bench.headrooms(ttft_slo_ms=200.0, tpot_slo_ms=20.0) == ([100, -100], tpot)


def test_the_tightest_tpot_slo_running_on_an_endpoint_limits_it() -> None:
    bench = Bench()
    bench.send("a", position=1, tpot_slo_ms=15.0)
    bench.send("b", position=1, tpot_slo_ms=40.0)
    assert bench.headrooms(tpot_slo_ms=50.0)[1] == [40, -15]
    bench.live.finished("a", streamed(), 1.0)
    assert bench.headrooms(tpot_slo_ms=50.0)[1] == [40, 10]
    bench.live.finished("b", streamed(end=End.ABORTED), 1.0)
    assert bench.headrooms(tpot_slo_ms=50.0)[1] == [40, 20]


def test_the_buffer_factor_scales_the_tightest_slo_too() -> None:
    bench = Bench(slo_buffer_factor=2.0)
    bench.send("a", position=0, tpot_slo_ms=15.0)
    assert bench.headrooms(tpot_slo_ms=50.0)[1] == [20, 70]


def test_running_slos_leave_with_their_endpoint() -> None:
    bench = Bench()
    bench.send("a", position=1, tpot_slo_ms=15.0)
    bench.live.endpoints_changed(bench.members[:1])
    bench.live.endpoints_changed(bench.members)
    assert bench.headrooms(tpot_slo_ms=50.0)[1] == [40, 20]
    bench.live.finished("a", streamed(), 1.0)


def test_a_prefill_endpoint_has_no_tpot() -> None:
    members = [endpoint(0, labels={"role": "prefill"}), endpoint(1, labels={"role": "decode"}), endpoint(2)]
    bench = Bench((1, 1, 1), (10, 10, 10), members, endpoint_role_label="role")
    assert bench.headrooms(tpot_slo_ms=5.0)[1] == [0, -5, -5]
    assert bench.headrooms()[1] == [0, -10, -10]


def test_the_label_alone_means_nothing_unless_it_is_configured() -> None:
    bench = Bench((1,), (10,), [endpoint(0, labels={"role": "prefill"})])
    assert bench.headrooms()[1] == [-10]


def test_dispatched_and_the_row_are_the_counters_of_the_load_producer() -> None:
    bench = Bench()
    bench.produce()
    assert bench.column("dispatched") == bench.plain.column(COLUMNS["inflight_requests"]).tolist()
    for name in ("inflight_requests", "inflight_prefill_tokens", "resident_tokens", "uncached_tokens"):
        assert bench.model.rows[:, FEATURES.index(name)].tolist() == bench.plain.column(COLUMNS[name]).tolist()
    assert bench.model.rows[:, FEATURES.index("waiting")].tolist() == bench.plain.column("waiting").tolist()


def test_the_named_load_producer_is_the_one_that_is_read() -> None:
    bench = Bench(in_flight_load_producer_name="mine")
    with pytest.raises(KeyError):
        bench.produce()
    bench.plain.columns.update({name.replace(INFLIGHT, "mine"): v * 0 for name, v in bench.plain.columns.items()})
    bench.produce()
    assert bench.column("dispatched") == [0, 0]


def test_the_needs_are_those_of_the_parameters() -> None:
    params = PredictedLatencyProducer(prefix_match_info_producer_name="p", in_flight_load_producer_name="l")
    assert [(r.attribute, r.producer, r.required) for r in params.reads()] == [
        (Attribute.PREFIX_MATCH, "p", True),
        (Attribute.INFLIGHT_LOAD, "l", True),
    ]
    assert [r.producer for r in PredictedLatencyProducer().reads()] == [PREFIX, INFLIGHT]


def test_what_was_predicted_for_an_endpoint_is_its_row_and_both_targets() -> None:
    bench = Bench()
    bench.produce()
    found = bench.live.predicted(bench.view, 1)
    assert found is not None
    assert (found.ttft_ms, found.tpot_ms, found.model_version) == (300.0, 30.0, 3)
    assert found.row == tuple(bench.model.rows[1].tolist())


def test_the_row_that_was_scored_is_the_row_that_is_learned() -> None:
    bench = Bench()
    made = bench.send("a", position=1)
    bench.produce(input_tokens=9)  # another request in between
    bench.live.finished("a", streamed(), 2.0)
    (sample,) = bench.samples
    assert made.prediction is not None
    assert sample.row == made.prediction.row
    assert (sample.ttft_ms, sample.tpot_ms, sample.predicted_ttft_ms, sample.predicted_tpot_ms) == (100, 20, 300, 30)
    assert (sample.model_version, sample.at_s, sample.explored) == (3, 2.0, False)
    assert len(bench.live.ledger) == 0


@pytest.mark.parametrize("fields", [{"end": End.ABORTED}, {"status": 500}, {"end": End.LOST}, {"output_tokens": 0}])
def test_an_end_that_measured_nothing_settles_the_ledger_without_a_sample(fields: dict[str, object]) -> None:
    bench = Bench()
    bench.send("a")
    bench.live.finished("a", streamed(**fields), 2.0)
    bench.live.finished("a", streamed(), 2.0)
    assert (bench.samples, len(bench.live.ledger)) == ([], 0)


def test_a_request_nobody_predicted_is_followed_without_harm() -> None:
    bench = Bench()
    bench.live.chosen(decision("a", request(tpot_slo_ms=5.0), bench.members[0]), bench.plain, 0, 0.0)
    bench.live.finished("a", streamed(), 1.0)
    assert bench.samples == []


def test_a_failed_prediction_leaves_nothing_of_the_last_one() -> None:
    bench = Bench()
    bench.produce()
    bench.model.answer = ()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="unpack"):
        bench.live.produce(request(), bench.plain, 0.0)
    assert bench.live.predicted(bench.plain, 0) is None


def test_a_request_with_an_slo_leaves_nothing_behind() -> None:
    bench = Bench()
    for i in range(20):
        bench.send(str(i), position=i % 2, tpot_slo_ms=10.0 + i)
    for i in range(20):
        bench.live.finished(str(i), streamed(), 1.0)
    assert len(bench.live._running_slos) == 0


def test_training_without_predicting_makes_no_columns_but_samples() -> None:
    router = router_of(
        "plugins: [{type: predicted-latency-producer, parameters: {predictInProduce: false}}, {type: latency-scorer}]",
        pool_of(endpoints(2)),
    )
    live = next(p for p in router.producers if p.name == LATENCY)
    samples: list[Sample] = []
    live.on_sample = samples.append  # type: ignore[attr-defined]
    decided = router.choose(asking(prompt(1)), None, 0.0)
    assert set(decided.scores.values()) == {0.67}  # free cache and no queue, but no prefix: as without predictions
    router.finish(decided.ticket, streamed(), 1.0)
    assert [s.ttft_ms for s in samples] == [100.0]


def test_the_expected_output_is_the_clients_cap_or_the_mean_seen_so_far() -> None:
    column = FEATURES.index("expected_output_tokens")

    def expected(bench: Bench, **fields: object) -> float:
        bench.produce(**fields)
        return float(bench.model.rows[0, column])

    bench = Bench()
    assert expected(bench) == FIRST_OUTPUT_GUESS_TOKENS
    assert expected(bench, max_output_tokens=50) == 50
    assert expected(bench, max_output_tokens=10**6) == FIRST_OUTPUT_GUESS_TOKENS
    for i, tokens in enumerate((40, 80)):
        bench.send(str(i))
        bench.live.finished(str(i), streamed(output_tokens=tokens), 1.0)
    bench.live.finished("x", streamed(status=500, output_tokens=9999), 1.0)
    assert expected(bench) == 64  # of 60: the mean creeps, and must not be a clock in the row


def test_more_than_a_hundred_endpoints_are_predicted_at_once() -> None:
    live = PredictedLatencyProducer(streaming_mode=True).open(LATENCY)
    view = full_candidates(250)
    live.endpoints_changed(view.endpoints)
    columns = live.produce(request(input_tokens=500), view, 0.0)
    assert {len(values) for values in columns.values()} == {250}
    assert all(np.isfinite(values).all() for values in columns.values())
    assert (columns[COLUMNS["ttft_ms"]] > 0).all()


@pytest.mark.parametrize("column", ["waiting", "running", "kv_usage", "metrics_age_s", COLUMNS["uncached_tokens"]])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_metric_that_is_no_number_disables_nobody_and_is_no_advantage(column: str, value: float) -> None:
    live = PredictedLatencyProducer(streaming_mode=True).open(LATENCY)
    live.publish(Model.cold())
    view = full_candidates(5, seed=1)
    live.endpoints_changed(view.endpoints)
    asked = request(input_tokens=500)
    clean = live.produce(asked, view, 0.0)
    broken = Candidates(view.endpoints, {name: values.copy() for name, values in view.columns.items()})
    broken.columns[column][2] = value
    columns = live.produce(asked, broken, 0.0)
    others = [0, 1, 3, 4]
    for name, values in columns.items():
        assert np.isfinite(values).all()
        assert values[others] == pytest.approx(clean[name][others])
    worst = np.delete(view.columns[column], 2).max()
    broken.columns[column][2] = worst
    assert columns[COLUMNS["ttft_ms"]][2] == pytest.approx(live.produce(asked, broken, 0.0)[COLUMNS["ttft_ms"]][2])


def test_an_empty_list_of_candidates_is_predicted_as_such() -> None:
    live = PredictedLatencyProducer().open(LATENCY)
    assert {len(v) for v in live.produce(request(), full_candidates(0), 0.0).values()} == {0}


def test_warming_up_changes_nothing() -> None:
    live = PredictedLatencyProducer().open(LATENCY)
    live.warm_up()
    assert len(live.ledger) == 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"slo_buffer_factor": 0.0}, "sloBufferFactor must be positive"),
        ({"slo_buffer_factor": float("nan")}, "sloBufferFactor must be positive"),
        ({"use_encoder_cache_features": True}, "not supported yet"),
        ({"preset": "abacus"}, "known: default, "),
        ({"context_ttl": "soon"}, "is not a duration"),
    ],
)
def test_parameters_are_checked(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PredictedLatencyProducer(**parameters).check()


def test_parameters_of_the_reference_that_have_no_use_are_accepted() -> None:
    PredictedLatencyProducer(sampling_mean=5.0, max_decode_token_samples_for_prediction=3).check()


# ------------------------------------------------------------------------- quantiles, engine classes, adapters, bias


def calibrated(bench: Bench, ratio: float) -> None:
    """Every outcome so far took ``ratio`` times the prediction."""
    for number in range(300):
        bench.send(str(number))
        bench.live.finished(str(number), streamed(ttft_ms=100.0 * ratio, e2e_ms=100.0 * ratio + 80.0 * ratio), 1.0)


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_headroom_may_be_that_of_a_quantile(quantile: float) -> None:
    bench = Bench(headroom_quantile=quantile)
    calibrated(bench, 2.0)
    ttft, _ = bench.headrooms(ttft_slo_ms=1000.0)
    assert ttft == pytest.approx([800.0, 400.0], rel=0.1)
    assert bench.column("ttft_ms") == [100.0, 300.0]  # what is predicted stays the prediction


def test_a_prediction_has_quantiles_beside_the_point_forecast() -> None:
    bench = Bench()
    calibrated(bench, 2.0)
    bench.produce()
    found = bench.live.predicted(bench.view, 1)
    assert found is not None
    assert found.ttft_ms == 300.0
    assert found.ttft_quantiles_ms == pytest.approx((600.0, 600.0), rel=0.1)
    assert found.endpoint == bench.members[1].key
    assert found.producer == LATENCY


def test_a_quantile_that_is_not_kept_is_refused() -> None:
    with pytest.raises(ValueError, match=r"headroomQuantile 0\.7 is not kept; accepted: 0\.5 or 0\.9"):
        PredictedLatencyProducer(headroom_quantile=0.7).check()


def test_endpoints_of_other_labels_are_of_another_class() -> None:
    members = [endpoint(0), endpoint(1, labels={"llm-d.ai/accelerator": "H100"}), endpoint(2, labels={"x": "y"})]
    bench = Bench((1.0, 2.0, 3.0), (1.0, 2.0, 3.0), members)
    bench.produce()
    assert bench.model.rows[:, ENGINE_CLASS].tolist() == [0.0, 1.0, 0.0]
    assert bench.live.classes.names == ("", "H100")


def test_the_labels_that_make_a_class_are_a_parameter() -> None:
    bench = Bench(
        members=[endpoint(0, labels={"tier": "a"}), endpoint(1, labels={"tier": "b"})], class_labels=("tier",)
    )
    bench.produce()
    assert bench.model.rows[:, ENGINE_CLASS].tolist() == [1.0, 2.0]


def test_a_restored_model_keeps_the_numbers_of_its_classes() -> None:
    bench = Bench(members=[endpoint(0, labels={"llm-d.ai/accelerator": "B"}), endpoint(1)])
    bench.live.restore(msgspec.structs.replace(Model.cold(), version=8, classes=("", "A", "B")))
    bench.live.publish(bench.model)  # type: ignore[arg-type]
    bench.produce()
    assert bench.model.rows[:, ENGINE_CLASS].tolist() == [2.0, 0.0]


def lora(bench: Bench, adapters: list[set[str]], model: str) -> list[float]:
    known = [Adapters(running=frozenset(names)) for names in adapters]
    bench.plain = Candidates(bench.members, bench.plain.columns, None, known)
    bench.produce(model=model, target_model=model)
    return bench.model.rows[:, LORA].tolist()


def test_an_adapter_is_loaded_somewhere_or_would_have_to_be() -> None:
    bench = Bench()
    assert lora(bench, [], "base") == [0.0, 0.0]
    assert lora(bench, [{"poet"}, set()], "base") == [0.0, 0.0]
    assert lora(bench, [{"poet"}, set()], "poet") == [1.0, 2.0]
    assert lora(bench, [], "poet") == [2.0, 2.0]  # seen before, loaded nowhere now
    assert lora(bench, [set(), {"other"}], "poet") == [2.0, 2.0]


def test_the_bias_of_an_endpoint_follows_the_pool_and_the_model() -> None:
    live = PredictedLatencyProducer().open(LATENCY)
    members = endpoints(2)
    view = full_candidates(2)
    cold = Model.cold()
    biased = msgspec.structs.replace(
        cold, version=1, ttft=msgspec.structs.replace(cold.ttft, bias={members[1].key: math.log(1.5)})
    )

    def ttft_ms(candidates: Candidates) -> np.ndarray:
        return live.produce(request(input_tokens=100), candidates, 0.0)[f"ttft_ms/{LATENCY}"]

    before = ttft_ms(view)
    live.publish(biased)
    np.testing.assert_allclose(ttft_ms(view) / before, [1.0, 1.5])
    alone = view.keep(np.array([False, True])).compact()
    np.testing.assert_allclose(ttft_ms(alone) / before[1:], [1.5])


def test_a_broken_off_reply_does_not_shorten_the_expected_output() -> None:
    bench = Bench()
    bench.send("a")
    bench.live.finished("a", streamed(end=End.ABORTED, output_tokens=1), 1.0)
    column = FEATURES.index("expected_output_tokens")
    bench.produce()
    assert bench.model.rows[0, column] == FIRST_OUTPUT_GUESS_TOKENS


@pytest.mark.parametrize(
    ("requests", "prefilling", "generated", "expected"),
    [
        (20.0, 0.0, 20 * 500.0, 1024.0),
        (20.0, 10.0, 10 * 500.0, 1024.0),
        (4.0, 0.0, 4 * 500.0, 256.0),
        (20.0, 0.0, 9.0, 256.0),
    ],
)
def test_replies_under_way_say_that_outputs_are_longer_than_those_that_have_ended(
    requests: float, prefilling: float, generated: float, expected: float
) -> None:
    bench = Bench()
    given = {"inflight_requests": requests, "prefilling_requests": prefilling, "generated_tokens": generated}
    columns = {COLUMNS[name]: np.array([value / 2, value / 2]) for name, value in given.items()}
    bench.plain = bench.plain.with_columns(columns)
    bench.produce()
    assert bench.model.rows[0, FEATURES.index("expected_output_tokens")] == expected
