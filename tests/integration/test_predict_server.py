"""llm-d's predictor API over real HTTP on loopback, with the real trainer process behind it."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from llmd_sched.predict_server.http import MAX_BODY_BYTES, PredictServer
from llmd_sched.predict_server.service import Settings

PATIENCE_S = 60.0
Q90 = 1.2816
"""The normal distribution's 0.9 quantile, in standard deviations."""
ROW = {
    "kv_cache_percentage": 0.5,
    "input_token_length": 200,
    "num_request_waiting": 3,
    "num_request_running": 1,
    "num_tokens_generated": 5,
    "prefix_cache_score": 0.5,
}
PREDICTION = {"ttft_ms", "tpot_ms", "predicted_at", "model_type", "objective_type", "quantile", "last_model_load"}


class Client:
    """Speaks to one server as a router does."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(path) as reply:
            return reply.status, await reply.json()

    async def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        async with self.session.post(path, data=data) as reply:
            return reply.status, await reply.json()

    async def teach(self, entries: list[dict]) -> None:
        status, reply = await self.post("/add_training_data_bulk", {"entries": entries})
        assert (status, reply) == (202, {"message": f"Accepted {len(entries)} training samples."})

    async def strict(self, rows: list[dict]) -> dict[str, Any]:
        status, reply = await self.post("/predict/bulk/strict", {"requests": rows})
        assert status == 200, reply
        return reply

    async def predictions_ms(self, rows: list[dict]) -> np.ndarray:
        """(2, n), TTFT before TPOT."""
        reply = await self.strict(rows)
        return np.array([[p["ttft_ms"], p["tpot_ms"]] for p in reply["predictions"]]).T

    async def ready(self) -> bool:
        return (await self.get("/readyz"))[0] == 200

    async def held(self) -> int:
        return int((await self.get("/data/status"))[1]["training_data"]["total_samples"])


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[tuple[PredictServer, Client]]:
    server = PredictServer(Settings(host="127.0.0.1", port=0, **settings))
    port = await server.start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            yield server, Client(session)
    finally:
        await server.stop()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():
            await asyncio.sleep(0.05)


async def until_fitted(server: PredictServer, samples: int) -> None:
    """Until the model in use knows at least so many samples."""

    async def fitted() -> bool:
        return server.service.model.samples >= samples

    await until(fitted)


def measured(count: int, seed: int = 1) -> list[dict]:
    """TTFT of 30 ms + 0.1 ms per uncached token and TPOT of 10 ms + 1 ms per request: separate entries, as the
    router sends them."""
    rng = np.random.default_rng(seed)
    entries = []
    for number in range(count):
        row = {**ROW, "input_token_length": int(rng.integers(50, 4000)), "num_request_running": int(rng.integers(0, 9))}
        if number % 2:
            row |= {"prefix_cache_score": 0.0, "num_tokens_generated": 0}
            latency = {"actual_ttft_ms": 0, "actual_tpot_ms": 10.0 + row["num_request_running"]}
        else:
            uncached = 0.5 * row["input_token_length"]
            latency = {"actual_ttft_ms": 30.0 + 0.1 * uncached, "actual_tpot_ms": 0, "num_tokens_generated": 0}
        entries.append({**row, **latency, "timestamp": "2026-08-11T10:00:00.123456789Z"})
    return entries


async def test_before_anything_is_learned_the_server_lives_and_is_not_ready() -> None:
    async with serving() as (_, client):
        assert (await client.get("/healthz"))[0] == 200
        for status, reply in (
            await client.get("/readyz"),
            await client.post("/predict", ROW),
            await client.post("/predict/bulk/strict", {"requests": [ROW]}),
        ):
            assert status == 503
            assert "nothing has been learned yet" in reply["detail"]
        status, reply = await client.post("/predict/bulk", {"requests": [ROW, {}]})
        assert status == 200
        assert reply["predictions"] == [None, None]
        assert (reply["total_requests"], reply["successful_predictions"], reply["failed_predictions"]) == (2, 0, 2)
        assert [error["index"] for error in reply["errors"]] == [0, 1]
        assert reply["errors"][0]["request"] == ROW
        assert (await client.post("/reload"))[1]["is_ready"] is False


async def test_a_router_feeds_it_asks_it_flushes_it_and_keeps_its_model() -> None:
    async with serving(min_samples=60) as (server, client):
        for begin in range(0, 400, 100):
            await client.teach(measured(400)[begin : begin + 100])
        await until(client.ready)
        await until_fitted(server, 300)
        row = {**ROW, "input_token_length": 2000, "num_tokens_generated": 1, "num_request_running": 4}
        reply = await client.strict([row, {**row, "prefix_cache_score": 0.0, "unheard_of": [1, 2]}])
        (half, half_tpot), (whole, whole_tpot) = [(p["ttft_ms"], p["tpot_ms"]) for p in reply["predictions"]]
        assert 100.0 < half < 180.0
        assert whole >= half
        assert half_tpot == whole_tpot == pytest.approx(14.0, rel=0.25)
        assert set(reply["predictions"][0]) == PREDICTION
        assert set(reply) == {"predictions", "total_requests", "successful_predictions", "failed_predictions",
                              "processing_time_ms"}  # fmt: skip
        status, one = await client.post("/predict", row)
        assert status == 200
        assert one["ttft_prediction_bounds"][0] <= one["ttft_prediction_bounds"][1] == one["ttft_ms"]
        assert set(one) == PREDICTION | {
            f"{target}_{what}" for target in ("ttft", "tpot") for what in ("uncertainty", "prediction_bounds")
        }

        async def all_held() -> bool:
            return await client.held() == 400

        await until(all_held)
        version = server.service.model.version
        status, flushed = await client.post("/flush")
        assert status == 200
        assert flushed["ttft_training_samples_flushed"] == flushed["tpot_training_samples_flushed"] == 200
        assert await client.held() == 0
        assert await client.ready()
        assert server.service.model.version >= version
        await client.teach(measured(20))

        async def the_new_are_held() -> bool:
            return await client.held() == 20

        await until(the_new_are_held)


async def test_a_flush_of_something_else_keeps_the_training_data() -> None:
    async with serving() as (_, client):
        await client.teach(measured(20))

        async def all_held() -> bool:
            return await client.held() == 20

        await until(all_held)
        asked = {"flush_training_data": False, "flush_test_data": True, "flush_metrics": True, "reason": "why not"}
        status, reply = await client.post("/flush", asked)
        assert (status, reply["reason"], reply["metrics_cleared"]) == (200, "why not", True)
        assert reply["ttft_training_samples_flushed"] == 0
        assert await client.held() == 20
        assert (await client.post("/flush", {"flush_metrics": "not_a_boolean"}))[0] == 422


async def test_a_restart_with_its_state_folder_is_ready_at_once(tmp_path: Path) -> None:
    async with serving(state_dir=str(tmp_path)) as (server, client):
        await client.teach(measured(200))
        await until_fitted(server, 200)
        version, before_ms = server.service.model.version, await client.predictions_ms([ROW])
    async with serving(state_dir=str(tmp_path)) as (server, client):
        assert await client.ready()
        assert server.service.model.version == version
        assert (await client.get("/status"))[1]["last_model_load"] is not None
        assert (await client.predictions_ms([ROW]))[:, 0] == pytest.approx(before_ms[:, 0], rel=0.2)

        async def restored() -> bool:
            return await client.held() == 200

        await until(restored)


REFUSED = [
    ("POST", "/predict", b"", 422, "truncated"),
    ("POST", "/predict", b"no json", 422, "malformed"),
    ("POST", "/predict", b"{}", 422, "missing required field `kv_cache_percentage`"),
    ("POST", "/predict", {**ROW, "encoder_matched_size": 1}, 400, "Expected encoder_matched_size <= "),
    ("POST", "/predict/bulk", {"requests": []}, 422, "length >= 1"),
    ("POST", "/predict/bulk/strict", {"requests": [ROW, {**ROW, "kv_cache_percentage": 7}]}, 422, "[1].kv_cache_perc"),
    ("POST", "/predict/bulk/strict", {"requests": [{**ROW, "encoder_matched_size": 1}]}, 400, "$.requests[0]"),
    ("POST", "/add_training_data_bulk", {"entries": [ROW]}, 422, "missing required field `actual_ttft_ms`"),
    ("POST", "/add_training_data_bulk", b"x" * (MAX_BODY_BYTES + 1), 413, f"exceeds {MAX_BODY_BYTES} bytes"),
    ("POST", "/flush", b"[]", 422, "Expected `object`"),
    ("GET", "/predict", None, 405, "Method Not Allowed"),
    ("GET", "/model/ttft/download", None, 404, "Not Found"),
]


async def test_every_refusal_says_why() -> None:
    async with serving() as (_, client):
        for method, path, body, status, detail in REFUSED:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            data = io.BytesIO(data) if data else data  # aiohttp warns of long bodies that are not files
            async with client.session.request(method, path, data=data) as reply:
                assert reply.status == status, (path, body)
                assert detail in (await reply.json())["detail"]
        async with client.session.get("/metrics") as reply:
            assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            page = await reply.text()
        assert 'predict_server_requests_total{route="/predict/bulk/strict",status="400"} 1.0' in page
        assert 'predict_server_requests_total{route="other",status="404"} 1.0' in page


async def test_a_bulk_answers_good_rows_beside_bad_ones() -> None:
    async with serving() as (server, client):
        await client.teach(measured(100))
        await until(client.ready)
        bad = {**ROW, "num_request_waiting": -1}
        status, reply = await client.post("/predict/bulk", {"requests": [ROW, bad, ROW]})
        assert status == 200
        assert [prediction is None for prediction in reply["predictions"]] == [False, True, False]
        assert reply["errors"] == [
            {"index": 1, "error": "Expected `int` >= 0 - at `$.num_request_waiting`", "request": bad}
        ]
        assert (reply["successful_predictions"], reply["failed_predictions"]) == (2, 1)
        assert server.service.ready


def stress_rows(rng: np.random.Generator, count: int) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """Rows of the reference's accuracy test and the means of their TTFT and TPOT."""
    columns = {
        "kv_cache_percentage": rng.uniform(0.1, 0.9, count),
        "input_token_length": rng.integers(50, 801, count),
        "num_request_waiting": rng.integers(0, 9, count),
        "num_request_running": rng.integers(1, 5, count),
        "num_tokens_generated": rng.integers(1, 26, count),
        "prefix_cache_score": rng.uniform(0.0, 1.0, count),
    }
    kv, length, waiting, running, generated, prefix = columns.values()
    ttft_ms = 2.0 * length + 3.0 * waiting + 4.0 * running + 50.0 * kv + 30.0 * prefix + 95.0
    tpot_ms = 100.0 * kv + 0.5 * length + generated + 5.0 * running + 9.0
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, one, strict=True)) for one in values], ttft_ms, tpot_ms


