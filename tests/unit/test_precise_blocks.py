"""Block keys that must equal the reference's, bit for bit."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from llmd_sched.prefix.blocks import Algorithm, BlockKeys, tokens_of

FNV, XXH = Algorithm.CBOR_FNV, Algorithm.XXH64


def tokens(count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.uint32)


@pytest.mark.parametrize(
    ("algorithm", "root", "blocks"),
    [
        (FNV, 0x9DDB2DB69F3F452C, [0x6B03331A89270195, 0x338DADF83464FCE0]),
        (XXH, 0xC90CBF5421A4994B, [0x5317A154BFE36A86, 0xCEF81508F75D55B7]),
    ],
)
def test_chains_give_the_reference_vectors(algorithm: Algorithm, root: int, blocks: list[int]) -> None:
    keys = BlockKeys(algorithm)
    assert keys.root("m") == root
    assert keys.chain(tokens(32), root) == blocks
    assert keys.chain(tokens(47), root) == blocks  # only full blocks
    assert keys.chain(tokens(16, 16), blocks[0]) == blocks[1:]
    assert keys.chain(tokens(15), root) == []


def test_a_salt_is_an_extra_of_the_first_block() -> None:
    keys = BlockKeys(FNV)
    salted = keys.chain(tokens(32), keys.root("m"), {0: ("salt",)})
    assert salted[0] == 0xC255F184BA55D007
    assert salted[1] == keys.chain(tokens(16, 16), salted[0])[0]


def fnv(data: bytes) -> int:
    h = 0xCBF29CE484222325
    for byte in data:
        h = (h ^ byte) * 0x100000001B3 % (1 << 64)
    return h


def cbor(value: object) -> bytes:
    """Canonical CBOR of what block keys are made of, written a second time and straight from the RFC."""
    if value is None:
        return b"\xf6"
    if isinstance(value, list):
        return head(4, len(value)) + b"".join(map(cbor, value))
    if isinstance(value, dict):
        return head(5, len(value)) + b"".join(cbor(k) + cbor(v) for k, v in value.items())
    if isinstance(value, str):
        return head(3, len(value.encode())) + value.encode()
    assert isinstance(value, int)
    return head(0, value)


def head(major: int, argument: int) -> bytes:
    if argument < 24:
        return bytes([major << 5 | argument])
    for info, width in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if argument < 1 << 8 * width:
            return bytes([major << 5 | info]) + argument.to_bytes(width, "big")
    raise AssertionError(argument)


@pytest.mark.parametrize("block_tokens", [1, 16, 24, 300])
def test_cbor_of_every_width_is_the_shortest(block_tokens: int) -> None:
    edges = [0, 23, 24, 255, 256, 65535, 65536, 2**32 - 1]
    ids = np.array([Random(7).choice(edges) for _ in range(2 * block_tokens)], dtype=np.uint32)
    keys, texts = BlockKeys(FNV, "seed", block_tokens), ("a", "ü" * 20, "x" * 300)
    root = fnv(cbor([fnv(b"seed"), None, "a/model"]))
    first = fnv(cbor([root, ids[:block_tokens].tolist(), [{"Hash": text} for text in texts]]))
    second = fnv(cbor([first, ids[block_tokens:].tolist(), None]))
    assert keys.root("a/model") == root
    assert keys.chain(ids, root, {0: texts}) == [first, second]


@pytest.mark.parametrize("parent", [0, 23, 24, 255, 256, 1 << 16, 1 << 32, 2**64 - 1])
def test_parents_of_every_width_are_hashed_as_integers(parent: int) -> None:
    assert BlockKeys(FNV, "", 2).chain(tokens(2), parent) == [fnv(cbor([parent, [0, 1], None]))]


def test_xxh64_covers_parent_tokens_and_sized_extras() -> None:
    xxhash = pytest.importorskip("xxhash")
    keys, texts = BlockKeys(XXH, "s", 4), ("ab", "cde")
    ids = np.array([1, 2**32 - 1, 7, 70000], dtype=np.uint32)
    extra = b"".join(len(t).to_bytes(8, "little") + t.encode() for t in texts)
    root = xxhash.xxh64_intdigest(xxhash.xxh64(b"s").digest()[::-1] + b"\1" + bytes(7) + b"m")
    assert keys.root("m") == root
    expected = xxhash.xxh64_intdigest(root.to_bytes(8, "little") + ids.astype("<u4").tobytes() + extra)
    assert keys.chain(ids, root, {0: texts}) == [expected]


@pytest.mark.parametrize("algorithm", [FNV, XXH])
def test_extras_change_their_block_and_all_behind_it(algorithm: Algorithm) -> None:
    keys = BlockKeys(algorithm, "", 2)
    plain = keys.chain(tokens(10), 5)
    tainted = keys.chain(tokens(10), 5, {2: ("image",), 3: ("image",)})
    assert tainted[:2] == plain[:2]
    assert not set(tainted[2:]) & set(plain[2:])
    assert keys.chain(tokens(10), 5, {2: ("image",)})[2:4] != tainted[3:]


def test_models_and_seeds_do_not_share_blocks() -> None:
    roots = {BlockKeys(a, seed).root(model) for a in (FNV, XXH) for seed in ("", "s") for model in ("m", "n")}
    assert len(roots) == 8


@pytest.mark.parametrize("size", [0, 1, 3, 4, 7, 8])
def test_a_prompt_is_its_token_ids(size: int) -> None:
    assert tokens_of(bytes(range(size))).tolist() == [0x03020100, 0x07060504][: size // 4]
