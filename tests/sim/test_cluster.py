"""The cluster in exact virtual time. All costs are powers of two, so sums are exact and every time below can be checked
by hand: a step takes 1/8 s, a prompt token 1/256 s, a sequence 1/64 s, the overhead 1/16 s, one way 1/128 s."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec
import numpy as np
import pytest

from llmd_sched.errors import ConfigError
from llmd_sched.pool.inflight import InFlightLoad
from llmd_sched.predict.model import Model
from llmd_sched.sim.cluster import Cluster
from llmd_sched.sim.engine import EngineConfig
from llmd_sched.sim.scenario import (
    Arrival,
    ClusterSpec,
    EngineSpec,
    Fail,
    Join,
    Leave,
    Record,
    Slow,
    arrival,
    columns,
)
from llmd_sched.sim.steptime import Preset, preset
from llmd_sched.types import End, Sample
from tests.builders import CONFIG_HEAD, endpoint, prompt

STEP_S, TOKEN_S, SEQUENCE_S, OVERHEAD_S, NETWORK_S = 1 / 8, 1 / 256, 1 / 64, 1 / 16, 1 / 128
DECODE_S = STEP_S + SEQUENCE_S
"""A step in which one request decodes."""

PLAIN = Preset(
    model="m",
    step_base_s=STEP_S,
    prefill_token_s=TOKEN_S,
    attention_pair_s=0.0,
    sequence_s=SEQUENCE_S,
    decode_context_token_s=0.0,
    request_overhead_s=OVERHEAD_S,
    kv_blocks=200,
    max_num_batched_tokens=1024,
    max_num_seqs=8,
)

FEWEST_OPEN = CONFIG_HEAD + "plugins: [{type: active-request-scorer}, {type: max-score-picker}]\n"
BY_LATENCY = (
    CONFIG_HEAD
    + "plugins: [{type: predicted-latency-producer, parameters: {streamingMode: true}}, {type: latency-scorer}, "
    + "{type: weighted-random-picker}]\n"
)


def member(number: int = 0, *, max_waiting: int = 1000, **fields: object) -> EngineSpec:
    config = EngineConfig(preset=PLAIN, max_waiting=max_waiting)
    return EngineSpec(**{"endpoint": endpoint(number), "engine": config, **fields})


def real(number: int = 0, **fields: object) -> EngineSpec:
    """A noisy engine of a published preset."""
    config = EngineConfig(preset=preset("llama-3-8b-h100"), noise_sigma=0.1)
    return EngineSpec(**{"endpoint": endpoint(number), "engine": config, **fields})


def spec(*engines: EngineSpec, **fields: object) -> ClusterSpec:
    made = {"config": FEWEST_OPEN, "engines": engines or (member(),), "network_s": NETWORK_S, "report_delay_s": 0.0}
    return ClusterSpec(**{**made, **fields})


def ask(at_s: float = 0.0, blocks: int = 1, output: int = 1, seed: int = 0, **fields: object) -> Arrival:
    """A prompt of so many blocks of 64 tokens."""
    return arrival(at_s, prompt(blocks, seed), output, **fields)


def many(count: int, every_s: float, output: int = 20) -> Iterator[Arrival]:
    return (ask(i * every_s, blocks=1 + i % 7, output=output, seed=i, id=str(i)) for i in range(count))


def run(described: ClusterSpec, *arrivals: Arrival) -> list[Record]:
    return Cluster(described).run(arrivals)


def as_bytes(records: Iterable[Record]) -> bytes:
    return msgspec.msgpack.encode([msgspec.structs.astuple(r) for r in records])


@pytest.mark.parametrize("path", ["lean", "duplex"])
def test_a_lone_request_takes_what_the_step_time_formula_says(path: str) -> None:
    (record,) = run(spec(path=path), ask(at_s=2.0, blocks=2, output=5, id="a"))
    ttft_s = 2 * NETWORK_S + OVERHEAD_S + STEP_S + 128 * TOKEN_S + SEQUENCE_S
    assert (record.request_id, record.arrival_s, record.endpoint) == ("a", 2.0, "e0")
    assert record.ttft_ms == ttft_s * 1e3
    assert record.tpot_ms == DECODE_S * 1e3
    assert record.e2e_ms == (ttft_s + 4 * DECODE_S) * 1e3
    assert (record.end, record.status) == (End.FINISHED, 200)
    assert (record.input_tokens, record.cached_tokens, record.output_tokens) == (128, 0, 5)


def test_every_coefficient_of_a_preset_is_in_the_first_token_of_a_lone_request() -> None:
    p, tokens = preset("qwen3-32b-h200"), 640
    lone = EngineSpec(endpoint=endpoint(), engine=EngineConfig(preset=p))
    (record,) = run(spec(lone), ask(blocks=10, output=2))
    prefill_s = p.step_base_s + p.prefill_token_s * tokens + p.attention_pair_s * tokens**2 / 2 + p.sequence_s
    decode_s = p.step_base_s + p.sequence_s + p.decode_context_token_s * tokens
    assert record.ttft_ms == pytest.approx((2 * NETWORK_S + p.request_overhead_s + prefill_s) * 1e3)
    assert record.tpot_ms == pytest.approx(decode_s * 1e3)


def test_a_request_that_arrives_during_a_step_waits_for_its_end_and_slows_the_other_down() -> None:
    # "b" is ready during the prefill of "a", which ends 0.5 s after "a" could be scheduled.
    early, late = run(spec(), ask(output=3), ask(0.25, blocks=2, output=1, seed=1))[::-1]
    start_s = NETWORK_S + OVERHEAD_S
    first_s = start_s + STEP_S + 64 * TOKEN_S + SEQUENCE_S
    second_s = first_s + STEP_S + 128 * TOKEN_S + 2 * SEQUENCE_S
    assert early.ttft_ms == (first_s + NETWORK_S) * 1e3
    assert late.ttft_ms == (second_s + NETWORK_S - 0.25) * 1e3
    assert early.e2e_ms == (second_s + DECODE_S + NETWORK_S) * 1e3


def test_the_second_of_two_equal_prompts_finds_all_but_its_last_block_cached() -> None:
    first, second = run(spec(), ask(blocks=2), ask(10.0, blocks=2))
    assert (first.cached_tokens, second.cached_tokens) == (0, 112)
    assert first.ttft_ms - second.ttft_ms == 112 * TOKEN_S * 1e3


def test_a_whole_reply_shows_no_first_token() -> None:
    (record,) = run(spec(path="duplex"), ask(output=5, streaming=False))
    assert np.isnan([record.ttft_ms, record.tpot_ms]).all()
    assert record.e2e_ms > 0
    assert record.output_tokens == 5


def first_tokens(described: ClusterSpec, *arrivals: Arrival) -> list[float]:
    """When the router took each request's first token to be there."""
    cluster, seen = Cluster(described), []
    note = cluster.router._tell_first_token

    def first_token(ticket: str, now_s: float) -> None:
        seen.append(now_s)
        note(ticket, now_s)

    cluster.router._tell_first_token = first_token  # type: ignore[method-assign]
    cluster.run(arrivals)
    return seen


