"""Plugins of conformance tests."""

from __future__ import annotations

from random import Random

import numpy as np
from numpy.typing import NDArray

from llmd_sched.headers import TEST_SELECTION
from llmd_sched.plugin import Filter
from llmd_sched.types import Candidates, Request


class HeaderBasedTestingFilter(Filter, frozen=True):
    """Keep the endpoints that the request names in ``test-epp-endpoint-selection``: ``ip`` or ``ip:port``, separated
    by commas. Without the header, or with an empty one, none.

    For conformance tests. A filter keeps or drops: the order in the header is not kept.
    """

    def headers(self) -> tuple[str, ...]:
        return (TEST_SELECTION,)

    def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
        named = {one.strip() for one in request.headers.get(TEST_SELECTION, "").split(",")}
        there = (candidates.endpoints[i] for i in candidates.index.tolist())
        return np.array([e.hostport in named or e.address in named for e in there], dtype=bool)
