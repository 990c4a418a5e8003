"""The blocks one endpoint is believed to hold: a bounded set of chained hashes, least recently used.

A chain hash stands for the whole prompt up to its block. Chains are noted tail first, so of two blocks of a chain the
earlier is always the more recent, and whoever holds a block holds all before it: where a run ends is found by
bisection. An insert costs a few memory accesses per block, in tables that fit a core's own cache.

``slots`` is an open-addressing table (linear probing, a power of two, at most half full) of entry numbers, 0 = empty.
Entry e has its hash in ``hashes[e]`` and its neighbours in order of use in ``older[e]`` and ``newer[e]``; entry 0
closes the ring: ``older[0]`` is the newest, ``newer[0]`` the oldest. A block takes 24 to 48 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit  # type: ignore[attr-defined]
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from llmd_sched.prefix.hashing import Hashes

MIN_ROOM_BLOCKS = 32


class Chains(NamedTuple):
    """The chained block hashes of a request's prompts, one after another."""

    hashes: Hashes
    ends: NDArray[np.int64]
    """Where each prompt's hashes end."""


def chains(of_prompts: Sequence[Hashes]) -> Chains:
    """One entry per prompt, head first; a prompt may have none."""
    hashes = of_prompts[0] if len(of_prompts) == 1 else np.concatenate([np.empty(0, np.uint64), *of_prompts])
    return Chains(hashes, np.cumsum([len(one) for one in of_prompts], dtype=np.int64))


class HeldBlocks:
    """What one endpoint holds. It takes no memory to speak of until something is inserted, and then what it needs."""

    __slots__ = ("_count", "_hashes", "_newer", "_older", "_slots", "moves")

    def __init__(self) -> None:
        self.moves = 0
        """How often its tables were replaced by others."""
        self._clear(0)

    def _clear(self, room: int) -> None:
        self._count = 0
        self.moves += 1
        self._slots = np.zeros(1 << (2 * room).bit_length() if room else 1, np.int32)
        self._hashes = np.zeros(room + 1, np.uint64)
        self._older, self._newer = np.zeros(room + 1, np.int32), np.zeros(room + 1, np.int32)

    def __len__(self) -> int:
        return self._count

    def match(self, asked: Chains) -> int:
        """How many leading blocks it holds, summed over the chains."""
        blocks: int = _match(self._slots, self._hashes, asked.hashes, asked.ends)
        return blocks

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Address and length of ``slots`` and of ``hashes``; good until ``moves`` changes."""
        return self._slots.ctypes.data, len(self._slots), self._hashes.ctypes.data, len(self._hashes)

    def insert(self, new: Chains, capacity: int) -> None:
        """Note that it holds these blocks now; the oldest beyond ``capacity`` (at least 1) are dropped."""
        room = len(self._hashes) - 1
        wanted = min(capacity, self._count + len(new.hashes))
        if not wanted <= room <= capacity:
            self._resize(min(capacity, max(2 * room, wanted, MIN_ROOM_BLOCKS)))
        self._count = _insert(self._slots, self._hashes, self._older, self._newer, self._count, *new)

    def _resize(self, room: int) -> None:
        held = chains([_newest_first(self._hashes, self._older, self._count)])
        self._clear(room)
        self._count = _insert(self._slots, self._hashes, self._older, self._newer, 0, *held)


class Crowd:
    """Several endpoints' blocks, asked at once: a call for each would cost more than what it does."""

    def __init__(self, members: Sequence[HeldBlocks]) -> None:
        self._members = tuple(members)
        self._moves = -1
        self._places: NDArray[np.int64] = np.zeros((0, 4), np.int64)

    def match(self, asked: Chains) -> NDArray[np.float64]:
        """``HeldBlocks.match`` of each, (n,)."""
        moves = sum([one.moves for one in self._members])
        if moves != self._moves:
            # The members keep their tables alive, and nobody replaces one while the kernel runs: one thread, no await.
            self._places = np.array([one.place for one in self._members], np.int64).reshape(-1, 4)
            self._moves = moves
        blocks: NDArray[np.float64] = _match_all(self._places, asked.hashes, asked.ends)
        return blocks