def test_on_the_duplex_path_the_router_sees_the_first_token_of_a_stream_and_of_nothing_else() -> None:
    described = spec(path="duplex")
    (record,) = run(described, ask(output=3))
    assert first_tokens(described, ask(output=3)) == [record.ttft_ms / 1e3]
    assert first_tokens(described, ask(output=3, streaming=False)) == []


def test_on_the_lean_path_the_router_assumes_the_first_token_at_the_predicted_time() -> None:
    # It looks at every decision, so the third arrival brings up the first two.
    described = spec(path="lean", config=BY_LATENCY)
    arrivals = [ask(output=9), ask(0.5, output=9, seed=1), ask(1.0, seed=2)]
    assert all(r.predicted_ttft_ms < 500 for r in run(described, *arrivals))
    assert first_tokens(described, *arrivals) == [0.5, 1.0]


def watch(described: ClusterSpec, at_s: Iterable[float], look: Callable[[Cluster], object], *before: Arrival) -> list:
    """What ``look`` sees at these times: arrivals are read one ahead, so each is a moment to look around."""
    cluster, seen = Cluster(described), []

    def arrivals() -> Iterator[Arrival]:
        yield from before
        for time_s in at_s:
            yield ask(time_s)
            seen.append((cluster.now_s, look(cluster)))

    cluster.run(arrivals())
    assert [now_s for now_s, _ in seen] == list(at_s)
    return [value for _, value in seen]


def open_requests(cluster: Cluster) -> int:
    return len(cluster.router.open)


def test_on_the_lean_path_the_end_of_a_request_is_known_later_but_no_different() -> None:
    soon, late = spec(report_delay_s=0.0), spec(report_delay_s=0.25)
    assert as_bytes(run(soon, ask())) == as_bytes(run(late, ask()))
    # It ends at 0.46875 s.
    assert watch(soon, [0.5], open_requests, ask()) == [0]
    assert watch(late, [0.5], open_requests, ask()) == [1]
    assert watch(late, [0.75], open_requests, ask()) == [0]
    assert watch(spec(path="duplex", report_delay_s=0.25), [0.5], open_requests, ask()) == [0]


