"""The ring of decisions: bounded, newest first, and without a word of a prompt."""

from __future__ import annotations

import gc
import json

import msgspec
import numpy as np

from llmd_sched.admin.decisions import CAPACITY, MAX_NAME_CHARS, NUMBER_BYTES, RECORD_BYTES, SCORE_BYTES, Decisions
from llmd_sched.types import Decision, End, Prediction, Request, Scores, Stage, Trace, Verdict
from tests.builders import asking, decision, endpoint, endpoints, request, streamed

SECRET = "the patient's name is Rosalind"


def decided(number: int, **fields: object) -> Decision:
    return decision(f"t{number}", request(id=f"r{number}", **fields), endpoint(number % 2))


def filled(count: int, **limits: int) -> Decisions:
    made = Decisions(**limits)
    for number in range(count):
        made.add(decided(number), float(number))
    return made


def test_the_newest_come_first_and_the_oldest_make_room() -> None:
    ring = filled(5, capacity=3)
    assert [r.request_id for r in ring.newest(10)] == ["r4", "r3", "r2"]
    assert [r.request_id for r in ring.newest(2)] == ["r4", "r3"]
    assert len(ring) == 3
    assert ring.bytes == 3 * RECORD_BYTES


def test_decisions_over_many_endpoints_are_fewer() -> None:
    many = endpoints(100)
    ring = Decisions(max_bytes=10 * (RECORD_BYTES + 100 * SCORE_BYTES))
    for number in range(50):
        scores = Scores(many, np.arange(100), np.zeros(100))
        ring.add(msgspec.structs.replace(decided(number), scores=scores), 0.0)
    assert len(ring) == 10
    assert ring.bytes <= ring.max_bytes
    ring.add(decided(50), 0.0)
    assert ring.bytes == 9 * (RECORD_BYTES + 100 * SCORE_BYTES) + RECORD_BYTES


def test_the_default_is_a_thousand() -> None:
    assert len(filled(CAPACITY + 5)) == CAPACITY == 1000


def test_filters_look_at_the_endpoint_and_the_request_id() -> None:
    ring = filled(6)
    chosen = endpoint(1)
    for name in (chosen.key, chosen.name, chosen.hostport):
        assert [r.request_id for r in ring.newest(2, endpoint=name)] == ["r5", "r3"]
    assert [r.ticket for r in ring.newest(9, request_id="r2")] == ["t2"]
    assert ring.newest(9, endpoint=chosen.key, request_id="r2") == []


def test_an_outcome_is_shown_with_its_decision() -> None:
    ring = filled(2)
    ring.finish("t0", streamed(cached_tokens=64))
    open_, finished = (record.as_json() for record in ring.newest(2))
    assert open_["outcome"] is None
    assert finished["outcome"] == {
        "end": "finished", "status": 200, "ttft_ms": 100.0, "tpot_ms": 20.0, "e2e_ms": 300.0, "prompt_tokens": None,
        "cached_tokens": 64, "output_tokens": 11, "streamed": True, "response_bytes": 0,
    }  # fmt: skip


def test_the_outcome_of_a_decision_that_made_room_is_dropped() -> None:
    ring = filled(3, capacity=2)
    ring.finish("t0", streamed())
    ring.finish("never seen", streamed(end=End.ABORTED))
    assert [r.outcome for r in ring.newest(9)] == [None, None]
    assert len(ring) == 2


