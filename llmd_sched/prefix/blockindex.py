"""Which endpoint holds which block on which medium, as told by the engines.

One dict maps a block key to its holders, as the bits of an integer; a holder is an endpoint's cache on one medium
("tier"). A lookup walks a prompt's keys once, joins neighbours with the same holders, and unpacks what is left, often
a handful of integers, into one matrix, from which come every endpoint's contiguous run from block 0 and the best tier
of each of its blocks. There is no limit of holders to a block.

A block that was announced several times (by tensor-parallel ranks, or cached twice) stays until it was removed as
often.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice, repeat, takewhile
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmd_sched.types import Array

MAX_TIERS = 8
"""Per endpoint; their names come from the network."""

SWEEP_SHARE = 32
"""A full index drops this fraction of its keys at once."""

ROWS = 256
"""So many different neighbours are unpacked at once."""


class Runs(NamedTuple):
    """What each endpoint holds of a prompt from its first block on, shapes (endpoints,), by an endpoint's number."""

    blocks: Array
    weighted: Array
    """The same blocks, each counted with the weight of the best tier it is on."""


class _Holder(NamedTuple):
    """Its number is its position in the index's list and in the bits."""

    endpoint: int
    weight: float
    counts: dict[int, int]
    """Key -> how often it was announced and not yet removed."""


class _Layout(NamedTuple):
    """How columns of holders become columns of endpoints."""

    order: NDArray[np.intp]
    """Holders, those of an endpoint side by side."""
    weights: Array
    """Of the holders in this order."""
    starts: NDArray[np.intp]
    """Where in it an endpoint's begin."""
    endpoints: NDArray[np.intp]