def running(cluster: Cluster) -> float:
    return float(cluster.pool.columns(cluster.now_s)["running"][0])


def test_the_pool_knows_what_the_last_scrape_saw() -> None:
    # Scheduled at 0.0703 s, it is seen by the scrape at 0.25 s.
    described = spec(scrape_interval_s=0.25)
    assert watch(described, [0.125, 0.375], running, ask(blocks=4)) == [0.0, 1.0]
    late = spec(scrape_interval_s=0.25, scrape_delay_s=0.1875)
    assert watch(late, [0.375, 0.4375], running, ask(blocks=4)) == [0.0, 1.0]


def test_facts_of_the_engine_reach_the_pool() -> None:
    def facts(cluster: Cluster) -> dict[str, float]:
        return {name: float(column[0]) for name, column in cluster.pool.columns(cluster.now_s).items()}

    (seen,) = watch(spec(), [0.51], facts, ask(blocks=4))
    assert seen["block_tokens"] == 16
    assert seen["cache_blocks"] == 200
    assert seen["kv_usage"] == 16 / 200
    assert seen["metrics_age_s"] == pytest.approx(0.01)


def test_a_hidden_slowdown_stretches_steps_and_nothing_else() -> None:
    (plain,) = run(spec(), ask(output=5))
    (slow,) = run(spec(member(slowdown=1.5)), ask(output=5))
    assert slow.tpot_ms == 1.5 * plain.tpot_ms
    fixed_ms = (2 * NETWORK_S + OVERHEAD_S) * 1e3
    assert slow.ttft_ms - fixed_ms == 1.5 * (plain.ttft_ms - fixed_ms)


def test_an_engine_slows_down_at_its_time_and_recovers() -> None:
    described = spec(events=[Slow(20.0, "e0", 1.0), Slow(10.0, "e0", 4.0)])
    times = [r.tpot_ms for r in run(described, ask(output=5), ask(11.0, output=5), ask(21.0, output=5))]
    assert times == [DECODE_S * 1e3, 4 * DECODE_S * 1e3, DECODE_S * 1e3]


def test_a_stall_lengthens_the_step_it_hits() -> None:
    (record,) = run(spec(member(stall_every_s=1e-9, stall_s=2.0)), ask(output=5))
    assert record.tpot_ms == (DECODE_S + 2.0) * 1e3
    rare = run(spec(member(stall_every_s=20.0, stall_s=2.0)), *many(60, every_s=4.0))
    stalled = sum(r.e2e_ms > 5000 for r in rare)
    assert 2 <= stalled <= 40


def test_requests_of_an_engine_that_dies_end_as_upstream_failures_at_that_moment() -> None:
    described = spec(events=[Fail(1.0, "e0"), Leave(1.5, "e0")])
    stream, whole = run(described, ask(output=50), ask(0.0, output=50, seed=1, streaming=False))
    assert (stream.end, stream.status) == (End.UPSTREAM_FAILED, 200)
    assert (whole.end, whole.status) == (End.UPSTREAM_FAILED, 503)
    assert stream.e2e_ms == whole.e2e_ms == (1.0 + NETWORK_S) * 1e3
    assert stream.ttft_ms > 0
    assert stream.output_tokens == 0


def test_a_dead_engine_refuses_connections_until_its_scrapes_say_so() -> None:
    described = spec(member(0), member(1), scrape_interval_s=0.25, events=[Fail(1.01, "e0")])
    # Requests so far apart that both look idle; by 1.5 s two scrapes have failed.
    asks = [ask(1.02 + i / 100, seed=i) for i in range(20)] + [ask(1.6 + i, seed=i) for i in range(20)]
    early, late = run(described, *asks)[:20], run(described, *asks)[20:]
    broken = [r for r in early + late if r.endpoint == "e0"]
    assert broken
    assert all((r.end, r.status, r.e2e_ms) == (End.UPSTREAM_FAILED, 503, 2 * NETWORK_S * 1e3) for r in broken)
    assert max(r.arrival_s for r in broken) < 1.5
    assert all(r.end == End.FINISHED for r in late if r.endpoint == "e1")


def test_an_engine_that_leaves_is_chosen_no_more_and_serves_what_it_holds() -> None:
    described = spec(member(0), member(1), events=[Leave(1.0, "e0")])
    asks = [ask(0.0, output=30, seed=0), ask(0.0, output=30, seed=1), *(ask(1.0 + i / 8, seed=i) for i in range(9))]
    records = run(described, *asks)
    assert {r.endpoint for r in records if r.arrival_s < 1} == {"e0", "e1"}
    assert {r.endpoint for r in records if r.arrival_s >= 1} == {"e1"}
    assert {r.end for r in records} == {End.FINISHED}