def test_a_record_tells_what_was_decided_by_which_numbers() -> None:
    first, second = endpoints(2)
    made = Decision(
        ticket="t",
        request=request(id="r", model="alias", target_model="m", priority=-1, input_tokens=7, ttft_slo_ms=200.0),
        picked=(second, first),
        scores=Scores([first, second], np.array([0, 1]), np.array([0.25, 0.123456])),
        prediction=Prediction((1.0,), 12.34567, 3.0, 9, (12.0, 20.0), (3.0, 4.0), second.key, "latency"),
        explored=True,
        at_s=5.0,
    )
    ring = Decisions()
    ring.add(made, 1_700_000_000.25)
    assert ring.newest(1)[0].as_json() == {
        "ticket": "t", "request_id": "r", "time": "2023-11-14T22:13:20.250+00:00", "model": "alias",
        "target_model": "m", "fairness_id": "default-flow", "priority": -1, "streaming": False, "input_tokens": 7,
        "max_output_tokens": None, "ttft_slo_ms": 200.0, "tpot_slo_ms": None, "endpoint": second.key,
        "destination": second.hostport, "fallbacks": [first.hostport], "stages": {}, "explored": True,
        "scores": {first.hostport: 0.25, second.hostport: 0.1235},
        "prediction": {
            "ttft_ms": 12.346, "tpot_ms": 3.0, "ttft_quantiles_ms": [12.0, 20.0], "tpot_quantiles_ms": [3.0, 4.0],
            "model_version": 9, "producer": "latency",
        },
        "trace": None, "outcome": None,
    }  # fmt: skip


def traced(values: object) -> Decision:
    told = Trace(endpoints(2), {"load/p": values}, (Verdict("label-filter", np.array([1])),))
    return msgspec.structs.replace(decided(0), trace=told)


def test_a_trace_is_told_and_counted() -> None:
    ring = Decisions()
    ring.add(traced(np.array([0.5, np.nan])), 0.0)
    told = json.loads(msgspec.json.encode(ring.newest(1)[0].as_json()))["trace"]
    first, second = (one.key for one in endpoints(2))
    assert told["produced"] == {"load/p": {first: 0.5, second: None}}
    assert told["filters"] == [{"filter": "label-filter", "kept": [second]}]
    assert ring.bytes == RECORD_BYTES + 2 * 2 * NUMBER_BYTES


def test_a_trace_that_fails_hides_nothing_else() -> None:
    ring = Decisions()
    ring.add(traced(np.array([1.0, 2.0, 3.0])), 0.0)
    told = ring.newest(1)[0].as_json()
    assert told["trace"]["error"].startswith("ValueError: zip()")
    assert told["request_id"] == "r0"


def test_stages_and_a_destination_of_its_own_are_told() -> None:
    first, second = endpoints(2)
    stages = (Stage("prefill", (second,), 1),)
    ring = Decisions()
    ring.add(msgspec.structs.replace(decided(0), stages=stages, elsewhere="10.9.9.9:1"), 0.0)
    told = ring.newest(1)[0].as_json()
    assert (told["endpoint"], told["destination"]) == (first.key, "10.9.9.9:1")
    assert told["stages"] == {"prefill": [second.key]}


def test_no_content_of_a_request_is_kept_or_told() -> None:
    ring = Decisions()
    ring.add(decision("t", asking(SECRET.encode(), cache_salt=SECRET), endpoint()), 0.0)
    assert SECRET not in msgspec.json.encode(ring.newest(1)[0].as_json()).decode()
    assert not [one for one in _reachable(ring) if isinstance(one, Request)]
    assert SECRET.encode() not in [one for one in _reachable(ring) if isinstance(one, bytes)]


def _reachable(root: object) -> list[object]:
    """All that a garbage collector would find from here, classes and modules aside."""
    found: dict[int, object] = {}
    todo = [root]
    while todo:
        one = todo.pop()
        if id(one) not in found and not isinstance(one, type) and not hasattr(one, "__loader__"):
            found[id(one)] = one
            todo += gc.get_referents(one)
    return list(found.values())


def test_names_that_clients_choose_are_cut() -> None:
    ring = Decisions()
    ring.add(decided(0, model="m" * 5000, target_model="t" * 5000, fairness_id="f" * 5000), 0.0)
    long = "i" * 5000
    ring.add(decision("t1", request(id=long), endpoint()), 0.0)
    told = [record.as_json() for record in ring.newest(2)]
    assert max(len(str(value)) for one in told for value in one.values()) == MAX_NAME_CHARS
    assert len(ring.newest(9, request_id=long)) == 1
