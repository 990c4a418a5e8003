"""/v1/batches in process over SQLite and a folder."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batchgw.api.objects import of_batch
from batchgw.api.settings import ApiSettings, Quotas
from batchgw.records import Batch, Chunk, LineError, Usage
from batchgw.seal import Seal
from batchgw.store import Store
from tests.batch_api import Api, api_of, error_of, line

TENANT = "X-MaaS-Username"
KEY = base64.b64encode(b"k" * 32).decode()
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with api_of(tmp_path) as made:
        yield made


@pytest.fixture
async def file_id(api: Api) -> str:
    return str((await api.upload(line("a") + line("b")))["id"])


async def stored(api: Api, answer: Any) -> Batch:
    batch = await api.store.batch(None, answer.json()["id"])
    assert batch is not None
    return batch


async def test_a_batch_is_created_complete(api: Api, file_id: str) -> None:
    answer = await api.batch(file_id, metadata={"k": "v"}, unknown_field=[1])
    made = answer.json()
    assert (answer.status_code, list(made)) == (200, [
        "id", "object", "endpoint", "input_file_id", "completion_window", "metadata", "created_at", "status",
        "output_file_id", "error_file_id", "cancelled_at", "cancelling_at", "completed_at", "expired_at", "expires_at",
        "failed_at", "finalizing_at", "in_progress_at", "request_counts", "errors", "usage",
    ])  # fmt: skip
    assert made["expires_at"] == made["created_at"] + 86400
    assert (made["status"], made["metadata"], made["request_counts"]["total"]) == ("validating", {"k": "v"}, 2)
    assert (made["errors"], made["usage"], made["output_file_id"]) == (None, None, None)
    assert (await api.client.get(f"/v1/batches/{made['id']}")).json() == made


def test_a_batch_that_ran_shows_model_usage_and_times() -> None:
    batch = Batch(
        id="batch_1", tenant="t", endpoint="/v1/completions", input_file_id="file-1", completion_window="24h",
        created_s=1.9, deadline_s=100.5, status="completed", total=3, completed=2, failed=1,
        usage=Usage(10, 4, 20, 5), model="m",
        output_file_id="file-2", error_file_id="file-3", in_progress_s=2.0, finalizing_s=3.0, completed_s=4.0,
    )  # fmt: skip
    shown = msgspec.to_builtins(of_batch(batch))
    assert shown["usage"] == {
        "input_tokens": 10, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 5}, "total_tokens": 30,
    }  # fmt: skip
    assert (shown["model"], shown["request_counts"]) == ("m", {"total": 3, "completed": 2, "failed": 1})
    assert (shown["created_at"], shown["expires_at"], shown["completed_at"], shown["failed_at"]) == (1, 100, 4, None)


def test_a_failed_batch_lists_its_errors() -> None:
    batch = Batch(
        id="batch_1", tenant="t", endpoint="/v1/completions", input_file_id="file-1", completion_window="24h",
        created_s=1.0, deadline_s=2.0, status="failed",
        errors=(LineError("invalid_method", "method is 'GET'", "method", 7),),
    )  # fmt: skip
    assert msgspec.json.decode(msgspec.json.encode(of_batch(batch)))["errors"] == {
        "object": "list",
        "data": [{"code": "invalid_method", "message": "method is 'GET'", "param": "method", "line": 7}],
    }


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"completion_window": None}, "completion_window", "`str`"),
        ({"completion_window": "soon"}, "completion_window", "24h"),
        ({"completion_window": "0h"}, "completion_window", "accepted"),
        ({"completion_window": "31d"}, "completion_window", "accepted"),
        ({"endpoint": "/v1/nonsense"}, "endpoint", "/v1/chat/completions"),
        ({"endpoint": 5}, "endpoint", "str"),
        ({"input_file_id": "file-unknown"}, "input_file_id", "Input file with ID 'file-unknown' not found"),
        ({"metadata": {str(i): "v" for i in range(17)}}, "metadata", "16"),
        ({"metadata": {"k" * 65: "v"}}, "metadata", "64"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "512"),
        ({"metadata": {"k": 1}}, "metadata[]", "str"),
        (
            {"output_expires_after": {"anchor": "completed_at", "seconds": 3600}},
            "output_expires_after.anchor", "created_at",
        ),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 10}}, "output_expires_after.seconds", "3600"),
        ({"output_expires_after": {"anchor": "created_at"}}, "output_expires_after.seconds", "Missing"),
    ],
)  # fmt: skip
async def test_a_refused_batch_names_the_parameter_and_what_is_accepted(
    api: Api, file_id: str, fields: dict[str, Any], param: str, says: str
) -> None:
    answer = await api.batch(file_id, **fields)
    error = error_of(answer)
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert says in error["message"]
    assert (await api.client.get("/v1/batches")).json()["data"] == []


@pytest.mark.parametrize("field", ["completion_window", "endpoint", "input_file_id"])
async def test_a_missing_parameter_is_named(api: Api, field: str) -> None:
    body = {"input_file_id": "file-1", "endpoint": "/v1/embeddings", "completion_window": "24h"}
    answer = await api.client.post("/v1/batches", json={k: v for k, v in body.items() if k != field})
    assert (answer.status_code, error_of(answer)["param"]) == (400, field)
    assert error_of(answer)["code"] == "missing_required_parameter"


@pytest.mark.parametrize(
    ("body", "code"),
    [(b"{", "invalid_json"), (b"[" * 9000, "invalid_json"), (b"x" * (1 << 20) + b"x", "body_too_large")],
)
async def test_a_body_that_is_no_json_or_too_large_is_refused(api: Api, body: bytes, code: str) -> None:
    answer = await api.client.post("/v1/batches", content=body)
    assert answer.status_code == 400
    assert error_of(answer)["code"] in (code, "invalid_type")


async def test_metadata_is_measured_in_characters(api: Api, file_id: str) -> None:
    assert (await api.batch(file_id, metadata={"ж" * 64: "ж" * 512})).status_code == 200


async def test_a_file_of_another_purpose_is_refused(api: Api) -> None:
    made = await api.upload(line(), purpose="vision")
    answer = await api.batch(made["id"])
    assert (answer.status_code, error_of(answer)["param"]) == (400, "input_file_id")


async def test_a_batch_on_an_invalid_file_says_at_once_what_is_wrong(api: Api) -> None:
    made = await api.upload(line("a") + b"oops\n")
    answer = await api.batch(made["id"])
    assert answer.status_code == 200
    (error,) = answer.json()["errors"]["data"]
    assert (error["code"], error["line"]) == ("invalid_json_line", 2)


async def test_a_batch_for_another_endpoint_says_so(api: Api, file_id: str) -> None:
    answer = await api.batch(file_id, endpoint="/v1/embeddings")
    assert [error["code"] for error in answer.json()["errors"]["data"]] == ["url_mismatch"]


async def test_an_added_endpoint_is_taken(tmp_path: Path) -> None:
    async with api_of(tmp_path, ApiSettings(extra_endpoints=("/v1/rerank",))) as api:
        made = await api.upload(line(url="/v1/rerank"))
        assert (await api.batch(made["id"], endpoint="/v1/rerank")).json()["errors"] is None


async def test_output_expiry_window_and_trace_are_kept(api: Api, file_id: str) -> None:
    expiry = {"anchor": "created_at", "seconds": 7200}
    answer = await api.batch(file_id, {"traceparent": TRACE}, completion_window="PT5S", output_expires_after=expiry)
    batch = await stored(api, answer)
    assert (batch.output_expires_after_s, batch.trace, batch.completion_window) == (7200, TRACE, "PT5S")
    assert batch.deadline_s == batch.created_s + 5
    for forged in ("00-" + "0" * 32 + "-b7ad6b7169203331-01", TRACE + "x", "ff" + TRACE[2:]):
        assert (await stored(api, await api.batch(file_id, {"traceparent": forged}))).trace is None


async def test_pass_through_headers_rest_encrypted(tmp_path: Path) -> None:
    settings = ApiSettings(pass_through_headers=("Authorization", "X-Team"), header_keys=(KEY,))
    async with api_of(tmp_path, settings) as api:
        made = await api.upload(line())
        batch = await stored(api, await api.batch(made["id"], {"authorization": "Bearer secret", "x-other": "no"}))
        assert batch.headers is not None
        assert b"secret" not in batch.headers
        assert Seal([KEY]).open(batch.headers) == {"Authorization": "Bearer secret"}
        assert (await stored(api, await api.batch(made["id"]))).headers is None


@pytest.mark.parametrize("value", ["a\r\nx-evil: 1", "a\nb", "a\x00b", "ж", "x" * 8193])
async def test_a_header_that_could_forge_another_is_refused(tmp_path: Path, value: str) -> None:
    async with api_of(tmp_path, ApiSettings(pass_through_headers=("X-Team",))) as api:
        made = await api.upload(line())
        headers: Any = [(b"x-team", value.encode())]
        answer = await api.batch(made["id"], headers)
        assert (answer.status_code, error_of(answer)["param"]) == (400, "X-Team")


async def test_one_idempotency_key_makes_one_batch(api: Api, file_id: str) -> None:
    first = await api.batch(file_id, {"idempotency-key": "k1"})
    again = await api.batch(file_id, {"idempotency-key": "k1"})
    assert again.json() == first.json()
    other = await api.batch(file_id, {"idempotency-key": "k1"}, completion_window="48h")
    assert (other.status_code, error_of(other)["code"]) == (409, "idempotency_key_reused")
    assert other.headers["x-should-retry"] == "false"
    assert (await api.batch(file_id, {"idempotency-key": "x" * 256})).status_code == 400
    assert len((await api.client.get("/v1/batches")).json()["data"]) == 1


async def test_an_idempotency_key_is_the_tenants_own(api: Api) -> None:
    ids = set()
    for tenant in ("alice", "bob"):
        made = await api.upload(line(), **{TENANT: tenant})
        answer = await api.batch(made["id"], {"idempotency-key": "k1", TENANT: tenant})
        ids.add(answer.json()["id"])
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("quotas", "code"),
    [
        (Quotas(open_batches=2), "open_batches_quota_exceeded"),
        (Quotas(queued_lines=5), "queued_lines_quota_exceeded"),
    ],
)
async def test_quotas_are_per_tenant_and_keep_a_repeated_request_answered(
    tmp_path: Path, quotas: Quotas, code: str
) -> None:
    async with api_of(tmp_path, ApiSettings(quotas=quotas)) as api:
        made = await api.upload(line("a") + line("b"))
        for key in ("k1", "k2"):
            assert (await api.batch(made["id"], {"idempotency-key": key})).status_code == 200
        refused = await api.batch(made["id"])
        assert (refused.status_code, error_of(refused)["code"]) == (429, code)
        assert error_of(refused)["type"] == "rate_limit_error"
        assert refused.headers["x-should-retry"] == "false"
        assert (await api.batch(made["id"], {"idempotency-key": "k2"})).status_code == 200
        other = await api.upload(line(), **{TENANT: "bob"})
        assert (await api.batch(other["id"], {TENANT: "bob"})).status_code == 200


async def test_batches_list_newest_first_by_id_and_by_number(api: Api, file_id: str) -> None:
    ids = [(await api.batch(file_id)).json()["id"] for _ in range(5)][::-1]

    async def listed(query: str) -> list[str]:
        return [batch["id"] for batch in (await api.client.get(f"/v1/batches?{query}")).json()["data"]]

    assert await listed("limit=2") == ids[:2]
    assert await listed(f"limit=2&after={ids[1]}") == ids[2:4]
    assert await listed("limit=2&after=2") == ids[2:4]
    assert await listed("order=asc") == ids[::-1]
    page = (await api.client.get("/v1/batches?limit=2")).json()
    assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[0], ids[1], True)
    nobody = (await api.client.get("/v1/batches", headers={TENANT: "nobody"})).json()
    assert (nobody["data"], nobody["first_id"], nobody["last_id"], nobody["has_more"]) == ([], None, None, False)


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=-1", "after=-1", "after=batch_unknown"])
async def test_a_wrong_query_is_refused_by_parameter(api: Api, query: str) -> None:
    answer = await api.client.get(f"/v1/batches?{query}")
    assert (answer.status_code, error_of(answer)["param"]) == (400, query.partition("=")[0])


async def started(api: Api, file_id: str) -> str:
    made = (await api.batch(file_id)).json()["id"]
    claim = await api.store.claim_validating("w", api.clock(), 60.0)
    assert claim is not None
    assert claim.batch.id == made
    chunk = Chunk(batch_id=made, number=0, model="m", start=0, stop=2)
    await api.store.start_batch(claim, [chunk], 2, "m", api.clock())
    return str(made)


async def finished(store: Store, now_s: float) -> None:
    claim = await store.claim_ending("w", now_s, 60.0)
    assert claim is not None
    await store.finish_batch(claim, completed=0, failed=2, now_s=now_s)


async def test_a_running_batch_is_cancelled_once_and_stays_so(api: Api, file_id: str) -> None:
    path = f"/v1/batches/{await started(api, file_id)}"
    first, again = await api.client.post(path + "/cancel"), await api.client.post(path + "/cancel")
    assert (first.json()["status"], first.json()["cancelling_at"]) == ("cancelling", int(api.clock()))
    assert again.json() == first.json()
    await finished(api.store, api.clock())
    after = await api.client.post(path + "/cancel")
    assert (after.status_code, after.json()["status"]) == (200, "cancelled")
    assert (await api.client.get(path)).json()["request_counts"] == {"total": 2, "completed": 0, "failed": 2}


async def test_a_batch_that_is_over_cannot_be_cancelled(api: Api, file_id: str) -> None:
    made = await started(api, file_id)
    await api.store.end_batch(made, "failed", api.clock())
    for status in ("in_progress (about to be failed)", "failed"):
        answer = await api.client.post(f"/v1/batches/{made}/cancel")
        assert (answer.status_code, error_of(answer)["message"]) == (
            400,
            f"Batch with status {status} cannot be cancelled",
        )
        if status != "failed":
            await finished(api.store, api.clock())


async def test_tenants_never_meet(api: Api) -> None:
    made = await api.upload(line(), **{TENANT: "alice"})
    batch = (await api.batch(made["id"], {TENANT: "alice"})).json()
    path, bob = f"/v1/batches/{batch['id']}", {TENANT: "bob"}
    for answer in (await api.client.get(path, headers=bob), await api.client.post(path + "/cancel", headers=bob)):
        assert (answer.status_code, error_of(answer)["message"]) == (404, f"Batch with ID {batch['id']} not found")
    assert (await api.client.get("/v1/batches", headers=bob)).json()["data"] == []
    assert (await api.batch(made["id"], bob)).status_code == 400
    assert (await api.client.get(path, headers={TENANT: "alice"})).json()["status"] == "validating"


async def test_the_input_of_a_live_batch_cannot_be_deleted(api: Api, file_id: str) -> None:
    made = await started(api, file_id)
    refused = await api.client.delete(f"/v1/files/{file_id}")
    assert (refused.status_code, error_of(refused)["code"]) == (409, "file_in_use")
    assert refused.headers["x-should-retry"] == "false"
    assert made in error_of(refused)["message"]
    await api.client.post(f"/v1/batches/{made}/cancel")
    await finished(api.store, api.clock())
    assert (await api.client.delete(f"/v1/files/{file_id}")).status_code == 200