class BlockIndex:
    """Endpoints are small integers that may be used anew after ``forget``. At most ``size`` keys, oldest dropped."""

    def __init__(self, size: int, weights: Mapping[str, float]) -> None:
        """``weights``: tier -> what a block on it is worth; 1.0 for others."""
        self.size = size
        self.admissions = self.evictions = 0
        """Blocks that came to a holder, and that left one, however."""
        self.suppressed = self.forwarded = 0
        """Removals of a block that was announced once more, and those that took effect."""
        self._weights = weights
        self._keys: dict[int, int] = {}
        self._holders: list[_Holder] = []
        self._numbers: dict[int, dict[str, int]] = {}
        """Endpoint -> tier -> number of the holder."""
        self._bits: dict[int, int] = {}
        """Endpoint -> its holders."""
        self._free: list[int] = []
        self._layout: _Layout | None = None

    def __len__(self) -> int:
        return len(self._keys)

    def holds(self, endpoint: int, key: int) -> bool:
        return bool(self._keys.get(key, 0) & self._bits.get(endpoint, 0))

    def add(self, endpoint: int, tier: str, keys: Sequence[int]) -> bool:
        """False when the endpoint has too many tiers already."""
        number = self._number(endpoint, tier)
        if number < 0:
            return False
        counts, bits, bit = self._holders[number].counts, self._keys, 1 << number
        known = len(counts)
        for key in keys:
            if key in counts:
                counts[key] += 1
            else:
                counts[key] = 1
                bits[key] = bits.get(key, 0) | bit
        self.admissions += len(counts) - known
        if len(bits) > self.size:
            self._drop_oldest(len(bits) - self.size + self.size // SWEEP_SHARE)
        return True

    def remove(self, endpoint: int, tier: str, keys: Sequence[int]) -> None:
        """Take back one announcement of each."""
        number = self._numbers.get(endpoint, {}).get(tier, -1)
        if number < 0:
            return
        counts = self._holders[number].counts
        for key in keys:
            count = counts.get(key, 0)
            if count > 1:
                counts[key] = count - 1
                self.suppressed += 1
            elif count:
                self.forwarded += 1
                del counts[key]
                self._clear(key, 1 << number)

    def drop(self, endpoint: int, keys: Sequence[int]) -> None:
        """However often they were announced, and on whatever tier."""
        for number in self._numbers.get(endpoint, {}).values():
            counts = self._holders[number].counts
            for key in keys:
                if counts.pop(key, 0):
                    self._clear(key, 1 << number)

    def forget(self, endpoint: int) -> None:
        """Drop all that the endpoint held."""
        self._layout = None
        self._bits.pop(endpoint, None)
        for number in self._numbers.pop(endpoint, {}).values():
            for key in self._holders[number].counts:
                self._clear(key, 1 << number)
            self._holders[number].counts.clear()
            self._free.append(number)

    def _clear(self, key: int, bit: int) -> None:
        self.evictions += 1
        left = self._keys[key] & ~bit
        if left:
            self._keys[key] = left
        else:
            del self._keys[key]

    def _drop_oldest(self, count: int) -> None:
        # In one sweep: looking for a dict's first key walks over all that were deleted before it.
        for key in list(islice(self._keys, count)):
            for number in _positions(self._keys.pop(key)):
                del self._holders[number].counts[key]
                self.evictions += 1

    def _number(self, endpoint: int, tier: str) -> int:
        """Of the holder, made when it is new; -1 when there are too many."""
        tiers = self._numbers.setdefault(endpoint, {})
        if tier not in tiers:
            if len(tiers) >= MAX_TIERS:
                return -1
            self._layout = None
            holder = _Holder(endpoint, self._weights.get(tier, 1.0), {})
            if self._free:
                tiers[tier] = self._free.pop()
                self._holders[tiers[tier]] = holder
            else:
                tiers[tier] = len(self._holders)
                self._holders.append(holder)
            self._bits[endpoint] = self._bits.get(endpoint, 0) | 1 << tiers[tier]
        return tiers[tier]

    def match(self, keys: Sequence[int], endpoints: int) -> Runs:
        """What each of the endpoints, numbered from 0, holds of a prompt with these block keys."""
        runs = Runs(np.zeros(endpoints), np.zeros(endpoints))
        lasts: NDArray[np.bool_] | None = None
        for bits, lengths in _neighbours(map(self._keys.get, keys, repeat(0))):
            layout = self._layout = self._layout or self._lay_out()
            held = _unpacked(bits, len(self._holders))[:, layout.order]
            holds = np.logical_or.reduceat(held, layout.starts, axis=1)
            if lasts is not None:
                holds[0] &= lasts
            holds = np.logical_and.accumulate(holds, axis=0)
            best = np.maximum.reduceat(held * layout.weights, layout.starts, axis=1)
            runs.blocks[layout.endpoints] += lengths @ holds
            runs.weighted[layout.endpoints] += lengths @ (best * holds)
            lasts = holds[-1]
            if not lasts.any():
                break
        return runs

    def _lay_out(self) -> _Layout:
        numbers = [(endpoint, n) for endpoint, tiers in self._numbers.items() for n in tiers.values()]
        owners, order = np.array(numbers, dtype=np.intp).T
        starts = np.flatnonzero(np.diff(owners, prepend=-1))
        weights = np.array([self._holders[n].weight for n in order])
        return _Layout(order, weights, starts, owners[starts])


def _neighbours(bits: Iterator[int]) -> Iterator[tuple[list[int], Array]]:
    """Runs of equal integers, until one is 0: which, and how long, ROWS of them at a time."""
    runs = takewhile(itemgetter(0), ((one, len(list(same))) for one, same in groupby(bits)))
    while part := list(islice(runs, ROWS)):
        yield [one for one, _ in part], np.array([length for _, length in part], dtype=np.float64)


def _unpacked(rows: list[int], bits: int) -> NDArray[np.bool_]:
    """The bits of each, lowest first, shape (len(rows), at least ``bits``)."""
    width = -(-bits // 8)
    data = b"".join([row.to_bytes(width, "little") for row in rows])
    packed = np.frombuffer(data, dtype=np.uint8).reshape(len(rows), width)
    return np.unpackbits(packed, axis=1, bitorder="little").view(np.bool_)


def _positions(bits: int) -> list[int]:
    """Of the bits that are set."""
    found = []
    while bits:
        low = bits & -bits
        found.append(low.bit_length() - 1)
        bits ^= low
    return found
