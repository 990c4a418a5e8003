"""What the batch gateway's metrics say of a made-up state."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, cast

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from batchgw.app.measured import StorageMetrics
from batchgw.blobs import BlobMissing, Blobs, BlobsUnavailable, BlobTooLarge
from batchgw.client.reply import Assembly
from batchgw.client.requests import Call, Flight
from batchgw.gates import gate
from batchgw.gates.base import Open, Tools
from batchgw.records import Batch, Usage
from batchgw.store import Store
from batchgw.store.base import FileInUse, LeaseLost, StoreUnavailable
from batchgw.worker import gauges
from batchgw.worker.gauges import View, largest
from batchgw.worker.metrics import Metrics, Names
from batchgw.worker.pacer import GatePacer, Standing
from tests.batch_metrics import VIEW, everything, labels_by_name

REFERENCE = [
    "http_requests_total",
    "http_request_duration_seconds_bucket",
    "http_requests_in_flight",
    "jobs_processed_total",
    "job_processing_duration_seconds_bucket",
    "job_queue_wait_duration_seconds_bucket",
    "plan_build_duration_seconds_bucket",
    "total_workers",
    "active_workers",
    "processor_inflight_requests",
    "processor_max_inflight_concurrency",
    "model_inflight_requests",
    "model_request_execution_duration_seconds_bucket",
    "request_errors_by_model_total",
    "batch_request_prompt_tokens_total",
    "batch_request_generation_tokens_total",
    "batch_job_e2e_latency_seconds_bucket",
    "batch_cancellation_total",
    "batch_startup_recovery_total",
    "batch_processor_aimd_concurrency_limit",
    "batch_processor_aimd_decreases_total",
    "batch_processor_aimd_increases_total",
    "batch_reconciler_orphans_recovered_total",
    "batch_reconciler_cycle_duration_seconds_bucket",
    "batch_reconciler_cas_conflicts_total",
    "batch_reconciler_stale_cleanup_total",
    "batch_reconciler_errors_total",
    "file_storage_operations_total",
]


def batch(status: str = "completed", **fields: Any) -> Batch:
    usual = {"id": "batch_1", "tenant": "t", "endpoint": "/v1/chat/completions", "input_file_id": "file-1"}
    return Batch(
        **{**usual, "completion_window": "1h", "created_s": 100.0, "deadline_s": 3700.0, "status": status, **fields}
    )


def flight(**fields: Any) -> Flight:
    body = msgspec.json.encode({"messages": [{"role": "user", "content": "hello"}], **fields})
    return Flight(
        Call(
            batch_id="batch_1", line=3, custom_id="c", url="/v1/chat/completions", model="m", body=body, tenant="t",
            deadline_s=1e12, prompt_bytes=400,
        )
    )  # fmt: skip


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_what_the_reference_exports_is_there_by_name() -> None:
    assert set(REFERENCE) <= set(labels_by_name())


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("batchgw_queue_depth_lines", {"model": "m", "state": "queued"}, 130),
        ("batchgw_queue_depth_lines", {"model": "m", "state": "leased"}, 20),
        ("batchgw_tenant_queue_lines", {"tenant": "bob"}, 37),
        ("batchgw_deadline_slack_seconds", {"model": "m"}, -40),
        ("batchgw_batches_at_risk", {"model": "m"}, 1),
        ("batchgw_speed_lines_per_second", {"model": "m"}, 2.5),
        ("batchgw_unwritten_lines", {}, 5),
        ("processor_inflight_requests", {}, 23),
        ("model_inflight_requests", {"model": "m"}, 20),
        ("batchgw_endpoint_inflight_lines", {"endpoint": "e1:8000"}, 8),
        ("batchgw_endpoint_inflight_lines", {"endpoint": "any"}, 3),
        ("active_workers", {}, 1),
        ("total_workers", {}, 1),
        ("processor_max_inflight_concurrency", {}, 5100),
        ("batchgw_pace_held", {"source": "m", "reason": "closed"}, 0),
        ("batchgw_pace_held", {"source": "n", "reason": "closed"}, 1),
        ("batchgw_pace_held", {"source": "http://scheduler:9090", "reason": "unheard"}, 1),
        ("batchgw_pace_room_lines", {"source": "m"}, 7),
        ("batchgw_pace_budget_ratio", {"source": "m"}, 0.4),
        ("batchgw_pace_budget_ratio", {"source": "http://scheduler:9090"}, None),
        ("batchgw_pace_heard_seconds", {"source": "http://scheduler:9090"}, 12.5),
        ("batch_processor_aimd_concurrency_limit", {"endpoint": "m"}, 12),
        ("batch_processor_aimd_increases_total", {"endpoint": "m"}, 40),
        ("batch_processor_aimd_decreases_total", {"endpoint": "m", "signal": "429"}, 3),
        ("batchgw_headroom_lines", {"endpoint": "e1:8000"}, 60),
        ("batchgw_headroom_burst", {"endpoint": "e0:8000"}, 1),
        ("batchgw_headroom_burst", {"endpoint": "e1:8000"}, 0),
        ("batchgw_headroom_step_budget_seconds", {"endpoint": "e0:8000"}, 0.025),
        ("batchgw_headroom_step_budget_seconds", {"endpoint": "e1:8000"}, None),
        ("batchgw_headroom_interactive_step_seconds", {"endpoint": "e0:8000"}, 0.011),
        ("batchgw_headroom_interactive_arrivals_per_second", {"endpoint": "e0:8000"}, 3),
    ],
)
def test_gauges_say_what_the_worker_is_at(name: str, labels: dict[str, str], expected: float | None) -> None:
    assert everything().get_sample_value(name, labels) == expected


def test_a_worker_without_work_is_not_active() -> None:
    metrics = Metrics()
    metrics.watch(lambda: View([], [], {}, {}))
    assert (value(metrics, "active_workers"), value(metrics, "processor_inflight_requests")) == (0, 0)


def test_names_that_others_make_up_have_a_bounded_number_of_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchgw.worker.metrics.MOST_NAMED", 2)
    names = Names()
    assert [names.of(name) for name in "abcab"] == ["a", "b", "other", "a", "b"]


def test_of_gauges_the_largest_keep_their_name_and_nothing_is_left_out() -> None:
    values = {("a", "queued"): 1, ("b", "queued"): 5, ("b", "leased"): 1, ("c", "queued"): 2, ("a", "leased"): 2}
    assert largest(values, 1) == {
        ("b", "queued"): 5, ("b", "leased"): 1, ("other", "queued"): 3, ("other", "leased"): 2,
    }  # fmt: skip


def test_a_thousand_models_are_a_hundred_series(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [msgspec.structs.replace(VIEW.waiting[0], model=f"m{i}", tenant=f"t{i}", queued_lines=i) for i in range(500)]
    (depth, tenants, *_) = gauges.queue(VIEW._replace(waiting=rows))
    assert len(depth.samples) == 2 * 101
    assert len(tenants.samples) == 101
    assert sum(one.value for one in depth.samples if one.labels["state"] == "queued") == sum(range(500))


def test_tokens_of_answered_lines_are_counted_by_kind() -> None:
    metrics = Metrics()
    metrics.answered("m", True, Usage(100, 60, 20, 5), 1.0)
    metrics.answered("m", False, Usage(10, 0, 0, 0), 1.0)
    name = "batchgw_answered_tokens_total"
    found = {kind: value(metrics, name, model="m", kind=kind) for kind in ("input", "cached", "output", "reasoning")}
    assert found == {"input": 110, "cached": 60, "output": 20, "reasoning": 5}
    assert value(metrics, "request_errors_by_model_total", model="m") == 1


@pytest.mark.parametrize(
    ("fields", "tokens", "prompt", "output"),
    [
        ({}, 7, 107, 0),  # goes on from its seven tokens, which are prompt then
        ({"messages": [{"role": "assistant", "content": "go on"}]}, 7, 100, 7),  # begins anew
        ({}, 0, None, None),  # nothing was computed that we know of
    ],
)
def test_what_an_abort_throws_away(
    fields: dict[str, Any], tokens: int, prompt: float | None, output: float | None
) -> None:
    metrics, cut = Metrics(), flight(**fields)
    cut.assembly = Assembly(cut.call.url)
    for _ in range(tokens):
        event = {"choices": [{"index": 0, "delta": {"content": " w"}}]}
        cut.assembly.feed(b"data: " + msgspec.json.encode(event) + b"\n\n")
    assert cut.tokens == tokens
    metrics.aborted(cut)
    found = [value(metrics, "batchgw_wasted_tokens_total", model="m", kind=kind) for kind in ("prompt", "output")]
    assert found == [prompt, output]
    assert value(metrics, "batchgw_aborted_lines_total", model="m") == 1


@pytest.mark.parametrize(
    ("status", "result", "reason"),
    [
        ("completed", "success", "none"),
        ("cancelled", "skipped", "none"),
        ("expired", "expired", "expired_execution"),
        ("failed", "failed", "system_error"),
    ],
)
def test_an_ended_batch_counts_by_how_and_is_told(status: str, result: str, reason: str) -> None:
    metrics, told = Metrics(), list[tuple[Batch, float]]()
    assert value(metrics, "jobs_processed_total", result=result, reason=reason) == 0, "seen before it rises"
    metrics.on_end = lambda *one: told.append(one)
    ended = batch(status, in_progress_s=110.0, total=5)
    metrics.ended(ended, 130.0)
    assert value(metrics, "jobs_processed_total", result=result, reason=reason) == 1
    assert value(metrics, "batch_job_e2e_latency_seconds_sum", status=status) == 30
    assert told == [(ended, 130.0)]


def test_chores_and_recoveries_count_under_the_reconcilers_names_too() -> None:
    metrics = Metrics()
    metrics.recoveries.labels("in_progress", "resumed").inc(2)
    metrics.recoveries.labels("cancelling", "finalized").inc()
    metrics.collected.labels("file").inc(3)
    metrics.collected.labels("batch").inc(4)
    metrics.chore("collect", 2.0)
    metrics.chore("plan", 9.0, failed=True)
    assert value(metrics, "batch_reconciler_orphans_recovered_total", action="resumed") == 2
    assert value(metrics, "batch_reconciler_orphans_recovered_total", action="finalized") == 1
    assert value(metrics, "batch_reconciler_stale_cleanup_total") == 7
    assert value(metrics, "batch_reconciler_cycle_duration_seconds_sum") == 2
    assert value(metrics, "batch_reconciler_errors_total") == 1


# Pacers


async def standing(pacer: GatePacer, model: str = "m") -> Standing:
    async with asyncio.timeout(5):
        while pacer.standings()[0].held == "opening":
            await pacer.changed.wait()
    return next(one for one in pacer.standings() if one.source == model)


async def test_a_gate_is_opening_then_open_with_the_room_it_last_gave() -> None:
    pacer = GatePacer(lambda model: Open(), per_model=10)
    assert not pacer.starts("m", [flight()])
    assert pacer.standings()[0].held == "opening"
    await standing(pacer)
    pacer.starts("m", [flight()] * 3)
    pacer.started(flight())
    assert await standing(pacer) == Standing("m", "", 1, 10, 10, budget=1.0)
    await pacer.close()


async def test_a_gate_without_budget_is_closed_unless_its_own_lines_fill_it() -> None:
    limited = {"type": "local-max-concurrency", "limit": 1}
    pacer = GatePacer(lambda model: gate(limited, Tools()), per_model=10)
    one = flight()
    pacer.starts("m", [one])
    await standing(pacer)
    await pacer.admit(one)
    assert (await standing(pacer)).held == "closed", "somebody else's"
    pacer.started(one)
    full = await standing(pacer)
    assert (full.held, full.budget) == ("", 0.0)
    await pacer.close()


async def test_the_windows_of_a_composite_are_shown_with_what_moved_them() -> None:
    written = {"type": "composite", "gates": [{"type": "constant"}, {"type": "aimd", "min": 4}]}
    pacer = GatePacer(lambda model: gate(written, Tools()), per_model=10)
    one = flight()
    pacer.starts("m", [one])
    await standing(pacer)
    await pacer.admit(one)
    pacer.answered(one, 200, "", None)
    pacer.answered(one, 429, "", None)
    (window,) = (await standing(pacer)).windows
    assert (window.increases, dict(window.decreases)) == (1, {"429": 1})
    await pacer.close()


# Storage


class Disk:
    """Raises what it is told, as a store or as blobs."""

    error: Exception | None = None
    answers = 3

    async def claim_chunk(self) -> int:
        if self.error:
            raise self.error
        return self.answers

    put = get_range = claim_chunk

    async def stream(self) -> AsyncIterator[bytes]:
        yield b"a"
        if self.error:
            raise self.error
        yield b"b"


@pytest.mark.parametrize(
    ("error", "kind", "conflicts"),
    [
        (None, None, 0),
        (StoreUnavailable(), "unavailable", 0),
        (LeaseLost(), None, 1),
        (FileInUse("f", "b"), None, 0),
        (ValueError(), "failed", 0),
    ],
)
async def test_the_database_is_timed_and_its_errors_told_from_answers(
    error: Exception | None, kind: str | None, conflicts: int
) -> None:
    registry, disk = CollectorRegistry(), Disk()
    store: Any = StorageMetrics(registry, "api").store(cast("Store", disk))
    disk.error = error
    if error is None:
        assert await store.claim_chunk() == 3
    else:
        with pytest.raises(type(error)):
            await store.claim_chunk()
    assert registry.get_sample_value("batchgw_store_duration_seconds_count", {"verb": "claim_chunk"}) == 1
    errors = {
        one.labels["kind"]: one.value
        for metric in registry.collect()
        for one in metric.samples
        if one.name == "batchgw_store_errors_total"
    }
    assert errors == ({kind: 1} if kind else {})
    assert registry.get_sample_value("batch_reconciler_cas_conflicts_total") == conflicts
    assert store.answers == 3, "what is no verb passes"


@pytest.mark.parametrize(
    ("verb", "error", "operation", "status"),
    [
        ("put", None, "store", "success"),
        ("put", BlobsUnavailable(), "store", "exhausted"),
        ("put", BlobTooLarge(), "store", None),
        ("get_range", BlobMissing(), "retrieve", "success"),
        ("stream", None, "retrieve", "success"),
        ("stream", BlobsUnavailable(), "retrieve", "exhausted"),
    ],
)
async def test_operations_on_files_count_by_the_references_names(
    verb: str, error: Exception | None, operation: str, status: str | None
) -> None:
    registry, disk = CollectorRegistry(), Disk()
    blobs: Any = StorageMetrics(registry, "processor").files(cast("Blobs", disk))
    disk.error = error
    with pytest.raises(type(error)) if error else contextlib.nullcontext():
        if verb == "stream":
            assert [piece async for piece in blobs.stream()] == [b"a", b"b"]
        else:
            await getattr(blobs, verb)()
    found = {
        (one.labels["operation"], one.labels["component"], one.labels["status"])
        for metric in registry.collect()
        for one in metric.samples
        if one.name == "file_storage_operations_total"
    }
    assert found == ({(operation, "processor", status)} if status else set())
