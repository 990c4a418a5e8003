"""Which endpoint has probably encoded an image, a video or a sound before, guessed from where we sent it."""

from __future__ import annotations

from collections import OrderedDict

import msgspec
import numpy as np

from llmd_sched.plugin import Attribute, Producer, ProducerPlugin, Reads, Scorer, reads
from llmd_sched.types import Array, Candidates, Decision, Endpoint, Request

DEFAULT_CACHE_MIB = 4096
ITEM_MIB = 2
"""What the embedding of one item is taken to need, as in the reference."""

MAX_ITEMS = 1 << 20
"""Of one endpoint, however large its cache is said to be."""

ENCODE = "encode"
"""The profile that is known by its name to pick who encodes, as in the reference."""


class MmEmbeddingsCacheProducer(ProducerPlugin, frozen=True):
    """How many of a prompt's images, videos and sounds each endpoint has in its encoder cache.

    ``cacheSizeInMBPerServer``: MiB per endpoint, of which an item takes 2; 0 or less = 4096. The least recently used
    go first.
    """

    provides = Attribute.ENCODER_CACHE

    cache_size_in_mb_per_server: int = msgspec.field(default=DEFAULT_CACHE_MIB, name="cacheSizeInMBPerServer")

    @property
    def capacity_items(self) -> int:
        mib = self.cache_size_in_mb_per_server
        return min(MAX_ITEMS, max(1, (mib if mib > 0 else DEFAULT_CACHE_MIB) // ITEM_MIB))

    def open(self, name: str) -> MmEmbeddingsCache:
        return MmEmbeddingsCache(name, self)


class MmEmbeddingsCache(Producer):
    """The live side. Columns: ``encoder_matched_items`` of ``encoder_items``, of this request; items that are the same
    count once."""

    def __init__(self, name: str, params: MmEmbeddingsCacheProducer) -> None:
        super().__init__(name)
        self._capacity = params.capacity_items
        self._held: dict[tuple[str, str], OrderedDict[int, None]] = {}
        """Hashes each server encoded, the most recent last."""

    def endpoints_changed(self, endpoints: list[Endpoint]) -> None:
        self._held = {e.server: self._held.get(e.server, OrderedDict()) for e in endpoints}

    def produce(self, request: Request, candidates: Candidates, now_s: float) -> dict[str, Array]:
        items, endpoints = set(request.media_hashes), candidates.endpoints
        matched = np.zeros(len(endpoints))
        if items:
            matched[:] = [sum(item in self._held[e.server] for item in items) for e in endpoints]
        return {
            f"encoder_matched_items/{self.name}": matched,
            f"encoder_items/{self.name}": np.full(len(endpoints), float(len(items))),
        }

    def chosen(self, decision: Decision, candidates: Candidates, position: int, now_s: float) -> None:
        if not decision.request.media_hashes:
            return
        encoder = next((s.picked[0] for s in decision.stages if s.profile == ENCODE), decision.picked[0])
        held = self._held[encoder.server]
        for item in decision.request.media_hashes:
            held[item] = None
            held.move_to_end(item)
        while len(held) > self._capacity:
            held.popitem(last=False)


class MmEmbeddingsCacheScorer(Scorer, frozen=True):
    """More of the prompt's images, videos and sounds in the endpoint's encoder cache: matched / all of them.

    A prompt without any scores 0. ``producerName``: the producer to ask, empty = the default one.
    """

    producer_name: str = ""

    def reads(self) -> tuple[Reads, ...]:
        return (reads(Attribute.ENCODER_CACHE, self.producer_name),)

    def score(self, request: Request, candidates: Candidates) -> Array:
        name = self.reads()[0].producer
        matched, nothing = candidates.get(f"encoder_matched_items/{name}"), np.zeros(len(candidates))
        if matched is None:
            return nothing
        items = candidates.column(f"encoder_items/{name}")
        return np.divide(matched, items, out=nothing, where=items > 0)
