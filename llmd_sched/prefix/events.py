"""KV cache events as vLLM and SGLang publish them: msgpack payloads -> batches of events.

A batch is ``[time, [event, ...], rank]`` and an event an array led by its type, or both are maps, an event's type under
``type``; newer engines append fields, so all after the first few are optional and ones we do not know are ignored. A
block hash is an integer or bytes, of which the last eight count, big-endian. Whatever cannot be read is left out and
counted: bytes from the network raise nothing.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

MAX_EVENTS = 1 << 16
"""Of one batch; the rest of it counts as malformed."""

_MASK = 0xFFFFFFFFFFFFFFFF

_BROKEN = (msgspec.DecodeError, ValueError, OverflowError, RecursionError)
"""What decoding raises; text that is no UTF-8 is a ValueError."""

Hash = int | bytes
Token = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]


class BlockStored(msgspec.Struct, tag="BlockStored", gc=False):
    """These blocks, one after the other, are in the cache now; without tokens, on one more medium."""

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[Token]
    block_size: Annotated[int, msgspec.Meta(ge=1)]
    lora_id: Any = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None

    def extras(self) -> dict[int, tuple[str, ...]]:
        """Block of this event -> texts besides tokens that went into its hash; the adapter's name is not one."""
        found = {}
        for i, entry in enumerate(self.extra_keys or ()):
            texts = [_text(item) for item in entry] if isinstance(entry, list) else []
            if self.lora_name in texts:
                texts.remove(self.lora_name)
            if texts:
                found[i] = tuple(texts)
        return found


class BlockRemoved(msgspec.Struct, tag="BlockRemoved", gc=False):
    """These blocks have left the medium."""

    block_hashes: list[Hash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    """Nothing is cached any more."""


class _StoredArray(BlockStored, tag="BlockStored", array_like=True, gc=False): ...


class _RemovedArray(BlockRemoved, tag="BlockRemoved", array_like=True, gc=False): ...


class _ClearedArray(AllBlocksCleared, tag="AllBlocksCleared", array_like=True, gc=False): ...


Event = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, frozen=True):
    """What could be read of one payload, in order."""

    events: list[Event]
    rank: int = 0
    """Data-parallel rank of the engine that published it."""
    malformed: int = 0
    """Events that could not be read, among them those of unknown type."""


class _BatchMap(msgspec.Struct):
    ts: Any
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _BatchArray(_BatchMap, array_like=True): ...


_BATCH_MAP, _BATCH_ARRAY = msgspec.msgpack.Decoder(_BatchMap), msgspec.msgpack.Decoder(_BatchArray)
_EVENT_MAP = msgspec.msgpack.Decoder(Event)
_EVENT_ARRAY = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray)


def decode(payload: bytes) -> Batch | None:
    """None when it is no batch at all."""
    try:
        batch = (_BATCH_MAP if _is_map(payload) else _BATCH_ARRAY).decode(payload)
    except _BROKEN:
        return None
    events, malformed = [], max(0, len(batch.events) - MAX_EVENTS)
    for raw in batch.events[:MAX_EVENTS]:
        try:
            events.append((_EVENT_MAP if _is_map(raw) else _EVENT_ARRAY).decode(raw))
        except _BROKEN:
            malformed += 1
    return Batch(events, batch.data_parallel_rank or 0, malformed)


def _is_map(data: bytes | msgspec.Raw) -> bool:
    """By the first byte: fixmap, map 16 or map 32."""
    first = bytes(memoryview(data)[:1])
    return b"\x80" <= first <= b"\x8f" or first in (b"\xde", b"\xdf")


def numbers(hashes: list[Hash]) -> list[int]:
    """Block hashes as unsigned 64-bit integers."""
    return [h & _MASK if isinstance(h, int) else int.from_bytes(h[-8:], "big") for h in hashes]


def _text(item: Any) -> str:
    """An adapter's name, a salt, an image's hash (alone, or beside where in the block it begins), or other bytes."""
    if isinstance(item, list) and item:
        item = item[0]
    return item.hex() if isinstance(item, bytes) else str(item)
