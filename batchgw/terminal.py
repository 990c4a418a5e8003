"""``batchgw submit`` and ``batchgw status``: a client of the API for people at a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from batchgw.records import TERMINAL

Batch = Mapping[str, Any]
"""As the API writes it."""

UPLOAD_S = 3600.0
ANSWER_S = 60.0
FIRST_LOOK_S, LAST_LOOK_S = 0.2, 2.0
"""Between two looks at a batch; they grow apart."""

SHOWN_ERRORS = 20
PLAIN_EVERY_S = 5.0
CHAT = "/v1/chat/completions"


class ApiError(Exception):
    """What the API refused, in its words; or that there is none."""


class Api:
    def __init__(self, base_url: str, headers: Mapping[str, str]) -> None:
        self._base_url, self._headers = base_url.rstrip("/").removesuffix("/v1"), dict(headers)

    async def __aenter__(self) -> Api:
        self._session = aiohttp.ClientSession(headers=self._headers)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def upload(self, file: Path) -> dict[str, Any]:
        form = aiohttp.FormData()
        form.add_field("purpose", "batch")
        with file.open("rb") as data:
            form.add_field("file", data, filename=file.name)
            return await self._json("POST", "/v1/files", data=form, limit_s=UPLOAD_S)

    async def create(self, file_id: str, endpoint: str, window: str) -> Batch:
        asked = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": window}
        return await self._json("POST", "/v1/batches", json=asked)

    async def batch(self, batch_id: str) -> Batch:
        return await self._json("GET", f"/v1/batches/{batch_id}")

    async def batches(self, limit: int) -> list[Batch]:
        listed: list[Batch] = (await self._json("GET", "/v1/batches", params={"limit": limit}))["data"]
        return listed

    async def download(self, file_id: str, to: Path) -> None:
        """The whole file or nothing."""
        part = to.with_name(f"{to.name}.part")
        async with self._answer("GET", f"/v1/files/{file_id}/content", limit_s=UPLOAD_S) as answer:
            with part.open("wb") as out:
                async for piece in answer.content.iter_chunked(1 << 20):
                    out.write(piece)
        part.replace(to)

    async def _json(self, method: str, path: str, limit_s: float = ANSWER_S, **body: Any) -> dict[str, Any]:
        async with self._answer(method, path, limit_s, **body) as answer:
            found: dict[str, Any] = await answer.json()
            return found

    @contextlib.asynccontextmanager
    async def _answer(
        self, method: str, path: str, limit_s: float, **body: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        timeout = aiohttp.ClientTimeout(total=limit_s)
        try:
            async with self._session.request(method, self._base_url + path, timeout=timeout, **body) as answer:
                if answer.status != 200:
                    raise ApiError(_said(answer.status, await answer.text()))
                yield answer
        except (aiohttp.ClientError, TimeoutError, ValueError) as e:
            raise ApiError(f"no answer from {self._base_url}: {str(e) or type(e).__name__}") from None


def _said(status: int, body: str) -> str:
    try:
        error = json.loads(body)["error"]
        return f"{error['message']} ({status}{', ' + error['code'] if error.get('code') else ''})"
    except (ValueError, TypeError, KeyError):
        return f"status {status}: {body[:200]}"


async def submit(
    api: Api, file: Path, endpoint: str, window: str, *, wait: bool = False, output: Path | None = None
) -> int:
    """Exit status: 0 for a batch that was taken (with ``wait``: that completed). Raises ApiError, OSError."""
    uploaded = await api.upload(file)
    print(f"{uploaded['id']}: {uploaded['bytes']:,} bytes", flush=True)
    batch = await api.create(uploaded["id"], endpoint or _endpoint_of(file), window)
    print(f"{batch['id']}: {batch['status']}", flush=True)
    if wait:
        batch = await follow(api, batch)
    return await _report(api, batch, output)


def _endpoint_of(file: Path) -> str:
    """The first line's; whether all have it is for the API to say."""
    with file.open("rb") as lines, contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(lines.readline(1 << 20))["url"])
    return CHAT


async def status(api: Api, batch_id: str, *, wait: bool = False, output: Path | None = None, limit: int = 20) -> int:
    """Of one batch, or of the newest ones. Raises ApiError, OSError."""
    if not batch_id:
        _list(await api.batches(limit))
        return 0
    batch = await api.batch(batch_id)
    if wait:
        batch = await follow(api, batch)
    else:
        _list([batch])
    return await _report(api, batch, output)


