"""Requests that were sent to an endpoint since its metrics were last read, and so show in none of them.

A queue is let go within milliseconds, metrics come every 50 ms or so: judged by metrics alone, a pool with a little
room would be sent everything that waits.
"""

from __future__ import annotations

import numpy as np

from llmd_sched.types import Array, Candidates, Endpoint

UNSEEN = "unseen_requests"
"""The column."""
SAME_READ_S = 1e-6
"""Ages are differences of times; what differs by less is one read."""


class Unseen:
    """The counters; as many as there are endpoints."""

    def __init__(self) -> None:
        self._members: list[Endpoint] = []
        self._rows: dict[tuple[str, str], int] = {}
        self._counts: Array = np.zeros(0)
        self._read_at_s: Array = np.zeros(0)

    def sent(self, endpoint: Endpoint) -> None:
        """A request was sent there after the last ``beside``."""
        row = self._rows.get(endpoint.server)
        if row is not None:
            self._counts[row] += 1.0

    def beside(self, candidates: Candidates, now_s: float) -> Candidates:
        """The candidates with the column; they must have ``metrics_age_s``."""
        if candidates.endpoints is not self._members:
            self._rearrange(candidates.endpoints)
        read_at_s = now_s - candidates.columns["metrics_age_s"]
        read = read_at_s > self._read_at_s + SAME_READ_S
        if read.any():
            self._counts[read] = 0.0
            self._read_at_s[read] = read_at_s[read]
        return candidates.with_columns({UNSEEN: self._counts})

    def _rearrange(self, endpoints: list[Endpoint]) -> None:
        source = np.array([self._rows.get(e.server, len(self._rows)) for e in endpoints], dtype=np.intp)
        self._counts = np.append(self._counts, 0.0)[source]
        self._read_at_s = np.append(self._read_at_s, -np.inf)[source]
        self._rows = {e.server: i for i, e in enumerate(endpoints)}
        self._members = endpoints
