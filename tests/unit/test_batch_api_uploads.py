"""/v1/uploads in process over SQLite and a folder."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from batchgw.api.settings import ApiSettings, Quotas
from tests.batch_api import Api, api_of, error_of, line

DATA = b"".join(line(str(i)) for i in range(20))


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with api_of(tmp_path, ApiSettings(max_part_bytes=2000)) as made:
        yield made


async def create(api: Api, size: int = len(DATA), **changes: Any) -> Any:
    body = {"purpose": "batch", "filename": "x/in.jsonl", "bytes": size, "mime_type": "application/jsonl", **changes}
    return await api.client.post("/v1/uploads", json=body)


async def add(api: Api, upload_id: str, data: bytes) -> Any:
    api.clock.now_s += 1
    return await api.client.post(f"/v1/uploads/{upload_id}/parts", files={"data": ("part", data)})


async def test_parts_become_one_file_in_the_order_named(api: Api) -> None:
    upload = (await create(api)).json()
    assert upload == {
        "id": upload["id"], "object": "upload", "bytes": len(DATA), "created_at": 1_000_000, "expires_at": 1_003_600,
        "filename": "in.jsonl", "purpose": "batch", "status": "pending", "file": None,
    }  # fmt: skip
    second = (await add(api, upload["id"], DATA[1000:])).json()
    first = (await add(api, upload["id"], DATA[:1000])).json()
    assert (first["object"], first["upload_id"]) == ("upload.part", upload["id"])
    body = {"part_ids": [first["id"], second["id"]], "md5": hashlib.md5(DATA, usedforsecurity=False).hexdigest()}
    done = await api.client.post(f"/v1/uploads/{upload['id']}/complete", json=body)
    assert done.json()["status"] == "completed"
    file = done.json()["file"]
    assert (file["filename"], file["status"], file["purpose"]) == ("in.jsonl", "processed", "batch")
    assert (await api.client.get(f"/v1/files/{file['id']}/content")).content == DATA
    assert (await api.batch(file["id"])).json()["request_counts"]["total"] == 20
    again = await api.client.post(f"/v1/uploads/{upload['id']}/complete", json=body)
    assert again.json() == done.json()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"purpose": "nonsense"}, "purpose"),
        ({"bytes": 0}, "bytes"),
        ({"bytes": (200 << 20) + 1}, "bytes"),
        ({"bytes": "many"}, "bytes"),
        ({"filename": "../.."}, "filename"),
        ({"mime_type": None}, "mime_type"),
        ({"expires_after": {"anchor": "created_at", "seconds": 1}}, "expires_after.seconds"),
    ],
)
async def test_a_refused_upload_names_the_parameter(api: Api, change: dict[str, Any], param: str) -> None:
    answer = await create(api, **change)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


async def test_what_does_not_add_up_is_refused_and_leaves_no_file(api: Api) -> None:
    upload = (await create(api)).json()["id"]
    ids = [(await add(api, upload, DATA[i : i + 1500])).json()["id"] for i in range(0, len(DATA), 1500)]
    bad: list[dict[str, Any]] = [
        {"part_ids": []}, {"part_ids": ids[:-1]}, {"part_ids": [*ids[:-1], "part_unknown"]},
        {"part_ids": [*ids, ids[0]]}, {"part_ids": ids, "md5": "0" * 32}, {},
    ]  # fmt: skip
    parts = api.blobs()
    for body in bad:
        answer = await api.client.post(f"/v1/uploads/{upload}/complete", json=body)
        assert answer.status_code == 400, body
        assert error_of(answer)["param"] in ("part_ids", "md5"), body
    assert api.blobs() == parts
    assert (await api.client.get("/v1/files")).json()["data"] == []
    good = await api.client.post(f"/v1/uploads/{upload}/complete", json={"part_ids": ids})
    assert good.json()["status"] == "completed"


async def test_a_part_that_is_too_large_or_missing_leaves_nothing(api: Api) -> None:
    upload = (await create(api)).json()["id"]
    assert error_of(await add(api, upload, b"x" * 2001))["code"] == "file_too_large"
    wrong = await api.client.post(f"/v1/uploads/{upload}/parts", files={"file": ("part", b"x")})
    assert (wrong.status_code, error_of(wrong)["param"]) == (400, "data")
    assert api.blobs() == []


async def test_parts_cannot_fill_the_disk(api: Api) -> None:
    upload = (await create(api, size=1000)).json()["id"]
    statuses = [(await add(api, upload, b"x" * 1000)).status_code for _ in range(5)]
    assert statuses == [200, 200, 200, 400, 400]


async def test_a_cancelled_upload_takes_no_more(api: Api) -> None:
    upload = (await create(api)).json()["id"]
    part = (await add(api, upload, b"x")).json()["id"]
    for _ in range(2):
        assert (await api.client.post(f"/v1/uploads/{upload}/cancel")).json()["status"] == "cancelled"
    for answer in (
        await add(api, upload, b"y"),
        await api.client.post(f"/v1/uploads/{upload}/complete", json={"part_ids": [part]}),
    ):
        assert (answer.status_code, error_of(answer)["code"]) == (400, "upload_ended")


async def test_an_upload_expires(api: Api) -> None:
    upload = (await create(api)).json()["id"]
    api.clock.now_s += 3600
    answer = await add(api, upload, b"y")
    assert (answer.status_code, "expired" in error_of(answer)["message"]) == (400, True)
    assert api.blobs() == []


async def test_uploads_are_the_tenants_own(api: Api) -> None:
    upload = (await create(api)).json()["id"]
    bob = {"X-MaaS-Username": "bob"}
    for verb, body in (("cancel", None), ("complete", {"part_ids": ["x"]})):
        answer = await api.client.post(f"/v1/uploads/{upload}/{verb}", headers=bob, json=body)
        assert answer.status_code == 404
    parts = await api.client.post(f"/v1/uploads/{upload}/parts", headers=bob, files={"data": ("p", b"x")})
    assert parts.status_code == 404


async def test_an_upload_counts_against_the_quota_when_it_is_announced(tmp_path: Path) -> None:
    async with api_of(tmp_path, ApiSettings(quotas=Quotas(stored_bytes=1000))) as api:
        answer = await create(api, size=1001)
        assert (answer.status_code, error_of(answer)["code"]) == (429, "stored_bytes_quota_exceeded")