async def _report(api: Api, batch: Batch, output: Path | None) -> int:
    """The end of a batch that is over, or that will fail: what is wrong on which line, its files."""
    errors = (batch.get("errors") or {"data": []})["data"]
    for error in errors[:SHOWN_ERRORS]:
        where = f"line {error['line']}: " if error["line"] is not None else ""
        print(f"{where}{error['message']} ({error['code']})", file=sys.stderr)
    if len(errors) > SHOWN_ERRORS:
        print(f"... and {len(errors) - SHOWN_ERRORS} more", file=sys.stderr)
    if batch["status"] in TERMINAL:
        print(_summary(batch))
        if output is not None:
            failed = output.with_suffix(f".errors{output.suffix}")
            for file_id, to in ((batch["output_file_id"], output), (batch["error_file_id"], failed)):
                if file_id:
                    await api.download(file_id, to)
                    print(f"{file_id}: {to}")
    return 1 if errors or (batch["status"] in TERMINAL and batch["status"] != "completed") else 0


def _summary(batch: Batch) -> str:
    counts, usage = batch["request_counts"], batch.get("usage")
    text = f"{batch['status']}: {counts['completed']} of {counts['total']} lines answered, {counts['failed']} failed"
    if not usage:
        return text
    cached = usage["input_tokens_details"]["cached_tokens"]
    return f"{text}; {usage['input_tokens']:,} prompt tokens ({cached:,} cached), {usage['output_tokens']:,} generated"


async def follow(api: Api, batch: Batch) -> Batch:
    """Until it is over. Interrupted, it says that the batch is not."""
    wait_s = FIRST_LOOK_S
    with _shower() as show, _going_on(batch["id"]):
        show(batch)
        while batch["status"] not in TERMINAL:
            await asyncio.sleep(wait_s)
            wait_s = min(LAST_LOOK_S, wait_s * 1.3)
            batch = await api.batch(batch["id"])
            show(batch)
    return batch


@contextlib.contextmanager
def _going_on(batch_id: str) -> Iterator[None]:
    try:
        yield
    except asyncio.CancelledError:
        print(f"{batch_id} goes on; to follow it again: batchgw status {batch_id} --wait", file=sys.stderr)
        raise


def _shower() -> contextlib.AbstractContextManager[Callable[[Batch], None]]:
    return _bar() if sys.stdout.isatty() else contextlib.nullcontext(_Plain())


class _Plain:
    """A line for each new status, and one every few seconds."""

    def __init__(self) -> None:
        self._status, self._at_s = "", 0.0

    def __call__(self, batch: Batch) -> None:
        if batch["status"] != self._status or time.monotonic() - self._at_s >= PLAIN_EVERY_S:
            self._status, self._at_s = batch["status"], time.monotonic()
            print(_line(batch), flush=True)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Batch], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("validating", total=None)

        def show(batch: Batch) -> None:
            counts = batch["request_counts"]
            failed = f", {counts['failed']} failed" if counts["failed"] else ""
            done = counts["completed"] + counts["failed"]
            progress.update(task, description=batch["status"] + failed, total=counts["total"] or None, completed=done)

        yield show


def _list(batches: Sequence[Batch]) -> None:
    if not sys.stdout.isatty():
        for batch in batches:
            print(_line(batch))
        return
    from rich.console import Console
    from rich.progress_bar import ProgressBar
    from rich.table import Column, Table

    table = Table(Column("batch", no_wrap=True), "status", "", "lines", "age", box=None, padding=(0, 1, 0, 0))
    for batch in batches:
        counts = batch["request_counts"]
        done = counts["completed"] + counts["failed"]
        bar = ProgressBar(total=max(1, counts["total"]), completed=done, width=10)
        lines = f"{done}/{counts['total']}" + (f", {counts['failed']} failed" if counts["failed"] else "")
        table.add_row(batch["id"], batch["status"], bar, lines, _age(time.time() - batch["created_at"]))
    Console().print(table)


def _line(batch: Batch) -> str:
    counts = batch["request_counts"]
    done = counts["completed"] + counts["failed"]
    return (
        f"{batch['id']} {batch['status']} {done}/{counts['total']} lines, {counts['failed']} failed, "
        f"created {_clock(batch['created_at'])}"
    )


def _clock(unix_s: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))


def _age(seconds: float) -> str:
    units = ((86400, "d"), (3600, "h"), (60, "m"))
    return next((f"{seconds / size:.0f}{unit}" for size, unit in units if seconds >= size), f"{max(0, seconds):.0f}s")


def read_key(path: str) -> str:
    """The API key that a file holds. Raises OSError, ApiError."""
    key = Path(path).read_text(errors="replace").strip() if path != os.devnull else ""
    if not key or not key.isprintable():
        raise ApiError(f"{path} holds no API key")
    return key
