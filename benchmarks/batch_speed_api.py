"""How long the API takes to store and check a large input file, and what memory that needs."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import aiohttp
import msgspec

from benchmarks.batch_processes import Child, serve_api

WORDS = ("the", "of", "batch", "latency", "harvest", "idle", "token", "queue", "deadline", "model", "prefix", "line")
SYSTEM = "You are a careful assistant. Answer in one sentence, and say so when you do not know. " * 4
BOUNDARY = "batch-speed-boundary"
PIECE_BYTES = 1 << 20
LIMIT_S = 300.0


def input_file(lines: int, size: int, seed: int) -> bytes:
    """``lines`` chat requests, about ``size`` bytes in all: a system prompt that all share, and words of their own."""
    rng, made = Random(seed), []
    for i in range(lines):
        line = _line(i, "")
        text = " ".join(rng.choices(WORDS, k=max(1, (size // lines - len(line)) // 6)))
        made.append(_line(i, text))
    return b"".join(made)


def _line(i: int, text: str) -> bytes:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{i} {text}"}]
    body = {"model": "m", "messages": messages, "max_tokens": 64}
    return (
        msgspec.json.encode({"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions", "body": body})
        + b"\n"
    )


def form(data: bytes) -> list[bytes]:
    """The body of an upload, in pieces."""
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
    )
    pieces = [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]
    return [head.encode(), *pieces, f"\r\n--{BOUNDARY}--\r\n".encode()]


async def upload(store_url: str, folder: Path, lines: int, size: int, seed: int) -> dict[str, float]:
    """Wall time of one upload, from its first byte to the file object, on a server that has served a small one."""
    api = Child(serve_api, store_url, str(folder / "blobs"), 0)
    url = f"http://127.0.0.1:{await api.start()}/v1/files"
    data = input_file(lines, size, seed)
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=LIMIT_S)) as session:
            await _post(session, url, input_file(100, 100_000, seed))
            cpu_s, rss_bytes, began_s = api.cpu_s, api.rss_bytes, time.perf_counter()
            await _post(session, url, data)
            took_s = time.perf_counter() - began_s
        return {
            "lines": float(lines),
            "mb": len(data) / 1e6,
            "s": took_s,
            "cpu_s": api.cpu_s - cpu_s,
            "mb_per_s": len(data) / 1e6 / took_s,
            "rss_growth_mb": (api.rss_bytes - rss_bytes) / 1e6,
            "peak_growth_mb": (api.peak_bytes - rss_bytes) / 1e6,
        }
    finally:
        await api.kill()


async def _post(session: aiohttp.ClientSession, url: str, data: bytes) -> None:
    async def body() -> AsyncIterator[bytes]:
        for piece in form(data):
            yield piece

    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    async with session.post(url, data=body(), headers=headers) as answer:
        said = await answer.json()
        assert answer.status == 200, said
        assert (said["status"], said["bytes"]) == ("processed", len(data)), said
