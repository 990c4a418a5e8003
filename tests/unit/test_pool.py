"""What is not known of an endpoint must never make it look idle."""

from __future__ import annotations

import numpy as np
import pytest

from llmd_sched.pool.pool import NEVER_READ_AGE_S, UNREACHABLE_AFTER_FAILURES, Load, Pool
from llmd_sched.types import Endpoint
from tests.builders import endpoint, endpoints, pool_of

BUSY = Load(waiting=7.0, running=9.0, kv_usage=0.5)
GAUGES = ("waiting", "running", "kv_usage")


def shown(pool: Pool, now_s: float, position: int) -> tuple[float, ...]:
    columns = pool.columns(now_s)
    return tuple(float(columns[name][position]) for name in GAUGES)


def names(pool: Pool, subset: set[str] | None = None, now_s: float = 0.0) -> list[str]:
    return [e.name for e in pool.candidates(subset, now_s).endpoints]


def test_what_was_read_is_shown() -> None:
    pool = pool_of(endpoints(2), {"e1": Load(1.0, 2.0, 0.3, 16.0, 1000.0)})
    columns = pool.columns(0.5)
    assert shown(pool, 0.5, 1) == (1.0, 2.0, 0.3)
    assert (columns["block_tokens"].tolist(), columns["cache_blocks"].tolist()) == ([0.0, 16.0], [0.0, 1000.0])
    assert columns["metrics_age_s"].tolist() == [0.5, 0.5]


def test_a_metric_the_page_does_not_have_keeps_its_last_value() -> None:
    pool = pool_of(endpoints(1), {"e0": Load(1.0, 2.0, 0.3, 16.0, 1000.0)})
    pool.record(pool.endpoints[0], Load(waiting=4.0), 1.0)
    assert shown(pool, 1.0, 0) == (4.0, 2.0, 0.3)
    assert pool.columns(1.0)["block_tokens"].tolist() == [16.0]


def test_an_endpoint_never_read_looks_like_the_worst_of_those_that_were() -> None:
    pool = Pool()
    pool.apply(endpoints(3))
    pool.record(pool.endpoints[0], Load(7.0, 1.0, 0.1), 0.0)
    pool.record(pool.endpoints[1], Load(2.0, 9.0, 0.5), 0.0)
    assert shown(pool, 1.0, 2) == (7.0, 9.0, 0.5)
    assert pool.columns(1.0)["metrics_age_s"].tolist() == [1.0, 1.0, NEVER_READ_AGE_S]


def test_a_pool_nobody_ever_read_looks_full() -> None:
    pool = Pool()
    pool.apply(endpoints(2))
    assert shown(pool, 5.0, 0) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("age_s", "values"), [(2.0, (0.0, 0.0, 0.0)), (2.1, (7.0, 9.0, 0.5))])
def test_a_stale_endpoint_looks_like_the_worst_fresh_one(age_s: float, values: tuple[float, ...]) -> None:
    pool = pool_of(endpoints(2))
    pool.record(pool.endpoints[1], BUSY, age_s)
    assert shown(pool, age_s, 0) == values


def test_a_stale_endpoint_keeps_its_own_value_when_that_is_worse() -> None:
    pool = pool_of(endpoints(2), {"e0": Load(50.0, 60.0, 0.9)})
    pool.record(pool.endpoints[1], BUSY, 10.0)
    assert shown(pool, 10.0, 0) == (50.0, 60.0, 0.9)


def test_a_pool_that_is_all_stale_looks_at_least_as_bad_as_it_was() -> None:
    pool = pool_of(endpoints(2), {"e0": Load(50.0, 0.0, 0.2)})
    assert shown(pool, 10.0, 1) == (50.0, 1.0, 1.0)


def test_a_page_without_any_gauge_refreshes_nothing() -> None:
    pool = pool_of(endpoints(1))
    pool.record(pool.endpoints[0], Load(block_tokens=16.0), 9.0)
    assert not pool.fresh(9.0).any()
    assert pool.columns(9.0)["block_tokens"].tolist() == [16.0]


def test_showing_a_pool_as_stale_leaves_what_is_known_untouched() -> None:
    pool = pool_of(endpoints(2))
    pool.columns(50.0)
    assert pool.columns(0.0)["waiting"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("failures", "left"),
    [({"e1": UNREACHABLE_AFTER_FAILURES - 1}, ["e0", "e1", "e2"]), ({"e1": UNREACHABLE_AFTER_FAILURES}, ["e0", "e2"])],
)
def test_an_endpoint_that_refuses_connections_is_left_out(failures: dict[str, int], left: list[str]) -> None:
    pool = pool_of(endpoints(3))
    for name, count in failures.items():
        for _ in range(count):
            pool.record_failure(next(e for e in pool.endpoints if e.name == name))
    assert names(pool) == left


