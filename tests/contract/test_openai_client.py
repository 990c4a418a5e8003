"""OpenAI's own client against the API: what it parses, pages through, waits for and raises."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from batchgw.api.settings import ApiSettings, Quotas
from tests.batch_api import Api, api_of, line

LINES = line("a") + line("b")


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with api_of(tmp_path, ApiSettings(quotas=Quotas(open_batches=7))) as made:
        yield made


@pytest.fixture
def client(api: Api) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="sk-unused", base_url="http://gateway/v1", http_client=api.client, max_retries=0)


async def uploaded(client: openai.AsyncOpenAI, data: bytes = LINES) -> str:
    file = await client.files.create(file=("in.jsonl", data), purpose="batch")
    return file.id


async def made(client: openai.AsyncOpenAI, file_id: str) -> openai.types.Batch:
    return await client.batches.create(
        input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"k": "v"}
    )


async def test_a_file_is_uploaded_waited_for_read_and_deleted(client: openai.AsyncOpenAI) -> None:
    file_id = await uploaded(client)
    file = await client.files.wait_for_processing(file_id, poll_interval=0.01, max_wait_seconds=1)
    assert (file.status, file.filename, file.purpose, file.bytes) == ("processed", "in.jsonl", "batch", len(LINES))
    assert (await client.files.content(file_id)).content == LINES
    assert (await client.files.delete(file_id)).deleted
    with pytest.raises(openai.NotFoundError, match=file_id):
        await client.files.retrieve(file_id)


async def test_lists_are_paged_through_to_their_end(api: Api, client: openai.AsyncOpenAI) -> None:
    files = []
    for _ in range(5):
        files.append(await uploaded(client))
        api.clock.now_s += 1
    batches = [(await made(client, files[0])).id for _ in range(5)]
    assert [file.id async for file in client.files.list(limit=2, order="asc")] == files
    assert {batch.id async for batch in client.batches.list(limit=2)} == set(batches)


async def test_a_batch_is_made_seen_and_cancelled(client: openai.AsyncOpenAI) -> None:
    batch = await made(client, await uploaded(client))
    assert (batch.status, batch.metadata, batch.expires_at) == ("validating", {"k": "v"}, batch.created_at + 86400)
    assert batch.request_counts is not None
    assert (await client.batches.retrieve(batch.id)) == batch
    for _ in range(2):
        assert (await client.batches.cancel(batch.id)).status == "cancelling"


async def test_a_file_in_parts_becomes_one(client: openai.AsyncOpenAI) -> None:
    upload = await client.uploads.create(
        bytes=len(LINES), filename="in.jsonl", mime_type="application/jsonl", purpose="batch"
    )
    halves = LINES[:50], LINES[50:]
    parts = [await client.uploads.parts.create(upload.id, data=half) for half in halves]
    done = await client.uploads.complete(upload.id, part_ids=[part.id for part in parts])
    assert done.file is not None
    assert (await client.files.content(done.file.id)).content == LINES


async def test_each_error_has_the_class_the_client_knows(client: openai.AsyncOpenAI) -> None:
    file_id = await uploaded(client)
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.batches.create(input_file_id=file_id, endpoint="/v1/nonsense", completion_window="24h")  # type: ignore[arg-type]
    assert (wrong.value.param, wrong.value.type) == ("endpoint", "invalid_request_error")
    with pytest.raises(openai.NotFoundError):
        await client.batches.retrieve("batch_unknown")
    for _ in range(7):
        await made(client, file_id)
    with pytest.raises(openai.ConflictError, match="batch_"):
        await client.files.delete(file_id)
    with pytest.raises(openai.RateLimitError, match="At most 7"):
        await made(client, file_id)
