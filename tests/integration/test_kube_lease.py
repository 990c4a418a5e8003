"""Leader election over real HTTP: time is in the test's hands, except where a loop runs by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from random import Random

import pytest
import pytest_asyncio

from llmd_sched.kube import lease
from llmd_sched.kube.client import ApiClient
from llmd_sched.kube.lease import Elector, Timings
from tests.integration.kube_api import LEASES, NAMESPACE, KubeApi, Object, running

NAME = "epp-serving-pool.llm-d.ai"
QUICK = Timings(lease_s=0.5, renew_s=0.2, retry_s=0.02)


class Election:
    """A server, a clock, and candidates."""

    def __init__(self, api: KubeApi, client: ApiClient) -> None:
        self.api, self.client, self.now_s = api, client, 1000.0
        self.told: dict[str, list[bool]] = {}

    def candidate(self, name: str, timings: Timings | None = None, *, real_time: bool = False) -> Elector:
        told = self.told.setdefault(name, [])
        own = {} if real_time else {"clock": lambda: self.now_s, "date": lambda: 1.7e9 + self.now_s}
        return Elector(self.client, NAMESPACE, NAME, name, told.append, Random(name), timings=timings, **own)

    @property
    def lease(self) -> Object:
        return self.api.objects[LEASES][NAME]

    @property
    def holder(self) -> str:
        return str(self.lease["spec"]["holderIdentity"])


@pytest_asyncio.fixture
async def election() -> AsyncIterator[Election]:
    async with running() as (api, client):
        yield Election(api, client)


async def test_the_first_makes_the_lease_and_leads(election: Election) -> None:
    one = election.candidate("one")
    assert not one.leading
    wait_s = await one.step()
    assert (one.leading, election.told["one"], wait_s) == (True, [True], 2.0)
    spec = election.lease["spec"]
    assert (spec["holderIdentity"], spec["leaseDurationSeconds"], spec["leaseTransitions"]) == ("one", 15, 0)
    assert spec["acquireTime"] == spec["renewTime"]
    assert spec["renewTime"].endswith("Z")


async def test_a_leader_renews_with_one_request_and_keeps_what_others_put_on_the_lease(election: Election) -> None:
    one = election.candidate("one")
    await one.step()
    acquired = election.lease["spec"]["acquireTime"]
    await election.api.put(
        LEASES, {**election.lease, "metadata": {**election.lease["metadata"], "labels": {"team": "x"}}}
    )
    for _ in range(3):
        election.now_s += 2.0
        await one.step()
    assert one.leading
    assert election.lease["metadata"]["labels"] == {"team": "x"}
    assert election.lease["spec"]["acquireTime"] == acquired != election.lease["spec"]["renewTime"]
    assert election.api.counted(LEASES)["put"] == 3  # the first met a conflict, and read what there is
    asked = len(election.api.requests)
    await one.step()
    assert len(election.api.requests) == asked + 1


async def test_of_two_only_one_leads_for_as_long_as_it_renews(election: Election) -> None:
    one, two = election.candidate("one"), election.candidate("two")
    await one.step()
    for _ in range(30):
        wait_s = await two.step()
        assert 2.0 <= wait_s <= 4.4
        assert (one.leading, two.leading) == (True, False)
        election.now_s += 2.0
        await one.step()
    assert election.told["two"] == []


async def test_a_follower_takes_over_when_the_leader_is_silent_and_never_before_that_stopped(
    election: Election,
) -> None:
    one, two = election.candidate("one"), election.candidate("two")
    await one.step()
    began_s = election.now_s
    while not two.leading:
        await two.step()
        assert not (one.leading and two.leading)
        election.now_s += 0.5
    assert election.now_s - began_s == pytest.approx(15.5)
    assert (election.holder, election.lease["spec"]["leaseTransitions"]) == ("two", 1)
    await one.step()
    assert election.told["one"] == [True, False]
    assert not one.leading


async def test_of_two_that_write_at_once_the_one_with_the_old_version_loses(election: Election) -> None:
    one, two = election.candidate("one"), election.candidate("two")
    await one.step()
    election.now_s += 4.0
    await two._read()
    election.now_s += 16.0
    three = election.candidate("three")
    three.election.observe(two.election.record, 1000.0)
    await asyncio.gather(two.step(), three.step())
    assert sorted([two.leading, three.leading]) == [False, True]


async def test_two_that_make_the_lease_at_once_do_not_both_lead(election: Election) -> None:
    candidates = [election.candidate(str(i)) for i in range(5)]
    await asyncio.gather(*(c.step() for c in candidates))
    assert [c.leading for c in candidates].count(True) == 1


async def test_a_leader_whose_lease_was_taken_by_hand_stops_at_its_next_renewal(election: Election) -> None:
    one = election.candidate("one")
    await one.step()
    await election.api.put(LEASES, {**election.lease, "spec": {**election.lease["spec"], "holderIdentity": "somebody"}})
    election.now_s += 2.0
    await one.step()
    assert (one.leading, election.told["one"], election.holder) == (False, [True, False], "somebody")


async def test_a_leader_that_cannot_renew_leads_until_the_deadline_and_goes_on_as_follower(
    election: Election, caplog: pytest.LogCaptureFixture
) -> None:
    one = election.candidate("one")
    await one.step()
    election.api.statuses = [500] * 100
    waits = []
    while one.leading:
        waits.append(await one.step())
        election.now_s += min(waits[-1], 3.0)
    assert election.now_s == 1010.0
    assert waits[-1] == 2.0
    election.api.statuses = []
    assert election.told["one"] == [True]
    await one.step()
    assert election.told["one"] == [True, False, True]
    assert len([r for r in caplog.records if "status 500" in r.getMessage()]) == 1


async def test_near_its_deadline_a_leader_neither_waits_nor_asks_beyond_it(election: Election) -> None:
    one = election.candidate("one")
    assert one._patience_s() == 5.0
    await one.step()
    assert one._patience_s() == 5.0
    election.now_s += 9.0
    assert one._patience_s() == 1.0
    election.api.statuses = [500]
    assert await one.step() == 1.0


async def test_a_server_that_hangs_cannot_hold_the_loss_back(election: Election) -> None:
    one = election.candidate("one", QUICK, real_time=True)
    one.start()
    async with asyncio.timeout(10):
        while not one.leading:
            await asyncio.sleep(0.005)
        election.api.hang = True
        while election.told["one"] != [True, False]:
            await asyncio.sleep(0.005)
    assert not one.leading
    await one.stop()


async def test_a_leader_that_stops_gives_the_lease_away_and_the_next_need_not_wait(election: Election) -> None:
    one, two = election.candidate("one"), election.candidate("two")
    await one.step()
    await two.step()
    await one.stop()
    assert (one.leading, election.told["one"], election.holder) == (False, [True, False], "")
    await two.step()
    assert two.leading
    assert election.lease["spec"]["leaseTransitions"] == 1


async def test_a_follower_that_stops_leaves_the_lease_alone(election: Election) -> None:
    one, two = election.candidate("one"), election.candidate("two")
    await one.step()
    await two.step()
    await two.stop()
    assert election.holder == "one"


async def test_a_server_that_hangs_does_not_hold_a_stop_back(
    election: Election, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "RELEASE_TIMEOUT_S", 0.05)
    one = election.candidate("one")
    await one.step()
    election.api.hang = True
    await one.stop()
    assert not one.leading
    assert "not released" in caplog.text


async def test_two_loops_hand_the_lease_over(election: Election) -> None:
    one, two = (election.candidate(name, QUICK, real_time=True) for name in ("one", "two"))
    one.start()
    async with asyncio.timeout(10):
        while not one.leading:
            await asyncio.sleep(0.005)
        two.start()
        await asyncio.sleep(0.1)
        assert not two.leading
        await one.stop()
        while not two.leading:
            await asyncio.sleep(0.005)
    await two.stop()
    assert election.told == {"one": [True, False], "two": [True, False]}