async def test_the_reference_s_accuracy_test_passes() -> None:
    rng = np.random.default_rng(42)
    rows, ttft_ms, tpot_ms = stress_rows(rng, 3000)
    ttft, tpot = rng.normal(ttft_ms, 20.0).tolist(), rng.normal(tpot_ms, 10.0).tolist()
    entries = [
        {**row, "actual_ttft_ms": max(1.0, a), "actual_tpot_ms": max(1.0, b)}
        for row, a, b in zip(rows, ttft, tpot, strict=True)
    ]
    async with serving() as (server, client):
        await client.teach(entries)
        await until_fitted(server, 5400)  # a tail of under a fiftieth is worth no refit
        rows, ttft_ms, tpot_ms = stress_rows(rng, 2000)
        said_ms = await client.predictions_ms(rows)
        true_ms = np.array([ttft_ms + Q90 * 20.0, tpot_ms + Q90 * 10.0])
        close = (np.abs(said_ms / true_ms - 1.0) <= 0.15).all(axis=0).mean()
        assert close >= 0.9  # the reference's own bar is 0.7
        drawn_ms = np.array([rng.normal(ttft_ms, 20.0), rng.normal(tpot_ms, 10.0)])
        assert (drawn_ms <= said_ms).mean(axis=1) == pytest.approx([0.9, 0.9], abs=0.08)
        longer_ms = await client.predictions_ms([rows[0], {**rows[0], "input_token_length": 900}])
        assert longer_ms[0, 1] >= longer_ms[0, 0]


