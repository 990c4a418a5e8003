"""Flow control in the simulated cluster, in exact virtual time."""

from __future__ import annotations

import numpy as np
import pytest

from llmd_sched.sim.cluster import Cluster
from llmd_sched.sim.scenario import Arrival, Join, Leave, columns
from tests.builders import CONFIG_HEAD
from tests.sim.test_cluster import DECODE_S, NETWORK_S, ask, member, spec

ONE_AT_A_TIME = (
    CONFIG_HEAD
    + "featureGates: [flowControl]\n"
    + "plugins: [{type: active-request-scorer}, {type: max-score-picker}, "
    + "{type: concurrency-detector, parameters: {maxConcurrency: 1}}]\n"
    + "flowControl: {saturationDetector: {pluginRef: concurrency-detector}, defaultRequestTTL: %ss, maxRequests: 3}\n"
)


def run(*arrivals: Arrival, ttl_s: float = 60.0, **fields: object) -> dict[str, np.ndarray]:
    cluster = Cluster(spec(config=ONE_AT_A_TIME % ttl_s, **fields))
    records = columns(sorted(cluster.run(arrivals), key=lambda r: (r.arrival_s, r.request_id)))
    assert len(cluster.router.open) == 0
    return records


def test_who_must_wait_goes_when_the_one_before_has_ended_and_the_wait_is_part_of_its_times() -> None:
    alone = run(ask(id="a", output=4))
    both = run(ask(id="a", output=4), ask(id="b", output=4, seed=1))
    assert both["queue_wait_ms"].tolist() == [0.0, alone["e2e_ms"][0]]
    assert both["ttft_ms"].tolist() == [alone["ttft_ms"][0], alone["e2e_ms"][0] + alone["ttft_ms"][0]]
    assert both["e2e_ms"].tolist() == [alone["e2e_ms"][0], 2 * alone["e2e_ms"][0]]
    assert both["tpot_ms"].tolist() == [DECODE_S * 1e3] * 2


def test_who_waits_for_too_long_is_refused_at_its_deadline() -> None:
    found = run(ask(id="a", output=40), ask(id="b", seed=1), ttl_s=0.5)
    assert found["status"].tolist() == [200, 429]
    assert found["end"].tolist() == ["finished", "refused"]


def test_a_full_queue_refuses_at_once() -> None:
    found = run(*(ask(id=name, output=8, seed=i) for i, name in enumerate("abcde")))
    assert found["status"].tolist() == [200, 200, 200, 200, 429]


def test_an_engine_that_joins_lets_a_waiting_request_go_at_once() -> None:
    found = run(ask(id="a", output=40), ask(id="b", seed=1), events=[Join(1.0, member(1))])
    assert found["queue_wait_ms"].tolist() == [0.0, 1000.0]
    assert found["endpoint"].tolist() == ["e0", "e1"]


def test_without_any_engine_requests_wait_for_one() -> None:
    found = run(ask(0.5, id="a"), events=[Leave(0.25, "e0"), Join(2.0, member(0))])
    assert found["queue_wait_ms"].tolist() == [1500.0]
    assert found["status"].tolist() == [200]


@pytest.mark.parametrize("engines", [1, 3])
def test_no_engine_ever_has_more_than_the_limit(engines: int) -> None:
    found = run(
        *(ask(0.1 * i, id=f"{i:02}", output=3, seed=i) for i in range(3)), engines=[member(i) for i in range(engines)]
    )
    from_s = found["arrival_s"] + found["queue_wait_ms"] / 1e3
    to_s = found["arrival_s"] + found["e2e_ms"] / 1e3 - NETWORK_S
    at_once = [(name, ((from_s <= at) & (at < to_s) & (found["endpoint"] == name)).sum())
               for name in set(found["endpoint"]) for at in from_s]  # fmt: skip
    assert {most for _, most in at_once} <= {0, 1}