def test_columns_follow_the_endpoints_that_are_left() -> None:
    pool = pool_of(endpoints(3), {"e0": BUSY, "e2": Load(3.0, 3.0, 0.3)})
    for _ in range(UNREACHABLE_AFTER_FAILURES):
        pool.record_failure(pool.endpoints[1])
    view = pool.candidates(None, 0.0)
    assert view.column("waiting").tolist() == [7.0, 3.0]
    assert all(len(values) == 2 for values in view.columns.values())


def test_one_good_page_makes_an_endpoint_reachable_again() -> None:
    pool = pool_of(endpoints(2))
    for _ in range(9):
        pool.record_failure(pool.endpoints[0])
    pool.record(pool.endpoints[0], BUSY, 0.0)
    assert names(pool) == ["e0", "e1"]


@pytest.mark.parametrize("subset", [None, {"10.0.0.1", "10.0.0.2"}])
def test_when_nobody_can_be_reached_everybody_is_tried(subset: set[str] | None) -> None:
    pool = pool_of(endpoints(2))
    for one in pool.endpoints * 3:
        pool.record_failure(one)
    assert names(pool, subset) == ["e0", "e1"]


def test_an_unreachable_endpoint_is_tried_when_the_subset_holds_no_other() -> None:
    pool = pool_of(endpoints(2))
    for _ in range(3):
        pool.record_failure(pool.endpoints[0])
    assert names(pool, {"10.0.0.1:8000"}) == ["e0"]
    assert names(pool, {"10.0.0.1:8000", "10.0.0.2:8000"}) == ["e1"]


MIXED = [
    endpoint(0, address="10.0.0.1", port=8000),
    endpoint(1, address="10.0.0.1", port=8001),
    endpoint(2, address="fd00::1", port=8000),
    endpoint(3, address="10.0.0.11", port=8000),
]


@pytest.mark.parametrize(
    ("subset", "expected"),
    [
        (None, ["e0", "e1", "e2", "e3"]),
        ({"10.0.0.1"}, ["e0", "e1"]),
        ({"10.0.0.1:8001"}, ["e1"]),
        ({"fd00::1"}, ["e2"]),
        ({"[fd00::1]:8000"}, ["e2"]),
        ({"[fd00::1]:8001"}, []),
        ({"10.0.0.1:8000", "fd00::1"}, ["e0", "e2"]),
        ({"10.9.9.9"}, []),
        (set(), []),
    ],
)
def test_a_subset_names_addresses_with_or_without_a_port(subset: set[str] | None, expected: list[str]) -> None:
    assert names(pool_of(MIXED), subset) == expected


def test_a_subset_keeps_its_columns_aligned() -> None:
    pool = pool_of(MIXED, {"e2": BUSY})
    view = pool.candidates({"fd00::1", "10.0.0.11"}, 0.0)
    assert view.column("waiting").tolist() == [7.0, 0.0]


def test_an_empty_pool_has_no_candidates() -> None:
    assert len(Pool().candidates(None, 0.0)) == 0
    assert len(Pool().candidates({"a"}, 0.0)) == 0


def test_applying_keeps_what_is_known_of_those_that_stay() -> None:
    pool = pool_of(endpoints(3), {"e1": BUSY})
    pool.apply([endpoint(9), endpoint(1)])
    assert shown(pool, 0.0, 1) == (7.0, 9.0, 0.5)
    assert pool.fresh(0.0).tolist() == [False, True]
    assert (pool.position("default/e1"), pool.position("default/e0")) == (1, None)


@pytest.mark.parametrize("changed", [{"address": "10.9.9.9"}, {"port": 9000}])
def test_an_endpoint_at_another_address_is_a_new_one(changed: dict[str, object]) -> None:
    pool = pool_of(endpoints(2), {"e0": Load(0.0, 0.0, 0.0, 16.0, 99.0)})
    for _ in range(3):
        pool.record_failure(pool.endpoints[0])
    pool.apply([endpoint(0, **changed), endpoint(1)])
    assert pool.fresh(0.0).tolist() == [False, True]
    assert pool.columns(0.0)["block_tokens"].tolist() == [0.0, 0.0]
    assert names(pool) == ["e0", "e1"]


