"""How full the pool is, and whom the detectors drop as filters."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from llmd_sched.config import convert
from llmd_sched.flow.saturation import (
    DECODE_ROLES,
    DETECTORS,
    PREFILL_ROLES,
    ConcurrencyDetector,
    Saturation,
    SaturationDetector,
    Stages,
    UtilizationDetector,
)
from llmd_sched.flow.unseen import UNSEEN, Unseen
from llmd_sched.sched.filters import ROLE_LABEL, DecodeFilter, PrefillFilter
from llmd_sched.types import Candidates, Endpoint
from tests.builders import candidates, endpoint, endpoints, labelled, request

NOBODY = candidates(0)


def kept(detector: SaturationDetector, view: Candidates) -> list[bool]:
    return detector.keep(request(), view, Random(0)).tolist()


@pytest.mark.parametrize(
    ("waiting", "kv_usage", "age_s", "policy", "expected"),
    [
        ([0], [0.0], [0.0], "saturated", 0.0),
        ([5], [0.0], [0.0], "saturated", 1.0),
        ([0], [0.8], [0.0], "saturated", 1.0),
        ([1], [0.4], [0.0], "saturated", 0.5),  # the larger of 0.2 and 0.5
        ([20], [0.0], [0.0], "saturated", 4.0),  # not capped
        ([20, 0], [0.0, 0.0], [0.0, 0.0], "saturated", 2.0),
        ([0, 0], [0.0, 0.0], [0.0, 9.0], "saturated", 0.5),  # a stale one is full
        ([20, 0], [0.0, 0.0], [9.0, 9.0], "saturated", 1.0),
        ([1, 20], [0.0, 0.0], [0.0, 9.0], "ignore", 0.2),
        ([20, 20], [0.0, 0.0], [9.0, 9.0], "ignore", 0.0),
        ([0], [0.0], [1.25], "saturated", 0.0),  # an idle endpoint is read once a second
        ([0], [0.0], [1.26], "saturated", 1.0),
        ([0], [0.0], [1e6], "saturated", 1.0),  # never read
    ],
)
def test_utilization(
    waiting: list[float], kv_usage: list[float], age_s: list[float], policy: str, expected: float
) -> None:
    view = candidates(waiting=waiting, kv_usage=kv_usage, metrics_age_s=age_s)
    assert UtilizationDetector(staleness_policy=policy).saturation(view) == pytest.approx(expected)


@pytest.mark.parametrize("detector", [UtilizationDetector(), ConcurrencyDetector(concurrency_mode="hybrid")])
def test_an_empty_pool_is_full(detector: SaturationDetector) -> None:
    assert detector.saturation(NOBODY) == 1.0
    assert kept(detector, NOBODY) == []


def test_a_longer_staleness_threshold_is_kept_to() -> None:
    view = candidates(metrics_age_s=[2.9, 3.1])
    detector = UtilizationDetector(metrics_staleness_threshold="3s")
    assert detector.stale(view) == 1
    assert detector.saturation(view) == 0.5


@pytest.mark.parametrize(
    ("waiting", "kv_usage", "age_s", "headroom", "expected"),
    [
        ([0, 4.9, 5, 9], [0, 0, 0, 0], [0, 0, 0, 0], 0.0, [True, True, False, False]),
        ([0, 0, 0], [0.79, 0.8, 0.9], [0, 0, 0], 0.0, [True, False, False]),
        ([5, 7], [0.0, 0.9], [0, 0], 0.2, [True, False]),
        ([0, 0], [0, 0], [0, 9.0], 0.0, [True, False]),
        ([9, 9], [0, 0], [0, 0], 0.0, [True, True]),  # nobody left: everybody
        ([0, 0], [0, 0], [9, 9], 0.0, [True, True]),
    ],
)
def test_utilization_as_a_filter(
    waiting: list[float], kv_usage: list[float], age_s: list[float], headroom: float, expected: list[bool]
) -> None:
    view = candidates(waiting=waiting, kv_usage=kv_usage, metrics_age_s=age_s)
    assert kept(UtilizationDetector(headroom=headroom), view) == expected


@pytest.mark.parametrize(
    ("mode", "requests", "tokens", "expected"),
    [
        ("requests", [0, 0], [0, 0], 0.0),
        ("requests", [10, 0], [900, 0], 0.5),
        ("requests", [10, 10], [0, 0], 1.0),
        ("requests", [30, 10], [0, 0], 2.0),
        ("tokens", [10, 10], [500, 0], 0.25),
        ("hybrid", [10, 0], [0, 1000], 1.0),  # mean of max(1, 0) and max(0, 1)
        ("hybrid", [5, 0], [0, 500], 0.5),
        ("hybrid", [5, 0], [800, 0], 0.4),
    ],
)
def test_concurrency(mode: str, requests: list[float], tokens: list[float], expected: float) -> None:
    detector = ConcurrencyDetector(max_concurrency=10, max_token_concurrency=1000, concurrency_mode=mode)
    view = candidates(inflight_requests=requests, inflight_tokens=tokens)
    assert detector.saturation(view) == pytest.approx(expected)


def test_a_full_pool_is_full_whatever_the_spread() -> None:
    for seed in range(200):
        random = Random(seed)
        counts = [0.0] * 7
        for _ in range(7 * 132):
            counts[random.randrange(7)] += 1
        assert ConcurrencyDetector(max_concurrency=132).saturation(candidates(inflight_requests=counts)) >= 1.0


def test_without_a_count_nothing_is_in_flight() -> None:
    assert ConcurrencyDetector().saturation(candidates(3)) == 0.0


def test_concurrency_reads_the_producer_that_is_configured() -> None:
    view = candidates(3).with_columns({"inflight_requests/mine": np.full(3, 50.0)})
    assert ConcurrencyDetector(in_flight_load_producer_name="mine").saturation(view) == 0.5


@pytest.mark.parametrize(
    ("mode", "headroom", "expected"),
    [
        ("requests", 0.0, [True, False, False]),
        ("requests", 0.2, [True, True, False]),
        ("tokens", 0.0, [True, True, True]),
        ("hybrid", 0.0, [True, False, False]),
    ],
)
def test_concurrency_as_a_filter(mode: str, headroom: float, expected: list[bool]) -> None:
    view = candidates(inflight_requests=[9, 10, 12], inflight_tokens=[0, 10, 20])
    detector = ConcurrencyDetector(max_concurrency=10, concurrency_mode=mode, headroom=headroom)
    assert kept(detector, view) == expected


def test_concurrency_as_a_filter_may_leave_nobody() -> None:
    assert kept(ConcurrencyDetector(max_concurrency=1), candidates(inflight_requests=[1, 2])) == [False, False]


def test_requests_that_show_in_no_metrics_yet_count_as_waiting() -> None:
    view = candidates(waiting=[1, 0], metrics_age_s=[0, 0]).with_columns({UNSEEN: np.array([4.0, 0.0])})
    assert UtilizationDetector().saturation(view) == 0.5
    assert ConcurrencyDetector().saturation(view) == 0.0


def unseen(counters: Unseen, members: list[Endpoint], read_at_s: list[float], now_s: float) -> list[float]:
    view = Candidates(members, {"metrics_age_s": now_s - np.array(read_at_s)})
    return counters.beside(view, now_s).column(UNSEEN).tolist()


def test_what_was_sent_is_unseen_until_the_next_read_of_that_endpoint() -> None:
    counters, members = Unseen(), endpoints(2)
    assert unseen(counters, members, [0.0, 0.0], 0.3) == [0, 0]
    for row in (0, 0, 1):
        counters.sent(members[row])
    assert unseen(counters, members, [0.0, 0.0], 0.7) == [2, 1]
    assert unseen(counters, members, [0.8, 0.0], 0.9) == [0, 1]
    counters.sent(members[0])
    assert unseen(counters, members, [0.8, 1.0], 1.1) == [1, 0]


def test_unseen_requests_follow_their_endpoint_as_others_come_and_go() -> None:
    counters, members = Unseen(), endpoints(3)
    unseen(counters, members, [0.0] * 3, 0.0)
    counters.sent(members[2])
    assert unseen(counters, [members[2], endpoint(9), members[0]], [0.0] * 3, 0.1) == [1, 0, 0]
    counters.sent(members[1])  # gone
    elsewhere = endpoint(2, address="10.9.9.9")  # the same name, another server
    assert unseen(counters, [elsewhere, members[2]], [0.0] * 2, 0.2) == [0, 1]


ROLES = [
    # labels, in flight, prefill, decode, effective; the limit is 10
    (["decode", "decode"], [5, 0], None, 0.25, 0.25),
    ([None, "decode"], [5, 5], None, 0.5, 0.5),
    (["prefill", "decode"], [10, 2], 1.0, 0.2, 1.0),
    (["encode-prefill", ""], [1, 2], 0.1, 0.2, 0.2),
    (["both", "decode"], [4, 2], 0.4, 0.3, 0.4),
    (["prefill-decode", "prefill"], [4, 2], 0.3, 0.4, 0.4),
    (["encode-prefill-decode"], [4], 0.4, 0.4, 0.4),
    (["encode", "decode"], [10, 2], None, 0.2, 0.2),  # encoders count in no stage
    (["unheard-of", "decode"], [10, 2], None, 0.2, 0.2),
    (["encode", "unheard-of"], [10, 2], None, None, 0.6),  # no stage at all: the whole pool
    (["prefill"], [3], 0.3, None, 0.3),
    ([], [], None, None, 1.0),
]


@pytest.mark.parametrize(("roles", "counts", "prefill", "decode", "effective"), ROLES)
def test_stages(
    roles: list[str | None], counts: list[float], prefill: float | None, decode: float | None, effective: float
) -> None:
    labels = [{} if role is None else {ROLE_LABEL: role} for role in roles]
    view = labelled(*labels, inflight_requests=counts) if roles else NOBODY
    measured = Stages(ConcurrencyDetector(max_concurrency=10)).measure(view)
    assert (measured.prefill, measured.decode, measured.effective) == pytest.approx((prefill, decode, effective))


def test_stages_are_found_again_when_the_endpoints_change() -> None:
    stages = Stages(ConcurrencyDetector(max_concurrency=10))
    assert stages.measure(candidates(inflight_requests=[5.0])) == Saturation(None, 0.5, 0.5)
    prefill = labelled({ROLE_LABEL: "prefill"}, {}, inflight_requests=[5.0, 1.0])
    assert stages.measure(prefill) == Saturation(0.5, 0.1, 0.5)
    assert stages.measure(candidates(inflight_requests=[3.0])) == Saturation(None, 0.3, 0.3)


def test_labels_are_read_once_per_list_of_endpoints() -> None:
    class Counting(dict[str, str]):
        read = 0

        def get(self, key: str, default: object = None) -> object:
            Counting.read += 1
            return super().get(key, default)

    members = [endpoint(i, labels=Counting({ROLE_LABEL: "prefill"})) for i in range(3)]
    stages = Stages(ConcurrencyDetector())
    for _ in range(5):
        stages.measure(Candidates(members, candidates(3).columns))
    assert Counting.read == 3


def test_stages_see_only_the_candidates_in_view() -> None:
    view = labelled({ROLE_LABEL: "prefill"}, {}, {}, inflight_requests=[90.0, 80.0, 10.0])
    measured = Stages(ConcurrencyDetector()).measure(view.keep(np.array([False, True, True])))
    assert measured == Saturation(None, pytest.approx(0.45), pytest.approx(0.45))


def test_stale_endpoints_are_counted() -> None:
    view = candidates(metrics_age_s=[0.0, 5.0, 5.0])
    assert Stages(UtilizationDetector()).measure(view).stale == 2


def test_the_roles_are_those_of_the_role_filters() -> None:
    assert {*DECODE_ROLES} == {"", *DecodeFilter.roles}
    assert PrefillFilter.roles == PREFILL_ROLES


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("utilization-detector", {"queueDepthThreshold": 0}, "queueDepthThreshold must be positive"),
        ("utilization-detector", {"kvCacheUtilThreshold": 1.5}, "kvCacheUtilThreshold"),
        ("utilization-detector", {"kvCacheUtilThreshold": 0}, "kvCacheUtilThreshold"),
        ("utilization-detector", {"metricsStalenessThreshold": "soon"}, "metricsStalenessThreshold: 'soon'"),
        ("utilization-detector", {"metricsStalenessThreshold": "0s"}, "more than 0"),
        ("utilization-detector", {"headroom": -0.1}, "headroom"),
        ("utilization-detector", {"stalenessPolicy": "panic"}, "accepted are saturated and ignore"),
        ("concurrency-detector", {"maxConcurrency": 0}, "must be positive"),
        ("concurrency-detector", {"maxTokenConcurrency": 0}, "must be positive"),
        ("concurrency-detector", {"concurrencyMode": "bytes"}, "requests, tokens and hybrid"),
        ("concurrency-detector", {"headroom": -0.1}, "headroom"),
    ],
)
def test_parameters_of_a_detector_that_make_no_sense_are_refused(
    name: str, parameters: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        convert(parameters, DETECTORS[name]).check()


def test_the_settings_of_the_reference_are_accepted() -> None:
    inert = convert({"queueDepthThreshold": 999999999, "kvCacheUtilThreshold": 1.0}, DETECTORS["utilization-detector"])
    inert.check()
    given = {"maxConcurrency": 132, "concurrencyMode": "requests", "headroom": 0}
    convert(given, DETECTORS["concurrency-detector"]).check()
