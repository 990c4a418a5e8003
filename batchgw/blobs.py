"""Where file contents live: a local folder, or an object store of Amazon, Google, Azure or one that speaks S3.

Blobs are written once and never changed, so reads may be split: a download is many bounded range requests, and a slow
reader holds none of them open. Requests are retried ``RETRIES`` times with backoff before BlobsUnavailable.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

import msgspec
import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, MemoryStore, from_url

if TYPE_CHECKING:  # these are types only
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

PART_BYTES = 8 << 20
"""Of a multipart upload (S3 takes 5 MiB to 5 GiB, and 10,000 of them) and of a read in a download."""
PARTS_AT_ONCE = 2
RETRIES = 3
REQUEST_S = 60.0
RETRYING_S = 120.0
ACCEPTED = "a folder, file:///a/folder, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix"
LISTED = 500
"""Keys of one page."""
_STAGED = re.compile(r"[A-Za-z0-9._-]+#\d+")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class BlobError(Exception):
    """Base of what the blob store raises."""


class BlobMissing(BlobError):
    """There is no blob of that key."""


class BlobTooLarge(BlobError):
    """More bytes came than allowed; nothing was kept."""


class BlobsUnavailable(BlobError):
    """The store could not be reached or refused, after its retries; asking again later is right."""


class BlobOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """How to reach an S3 store (others take ``extra``: obstore's own option names); None: from the environment.

    ``path_style``: the bucket is in the path, not in the host name. An ``endpoint`` may be plain http.
    """

    endpoint: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None
    path_style: bool = False
    extra: dict[str, str] = {}


def key(tenant: str, name: str) -> str:
    """The one way a key is made: the tenant's folder and a file name; ValueError for a name that is no file name."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a blob's name; accepted: letters, digits, '.', '_' and '-', 200 at most")
    return f"t-{hashlib.sha256(tenant.encode()).hexdigest()[:61]}/{name}"


class Blobs:
    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @classmethod
    def open(cls, url: str, options: BlobOptions | None = None) -> Blobs:
        """``/a/folder``, ``file:///a/folder``, ``s3://bucket/prefix``, ``gs://``, ``az://``, ``memory://`` (tests).

        ValueError for anything else; that a server is there shows with the first request.
        """
        parts = urlsplit(url)
        match parts.scheme:
            case "" if parts.path:
                return cls(_folder(Path(url)))
            case "file" if not parts.netloc and parts.path:
                return cls(_folder(Path(unquote(parts.path))))
            case "memory":
                return cls(MemoryStore())
            case "s3" | "gs" | "az" if parts.netloc:
                return cls(_remote(url, options or BlobOptions()))
        raise ValueError(f"blob URL {url!r}: accepted: {ACCEPTED}")

    async def put(self, key: str, data: AsyncIterator[bytes], limit_bytes: int) -> int:
        """Streams ``data`` in; its size. Nothing is left behind when it raises: BlobTooLarge, or what ``data`` does.

        Holds ``PARTS_AT_ONCE`` parts in memory. ``data`` sets the pace, so its time limit is the caller's.
        """
        meter = _Meter(data, limit_bytes)
        with _told(key):
            await obstore.put_async(
                self._store,
                key,
                aiter(meter),
                use_multipart=True,
                chunk_size=PART_BYTES,
                max_concurrency=PARTS_AT_ONCE,
            )
        return meter.size

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Raises BlobMissing, and BlobError for a start beyond the end."""
        if stop <= start:
            return b""
        with _told(key):
            async with asyncio.timeout(RETRYING_S + REQUEST_S):
                return bytes(await obstore.get_range_async(self._store, key, start=start, end=stop))

    async def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """One ``bytes`` per (start, stop), in that order; near ones are read together. Raises BlobMissing."""
        if not ranges:
            return []
        starts, ends = zip(*ranges, strict=True)
        with _told(key):
            async with asyncio.timeout(RETRYING_S + REQUEST_S):
                found = await obstore.get_ranges_async(self._store, key, starts=starts, ends=ends)
        return [bytes(part) for part in found]

    async def stream(self, key: str, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        """The bytes from ``start`` to ``stop`` (or the end) in pieces of ``PART_BYTES``; BlobMissing at the first."""
        size = await self.size(key)
        if size is None:
            raise BlobMissing(f"there is no blob {key}")
        end = size if stop is None else min(stop, size)
        for at in range(start, end, PART_BYTES):
            yield await self.get_range(key, at, min(at + PART_BYTES, end))

    async def delete(self, key: str) -> None:
        """Absent already is fine."""
        with contextlib.suppress(BlobMissing), _told(key):
            async with asyncio.timeout(RETRYING_S + REQUEST_S):
                await obstore.delete_async(self._store, key)

    async def older(self, before_s: float) -> AsyncIterator[list[str]]:
        """All keys last written before then (unix seconds), some at a time."""
        pages = aiter(obstore.list(self._store, chunk_size=LISTED))
        while True:
            with _told("listing"):
                async with asyncio.timeout(RETRYING_S + REQUEST_S):
                    page = await anext(pages, None)
            if page is None:
                return
            yield [blob["path"] for blob in page if blob["last_modified"].timestamp() < before_s]

    async def remove_cut(self, before_s: float) -> int:
        """Deletes what uploads into a folder had written when their process was killed, if before then; how many.

        An object store keeps such parts out of sight, and a lifecycle rule of its bucket deletes them.
        """
        if not isinstance(self._store, LocalStore) or self._store.prefix is None:
            return 0
        return await asyncio.to_thread(_remove_staged, Path(self._store.prefix), before_s)

    async def size(self, key: str) -> int | None:
        """Bytes; None when there is no such blob."""
        try:
            with _told(key):
                async with asyncio.timeout(RETRYING_S + REQUEST_S):
                    return (await obstore.head_async(self._store, key))["size"]
        except BlobMissing:
            return None


class _Meter:
    """Passes pieces on, counts their bytes and stops at the limit; empty pieces are dropped."""

    def __init__(self, data: AsyncIterator[bytes], limit_bytes: int) -> None:
        self._data = data
        self._limit_bytes = limit_bytes
        self.size = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._data:
            self.size += len(piece)
            if self.size > self._limit_bytes:
                raise BlobTooLarge(f"more than the {self._limit_bytes} bytes allowed")
            if piece:
                yield piece


@contextlib.contextmanager
def _told(key: str) -> Iterator[None]:
    """The client library's errors in our words; what a caller's iterator raises passes through."""
    try:
        yield
    except FileNotFoundError as error:
        raise BlobMissing(f"there is no blob {key}") from error
    except (BaseError, TimeoutError) as error:
        what = str(error).partition("\n")[0] or "no answer in time"
        raise BlobsUnavailable(f"blob {key}: {what}") from error


def _remove_staged(folder: Path, before_s: float) -> int:
    """``obstore`` writes ``name#1`` and renames it when it is whole."""
    removed = 0
    for path in folder.glob("t-*/*#*"):
        with contextlib.suppress(FileNotFoundError):
            if _STAGED.fullmatch(path.name) and path.stat().st_mtime < before_s:
                path.unlink()
                removed += 1
    return removed


def _folder(path: Path) -> LocalStore:
    path.mkdir(parents=True, exist_ok=True)
    return LocalStore(path.resolve())


def _remote(url: str, options: BlobOptions) -> ObjectStore:
    given: Mapping[str, str | None] = {
        "endpoint": options.endpoint,
        "region": options.region,
        "access_key_id": options.access_key_id,
        "secret_access_key": options.secret_access_key,
    }
    config = {name: value for name, value in given.items() if value is not None} | options.extra
    if url.startswith("s3:"):
        config["virtual_hosted_style_request"] = str(not options.path_style).lower()
    client: ClientConfig = {"timeout": timedelta(seconds=REQUEST_S), "connect_timeout": timedelta(seconds=5)}
    if options.endpoint and options.endpoint.startswith("http:"):
        client["allow_http"] = True
    retry: RetryConfig = {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRYING_S)}
    try:
        return from_url(url, config=cast("Any", config), client_options=client, retry_config=retry)
    except BaseError as error:
        raise ValueError(f"blob store {url}: {str(error).partition(chr(10))[0]}") from None
