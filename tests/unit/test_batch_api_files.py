"""/v1/files and what all routes share, in process over SQLite and a folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from batchgw.api.app import create_app, create_ops_app
from batchgw.api.auth import hashed
from batchgw.api.metrics import ApiMetrics
from batchgw.api.settings import ApiSettings, Quotas
from batchgw.blobs import BlobsUnavailable
from batchgw.errors import ConfigError
from batchgw.records import ApiKey
from batchgw.store.base import StoreUnavailable
from tests.batch_api import Api, api_of, error_of, line

TENANT = "X-MaaS-Username"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with api_of(tmp_path) as made:
        yield made


async def test_a_file_lives_from_upload_to_deletion(api: Api) -> None:
    data = line("a") + line("b")
    made = await api.upload(data, name="../dir/in.jsonl")
    assert made == {
        "id": made["id"], "object": "file", "bytes": len(data), "created_at": 1_000_000, "filename": "in.jsonl",
        "expires_at": 1_000_000 + 30 * 86400, "purpose": "batch", "status": "processed",
    }  # fmt: skip
    path = f"/v1/files/{made['id']}"
    assert (await api.client.get(path)).json() == made
    content = await api.client.get(path + "/content")
    assert (content.status_code, content.content) == (200, data)
    assert content.headers["content-length"] == str(len(data))
    assert len(api.blobs()) == 2, "the file and its plan"
    assert (await api.client.delete(path)).json() == {"id": made["id"], "object": "file", "deleted": True}
    assert api.blobs() == []
    for answer in (await api.client.get(path), await api.client.get(path + "/content"), await api.client.delete(path)):
        assert answer.status_code == 404
        assert error_of(answer)["message"] == f"File with ID {made['id']} not found"


async def test_an_invalid_batch_file_is_kept_with_what_is_wrong(api: Api) -> None:
    made = await api.upload(line("a") + b"oops\n" + line("a"))
    assert made["status"] == "error"
    assert made["status_details"].startswith("2 errors, the first: line 2: ")
    assert len(api.blobs()) == 1


async def test_other_purposes_are_not_read_and_do_not_expire(api: Api) -> None:
    made = await api.upload(b"not jsonl", purpose="user_data", name="notes")
    assert (made["status"], made["expires_at"]) == ("processed", None)
    assert [name.rpartition(".")[2] for name in api.blobs()] == ["jsonl"]


@pytest.mark.parametrize("purpose", ["batch", "vision"])
async def test_the_purpose_may_follow_the_file(api: Api, purpose: str) -> None:
    parts: Any = [("file", ("a.jsonl", line("a") + b"bad\n")), ("purpose", (None, purpose))]
    made = (await api.client.post("/v1/files", files=parts)).json()
    assert (made["purpose"], made["status"]) == (purpose, "error" if purpose == "batch" else "processed")


async def test_an_expiry_is_taken_from_the_form(api: Api) -> None:
    form = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "7200"}
    made = (await api.client.post("/v1/files", data=form, files={"file": ("a.jsonl", line())})).json()
    assert made["expires_at"] == made["created_at"] + 7200


@pytest.mark.parametrize(
    ("form", "files", "param"),
    [
        ({}, {"file": ("a", b"x")}, "purpose"),
        ({"purpose": "nonsense"}, {"file": ("a", b"x")}, "purpose"),
        ({"purpose": "batch_output"}, {"file": ("a", b"x")}, "purpose"),
        ({"purpose": "batch"}, {"other": ("a", b"x")}, "other"),
        (
            {"purpose": "batch", "expires_after[anchor]": "created_at"},
            {"file": ("a", line())},
            "expires_after[seconds]",
        ),
        ({"purpose": "batch"}, [("file", ("a", line())), ("file", ("b", line()))], "file"),
    ],
)
async def test_a_refused_upload_names_the_field_and_leaves_nothing(
    api: Api, form: dict[str, str], files: Any, param: str
) -> None:
    answer = await api.client.post("/v1/files", data=form, files=files)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)
    assert error_of(answer)["type"] == "invalid_request_error"
    assert api.blobs() == []
    assert (await api.client.get("/v1/files")).json()["data"] == []


async def test_a_form_without_a_file_is_the_clients_fault(api: Api) -> None:
    parts: Any = [("purpose", (None, "batch"))]
    answer = await api.client.post("/v1/files", files=parts)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "missing_required_parameter")


async def test_a_form_that_breaks_off_leaves_nothing(api: Api) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    kind = {"content-type": "multipart/form-data; boundary=b"}
    answer = await api.client.post("/v1/files", content=head + line() * 1000, headers=kind)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_form")
    assert api.blobs() == []


@pytest.mark.parametrize("announced", [True, False])
async def test_a_file_beyond_its_limit_leaves_nothing(tmp_path: Path, announced: bool) -> None:
    settings = ApiSettings(max_batch_file_bytes=1000, max_file_bytes=2000)
    async with api_of(tmp_path, settings) as api:
        for purpose, size, status in (("batch", 1001, 400), ("user_data", 2000, 200), ("user_data", 2001, 400)):
            parts: Any = [("file", ("a", b"x" * size)), ("purpose", (None, purpose))]
            answer = await api.client.post("/v1/files", files=parts if announced else parts[::-1])
            assert answer.status_code == status, (purpose, size)
        assert error_of(answer)["message"] == "File size exceeds the maximum allowed size of 2000 bytes"
        assert len(api.blobs()) == 1


async def test_lists_go_by_object_id_and_by_number(api: Api) -> None:
    ids = [(await api.upload(line(), purpose="vision" if i == 2 else "batch"))["id"] for i in range(5)]
    newest = ids[::-1]

    async def listed(**query: Any) -> dict[str, Any]:
        answer = await api.client.get("/v1/files", params=query)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    first = await listed(limit=2)
    assert [f["id"] for f in first["data"]] == newest[:2]
    assert (first["object"], first["first_id"], first["last_id"], first["has_more"]) == ("list", *newest[:2], True)
    for after in (newest[1], "2"):
        assert [f["id"] for f in (await listed(limit=2, after=after))["data"]] == newest[2:4]
    last = await listed(after=newest[3])
    assert ([f["id"] for f in last["data"]], last["has_more"]) == (newest[4:], False)
    assert [f["id"] for f in (await listed(order="asc", limit=10000))["data"]] == ids
    assert [f["id"] for f in (await listed(purpose="vision"))["data"]] == [ids[2]]
    empty = await listed(purpose="evals")
    assert (empty["data"], empty["first_id"], empty["last_id"], empty["has_more"]) == ([], "", "", False)


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=10001", "limit=x", "order=up", "purpose=nope", "after=-1", "after=file-unknown"]
)
async def test_a_wrong_query_is_refused_by_parameter(api: Api, query: str) -> None:
    answer = await api.client.get(f"/v1/files?{query}")
    assert (answer.status_code, error_of(answer)["param"]) == (400, query.partition("=")[0])


@pytest.mark.parametrize(
    ("headers", "status", "start", "stop"),
    [
        ({"range": "bytes=10-19"}, 206, 10, 20),
        ({"range": "bytes=-5"}, 206, -5, None),
        ({"range": "bytes=10-"}, 206, 10, None),
        ({"range": "bytes=0-1,4-5"}, 200, 0, None),
        ({"range": "bytes=10-19", "if-range": '"another"'}, 200, 0, None),
        ({}, 200, 0, None),
    ],
)
async def test_content_comes_whole_or_by_range(
    api: Api, headers: dict[str, str], status: int, start: int, stop: int | None
) -> None:
    data = line("a")
    made = await api.upload(data)
    answer = await api.client.get(f"/v1/files/{made['id']}/content", headers=headers)
    assert (answer.status_code, answer.content) == (status, data[start:stop])
    assert answer.headers["accept-ranges"] == "bytes"
    assert ("content-range" in answer.headers) == (status == 206)


async def test_a_range_beyond_the_end_is_416(api: Api) -> None:
    made = await api.upload(line("a"))
    answer = await api.client.get(f"/v1/files/{made['id']}/content", headers={"range": "bytes=100000-"})
    assert (answer.status_code, error_of(answer)["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{made['bytes']}"


async def test_an_empty_file_has_empty_content(api: Api) -> None:
    made = await api.upload(b"", purpose="user_data")
    answer = await api.client.get(f"/v1/files/{made['id']}/content")
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")


async def test_tenants_never_meet(api: Api) -> None:
    made = await api.upload(line(), **{TENANT: "alice"})
    path = f"/v1/files/{made['id']}"
    for tenant in ("bob", "", "Alice"):
        headers = {TENANT: tenant}
        assert (await api.client.get(path, headers=headers)).status_code == 404
        assert (await api.client.get(path + "/content", headers=headers)).status_code == 404
        assert (await api.client.delete(path, headers=headers)).status_code == 404
        assert (await api.client.get("/v1/files", headers=headers)).json()["data"] == []
        assert (await api.client.get(f"/v1/files?after={made['id']}", headers=headers)).status_code == 400
    assert (await api.client.get(path, headers={TENANT: "alice"})).status_code == 200


async def test_the_last_tenant_header_counts(api: Api) -> None:
    made = await api.upload(line(), **{TENANT: "alice"})
    path = f"/v1/files/{made['id']}"
    assert (await api.client.get(path, headers=[(TENANT, "mallory"), (TENANT, "alice")])).status_code == 200
    assert (await api.client.get(path, headers={TENANT: "mallory, alice"})).status_code == 200
    assert (await api.client.get(path, headers=[(TENANT, "alice"), (TENANT, "mallory")])).status_code == 404


async def test_a_tenant_header_from_an_untrusted_peer_is_refused(tmp_path: Path) -> None:
    settings = ApiSettings(trust_tenant_header="cidrs", trusted_cidrs=("10.0.0.0/8",))
    async with api_of(tmp_path, settings) as api:
        refused = await api.client.get("/v1/files", headers={TENANT: "alice"})
        assert (refused.status_code, error_of(refused)["code"]) == (403, "untrusted_tenant_header")
        assert (await api.client.get("/v1/files")).status_code == 200


async def test_a_tenant_header_that_nobody_trusts_is_ignored(tmp_path: Path) -> None:
    async with api_of(tmp_path, ApiSettings(trust_tenant_header="never")) as api:
        made = await api.upload(line(), **{TENANT: "alice"})
        assert (await api.client.get(f"/v1/files/{made['id']}")).status_code == 200


async def test_an_api_key_says_the_tenant(tmp_path: Path) -> None:
    async with api_of(tmp_path, ApiSettings(api_keys_required=True)) as api:
        for name in ("alice", "bob"):
            key = ApiKey(sha256=hashed(f"sk-{name}"), tenant=name, name="test", created_s=0.0)
            await api.store.add_api_key(key)
        made = await api.upload(line(), authorization="Bearer sk-alice", **{TENANT: "bob"})
        path = f"/v1/files/{made['id']}"
        assert (await api.client.get(path, headers={"authorization": "bearer sk-alice"})).status_code == 200
        assert (await api.client.get(path, headers={"authorization": "Bearer sk-bob"})).status_code == 404
        await api.store.revoke_api_key(hashed("sk-alice"), 1.0)
        for given in ("Bearer sk-alice", "Bearer sk-nobody", "Bearer ", "Basic sk-bob", "Bearer " + "x" * 600, ""):
            answer = await api.client.get(path, headers={"authorization": given})
            assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key"), given
            assert error_of(answer)["type"] == "authentication_error"


async def test_stored_bytes_have_a_quota(tmp_path: Path) -> None:
    async with api_of(tmp_path, ApiSettings(quotas=Quotas(stored_bytes=1000))) as api:
        made = await api.upload(b"x" * 600, purpose="vision")
        form, files = {"purpose": "vision"}, {"file": ("a", b"x" * 401)}
        answer = await api.client.post("/v1/files", data=form, files=files)
        assert (answer.status_code, error_of(answer)["code"]) == (429, "stored_bytes_quota_exceeded")
        assert answer.headers["x-should-retry"] == "false"
        assert len(api.blobs()) == 1
        await api.client.delete(f"/v1/files/{made['id']}")
        await api.upload(b"x" * 401, purpose="vision")


async def test_every_answer_has_its_request_id_and_security_headers(api: Api) -> None:
    for path, status in (("/v1/files", 200), ("/v1/nope", 404), ("/v1/files?limit=0", 400), ("/health", 200)):
        answer = await api.client.get(path, headers={"x-request-id": "mine-1"})
        assert answer.status_code == status
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-xss-protection"] == "1; mode=block"
    assert len((await api.client.get("/health")).headers["x-request-id"]) == 36
    assert (await api.client.get("/health", headers={"x-request-id": "a b"})).headers["x-request-id"] != "a b"


async def test_unknown_urls_methods_and_options(api: Api) -> None:
    unknown = await api.client.get("/v1/nope")
    assert (unknown.status_code, error_of(unknown)["message"]) == (404, "Unknown request URL: GET /v1/nope")
    wrong = await api.client.put("/v1/files")
    assert (wrong.status_code, "allow" in wrong.headers) == (405, True)
    assert error_of(wrong)["message"] == "Method not allowed: PUT /v1/files"
    assert (await api.client.options("/v1/files")).status_code == 204


async def test_storage_that_fails_is_503_and_to_be_tried_again(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def down(*args: object, **kwargs: object) -> None:
        raise StoreUnavailable("down")

    monkeypatch.setattr(api.store, "file", down)
    monkeypatch.setattr(api.store, "ping", down)
    answer = await api.client.get("/v1/files/file-1")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "down" not in error_of(answer)["message"]
    assert ((await api.client.get("/ready")).status_code, (await api.client.get("/health")).text) == (503, "OK")


async def test_blobs_that_fail_are_503_and_no_file_is_made(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def down(*args: object) -> int:
        raise BlobsUnavailable("down")

    monkeypatch.setattr("batchgw.blobs.Blobs.put", down)
    answer = await api.client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", line())})
    assert answer.status_code == 503
    assert (await api.client.get("/v1/files")).json()["data"] == []


async def test_a_file_row_that_may_have_been_written_keeps_its_bytes(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    written = api.store.add_file

    async def lost(file: Any) -> None:
        await written(file)
        raise StoreUnavailable("the connection broke after the commit")

    monkeypatch.setattr(api.store, "add_file", lost)
    answer = await api.client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", line())})
    assert answer.status_code == 503
    (file,) = (await api.client.get("/v1/files")).json()["data"]
    assert (await api.client.get(f"/v1/files/{file['id']}/content")).content == line()


async def test_a_fault_of_ours_is_500_with_the_request_id_and_nothing_inside(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*args: object) -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(api.store, "file", broken)
    answer = await api.client.get("/v1/files/file-1", headers={"x-request-id": "r1"})
    assert (answer.status_code, error_of(answer)["type"], error_of(answer)["param"]) == (500, "server_error", "r1")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == "r1"


async def test_a_client_that_stops_sending_is_told_so(tmp_path: Path) -> None:
    async def stuck() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nxxx'
        await asyncio.sleep(30)

    async with api_of(tmp_path, ApiSettings(read_idle_s=0.05)) as api:
        kind = {"content-type": "multipart/form-data; boundary=b"}
        answer = await api.client.post("/v1/files", content=stuck(), headers=kind)
        assert (answer.status_code, error_of(answer)["code"]) == (408, "request_timeout")
        assert api.blobs() == []


async def test_metrics_count_by_template_and_status(api: Api) -> None:
    registry = CollectorRegistry()
    ops = create_ops_app(registry, api.store)
    app = create_app(ApiSettings(), api.store, None, metrics=ApiMetrics(registry))  # type: ignore[arg-type]
    async with api.over(app) as client:
        for path in ("/v1/files/file-1", "/v1/files/file-2", "/v1/made/up", "/v1/files"):
            await client.get(path)

    def count(path: str, status: str) -> float | None:
        labels = {"method": "GET", "path": path, "status": status}
        return registry.get_sample_value("http_requests_total", labels)

    assert (count("/v1/files/{file_id}", "404"), count("other", "404"), count("/v1/files", "200")) == (2, 1, 1)
    in_flight = {"method": "GET", "path": "/v1/files"}
    assert registry.get_sample_value("http_requests_in_flight", in_flight) == 0
    async with api.over(ops) as client:
        assert "http_request_duration_seconds_bucket" in (await client.get("/metrics")).text
        assert [(await client.get(path)).text for path in ("/health", "/ready")] == ["OK", "ok"]


async def test_the_openapi_page_describes_every_route(api: Api) -> None:
    document = (await api.client.get("/openapi.json")).json()
    operations = [(verb, path) for path, verbs in document["paths"].items() for verb in verbs]
    assert len(operations) == 13
    names = set(document["components"]["schemas"])
    assert {"FileObject", "BatchObject", "UploadObject", "CreateBatch", "Error"} <= names
    refs = {ref.rpartition("/")[2] for ref in _refs(document)}
    assert refs <= names
    assert (await api.client.get("/docs")).status_code == 200


def test_settings_that_do_not_go_together_stop_the_start() -> None:
    with pytest.raises(ConfigError, match="headerKeys"):
        create_app(ApiSettings(pass_through_headers=("Authorization",)), None, None)  # type: ignore[arg-type]


def _refs(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [node["$ref"]] if isinstance(node.get("$ref"), str) else [r for v in node.values() for r in _refs(v)]
    return [r for v in node for r in _refs(v)] if isinstance(node, list) else []
