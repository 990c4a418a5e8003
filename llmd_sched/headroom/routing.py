"""Where batch goes, and where interactive requests do."""

from __future__ import annotations

from random import Random
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmd_sched.headers import DESTINATION_SUBSET
from llmd_sched.plugin import Attribute, Filter, Reads, reads
from llmd_sched.types import Candidates, Request


class BatchHeadroomFilter(Filter, frozen=True):
    """Sends batch (negative priority) to the endpoints that have room for it, and interactive requests to those that
    carry them: few while there is little, so that the others are free for batch. To be the first filter.

    A batch request goes to the endpoints its ``x-gateway-destination-endpoint-subset`` names, where they exist; else
    to those with room, at best such as carry no interactive requests. Where none has any, ``whenFull: most-room``
    takes the one that is least beyond, ``refuse`` answers 429. Needs batch-headroom-producer, which is added when
    there is none.
    """

    when_full: Literal["most-room", "refuse"] = "most-room"
    headroom_info_producer_name: str = ""

    def reads(self) -> tuple[Reads, ...]:
        return (reads(Attribute.HEADROOM, self.headroom_info_producer_name),)

    def headers(self) -> tuple[str, ...]:
        return (DESTINATION_SUBSET,)

    def keep(self, request: Request, candidates: Candidates, rng: Random) -> NDArray[np.bool_]:
        producer = self.reads()[0].producer
        room, carrier = candidates.get(f"batch_room/{producer}"), candidates.get(f"carrier/{producer}")
        if room is None or carrier is None:
            return np.ones(len(candidates), dtype=bool)
        carries: NDArray[np.bool_] = carrier > 0
        if request.priority >= 0:
            return carries if carries.any() else ~carries
        named = _named(request, candidates)
        if named.any():
            return named
        roomy: NDArray[np.bool_] = room > 0
        idle = roomy & ~carries
        if idle.any():
            return idle
        return roomy if roomy.any() or self.when_full == "refuse" else room == room.max()


def _named(request: Request, candidates: Candidates) -> NDArray[np.bool_]:
    """By the request's own header, as ``ip:port``."""
    text = request.headers.get(DESTINATION_SUBSET)
    if not text:
        return np.zeros(len(candidates), dtype=bool)
    names = {part.strip() for part in text.split(",")}
    return np.array([candidates.endpoints[i].hostport in names for i in candidates.index], dtype=bool)