def test_an_engine_that_joins_is_chosen_from_then_on_and_seen_by_scrapes() -> None:
    described = spec(events=[Join(5.0, member(1)), Fail(50.0, "e1"), Join(60.0, member(1))])
    # Steady load, so that the newcomer is the emptier one.
    records = run(described, *(ask(i / 4, output=3, seed=i) for i in range(40)))
    joined = [r.arrival_s for r in records if r.endpoint == "e1"]
    assert min(joined) == 5.0
    assert len(joined) > 5


def test_a_failed_engine_can_be_restarted_and_has_forgotten_everything() -> None:
    described = spec(events=[Fail(5.0, "e0"), Join(6.0, member(0))])
    first, warm, restarted = run(described, ask(blocks=2), ask(4.0, blocks=2), ask(7.0, blocks=2))
    assert (first.cached_tokens, warm.cached_tokens, restarted.cached_tokens) == (0, 112, 0)
    assert restarted.end == End.FINISHED


def test_what_an_engine_refuses_ends_with_its_status() -> None:
    records = run(spec(member(max_waiting=1)), ask(blocks=60), *(ask(seed=i) for i in (1, 2)))
    assert [(r.status, r.end) for r in records[:2]] == [(400, End.FINISHED), (503, End.FINISHED)]
    assert records[0].e2e_ms == 2 * NETWORK_S * 1e3
    assert records[2].status == 200


def test_what_the_router_refuses_is_recorded_without_an_endpoint() -> None:
    cluster = Cluster(spec(events=[Leave(1.0, "e0")]))
    records = cluster.run([ask(), ask(2.0, id="late")])
    assert [(r.request_id, r.endpoint, r.end, r.status) for r in records[1:]] == [("late", "", "refused", 503)]
    assert np.isnan(records[1].e2e_ms)


def eventful(path: str = "lean", seed: int = 0) -> ClusterSpec:
    """Learned routing over noisy engines, with everything that can happen."""
    return spec(
        real(0),
        real(1, slowdown=1.5),
        real(2, stall_every_s=5.0, stall_s=0.5),
        config=BY_LATENCY,
        path=path,
        seed=seed,
        network_s=0.0005,
        report_delay_s=0.05,
        events=[
            Join(2.0, real(3)),
            Fail(4.0, "e0"),
            Leave(5.0, "e0"),
            Join(6.0, real(0)),
            Leave(7.0, "e2"),
            Slow(8.0, "e1", 1.0),
        ],
    )


@pytest.mark.parametrize("path", ["lean", "duplex"])
def test_two_runs_agree_bit_by_bit_and_another_seed_differs(path: str) -> None:
    one, two, other = (run(eventful(path, seed), *many(250, every_s=0.04)) for seed in (0, 0, 1))
    assert max(r.model_version for r in one) > 3
    assert as_bytes(one) == as_bytes(two)
    assert as_bytes(one) != as_bytes(other)


@pytest.mark.parametrize("path", ["lean", "duplex"])
def test_in_the_end_the_router_owes_nothing(path: str) -> None:
    cluster = Cluster(eventful(path))
    records = cluster.run(
        ask(i * 0.03, blocks=1 + i % 7, output=100, seed=i, streaming=i % 3 > 0, ttft_slo_ms=500.0, tpot_slo_ms=50.0)
        for i in range(400)
    )
    ends = {r.end for r in records}
    assert len(records) == 400
    assert ends == {End.FINISHED, End.UPSTREAM_FAILED}
    assert cluster.router.open == {}
    assert cluster.router.lost == 0
    assert sum(cluster.router.producer_errors.values()) == 0
    (load,) = (p for p in cluster.router.producers if isinstance(p, InFlightLoad))
    owed = load.produce(ask().request, cluster.pool.candidates(None, cluster.now_s), cluster.now_s)
    assert {name: column.tolist() for name, column in owed.items() if not name.startswith("uncached")} == {
        f"{name}/{load.name}": [0.0] * 3 for name in InFlightLoad.COLUMNS
    }
    (producer,) = cluster.producers
    assert len(producer.ledger) == 0


