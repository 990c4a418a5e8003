"""How much of what is asked is asked again: the working set of reused blocks, by sampling.

A cache that holds all of it loses nothing to a second copy; one that holds a part of it does. So this number, over an
endpoint's capacity, says whether copies cost anything. It is a property of the traffic and not of the routing, hence
it does not swing with the decisions made upon it.

Only blocks whose hash falls into one in SAMPLED are looked at, which keeps the ratio of distinct to reused ones
(Waldspurger et al., FAST 2015, "Efficient MRC construction with SHARDS").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SAMPLED = 8
WINDOW_S = 120.0
MAX_SAMPLES = 1 << 18
"""Of one window; beyond it new blocks are not counted, which are two million of them."""


class WorkingSet:
    """Blocks asked for at least twice: in this window or the one before, and once more in this one."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._began_s = -np.inf
        self._seen: set[int] = set()
        self._before: set[int] = set()
        self._reused: set[int] = set()
        self._reused_before = 0

    def asked(self, hashes: NDArray[np.uint64], now_s: float) -> None:
        """A prompt's blocks were asked for."""
        if now_s - self._began_s >= self._window_s:
            self._turn(now_s)
        sample = set(hashes[hashes % np.uint64(SAMPLED) == 0].tolist())
        again = {h for h in sample if h in self._seen or h in self._before}
        if len(self._seen) < MAX_SAMPLES:
            self._seen |= sample
            self._reused |= again

    def _turn(self, now_s: float) -> None:
        self._began_s = now_s
        self._before, self._seen = self._seen, set()
        self._reused_before, self._reused = len(self._reused), set()

    @property
    def blocks(self) -> int:
        """Estimate of their number: the larger of this window's and the last one's."""
        return SAMPLED * max(len(self._reused), self._reused_before)
