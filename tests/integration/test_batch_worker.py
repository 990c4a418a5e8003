"""A worker with its upkeep over a real store, blobs in a folder and a stand-in engine."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from batchgw.gates.base import Open
from batchgw.records import Batch
from batchgw.store import open_store
from batchgw.webhooks import sign
from batchgw.worker.finalize import FinalizerSettings
from batchgw.worker.metrics import Metrics
from batchgw.worker.pacer import GatePacer
from batchgw.worker.upkeep import CHUNK_LINES
from batchgw.worker.webhooks import AGAIN_S, Teller, Webhook
from batchgw.worker.worker import WorkerSettings
from benchmarks.batch_engine import Engine, Fault, Trouble, running
from benchmarks.batch_site import LOOK_S, Site, requests, site, wrong
from tests.batch_stores import postgres, store_url  # noqa: F401  (fixtures)
from tests.envoy_stream import until

PATIENT: dict[str, Any] = {"lease_s": 30.0, "request_timeout_s": 30.0}
"""Longer than a loaded machine keeps anything waiting: a lease or a request that runs out is rightly sent again."""


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with running(Engine()) as made:
        yield made


@pytest.fixture
async def gateway(store_url: str, tmp_path: Path, engine: Engine) -> AsyncIterator[Site]:  # noqa: F811
    (tmp_path / "blobs").mkdir()
    async with site(lambda: open_store(store_url), tmp_path / "blobs", engine.url) as made:
        made.worker = partial(made.worker, **PATIENT)
        yield made


def failing(custom_ids: set[int], fault: Fault) -> Trouble:
    """For the lines of these numbers."""
    texts = {f"line {number}" for number in custom_ids}
    return lambda asked: fault if asked.body["messages"][0]["content"] in texts else None


def hanging_after(answers: int) -> Trouble:
    """The first ones are answered, whichever lines they are."""
    left = iter(range(answers))
    return lambda asked: Fault("hang") if next(left, None) is None else None


async def test_a_batch_runs_from_its_file_to_its_output(gateway: Site, engine: Engine) -> None:
    async with gateway.worker():
        batch = await gateway.ended((await gateway.submit(requests(120))).id)
    assert (batch.status, batch.model, batch.error_file_id) == ("completed", "m", None)
    assert not await wrong(gateway, batch, 120)
    assert (batch.usage.output_tokens, len(engine.asked)) == (600, 120)
    assert batch.output_file_id is not None
    file = await gateway.store.file("t", batch.output_file_id)
    assert file is not None
    assert (file.purpose, file.filename) == ("batch_output", f"batch_output_{batch.id}.jsonl")
    line = (await gateway.lines(batch, batch.output_file_id))[7]
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("c7", None, 200)
    assert line["response"]["body"]["choices"][0]["message"]["content"] == " w0 w1 w2 w3 w4"


@pytest.mark.parametrize("routing", ["openai", "llm-d"])
async def test_a_refused_line_goes_where_the_routing_says_and_counts_as_failed(
    gateway: Site, engine: Engine, routing: Any
) -> None:
    engine.trouble = failing({3, 5}, Fault("status", 400))
    async with gateway.worker(finalizer=FinalizerSettings(routing=routing)):
        batch = await gateway.ended((await gateway.submit(requests(8))).id)
    assert (batch.status, batch.completed, batch.failed) == ("completed", 6, 2)
    refused = await gateway.lines(batch, batch.error_file_id if routing == "openai" else batch.output_file_id)
    kept = [line for line in refused if line["response"]["status_code"] == 400]
    assert [line["custom_id"] for line in kept] == ["c3", "c5"]
    assert (batch.error_file_id is None) is (routing == "llm-d")


async def test_models_of_one_file_run_independently(gateway: Site, engine: Engine) -> None:
    engine.trouble = lambda asked: Fault("hang") if asked.body["model"] == "stuck" else None
    async with gateway.worker(per_model=4):
        batch = await gateway.submit(requests(60, model=["stuck", "free"]))
        await until(lambda: sum(asked.body["model"] == "free" for asked in engine.asked) == 30)
        await until(lambda: sum(asked.body["model"] == "stuck" for asked in engine.asked) == 4)
        assert (await gateway.batch(batch.id)).status == "in_progress"


async def answered(gateway: Site, batch: Batch, lines: int) -> None:
    """Until so many lines have come out."""
    async with asyncio.timeout(30.0):
        while (await gateway.batch(batch.id)).completed < lines:
            await asyncio.sleep(0.01)


async def cancelled(gateway: Site, batch: Batch, after: int) -> Batch:
    """Cancels it when ``after`` lines have come out."""
    await answered(gateway, batch, after)
    await gateway.store.cancel_batch("t", batch.id, batch.created_s)
    return await gateway.ended(batch.id)


async def test_a_cancelled_batch_keeps_what_is_finished_and_says_so_of_the_rest(gateway: Site, engine: Engine) -> None:
    engine.trouble = hanging_after(10)
    async with gateway.worker():
        batch = await cancelled(gateway, await gateway.submit(requests(200)), 10)
        await until(lambda: engine.in_flight == 0)
    assert (batch.status, batch.completed, batch.failed) == ("cancelled", 10, 190)
    assert not await wrong(gateway, batch, 200)
    errors = await gateway.lines(batch, batch.error_file_id)
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}


async def test_a_batch_cancelled_before_it_was_planned_accounts_for_each_line(gateway: Site) -> None:
    submitted = await gateway.submit(requests(70))
    await gateway.store.cancel_batch("t", submitted.id, submitted.created_s)
    async with gateway.worker():
        batch = await gateway.ended(submitted.id)
    assert (batch.status, batch.total, batch.output_file_id) == ("cancelled", 70, None)
    assert not await wrong(gateway, batch, 70)


async def test_a_batch_past_its_window_expires_with_what_is_finished(gateway: Site, engine: Engine) -> None:
    engine.trouble = hanging_after(10)
    async with gateway.worker(per_model=15) as process:
        submitted = await gateway.submit(requests(200))
        await answered(gateway, submitted, 10)
        process.upkeep._clock = lambda: submitted.deadline_s + 1.0
        batch = await gateway.ended(submitted.id)
    assert (batch.status, batch.completed, batch.failed) == ("expired", 10, 190)
    assert not await wrong(gateway, batch, 200)
    errors = await gateway.lines(batch, batch.error_file_id)
    assert {line["error"]["code"] for line in errors} == {"batch_expired"}


async def test_a_bad_file_fails_its_batch_with_each_lines_error(gateway: Site, engine: Engine) -> None:
    bad = requests(2) + b"nonsense\n" + requests(1).replace(b"c0", b"c9").replace(b"POST", b"GET")
    async with gateway.worker():
        batch = await gateway.ended((await gateway.submit(bad)).id)
    assert batch.status == "failed"
    assert [(error.code, error.line) for error in batch.errors] == [("invalid_json_line", 3), ("invalid_method", 4)]
    assert not engine.asked


async def test_a_batch_whose_endpoint_is_not_its_lines_fails(gateway: Site) -> None:
    async with gateway.worker():
        batch = await gateway.ended((await gateway.submit(requests(2, url="/v1/completions"))).id)
    assert [(batch.status, error.code) for error in batch.errors] == [("failed", "url_mismatch")]


async def test_a_batch_whose_input_is_gone_ends_failed_with_a_line_for_each(gateway: Site) -> None:
    submitted = await gateway.submit(requests(60))
    file = await gateway.store.file("t", submitted.input_file_id)
    assert file is not None
    await gateway.blobs.delete(file.blob)
    async with gateway.worker():
        batch = await gateway.ended(submitted.id)
    assert (batch.status, batch.failed, batch.errors[0].code) == ("failed", 60, "input_file_unreadable")
    assert len(await gateway.lines(batch, batch.error_file_id)) == 60


async def test_a_graceful_stop_hands_in_what_is_finished_and_hands_back_the_rest(gateway: Site, engine: Engine) -> None:
    engine.token_s = 0.02
    submitted = await gateway.submit(requests(150))
    unhurried = WorkerSettings(poll_s=LOOK_S, flush_s=0.05, stop_s=30.0)
    async with gateway.worker("first", settings=unhurried):
        await until(lambda: len(engine.asked) >= 40)
    stopped = await gateway.batch(submitted.id)
    assert stopped.completed == len(engine.asked), "what was sent was finished and handed in"
    [row] = await gateway.store.waiting(stopped.created_s)
    assert (row.leased_lines, row.queued_lines) == (0, 150 - stopped.completed)
    async with gateway.worker("second"):
        batch = await gateway.ended(submitted.id)
    assert not await wrong(gateway, batch, 150)
    assert len(engine.asked) == 150, "no line was sent twice"


async def test_lines_that_the_pacer_wants_back_are_cut_and_go_on_with_their_tokens(
    gateway: Site, engine: Engine
) -> None:
    class Cutting(GatePacer):
        """Wants each line back once, in the middle."""

        def __init__(self) -> None:
            super().__init__(lambda model: Open(), per_model=10)
            self.cut: set[str] = set()
            self.wanted: set[str] = set()

        def tokens(self, flight: Any, count: int) -> None:
            if flight.tokens >= 5 and flight.key not in self.cut:
                self.cut.add(flight.key)
                self.wanted.add(flight.key)
                self.changed.set()

        def aborts(self, model: str) -> Any:
            wanted, self.wanted = self.wanted, set()
            return wanted

    engine.tokens, engine.token_s = 20, 0.01
    async with gateway.worker(pacer=Cutting()) as process:
        batch = await gateway.ended((await gateway.submit(requests(20))).id)
        assert process.metrics.aborts.labels("m")._value.get() == 20
    assert not await wrong(gateway, batch, 20)
    assert batch.usage.output_tokens == 400
    for line in await gateway.lines(batch, batch.output_file_id):
        text = line["response"]["body"]["choices"][0]["message"]["content"]
        assert text == "".join(f" w{i}" for i in range(20))
    resumed = [asked for asked in engine.asked if asked.body["messages"][-1]["role"] == "assistant"]
    assert len(resumed) == 20


async def test_no_more_lines_are_in_flight_than_permitted_and_the_buffer_is_bounded(
    gateway: Site, engine: Engine
) -> None:
    engine.token_s = 0.002
    async with gateway.worker(per_model=7) as process:
        submitted = await gateway.submit(requests(300))
        most = 0
        async with asyncio.timeout(30.0):
            while (await gateway.batch(submitted.id)).status != "completed":
                most = max(most, process.worker._buffer.count("m"))
                await asyncio.sleep(0.005)
    assert engine.most_in_flight <= 7
    assert 0 < most < 2 * CHUNK_LINES + CHUNK_LINES // 2


async def test_two_workers_share_one_batch_and_no_line_is_sent_twice(gateway: Site, engine: Engine) -> None:
    engine.token_s = 0.002
    async with gateway.worker("a"), gateway.worker("b"):
        batch = await gateway.ended((await gateway.submit(requests(400))).id)
    assert not await wrong(gateway, batch, 400)
    assert set(engine.calls.values()) == {1}


async def test_webhooks_are_queued_with_the_end_they_tell_of(gateway: Site) -> None:
    async with gateway.worker(finalizer=FinalizerSettings(webhooks=("hook",))):
        batch = await gateway.ended((await gateway.submit(requests(1))).id)
    delivery = await gateway.store.claim_delivery(batch.created_s + 3600, 1.0)
    assert delivery is not None
    assert (delivery.webhook, delivery.batch_id, delivery.event) == ("hook", batch.id, "batch.completed")


async def test_expired_files_lose_their_bytes_and_rows(gateway: Site) -> None:
    async with gateway.worker() as process:
        batch = await gateway.ended((await gateway.submit(requests(1), output_expires_after_s=3600)).id)
        assert batch.output_file_id is not None
        file = await gateway.store.file("t", batch.output_file_id)
        assert file is not None
        process.upkeep._clock = lambda: batch.created_s + 3700.0
        await process.upkeep.collect()
        assert await gateway.store.file("t", file.id) is None
        assert await gateway.blobs.size(file.blob) is None
        assert await gateway.store.file("t", batch.input_file_id) is not None


async def test_depth_slack_tokens_and_ends_are_on_the_metrics_page(gateway: Site) -> None:
    async with gateway.worker() as process:
        await gateway.ended((await gateway.submit(requests(60))).id)
        registry = process.metrics.registry
        assert registry.get_sample_value("batchgw_harvested_tokens_total", {"model": "m"}) == 300
        assert registry.get_sample_value("jobs_processed_total", {"result": "success", "reason": "none"}) == 1
        assert registry.get_sample_value("batch_request_generation_tokens_total", {"model": "m"}) == 300
        names = {metric.name for metric in registry.collect()}
        assert {"batchgw_queue_depth_lines", "batchgw_deadline_slack_seconds", "batchgw_batches_at_risk"} <= names


SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()


@asynccontextmanager
async def hook(statuses: list[int]) -> AsyncIterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """A webhook that answers with these statuses, then 200, and notes what it was told."""
    told: list[tuple[dict[str, str], bytes]] = []

    async def take(request: web.Request) -> web.Response:
        told.append(({name.lower(): value for name, value in request.headers.items()}, await request.read()))
        return web.Response(status=statuses.pop(0) if statuses else 200)

    app = web.Application()
    app.router.add_post("/hook", take)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/hook", told
    finally:
        await runner.cleanup()


async def test_a_webhook_is_told_signed_until_it_takes_the_event_and_not_for_ever(gateway: Site) -> None:
    async with gateway.worker(finalizer=FinalizerSettings(webhooks=("hook",))):
        batch = await gateway.ended((await gateway.submit(requests(1))).id)
    now_s = batch.created_s + 60.0
    async with hook([500, 301]) as (url, told):
        teller = Teller(gateway.store, {"hook": Webhook(url=url, secret=SECRET)}, Metrics(), clock=lambda: now_s)
        attempts = 0
        while len(told) < 3:
            assert await teller.step()
            attempts += 1
            assert not await teller.step(), "not before its time"
            now_s += AGAIN_S[attempts - 1] + 1.0
        assert not await teller.step(), "told once it was taken"
    assert {json.loads(body)["data"]["id"] for _, body in told} == {batch.id}
    assert len({headers["webhook-id"] for headers, _ in told}) == 1
    for headers, body in told:
        assert (
            headers["webhook-signature"]
            == sign(SECRET, headers["webhook-id"], int(headers["webhook-timestamp"]), body)["webhook-signature"]
        )


async def test_a_webhook_that_never_takes_an_event_is_given_up(gateway: Site) -> None:
    async with gateway.worker(finalizer=FinalizerSettings(webhooks=("hook",))):
        batch = await gateway.ended((await gateway.submit(requests(1))).id)
    now_s = batch.created_s + 60.0
    async with hook([500] * 100) as (url, told):
        teller = Teller(gateway.store, {"hook": Webhook(url=url, secret=SECRET)}, Metrics(), clock=lambda: now_s)
        while await teller.step():
            now_s += 100_000.0
    assert len(told) == len(AGAIN_S) + 1