class Recorder:
    """A trainer that keeps its samples and brings a new model at every fourth look."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.samples: list[Sample] = []
        self.looks_s: list[float] = []

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)

    def tick(self, now_s: float) -> Model | None:
        self.looks_s.append(now_s)
        if len(self.looks_s) % 4:
            return None
        self.model = msgspec.structs.replace(self.model, version=self.model.version + 1)
        return self.model


def test_every_measured_request_reaches_the_trainer_with_what_was_predicted() -> None:
    cluster = Cluster(spec(real(0), real(1), config=BY_LATENCY, trainer=Recorder, events=[Fail(4.0, "e0")]))
    records = cluster.run(ask(i * 0.05, output=200, seed=i, streaming=i % 2 > 0) for i in range(100))
    ((_, trainer),) = cluster.trainers
    assert isinstance(trainer, Recorder)
    assert [(s.ttft_ms, s.tpot_ms, s.predicted_ttft_ms, s.model_version) for s in trainer.samples] == [
        (r.ttft_ms, r.tpot_ms, r.predicted_ttft_ms, r.model_version)
        for r in records
        if r.end == End.FINISHED and r.ttft_ms > 0
    ]
    assert 25 < len(trainer.samples) < 50


def test_the_trainer_is_asked_at_its_cadence_and_a_model_is_in_use_after_the_delay() -> None:
    described = spec(config=BY_LATENCY, trainer=Recorder, trainer_interval_s=0.25, publish_delay_s=0.5)
    cluster = Cluster(described)
    records = cluster.run(ask(i / 8, seed=i) for i in range(40))
    ((_, trainer),) = cluster.trainers
    assert isinstance(trainer, Recorder)
    assert trainer.looks_s == [i / 4 for i in range(len(trainer.looks_s))]
    # A fit begins at 0.75 s, 1.75 s and so on; a decision at the very moment of publication has the new model.
    expected = {i / 8: max(0, (i + 6) // 8 - 1) for i in range(40)}
    assert {r.arrival_s: r.model_version for r in records} == expected


def test_what_is_learned_in_line_predicts_better_than_the_start() -> None:
    records = Cluster(spec(real(0), real(1), config=BY_LATENCY)).run(many(300, every_s=0.05))
    arrays = columns(records)
    error = np.abs(arrays["predicted_ttft_ms"] / arrays["ttft_ms"] - 1)
    learned = arrays["model_version"] > 0
    assert learned.sum() > 200
    assert np.median(error[learned]) < np.median(error[~learned]) / 2


def test_without_a_trainer_the_first_model_stays() -> None:
    cluster = Cluster(spec(real(), config=BY_LATENCY, trainer=None))
    assert {r.model_version for r in cluster.run(many(100, every_s=0.05))} == {0}
    assert cluster.trainers == []


def test_without_a_predictor_nothing_is_predicted() -> None:
    (record,) = run(spec(), ask())
    assert record.model_version == -1
    assert np.isnan([record.predicted_ttft_ms, record.predicted_tpot_ms]).all()


def test_a_producer_that_fails_ends_the_run() -> None:
    cluster = Cluster(spec(config=BY_LATENCY))

    def broken(model: object) -> None:
        raise ValueError("no good")

    cluster.producers[0].on_sample = broken
    with pytest.raises(RuntimeError, match="no good"):
        cluster.run([ask(output=3)])


def test_records_become_aligned_arrays() -> None:
    table = columns(run(spec(), ask(output=2), ask(9.0, output=3)))
    assert set(table) == set(Record.__struct_fields__)
    assert table["output_tokens"].tolist() == [2, 3]
    assert table["ttft_ms"].dtype == np.float64
    assert (table["end"] == "finished").all()


def test_arrivals_must_be_in_order() -> None:
    with pytest.raises(ValueError, match=r"nothing can be planned for 1\.0 s when it is 2\.0 s"):
        run(spec(), ask(2.0), ask(1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: member(slowdown=0.5), "slowdown"),
        (lambda: member(stall_every_s=0.0), "stall_every_s"),
        (lambda: Slow(1.0, "e0", 0.0), "slowdown"),
        (lambda: spec(scrape_interval_s=0.0), "scrape_interval_s"),
        (lambda: spec(network_s=-1.0), "network_s"),
        (lambda: spec(events=[Fail(1.0, "e9")]), "no engine.*e9"),
        (lambda: spec(events=[Join(2.0, member(1)), Slow(1.0, "e1", 2.0)]), "no engine.*e1"),
        (lambda: Cluster(spec(member(0), member(0))), "two engines named 'e0'"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_bad_configuration_is_refused_as_by_the_server() -> None:
    with pytest.raises(ConfigError):
        Cluster(spec(config=CONFIG_HEAD + "plugins: [{type: nonsense}]\n"))
