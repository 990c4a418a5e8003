"""What every store of the batch gateway keeps, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from random import Random

import msgspec
import pytest

from batchgw.records import Batch, Chunk, Claim, Delivery, File, LineError, Result, Usage
from batchgw.store import Store, open_store
from batchgw.store.base import FileInUse, LeaseLost, Page, UnknownCursor
from tests.batch_stores import postgres, store_url

__all__ = ["postgres", "store_url"]

LEASE_S = 15.0


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    async with open_store(store_url) as opened:
        yield opened


def a_file(number: int = 1, **changes: object) -> File:
    plain = File(
        id=f"file-{number}",
        tenant="ada",
        purpose="batch",
        filename="in.jsonl",
        bytes=10,
        created_s=1.0,
        blob=f"b/{number}",
    )
    return msgspec.structs.replace(plain, **changes)


def a_batch(number: int = 1, **changes: object) -> Batch:
    plain = Batch(
        id=f"batch_{number}",
        tenant="ada",
        endpoint="/v1/chat/completions",
        input_file_id="file-1",
        completion_window="24h",
        created_s=float(number),
        deadline_s=1000.0,
    )
    return msgspec.structs.replace(plain, **changes)


def chunks(batch_id: str, count: int, lines: int = 4, model: str = "m") -> list[Chunk]:
    return [
        Chunk(batch_id=batch_id, number=n, model=model, start=n * lines, stop=(n + 1) * lines, prefix=2**64 - 1 - n)
        for n in range(count)
    ]


async def running(store: Store, number: int = 1, count: int = 2, **changes: object) -> Batch:
    """A batch of ``count`` chunks of four lines that is in progress since 10 s."""
    batch = await store.add_batch(a_batch(number, **changes))
    claim = await store.claim_validating("planner", 10.0, LEASE_S)
    assert claim is not None
    return await store.start_batch(claim, chunks(batch.id, count), 4 * count, "m", 10.0)


def answers(claim: Claim, ok: bool = True) -> list[Result]:
    lines = range(claim.chunk.start, claim.chunk.stop)
    return [Result(line, ok, b'{"line": %d}\n' % line, Usage(2, 1, 3, 0)) for line in lines]


async def claimed(store: Store, worker: str = "w1", now_s: float = 20.0, number: int = 1) -> Claim:
    claim = await store.claim_chunk(f"batch_{number}", "m", worker, now_s, LEASE_S)
    assert claim is not None
    return claim


async def test_a_batch_goes_from_validating_to_completed_and_keeps_its_counts_and_files(store: Store) -> None:
    await store.add_file(a_file())
    assert (await running(store)).status == "in_progress"
    for _ in range(2):
        claim = await claimed(store)
        assert await store.add_results(claim, answers(claim), 21.0) == 4
    ending = await store.claim_ending("w1", 22.0, LEASE_S)
    assert ending is not None
    assert (ending.batch.status, ending.batch.ending, ending.batch.completed) == ("finalizing", "completed", 8)
    assert [r.line async for r in store.results("batch_1")] == list(range(8))
    output = a_file(2, purpose="batch_output")
    done = await store.finish_batch(ending, completed=8, failed=0, now_s=23.0, output=output)
    assert (done.status, done.completed_s, done.output_file_id) == ("completed", 23.0, "file-2")
    assert done.usage == Usage(16, 8, 24, 0)
    assert await store.file("ada", "file-2") == output
    assert [r async for r in store.results("batch_1")] == []
    assert await store.waiting(24.0) == []


async def test_a_line_that_is_answered_twice_counts_once(store: Store) -> None:
    await running(store)
    claim = await claimed(store)
    first, *rest = answers(claim)
    assert await store.add_results(claim, [first], 21.0) == 1
    assert await store.add_results(claim, [first, *rest], 21.0) == 3
    batch = await store.batch(None, "batch_1")
    assert batch is not None
    assert (batch.completed, batch.usage) == (4, Usage(8, 4, 12, 0))


async def test_who_lost_the_lease_changes_nothing_and_the_next_resumes_where_it_stopped(store: Store) -> None:
    await running(store)
    old = await claimed(store, "dead")
    await store.add_results(old, answers(old)[:1], 21.0)
    assert await store.claim_chunk("batch_1", "m", "w2", 21.0, LEASE_S) is not None  # the other chunk
    assert await store.claim_chunk("batch_1", "m", "w2", 21.0, LEASE_S) is None
    new = await claimed(store, "w2", 20.0 + LEASE_S)
    assert (new.chunk.number, new.epoch, new.done, new.chunk.attempts) == (0, old.epoch + 1, frozenset({0}), 1)
    with pytest.raises(LeaseLost):
        await store.add_results(old, answers(old), 36.0)
    assert await store.add_results(new, answers(new)[1:], 37.0) == 3


async def test_a_heartbeat_renews_what_is_held_and_tells_what_is_not(store: Store) -> None:
    await running(store)
    kept, lost = await claimed(store), await claimed(store)
    await store.release_chunk(lost)
    other = await claimed(store, "w2", 21.0)
    assert other.lease != lost.lease
    alive = await store.heartbeat("w1", [kept, lost], 30.0, LEASE_S)
    assert (alive.lost, alive.ended) == ({lost.lease}, frozenset())
    assert await store.claim_chunk("batch_1", "m", "w3", 21.0 + LEASE_S - 1, LEASE_S) is None
    assert (await claimed(store, "w3", 21.0 + LEASE_S)).chunk.number == other.chunk.number
    assert await store.claim_chunk("batch_1", "m", "w3", 44.0, LEASE_S) is None  # kept holds until 45 s


async def test_cancelling_closes_what_waits_and_takes_what_was_answered(store: Store) -> None:
    await running(store)
    claim = await claimed(store)
    cancelled = await store.cancel_batch("ada", "batch_1", 21.0)
    assert cancelled is not None
    assert (cancelled.status, cancelled.cancelling_s) == ("cancelling", 21.0)
    assert await store.claim_chunk("batch_1", "m", "w2", 22.0, LEASE_S) is None
    assert (await store.heartbeat("w1", [claim], 22.0, LEASE_S)).ended == {"batch_1"}
    assert await store.claim_ending("w1", 22.0, LEASE_S) is None  # w1 still works on it
    assert await store.add_results(claim, answers(claim)[:2], 23.0) == 2
    await store.release_chunk(claim)
    ending = await store.claim_ending("w1", 24.0, LEASE_S)
    assert ending is not None
    with pytest.raises(LeaseLost):
        await store.add_results(claim, answers(claim), 25.0)
    with pytest.raises(ValueError, match="5 failed of 8 lines"):
        await store.finish_batch(ending, completed=2, failed=5, now_s=25.0)
    assert (await store.finish_batch(ending, completed=2, failed=6, now_s=25.0)).status == "cancelled"
    again = await store.cancel_batch("ada", "batch_1", 26.0)
    assert again is not None
    assert (again.status, again.cancelled_s) == ("cancelled", 25.0)


async def test_a_deadline_that_passed_ends_a_batch_once(store: Store) -> None:
    await running(store)
    assert await store.expire_batches(999.0, 10) == []
    assert await store.expire_batches(1000.5, 10) == ["batch_1"]
    assert await store.expire_batches(1001.0, 10) == []
    assert await store.end_batch("batch_1", "completed", 1001.0) is None
    ending = await store.claim_ending("w1", 1001.0, LEASE_S)
    assert ending is not None
    done = await store.finish_batch(ending, completed=0, failed=8, now_s=1002.0)
    assert (done.status, done.expired_s) == ("expired", 1002.0)


async def test_a_batch_that_cannot_start_says_why_and_its_webhook_waits(store: Store) -> None:
    await store.add_batch(a_batch())
    claim = await store.claim_validating("w1", 10.0, LEASE_S)
    assert claim is not None
    wrong = LineError("invalid_json_line", "This line is not parseable as valid JSON.", None, 3)
    event = Delivery(
        id="evt_1", webhook="h", batch_id="batch_1", tenant="ada", event="batch.failed", created_s=11.0, due_s=11.0
    )
    failed = await store.fail_batch(claim, [wrong], 11.0, total=5, deliveries=[event])
    assert (failed.status, failed.errors, failed.failed, failed.total) == ("failed", (wrong,), 5, 5)
    due = await store.claim_delivery(12.0, 30.0)
    assert due is not None
    assert (due.id, due.attempts) == ("evt_1", 1)
    assert await store.claim_delivery(12.0, 30.0) is None
    await store.end_delivery("evt_1")
    assert await store.claim_delivery(100.0, 30.0) is None


async def test_an_idempotency_key_gives_the_batch_that_is_there(store: Store) -> None:
    made = await asyncio.gather(*(store.add_batch(a_batch(n, idempotency_key="k")) for n in range(1, 5)))
    assert len({one.id for one in made}) == 1
    other = await store.add_batch(a_batch(9, tenant="bob", idempotency_key="k"))
    assert other.id == "batch_9"


@pytest.mark.parametrize("descending", [True, False])
async def test_pages_go_by_creation_and_then_by_id_and_by_id_or_offset(store: Store, descending: bool) -> None:
    for number in (3, 1, 2, 5, 4):
        await store.add_batch(a_batch(number, created_s=1.0 if number < 4 else 2.0))
    order = sorted((f"batch_{n}" for n in range(1, 6)), reverse=descending)
    first = await store.batches("ada", Page(limit=2, descending=descending))
    assert ([one.id for one in first.items], first.has_more) == (order[:2], True)
    for after in (order[1], 2):
        rest = await store.batches("ada", Page(after, 5, descending))
        assert ([one.id for one in rest.items], rest.has_more) == (order[2:], False)
    with pytest.raises(UnknownCursor):
        await store.batches("bob", Page(order[1], 5, descending))


async def test_tenants_never_see_each_others_things(store: Store) -> None:
    await store.add_file(a_file())
    await store.add_batch(a_batch())
    assert await store.file("bob", "file-1") is None
    assert await store.batch("bob", "batch_1") is None
    assert await store.cancel_batch("bob", "batch_1", 5.0) is None
    assert await store.remove_file("bob", "file-1") is None
    assert (await store.files("bob", None, Page())).items == ()
    assert await store.open_batches("bob") == 0


async def test_the_input_of_a_batch_that_is_not_over_stays(store: Store) -> None:
    await store.add_file(a_file(expires_s=5.0))
    await store.add_batch(a_batch())
    with pytest.raises(FileInUse, match="batch_1"):
        await store.remove_file("ada", "file-1")
    assert await store.expired_files(6.0, 10) == []


async def test_what_was_begun_is_finished_when_whoever_waits_is_cancelled(store: Store) -> None:
    """However often, and then the next one has its turn: no connection is left in the middle of a transaction."""
    for number in range(10):
        waiting = asyncio.create_task(store.add_file(a_file(number)))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    async with asyncio.timeout(5):
        while len((await store.files("ada", None, Page(limit=20))).items) < 10:
            await asyncio.sleep(0.01)


async def test_two_workers_never_hold_the_same_chunk(store: Store) -> None:
    await running(store, count=10)
    got = await asyncio.gather(*(store.claim_chunk("batch_1", "m", f"w{n}", 20.0, LEASE_S) for n in range(10)))
    numbers = [claim.chunk.number for claim in got if claim is not None]
    assert len(numbers) == len(set(numbers)) >= 1
    (row,) = await store.waiting(20.0)
    assert (row.leased_lines, row.queued_lines) == (4 * len(numbers), 40 - 4 * len(numbers))
    assert row.done_lines == 0


@pytest.mark.parametrize("seed", range(3))
async def test_whoever_is_killed_when_every_line_is_answered_once(store: Store, seed: int) -> None:
    """Three workers that die at random: a dead one's lease runs out, and what it wrote before still counts."""
    rng, now_s = Random(seed), 20.0
    await running(store, count=6)
    held: list[Claim] = []
    for _ in range(400):
        now_s += rng.random() * 4
        claim = await store.claim_chunk("batch_1", "m", f"w{rng.randrange(3)}", now_s, LEASE_S)
        held += [claim] if claim else []
        if held:
            one = held.pop(rng.randrange(len(held)))
            part = rng.sample(answers(one), rng.randrange(1, 5))
            try:
                await store.add_results(one, part, now_s)
            except LeaseLost:
                continue
            if rng.random() < 0.5:
                held.append(one)
        batch = await store.batch(None, "batch_1")
        assert batch is not None
        assert batch.completed + batch.failed <= batch.total
        if batch.ending:
            break
    assert batch.ending == "completed"
    assert [r.line async for r in store.results("batch_1")] == list(range(24))