def test_labels_may_change_without_losing_anything() -> None:
    pool = pool_of(endpoints(1), {"e0": BUSY})
    pool.apply([endpoint(0, labels={"role": "decode"})])
    assert shown(pool, 0.0, 0) == (7.0, 9.0, 0.5)
    assert pool.endpoints[0].labels == {"role": "decode"}


def test_the_same_name_in_another_namespace_is_another_endpoint() -> None:
    pool = pool_of([endpoint(0), endpoint(0, namespace="b", address="10.0.0.9")])
    assert len(pool) == 2


def test_an_identity_listed_twice_counts_once() -> None:
    pool = pool_of([endpoint(0), endpoint(0, address="10.0.0.9")])
    assert [e.address for e in pool.endpoints] == ["10.0.0.9"]


@pytest.mark.parametrize("late", [endpoint(5), endpoint(0, address="10.9.9.9")])
def test_news_of_an_endpoint_that_is_gone_is_dropped(late: Endpoint) -> None:
    pool = pool_of(endpoints(1), {"e0": BUSY})
    pool.record(late, Load(0.0, 0.0, 0.0), 5.0)
    for _ in range(5):
        pool.record_failure(late)
    assert shown(pool, 0.0, 0) == (7.0, 9.0, 0.5)
    assert names(pool) == ["e0"]


def test_a_change_of_members_is_told() -> None:
    told: list[list[str]] = []
    pool = Pool()
    pool.on_change.append(lambda members: told.append([e.name for e in members]))
    pool.apply(endpoints(2))
    pool.apply([])
    assert told == [["e0", "e1"], []]


def test_all_columns_stay_aligned_through_changes() -> None:
    pool = Pool()
    for count in (3, 0, 5, 1):
        pool.apply(endpoints(count))
        assert {len(values) for values in pool.columns(0.0).values()} == {count}
        assert np.isfinite(pool.columns(1e9)["metrics_age_s"]).all()


HEAT = "heat/core-metrics-extractor"


def heat(pool: Pool, now_s: float = 0.0) -> list[float | None]:
    return [None if np.isnan(value) else value for value in pool.columns(now_s)[HEAT].tolist()]


def test_a_custom_metric_is_a_column_from_its_first_value_on() -> None:
    pool = pool_of(endpoints(3))
    assert HEAT not in pool.columns(0.0)
    pool.record(pool.endpoints[1], Load(0.0, 0.0, 0.0, custom={HEAT: 4.0}), 0.0)
    assert heat(pool) == [None, 4.0, None]
    assert pool.candidates({"10.0.0.2"}, 0.0).column(HEAT).tolist() == [4.0]


@pytest.mark.parametrize("later", [Load(1.0), Load(1.0, custom={}), Load(1.0, custom={"other/x": 1.0})])
def test_a_custom_metric_the_page_does_not_have_keeps_its_last_value(later: Load) -> None:
    pool = pool_of(endpoints(1), {"e0": Load(0.0, 0.0, 0.0, custom={HEAT: 4.0})})
    pool.record(pool.endpoints[0], later, 1.0)
    assert heat(pool, 1.0) == [4.0]


def test_a_custom_metric_of_a_stale_endpoint_is_unknown() -> None:
    pool = pool_of(endpoints(2), {"e0": Load(0.0, 0.0, 0.0, custom={HEAT: 4.0})})
    pool.record(pool.endpoints[1], Load(0.0, 0.0, 0.0, custom={HEAT: 5.0}), 9.0)
    assert heat(pool, 9.0) == [None, 5.0]
    assert heat(pool, 1.0) == [4.0, 5.0]


def test_an_engine_with_custom_metrics_alone_is_no_idle_one() -> None:
    pool = Pool()
    pool.apply(endpoints(1))
    pool.record(pool.endpoints[0], Load(custom={HEAT: 4.0}), 5.0)
    assert heat(pool, 5.0) == [4.0]
    assert not pool.fresh(5.0).any()
    assert shown(pool, 5.0, 0) == (1.0, 1.0, 1.0)


def test_custom_metrics_follow_the_members() -> None:
    pool = pool_of(endpoints(3), {f"e{i}": Load(0.0, 0.0, 0.0, custom={HEAT: float(i)}) for i in range(3)})
    pool.apply([endpoint(2), endpoint(9), endpoint(0, address="10.9.9.9"), endpoint(1)])
    assert heat(pool) == [2.0, None, None, 1.0]
