"""Hashes that must equal the reference's, bit for bit."""

from __future__ import annotations

import struct
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.prefix.hashing import block_hashes, continued, xxh64
from tests.builders import fuzzed, prompt


def ids(*tokens: int) -> bytes:
    return struct.pack(f"<{len(tokens)}I", *tokens)


@pytest.mark.parametrize(
    ("data", "digest"),
    [
        (b"", 0xEF46DB3751D8E999),
        (b"a", 0xD24EC4F1A98C6E5B),
        (b"abc", 0x44BC2CF5AD770999),
        (b"Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1),
    ],
)
def test_xxh64_gives_the_published_digests(data: bytes, digest: int) -> None:
    assert xxh64(data) == digest


@pytest.mark.parametrize("length", [*range(72), 127, 128, 129, 1000, 65537])
def test_xxh64_agrees_with_the_xxhash_package(length: int) -> None:
    xxhash = pytest.importorskip("xxhash")
    data = Random(length).randbytes(length)
    assert xxh64(data) == xxhash.xxh64_intdigest(data)


def test_token_ids_give_the_reference_chain() -> None:
    hashes = block_hashes(ids(*range(130)), "m", 64, 100)
    assert hashes.tolist() == [0x9504D79D090C075D, 0x02E5E0D1AB3A2586, 0x7B0454186E99F289]
    assert hashes.dtype == np.uint64


def test_text_counts_four_bytes_to_a_token() -> None:
    text = b"The quick brown fox"
    assert struct.unpack("<5I", text + b"\0") == (543516756, 1667855729, 1919033451, 544110447, 7892838)
    assert block_hashes(text, "m", 64, 100).tolist() == [0x4B8E04255AFFE403]


def test_text_and_its_token_ids_hash_alike() -> None:
    text = b"The quick brown fox."
    assert block_hashes(text, "m", 2, 9).tolist() == block_hashes(ids(*struct.unpack("<5I", text)), "m", 2, 9).tolist()


@pytest.mark.parametrize(
    ("tokens", "limit", "blocks"),
    [(0, 9, 0), (1, 9, 1), (63, 9, 1), (64, 9, 1), (65, 9, 2), (640, 9, 9), (640, 0, 0), (640, 1, 1)],
)
def test_a_started_block_is_hashed_and_the_limit_holds(tokens: int, limit: int, blocks: int) -> None:
    assert len(block_hashes(bytes(4 * tokens), "m", 64, limit)) == blocks


def test_a_limit_cuts_the_chain_and_changes_nothing_before() -> None:
    text = prompt(5)
    assert block_hashes(text, "m", 64, 3).tolist() == block_hashes(text, "m", 64, 9).tolist()[:3]


def test_model_and_salt_root_the_chain() -> None:
    text = prompt(2)
    chains = [block_hashes(text, root, 64, 9).tolist() for root in ("m", "n", "msalt", "")]
    assert len({h for chain in chains for h in chain}) == 8


def test_a_root_is_hashed_as_utf8() -> None:
    assert block_hashes(prompt(1), "modèle", 64, 9).tolist() != block_hashes(prompt(1), "modele", 64, 9).tolist()


@fuzzed
@given(st.binary(min_size=1, max_size=200), st.integers(0, 199), st.sampled_from([1, 2, 7]))
def test_hashes_agree_exactly_as_far_as_the_prompts_do(text: bytes, at: int, block_tokens: int) -> None:
    at %= len(text)
    other = text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :]
    same, changed = (block_hashes(t, "m", block_tokens, 999).tolist() for t in (text, other))
    first = at // (4 * block_tokens)
    assert same[:first] == changed[:first]
    assert not set(same[first:]) & set(changed[first:])


@fuzzed
@given(st.binary(max_size=100), st.binary(max_size=100), st.sampled_from([1, 2, 7]), st.integers(0, 20))
def test_a_chain_goes_on_as_if_all_had_been_there_from_the_start(
    begun: bytes, more: bytes, block_tokens: int, limit: int
) -> None:
    block_bytes = 4 * block_tokens
    full = min(len(begun) // block_bytes, limit)
    chain = block_hashes(begun, "m", block_tokens, limit)[:full]
    whole = block_hashes(begun + more, "m", block_tokens, limit)[: len(begun + more) // block_bytes]
    assert continued(chain, begun[full * block_bytes :] + more, "m", block_tokens, limit).tolist() == whole.tolist()
