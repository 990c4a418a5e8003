"""One process with API and worker: a client's trace goes through to the engine, and the metrics page tells the rest."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from batchgw.app.listener import bound
from batchgw.app.parts import storage
from batchgw.app.service import Service
from batchgw.config import address, load
from batchgw.tracing.otel import OtelTracer
from benchmarks.batch_engine import Engine, Fault, running, text_of
from benchmarks.batch_site import CHAT, requests

PATIENCE_S = 30.0
CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE, SPAN = CLIENT.split("-")[1:3]
LINES = 12


class Traced:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = OtelTracer(provider, 10.0)

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]


@asynccontextmanager
async def serving(folder: Path, gateway: str, traced: Traced) -> AsyncIterator[tuple[openai.AsyncOpenAI, str]]:
    written: dict[str, Any] = {
        "data": str(folder), "gateway": gateway, "tracing": {"endpoint": "http://127.0.0.1:1"},
        "worker": {"pollS": 0.05, "flushS": 0.05, "stopS": 1.0}, "upkeep": {"lookS": 0.05},
        "pace": {"gate": {"type": "constant"}},
    }  # fmt: skip
    settings, anywhere = load(json.dumps(written), {}), address("127.0.0.1:0")
    with bound(anywhere, "$.listen") as api, bound(anywhere, "$.ops") as ops:
        async with asyncio.timeout(PATIENCE_S), storage(settings) as (store, blobs), asyncio.TaskGroup() as group:
            service = Service(settings, store, blobs, api=api, ops=ops, works=True, tracer=traced.tracer)
            task = group.create_task(service.run())
            url, page = (f"http://127.0.0.1:{one.getsockname()[1]}" for one in (api, ops))
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
                yield client, page
            service.stop()
            await task


async def ended(client: openai.AsyncOpenAI) -> openai.types.Batch:
    file = await client.files.create(file=("in.jsonl", requests(LINES)), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", extra_headers={"traceparent": CLIENT}
    )
    while batch.status not in ("completed", "failed", "expired"):
        await asyncio.sleep(0.02)
        batch = await client.batches.retrieve(batch.id)
    return batch


async def test_a_trace_goes_from_the_client_over_each_line_to_the_result(tmp_path: Path) -> None:
    traced, refuse = Traced(), Fault("status", 400)
    async with (
        running(Engine(trouble=lambda asked: refuse if text_of(asked.body) == "line 3" else None)) as engine,
        serving(tmp_path, engine.url, traced) as (client, page),
    ):
        batch = await ended(client)
        async with aiohttp.ClientSession() as session, session.get(f"{page}/metrics") as response:
            text = await response.text()
    assert {f"{span.context.trace_id:032x}" for span in traced.exporter.get_finished_spans()} == {TRACE}

    (created,) = traced.named("POST /v1/batches")
    assert created.parent is not None
    assert f"{created.parent.span_id:016x}" == SPAN
    lines = traced.named("http-request")
    past = [traced.named(name) for name in ("process-batch", "ingest-and-plan", "execute-job", "finalize")]
    assert [len(found) for found in past] == [1, 1, 1, 1]
    for span in (*lines, *(found[0] for found in past)):
        assert span.parent is not None
        assert span.parent.span_id == created.context.span_id, span.name

    sent = {asked.headers["traceparent"] for asked in engine.asked}
    assert sent == {f"00-{TRACE}-{span.context.span_id:016x}-01" for span in lines}
    assert len(sent) == LINES
    failed = [span for span in lines if not span.status.is_ok]
    assert [dict(span.attributes or {})["batch.line"] for span in failed] == [3]
    (whole,) = traced.named("process-batch")
    told = dict(whole.attributes or {})
    assert (told["batch.id"], told["batch.output_file.id"]) == (batch.id, batch.output_file_id)
    assert (told["batch.request.completed"], told["batch.request.failed"]) == (LINES - 1, 1)
    check_page(text)


def check_page(text: str) -> None:
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    page = {(one.name, *sorted(one.labels.items())): one.value for one in samples}
    assert page["batchgw_answered_tokens_total", ("kind", "output"), ("model", "m")] == 5 * (LINES - 1)
    assert page["batchgw_store_duration_seconds_count", ("verb", "claim_chunk")] >= 1
    assert page["batchgw_pace_held", ("reason", "closed"), ("source", "m")] == 0
    assert page[("processor_inflight_requests",)] == 0
    stored = ("component", "serve"), ("operation", "store"), ("status", "success")
    assert page["file_storage_operations_total", *stored] >= 3
