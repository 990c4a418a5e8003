"""What every place for file contents does alike: memory, a local folder, and a server that speaks S3."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from unittest import mock

import pytest
from moto.server import ThreadedMotoServer

from batchgw.blobs import PART_BYTES, BlobMissing, BlobOptions, Blobs, BlobTooLarge, key


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Its URL; it has the bucket ``blobs``."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    import boto3

    with mock.patch.dict(os.environ, {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}):
        boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="blobs")
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["memory", "folder", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    if request.param == "memory":
        return Blobs.open("memory://")
    if request.param == "folder":
        return Blobs.open(str(tmp_path / "blobs"))
    options = BlobOptions(
        endpoint=request.getfixturevalue("s3"),
        region="us-east-1",
        access_key_id="x",
        secret_access_key="x",
        path_style=True,
    )
    return Blobs.open(f"s3://blobs/{uuid.uuid4().hex}", options)


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def read(blobs: Blobs, name: str, start: int = 0, stop: int | None = None) -> bytes:
    return b"".join([part async for part in blobs.stream(name, start, stop)])


async def test_what_was_put_is_read_whole_in_ranges_and_from_the_middle(blobs: Blobs) -> None:
    name = key("ada", "file-1.jsonl")
    assert await blobs.put(name, pieces(b"hello ", b"", b"world"), 100) == 11
    assert await blobs.size(name) == 11
    assert await read(blobs, name) == b"hello world"
    assert await read(blobs, name, 3, 8) == b"lo wo"
    assert await blobs.get_range(name, 6, 11) == b"world"
    assert await blobs.get_ranges(name, [(6, 11), (0, 5)]) == [b"world", b"hello"]


async def test_what_was_written_before_a_time_is_listed_and_nothing_younger(blobs: Blobs) -> None:
    names = {key("ada", f"file-{n}.jsonl") for n in range(3)}
    for name in names:
        await blobs.put(name, pieces(b"x"), 10)
    assert {name async for page in blobs.older(time.time() + 60) for name in page} == names
    assert [page async for page in blobs.older(time.time() - 60) if page] == []


async def test_parts_of_a_cut_upload_are_removed_from_a_folder_and_whole_files_are_not(tmp_path: Path) -> None:
    blobs, name = Blobs.open(str(tmp_path / "blobs")), key("ada", "file-1.jsonl")
    await blobs.put(name, pieces(b"x"), 10)
    cut = tmp_path / "blobs" / f"{name}#1"
    cut.write_bytes(b"half")
    assert await blobs.remove_cut(time.time() - 60) == 0
    assert await blobs.remove_cut(time.time() + 60) == 1
    assert not cut.exists()
    assert await read(blobs, name) == b"x"


async def test_a_blob_of_several_parts_is_put_together_in_order(blobs: Blobs) -> None:
    parts = [bytes([n]) * (PART_BYTES // 2 + 1) for n in range(5)]
    size = await blobs.put("many", pieces(*parts), 1 << 30)
    assert size == sum(map(len, parts))
    assert await read(blobs, "many") == b"".join(parts)


async def test_too_much_leaves_nothing_behind(blobs: Blobs) -> None:
    with pytest.raises(BlobTooLarge, match="10 bytes"):
        await blobs.put("big", pieces(b"12345", b"678901"), 10)
    assert await blobs.size("big") is None


async def test_a_source_that_fails_leaves_nothing_behind(blobs: Blobs) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 1000
        raise RuntimeError("the client is gone")

    with pytest.raises(RuntimeError, match="the client is gone"):
        await blobs.put("half", broken(), 1 << 20)
    assert await blobs.size("half") is None


async def test_what_is_not_there_is_told_and_may_be_deleted(blobs: Blobs) -> None:
    assert await blobs.size("none") is None
    with pytest.raises(BlobMissing, match="none"):
        await read(blobs, "none")
    with pytest.raises(BlobMissing, match="none"):
        await blobs.get_range("none", 0, 5)
    await blobs.delete("none")


async def test_what_is_deleted_is_gone(blobs: Blobs) -> None:
    await blobs.put("gone", pieces(b"x"), 10)
    await blobs.delete("gone")
    assert await blobs.size("gone") is None


@pytest.mark.parametrize("name", ["", "../etc/passwd", "a/b", ".hidden", "a\\b", "a\0b", "x" * 201, "ä"])
def test_a_name_that_could_leave_its_folder_makes_no_key(name: str) -> None:
    with pytest.raises(ValueError, match="accepted"):
        key("ada", name)


def test_tenants_have_folders_of_their_own_whatever_they_are_called() -> None:
    folders = {key(tenant, "f").partition("/")[0] for tenant in ("ada", "../ada", "ada/", "", "ADA")}
    assert len(folders) == 5
    assert all(len(folder) == 63 and folder.isascii() for folder in folders)


@pytest.mark.parametrize("url", ["", "http://x/y", "s3://", "file://host/x", "ftp://a/b"])
def test_a_url_of_another_kind_is_refused_with_what_is_accepted(url: str) -> None:
    with pytest.raises(ValueError, match="accepted"):
        Blobs.open(url)
