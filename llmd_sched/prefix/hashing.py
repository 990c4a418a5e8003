"""Chained block hashes of a prompt, compatible with the reference's approximate index.

With ``model`` and ``salt`` concatenated as UTF-8, and a block of ``4 * block_tokens`` bytes:

    h[-1] = xxh64(model || salt)      b[i] = xxh64(block i)      h[i] = xxh64(LE64(b[i]) || LE64(h[i-1]))

Text counts four bytes to a token, zero padded at the end, so the little-endian token ids of a block *are* its bytes.
The last, partial block is hashed too. xxh64 is Yann Collet's 64-bit hash (github.com/Cyan4973/xxHash, its
specification), seed 0, compiled by Numba: 400 KB of prompt take about 0.3 ms.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import njit
from numpy.typing import NDArray

BYTES_PER_TOKEN = 4

Hashes = NDArray[np.uint64]

_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)
_P4 = np.uint64(0x85EBCA77C2B2AE63)
_P5 = np.uint64(0x27D4EB2F165667C5)


@njit(inline="always")
def _rotl(x, r):  # type: ignore[no-untyped-def]
    return (x << np.uint64(r)) | (x >> np.uint64(64 - r))


@njit(inline="always")
def _read(data, at, width):  # type: ignore[no-untyped-def]
    value = np.uint64(0)
    for i in range(width):
        value |= np.uint64(data[at + i]) << np.uint64(8 * i)
    return value


@njit(inline="always")
def _round(acc, lane):  # type: ignore[no-untyped-def]
    return _rotl(acc + lane * _P2, 31) * _P1


@njit(inline="always")
def _avalanche(h):  # type: ignore[no-untyped-def]
    h = (h ^ (h >> np.uint64(33))) * _P2
    h = (h ^ (h >> np.uint64(29))) * _P3
    return h ^ (h >> np.uint64(32))


@njit  # not cached by itself: Numba must not load one kernel both alone and inside another
def _xxh64(data, start, end):  # type: ignore[no-untyped-def]
    n = end - start
    at = start
    if n >= 32:
        a, b, c, d = _P1 + _P2, _P2, np.uint64(0), np.uint64(0) - _P1
        while at + 32 <= end:
            a = _round(a, _read(data, at, 8))
            b = _round(b, _read(data, at + 8, 8))
            c = _round(c, _read(data, at + 16, 8))
            d = _round(d, _read(data, at + 24, 8))
            at += 32
        h = _rotl(a, 1) + _rotl(b, 7) + _rotl(c, 12) + _rotl(d, 18)
        for acc in (a, b, c, d):
            h = (h ^ _round(np.uint64(0), acc)) * _P1 + _P4
    else:
        h = _P5
    h += np.uint64(n)
    while at + 8 <= end:
        h = _rotl(h ^ _round(np.uint64(0), _read(data, at, 8)), 27) * _P1 + _P4
        at += 8
    if at + 4 <= end:
        h = _rotl(h ^ (_read(data, at, 4) * _P1), 23) * _P2 + _P3
        at += 4
    while at < end:
        h = _rotl(h ^ (np.uint64(data[at]) * _P5), 11) * _P1
        at += 1
    return _avalanche(h)


@njit(cache=True)
def _chain(data, block_bytes, blocks, parent):  # type: ignore[no-untyped-def]
    out = np.empty(blocks, dtype=np.uint64)
    pair = np.empty(16, dtype=np.uint8)
    for i in range(blocks):
        b = _xxh64(data, i * block_bytes, min((i + 1) * block_bytes, len(data)))
        for k in range(8):
            pair[k] = np.uint8((b >> np.uint64(8 * k)) & np.uint64(255))
            pair[8 + k] = np.uint8((parent >> np.uint64(8 * k)) & np.uint64(255))
        parent = _xxh64(pair, 0, 16)
        out[i] = parent
    return out


@njit(cache=True)
def _digest(data):  # type: ignore[no-untyped-def]
    return _xxh64(data, 0, len(data))


def xxh64(data: bytes) -> int:
    """xxHash64 of ``data``, seed 0."""
    return int(_digest(np.frombuffer(data, dtype=np.uint8)))


@lru_cache(maxsize=1024)
def _root_hash(root: str) -> np.uint64:
    return np.uint64(xxh64(root.encode()))


def block_hashes(prompt: bytes, root: str, block_tokens: int, max_blocks: int) -> Hashes:
    """Chain hashes of ``prompt``, head first, at most ``max_blocks`` of them.

    ``root`` is model and cache salt, concatenated. Shape (ceil(tokens / block_tokens),) or shorter.
    """
    data = prompt + bytes(-len(prompt) % BYTES_PER_TOKEN)
    block_bytes = block_tokens * BYTES_PER_TOKEN
    blocks = min(-(-len(data) // block_bytes), max_blocks)
    return _chain(np.frombuffer(data, dtype=np.uint8), block_bytes, blocks, _root_hash(root))  # type: ignore[no-any-return]


def continued(chain: Hashes, more: bytes, root: str, block_tokens: int, max_blocks: int) -> Hashes:
    """``chain``, which hashes full blocks only, and then the full blocks of ``more``, the bytes that follow them.

    At most ``max_blocks`` in all. A started block is left out: nobody knows yet how it will end.
    """
    block_bytes = block_tokens * BYTES_PER_TOKEN
    blocks = max(0, min(len(more) // block_bytes, max_blocks - len(chain)))
    parent = chain[-1] if len(chain) else _root_hash(root)
    return np.concatenate((chain, _chain(np.frombuffer(more, dtype=np.uint8), block_bytes, blocks, parent)))