@pytest.mark.parametrize("objective", ["mean", "quantile"])
async def test_tokens_in_flight_slow_the_prediction_down(objective: str) -> None:
    rng = np.random.default_rng(7)
    prefill, decode = rng.integers(0, 10_001, 600).tolist(), rng.integers(0, 3_001, 600).tolist()
    entries = [
        {
            **ROW,
            "prefill_tokens_in_flight": p,
            "decode_tokens_in_flight": d,
            "actual_ttft_ms": 550.0 + 0.05 * p + rng.normal(0.0, 5.0),
            "actual_tpot_ms": 170.0 + 0.02 * d + rng.normal(0.0, 5.0),
        }
        for p, d in zip(prefill, decode, strict=True)
    ]
    async with serving(objective=objective) as (server, client):
        await client.teach(entries)
        await until_fitted(server, 1000)
        rows = [{**ROW, "prefill_tokens_in_flight": n, "decode_tokens_in_flight": n // 3} for n in (0, 5_000, 10_000)]
        ttft_ms, tpot_ms = await client.predictions_ms(rows)
        assert ttft_ms == pytest.approx([550.0, 800.0, 1050.0], rel=0.15)
        assert tpot_ms == pytest.approx([170.0, 203.0, 237.0], rel=0.15)


async def test_the_command_serves_until_it_is_told_to_end_and_keeps_what_it_learned(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmd_sched", "predict-server", "--host", "127.0.0.1", "--port", "0",
               "--predictor-state-dir", str(tmp_path)]  # fmt: skip
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        assert process.stderr is not None
        async with asyncio.timeout(PATIENCE_S):
            line = b""
            while b"http://127.0.0.1:" not in line:
                line = await process.stderr.readline()
                assert line, "it ended early"
            port = int(line.rsplit(b":", 1)[1])
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
                client = Client(session)
                await client.teach(measured(100))
                await until(client.ready)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert os.listdir(tmp_path) == ["predict-server.predictor-state"]


async def test_a_port_in_use_is_said_and_no_child_stays_behind() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = PredictServer(Settings(host="127.0.0.1", port=taken.getsockname()[1]))
        with pytest.raises(OSError, match="address already in use"):
            await server.start()
    assert server.service.trainer.pid is None
