"""The KV cache of one engine as vLLM V1 keeps it: a fixed pool of blocks, reference counts, one LRU queue.

A block is free when nobody holds it. Free blocks wait in one queue; allocation pops its head, and only then does a
cached block lose its content. So cached but idle blocks count as free, and a shared prefix survives while others age.
Equal content computed twice is held twice, as there: nothing is merged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

BLOCK_TOKENS = 16


def blocks_for(tokens: int) -> int:
    """How many blocks hold ``tokens`` tokens."""
    return -(-tokens // BLOCK_TOKENS)


class BlockPool:
    """``total_blocks`` blocks, named 0 to total_blocks - 1. A block list belongs to the sequence that holds it."""

    def __init__(self, total_blocks: int) -> None:
        if total_blocks < 1:
            raise ValueError(f"a pool needs at least one block, not {total_blocks}")
        self.total_blocks = total_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(total_blocks))
        self._holders = [0] * total_blocks
        self._hash_of: list[int | None] = [None] * total_blocks
        self._cached: dict[int, list[int]] = {}

    @property
    def held_blocks(self) -> int:
        return self.total_blocks - len(self._free)

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Held over total, 0..1."""
        return self.held_blocks / self.total_blocks

    def longest_prefix(self, hashes: Sequence[int], max_blocks: int) -> list[int]:
        """Cached blocks of the longest run of ``hashes`` from the start, ``max_blocks`` at most. Takes nothing."""
        hits: list[int] = []
        for block_hash in islice(hashes, max_blocks):
            copies = self._cached.get(block_hash)
            if copies is None:
                break
            hits.append(copies[0])
        return hits

    def take(self, hits: Sequence[int], new_blocks: int) -> list[int] | None:
        """Hold ``hits`` and ``new_blocks`` fresh blocks; None, and nothing changed, when they do not fit."""
        idle_hits = sum(1 for block in hits if not self._holders[block])
        if idle_hits + new_blocks > len(self._free):
            return None
        for block in hits:
            if not self._holders[block]:
                del self._free[block]
            self._holders[block] += 1
        return [*hits, *(self._pop() for _ in range(new_blocks))]

    def grow(self, blocks: list[int], tokens: int) -> bool:
        """Extend ``blocks`` until it holds ``tokens`` tokens; False, and nothing changed, when that does not fit."""
        missing = blocks_for(tokens) - len(blocks)
        if missing > len(self._free):
            return False
        blocks.extend(self._pop() for _ in range(missing))
        return True

    def cache(self, block: int, block_hash: int) -> None:
        """A held block is full: later lookups may find it until it is given away again."""
        self._hash_of[block] = block_hash
        self._cached.setdefault(block_hash, []).append(block)

    def release(self, blocks: list[int]) -> None:
        """Let go of a sequence's blocks and empty the list. Its last block is the first to be given away."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
        blocks.clear()

    def _pop(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._holders[block] = 1
        block_hash = self._hash_of[block]
        if block_hash is not None:
            self._evict(block, block_hash)
        return block

    def _evict(self, block: int, block_hash: int) -> None:
        self._hash_of[block] = None
        copies = self._cached[block_hash]
        copies.remove(block)
        if not copies:
            del self._cached[block_hash]
