"""The rules of a lease with a clock in the test's hands: who may take it, how long one leads."""

from __future__ import annotations

import msgspec
import pytest

from llmd_sched.kube.lease import Election, Record, Timings, lease_name, micro_time

DATE_S = 1_767_225_600.5


def candidate(name: str = "me") -> Election:
    return Election(name, Timings())


def held_by(name: str, renewed: str = "1", seconds: int = 15) -> Record:
    return Record(name, seconds, "0", renewed, 3)


def leader() -> Election:
    made = candidate()
    made.wrote(made.claim(DATE_S), 100.0)
    return made


def test_a_lease_that_is_not_there_is_free_and_claimed_without_a_transition() -> None:
    me = candidate()
    assert me.free(0.0)
    at = "2026-01-01T00:00:00.500000Z"
    assert me.claim(DATE_S) == Record("me", 15, at, at, 0)


def test_one_leads_from_when_it_asked_until_the_renewal_deadline() -> None:
    me = leader()
    assert me.leading(100.0)
    assert me.leading(109.9)
    assert not me.leading(110.0)
    assert me.deadline_s == 110.0


def test_a_renewal_keeps_when_it_was_acquired_and_counts_no_transition() -> None:
    me = leader()
    again = me.claim(DATE_S + 60)
    assert again.acquire_time == me.record.acquire_time
    assert again.renew_time == micro_time(DATE_S + 60)
    assert again.lease_transitions == 0


def test_a_follower_waits_for_the_lease_to_end_by_its_own_clock() -> None:
    me = candidate()
    me.observe(held_by("other"), 50.0)
    assert not me.free(64.9)
    me.observe(held_by("other"), 64.9)
    assert me.free(65.0)
    me.observe(held_by("other", renewed="2"), 65.0)
    assert not me.free(79.9)
    assert me.free(80.0)


def test_whoever_takes_a_lease_over_counts_a_transition() -> None:
    me = candidate()
    me.observe(held_by("other"), 0.0)
    assert me.claim(DATE_S).lease_transitions == 4


@pytest.mark.parametrize("holder", ["", None])
def test_a_released_lease_is_free_at_once(holder: str | None) -> None:
    me = candidate()
    me.observe(msgspec.structs.replace(held_by("other"), holder_identity=holder), 0.0)
    assert me.free(0.0)


def test_a_leader_that_sees_another_holder_stops_leading_at_once() -> None:
    me = leader()
    me.observe(held_by("other"), 101.0)
    assert not me.leading(101.0)
    assert not me.free(102.0)


def test_a_leader_that_was_too_late_may_take_its_own_lease_again() -> None:
    me = leader()
    assert not me.leading(111.0)
    assert me.free(111.0)
    me.wrote(me.claim(DATE_S), 111.0)
    assert me.leading(111.0)


def test_a_released_lease_names_nobody_and_keeps_its_count() -> None:
    me = candidate()
    me.observe(held_by("me"), 0.0)
    assert me.release(DATE_S).holder_identity == ""
    assert me.release(DATE_S).lease_transitions == 3


def test_a_lease_of_part_of_a_second_is_rounded_up() -> None:
    me = Election("me", Timings(0.05, 0.03, 0.01))
    assert me.claim(DATE_S).lease_duration_seconds == 1


@pytest.mark.parametrize("timings", [Timings(10, 10, 2), Timings(15, 2, 2), Timings(15, 10, 0)])
def test_timings_that_would_let_two_lead_are_refused(timings: Timings) -> None:
    with pytest.raises(ValueError, match="outlast"):
        Election("me", timings)


def test_the_lease_is_named_after_the_pool() -> None:
    assert lease_name("prod", "llama") == "epp-prod-llama.llm-d.ai"