def warm_up() -> None:
    """Compile the kernels, or load them."""
    held = HeldBlocks()
    held.insert(chains([np.ones(1, np.uint64)]), 1)
    held.match(chains([]))
    Crowd([held]).match(chains([]))


# ------------------------------------------------------------------------------------------------------------ kernels


def _pointer_of(context, address):  # type: ignore[no-untyped-def]
    """An address as a pointer, which ``carray`` makes an array of."""

    def generate(_, builder, __, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


_pointer: Any = intrinsic(_pointer_of)


@njit
def _find(slots, hashes, h):  # type: ignore[no-untyped-def]
    """The slot that holds ``h``, or the empty one where it belongs."""
    mask = len(slots) - 1
    at = np.int64(h & np.uint64(mask))
    while slots[at] != 0 and hashes[slots[at]] != h:
        at = (at + 1) & mask
    return at


@njit
def _remove(slots, hashes, h):  # type: ignore[no-untyped-def]
    """Empty the slot of ``h`` and close the gap, so that no probe stops short (Knuth, TAOCP 3, 6.4, algorithm R)."""
    mask = len(slots) - 1
    gap = _find(slots, hashes, h)
    at = (gap + 1) & mask
    while slots[at] != 0:
        home = np.int64(hashes[slots[at]] & np.uint64(mask))
        if ((at - home) & mask) >= ((at - gap) & mask):
            slots[gap] = slots[at]
            gap = at
        at = (at + 1) & mask
    slots[gap] = 0


@njit
def _unlink(older, newer, entry):  # type: ignore[no-untyped-def]
    newer[older[entry]] = newer[entry]
    older[newer[entry]] = older[entry]


@njit
def _link_newest(older, newer, entry):  # type: ignore[no-untyped-def]
    older[entry], newer[entry] = older[0], 0
    newer[older[0]] = entry
    older[0] = entry


@njit(cache=True)
def _match(slots, hashes, asked, ends):  # type: ignore[no-untyped-def]
    return _matched(slots, hashes, asked, ends)


@njit(cache=True)
def _match_all(places, asked, ends):  # type: ignore[no-untyped-def]
    out = np.empty(len(places))
    for i in range(len(places)):
        slots = carray(_pointer(places[i, 0]), (places[i, 1],), np.int32)
        hashes = carray(_pointer(places[i, 2]), (places[i, 3],), np.uint64)
        out[i] = _matched(slots, hashes, asked, ends)
    return out


@njit
def _matched(slots, hashes, asked, ends):  # type: ignore[no-untyped-def]
    total, start = 0, 0
    for end in ends:
        low, high = 0, end - start  # it holds ``low`` blocks, and no more than ``high``
        # The first block before all else: most endpoints lack it.
        if high > 0 and slots[_find(slots, hashes, asked[start])] == 0:
            high = 0
        while low < high:
            middle = (low + high + 1) // 2
            if slots[_find(slots, hashes, asked[start + middle - 1])] != 0:
                low = middle
            else:
                high = middle - 1
        total += low
        start = end
    return total


@njit(cache=True)
def _insert(slots, hashes, older, newer, count, new, ends):  # type: ignore[no-untyped-def]
    """Returns how many are held now. What does not fit takes the place of the oldest."""
    room, start = len(hashes) - 1, 0
    for end in ends:
        for i in range(min(end, start + room) - 1, start - 1, -1):
            h = new[i]
            slot = _find(slots, hashes, h)
            entry = slots[slot]
            if entry != 0:
                _unlink(older, newer, entry)
            else:
                if count < room:
                    count += 1
                    entry = np.int32(count)
                else:
                    entry = newer[0]
                    _unlink(older, newer, entry)
                    _remove(slots, hashes, hashes[entry])
                    slot = _find(slots, hashes, h)
                hashes[entry] = h
                slots[slot] = entry
            _link_newest(older, newer, entry)
        start = end
    return count


@njit(cache=True)
def _newest_first(hashes, older, count):  # type: ignore[no-untyped-def]
    out = np.empty(count, dtype=np.uint64)
    entry = 0
    for i in range(count):
        entry = older[entry]
        out[i] = hashes[entry]
    return out
