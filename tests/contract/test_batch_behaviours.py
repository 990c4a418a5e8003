"""What the reference's end-to-end suite asserts, one sentence a test, over SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import pytest

from batchgw.blobs import key
from batchgw.store import database, open_store
from batchgw.store.base import StoreUnavailable
from batchgw.worker.sweep import ORPHAN_S, sweep
from benchmarks.batch_site import requests
from tests.batch_api import error_of
from tests.batch_gateway import LIMIT_S, LOOK_S, Gateway, codes, gateway, model, whole
from tests.batch_stores import postgres
from tests.envoy_stream import until

__all__ = ["gateway", "postgres", "whole"]

pytestmark = pytest.mark.asyncio(loop_scope="module")


# Files


async def test_a_file_is_uploaded_read_back_and_deleted(gateway: Gateway) -> None:
    data = requests(2)
    made = await gateway.upload(data)
    assert (made["object"], made["bytes"], made["filename"], made["purpose"]) == (
        "file",
        len(data),
        "in.jsonl",
        "batch",
    )
    assert await gateway.get(f"files/{made['id']}") == made
    assert (await gateway.ask("GET", f"files/{made['id']}/content")).content == data
    assert (await gateway.ask("DELETE", f"files/{made['id']}")).json() == {
        "id": made["id"], "object": "file", "deleted": True,
    }  # fmt: skip
    for path in (f"files/{made['id']}", f"files/{made['id']}/content"):
        assert (await gateway.ask("GET", path)).status_code == 404


async def test_two_files_of_one_name_are_two_files(gateway: Gateway) -> None:
    first, second = [await gateway.upload(requests(1), name="same.jsonl") for _ in range(2)]
    assert first["id"] != second["id"]
    assert first["filename"] == second["filename"] == "same.jsonl"


async def test_files_are_listed_in_pages_by_number_and_by_id(gateway: Gateway) -> None:
    made = {(await gateway.upload(requests(1)))["id"] for _ in range(5)}
    for cursor in ("2", None):
        first = await gateway.get("files?limit=2")
        assert first["has_more"]
        second = await gateway.get(f"files?limit=3&after={cursor or first['last_id']}")
        assert not second["has_more"]
        ids = [file["id"] for file in (*first["data"], *second["data"])]
        assert (len(ids), set(ids)) == (5, made)


async def test_a_list_of_one_purpose_has_no_other(gateway: Gateway) -> None:
    for purpose in ("batch", "fine-tune", "batch"):
        await gateway.upload(requests(1), purpose=purpose)
    assert [file["purpose"] for file in (await gateway.get("files?purpose=batch"))["data"]] == ["batch"] * 2


# Batches


async def test_a_batch_goes_from_its_file_to_an_output_line_for_each_request(gateway: Gateway) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    name = model("m")
    headers = {"traceparent": trace}
    made = await gateway.create(requests(2, name), headers, metadata={"k": "v"}, completion_window="10m")
    assert made["expires_at"] == made["created_at"] + 600
    batch = await gateway.ended(made)
    assert (batch["status"], batch["metadata"], batch["model"]) == ("completed", {"k": "v"}, name)
    assert batch["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
    assert batch.get("error_file_id") is None
    lines = await gateway.lines(batch["output_file_id"])
    assert [(line["custom_id"], line["response"]["status_code"]) for line in lines] == [("c0", 200), ("c1", 200)]
    for asked in gateway.asked(name):
        assert trace[3:35] in asked.headers["traceparent"], "one trace from the client to the engine"
        assert asked.headers["x-gateway-inference-objective"] == "batch"
        assert asked.headers["x-gateway-inference-fairness-id"] == gateway.tenant


async def test_batches_are_listed_in_pages_by_number_and_by_id(gateway: Gateway) -> None:
    file = await gateway.upload(requests(1, model("m")))
    made = {(await gateway.create(b"", input_file_id=file["id"]))["id"] for _ in range(5)}
    for cursor in ("2", None):
        first = await gateway.get("batches?limit=2")
        second = await gateway.get(f"batches?limit=3&after={cursor or first['last_id']}")
        ids = [batch["id"] for batch in (*first["data"], *second["data"])]
        assert (len(ids), set(ids), second["has_more"]) == (5, made, False)


async def test_a_newline_at_the_end_is_no_request(gateway: Gateway) -> None:
    batch = await gateway.ended(await gateway.create(requests(2, model("m")) + b"\n"))
    assert (batch["status"], batch["request_counts"]["total"]) == ("completed", 2)


async def test_one_unknown_model_fails_its_line_and_no_other(gateway: Gateway) -> None:
    good = model("m")
    batch = await gateway.ended(await gateway.create(requests(3, [good, good, model("unknown")])))
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    [failed] = await gateway.lines(batch["error_file_id"])
    assert (failed["custom_id"], failed["error"]["code"]) == ("c2", "model_not_found")


async def test_a_batch_of_unknown_models_completes_with_all_failed(gateway: Gateway) -> None:
    batch = await gateway.ended(await gateway.create(requests(3, model("unknown"))))
    assert (batch["status"], batch.get("output_file_id")) == ("completed", None)
    assert batch["request_counts"] == {"total": 3, "completed": 0, "failed": 3}


async def test_two_batches_share_one_file(gateway: Gateway) -> None:
    file = await gateway.upload(requests(2, model("m")))
    made = [await gateway.create(b"", input_file_id=file["id"]) for _ in range(2)]
    ended = [await gateway.ended(batch) for batch in made]
    assert [batch["request_counts"]["completed"] for batch in ended] == [2, 2]
    assert len({batch["output_file_id"] for batch in ended}) == 2


async def test_two_models_of_one_file_both_complete(gateway: Gateway) -> None:
    names = [model("m"), model("n")]
    batch = await gateway.ended(await gateway.create(requests(4, names)))
    assert (batch["status"], batch["request_counts"]["completed"]) == ("completed", 4)
    served = {
        line["custom_id"]: line["response"]["body"]["model"] for line in await gateway.lines(batch["output_file_id"])
    }
    assert served == {f"c{i}": names[i % 2] for i in range(4)}


async def test_five_batches_at_once_all_complete(gateway: Gateway) -> None:
    name = model("m")
    made = await asyncio.gather(*(gateway.create(requests(3, name)) for _ in range(5)))
    ended = await asyncio.gather(*(gateway.ended(batch) for batch in made))
    assert [(batch["status"], batch["request_counts"]["completed"]) for batch in ended] == [("completed", 3)] * 5


async def test_configured_headers_reach_the_engine_and_others_do_not(gateway: Gateway) -> None:
    name = model("m")
    headers = {"X-Team": "blue", "Authorization": "Bearer mine", "X-Other": "no"}
    batch = await gateway.ended(await gateway.create(requests(2, name), headers))
    assert batch["request_counts"]["completed"] == 2
    for asked in gateway.asked(name):
        assert (asked.headers["x-team"], asked.headers["authorization"]) == ("blue", "Bearer mine")
        assert "x-other" not in asked.headers


async def test_progress_is_seen_while_a_batch_runs_and_never_falls(gateway: Gateway) -> None:
    batch = await gateway.create(requests(40, [model("m"), model("hang")]))
    running_batch = await gateway.completes(batch, 20)
    assert running_batch["status"] == "in_progress"
    await gateway.cancel(batch)
    seen = [batch, running_batch]
    await gateway.ended(batch, seen)
    done = [one["request_counts"]["completed"] for one in seen]
    order = ["validating", "in_progress", "cancelling", "cancelled"]
    ranks = [order.index(one["status"]) for one in seen]
    assert (done, ranks) == (sorted(done), sorted(ranks))


# Cancelling and expiry


async def test_a_batch_cancelled_right_away_ends_cancelled(gateway: Gateway) -> None:
    batch = await gateway.create(requests(5, model("hang")))
    assert (await gateway.cancel(batch)).json()["status"] in ("cancelling", "cancelled")
    ended = await gateway.ended(batch)
    assert (ended["status"], ended["request_counts"]) == ("cancelled", {"total": 5, "completed": 0, "failed": 5})


async def test_a_running_batch_that_is_cancelled_keeps_what_is_done_and_names_the_rest(gateway: Gateway) -> None:
    batch = await gateway.create(requests(25, [model("m"), *[model("hang")] * 4]))
    await gateway.completes(batch, 5)
    assert (await gateway.cancel(batch)).json()["status"] == "cancelling"
    ended = await gateway.ended(batch)
    assert (ended["status"], ended["request_counts"]) == ("cancelled", {"total": 25, "completed": 5, "failed": 20})
    done, rest = await gateway.lines(ended["output_file_id"]), await gateway.lines(ended["error_file_id"])
    assert (len(done), len(rest), codes(rest)) == (5, 20, {"batch_cancelled"})


async def test_cancelling_twice_is_cancelling_once(gateway: Gateway) -> None:
    batch = await gateway.create(requests(5, model("hang")))
    answers = [await gateway.cancel(batch) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["cancelling_at"] == answers[1].json()["cancelling_at"]
    ended = await gateway.ended(batch)
    again = await gateway.cancel(batch)
    assert (again.status_code, again.json()) == (200, ended)


async def test_a_completed_batch_cannot_be_cancelled(gateway: Gateway) -> None:
    batch = await gateway.ended(await gateway.create(requests(1, model("m"))))
    refused = await gateway.cancel(batch)
    assert (refused.status_code, error_of(refused)["type"]) == (400, "invalid_request_error")
    assert await gateway.get(f"batches/{batch['id']}") == batch


async def test_a_batch_that_is_not_reached_within_its_window_expires(gateway: Gateway) -> None:
    name = model("hang")
    blocker = await gateway.create(requests(50, name))
    await until(lambda: len(gateway.asked(name)) == 20)
    batch = await gateway.ended(await gateway.create(requests(15, name), completion_window="1s"))
    assert (batch["status"], batch.get("output_file_id")) == ("expired", None)
    assert batch["request_counts"] == {"total": 15, "completed": 0, "failed": 15}
    rest = await gateway.lines(batch["error_file_id"])
    assert (len(rest), codes(rest)) == (15, {"batch_expired"})
    assert len(gateway.asked(name)) == 20, "none of it was sent"
    await gateway.cancel(blocker)
    assert (await gateway.ended(blocker))["status"] == "cancelled"


async def test_a_batch_whose_last_lines_are_in_flight_when_its_window_ends_expires(gateway: Gateway) -> None:
    made = await gateway.create(requests(4, [model("m"), model("hang")]), completion_window="1s")
    batch = await gateway.ended(made)
    assert (batch["status"], batch["request_counts"]) == ("expired", {"total": 4, "completed": 2, "failed": 2})
    assert codes(await gateway.lines(batch["error_file_id"])) == {"batch_expired"}


# What is refused


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (requests(1) * 2, "duplicate_custom_id"),
        (requests(1, stream=True), "stream_unsupported"),
    ],
)
async def test_a_file_with_a_line_that_cannot_run_fails_its_batch(gateway: Gateway, bad: bytes, code: str) -> None:
    batch = await gateway.ended(await gateway.create(bad))
    assert (batch["status"], [error["code"] for error in batch["errors"]["data"]]) == ("failed", [code])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_file_id": None}, "input_file_id"),
        ({"endpoint": "/v1/nonsense"}, "endpoint"),
        ({"input_file_id": "file-unknown"}, "input_file_id"),
    ],
)
async def test_a_batch_that_cannot_be_is_refused_by_parameter(
    gateway: Gateway, change: dict[str, Any], param: str
) -> None:
    file = await gateway.upload(requests(1))
    body = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h", **change}
    body = {name: value for name, value in body.items() if value is not None}
    answer = await gateway.ask("POST", "batches", json=body)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)
    assert (await gateway.get("batches"))["data"] == []


async def test_another_tenant_sees_and_changes_nothing(gateway: Gateway) -> None:
    batch = await gateway.create(requests(1, model("hang")))
    file_id = batch["input_file_id"]
    for method, path in [
        ("GET", f"files/{file_id}"),
        ("GET", f"files/{file_id}/content"),
        ("DELETE", f"files/{file_id}"),
        ("GET", f"batches/{batch['id']}"),
        ("POST", f"batches/{batch['id']}/cancel"),
    ]:
        assert (await gateway.ask(method, path, tenant="other")).status_code == 404, path
    for path in ("files", "batches"):
        assert (await gateway.ask("GET", path, tenant="other")).json()["data"] == []
    body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    assert (await gateway.ask("POST", "batches", tenant="other", json=body)).status_code == 400
    assert (await gateway.get(f"batches/{batch['id']}"))["status"] in ("validating", "in_progress")
    await gateway.cancel(batch)
    await gateway.ended(batch)


# Refusals of the engine side


async def test_a_line_that_is_throttled_for_a_while_is_tried_again(gateway: Gateway) -> None:
    name = model("busy")
    batch = await gateway.ended(await gateway.create(requests(2, name)))
    assert batch["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
    assert len(gateway.asked(name)) == 4


async def test_a_line_that_is_throttled_for_ever_fails_with_the_answer_recorded(gateway: Gateway) -> None:
    throttled, good = model("429"), model("m")
    batch = await gateway.ended(await gateway.create(requests(2, [throttled, good])))
    assert (batch["status"], batch["request_counts"]) == ("completed", {"total": 2, "completed": 1, "failed": 1})
    [failed] = await gateway.lines(batch["error_file_id"])
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("c0", 429)
    assert len(gateway.asked(throttled)) == 3, "max_retries"


# Kills and the end of things


async def test_a_batch_cancelled_while_a_killed_worker_holds_lines_of_it_ends_all_the_same(gateway: Gateway) -> None:
    name = model("hang")
    batch = await gateway.create(requests(250, name))  # more than the gateway's own worker takes
    async with asyncio.timeout(LIMIT_S):
        while await gateway.site.store.claim_chunk(batch["id"], name, "killed", time.time(), 1.0) is None:
            await asyncio.sleep(LOOK_S)
    assert (await gateway.cancel(batch)).json()["status"] == "cancelling"
    ended = await gateway.ended(batch)
    assert (ended["status"], ended["request_counts"]["failed"]) == ("cancelled", 250)
    lines = await gateway.lines(ended["error_file_id"])
    assert (len({line["custom_id"] for line in lines}), codes(lines)) == (250, {"batch_cancelled"})


@pytest.mark.parametrize(("ping_after_s", "lost"), [(0.0, 0), (60.0, 1)])
async def test_connections_that_the_database_dropped_are_replaced(
    postgres: Any, monkeypatch: pytest.MonkeyPatch, ping_after_s: float, lost: int
) -> None:
    """Without a word where they had lain idle; else one verb fails, and may be asked again."""
    monkeypatch.setattr(database, "PING_AFTER_S", ping_after_s)
    name, failed = f"t{uuid.uuid4().hex}", 0
    postgres.psql(f"CREATE DATABASE {name};")
    async with open_store(str(postgres.get_uri(name))) as store:
        await asyncio.gather(*(store.ping() for _ in range(3)))
        postgres.psql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}';")
        for _ in range(4):
            try:
                await store.ping()
            except StoreUnavailable:
                failed += 1
    assert failed == lost


async def test_what_is_past_its_time_is_gone_from_the_api_and_the_database(gateway: Gateway) -> None:
    batch = await gateway.ended(await gateway.create(requests(1, model("m"))))
    upkeep = gateway.process.upkeep
    later_s = time.time() + 400 * 86400.0
    upkeep._clock, clock = lambda: later_s, upkeep._clock
    try:
        while await upkeep.collect():
            pass
    finally:
        upkeep._clock = clock
    for path in (f"batches/{batch['id']}", f"files/{batch['input_file_id']}", f"files/{batch['output_file_id']}"):
        assert (await gateway.ask("GET", path)).status_code == 404, path
    assert await gateway.site.store.batch(None, batch["id"]) is None
    assert await gateway.site.store.stored_bytes(gateway.tenant) == 0


async def test_bytes_that_a_killed_server_left_are_swept_and_no_others(gateway: Gateway) -> None:
    file, blobs = await gateway.upload(requests(3)), gateway.site.blobs
    folder = gateway.folder / key(gateway.tenant, "x").partition("/")[0]
    orphan, foreign = f"file-{uuid.uuid4().hex}", "file-of-somebody-else"
    for name in (f"{orphan}.jsonl", f"{orphan}.plan", f"{orphan}.jsonl#1", f"{foreign}.jsonl", "notes#1.txt"):
        (folder / name).write_bytes(b"x")
    await sweep(gateway.site.store, blobs, time.time() - ORPHAN_S)
    assert (folder / f"{orphan}.jsonl").exists(), "young ones may be of an upload under way"
    assert await sweep(gateway.site.store, blobs, time.time() + 60.0) == 3
    left = {f"{file['id']}.jsonl", f"{file['id']}.plan", f"{foreign}.jsonl", "notes#1.txt"}
    assert {path.name for path in folder.iterdir()} == left


async def test_it_says_that_it_lives_and_is_ready(gateway: Gateway) -> None:
    for path in ("/health", "/ready"):
        assert (await gateway.client.get(path)).status_code == 200
