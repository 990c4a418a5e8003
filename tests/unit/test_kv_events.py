"""Payloads as engines publish them, in every layout, and payloads that are broken."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.prefix import events
from llmd_sched.prefix.events import AllBlocksCleared, Batch, BlockRemoved, BlockStored, decode, numbers
from tests.builders import fuzzed

pack = msgspec.msgpack.encode
STORED = ["BlockStored", [1, 2], None, [5, 6, 7, 8], 2]


def batch(*made: object, rank: object = 0) -> Batch:
    decoded = decode(pack([1.5, list(made), rank]))
    assert decoded is not None
    return decoded


def test_an_array_names_its_type_first() -> None:
    tail = [None, "GPU", "adapter", [None, ["salt"]], 3, "full_attention", None]
    stored, removed, cleared = batch(
        [*STORED, *tail], ["BlockRemoved", [9], "CPU", 3], ["AllBlocksCleared"], rank=4
    ).events
    assert isinstance(stored, BlockStored)
    assert (stored.block_hashes, stored.parent_block_hash, stored.token_ids, stored.block_size) == (
        [1, 2], None, [5, 6, 7, 8], 2,
    )  # fmt: skip
    assert (stored.medium, stored.lora_name, stored.group_idx) == ("GPU", "adapter", 3)
    assert stored.kv_cache_spec_kind == "full_attention"
    assert isinstance(removed, BlockRemoved)
    assert (removed.block_hashes, removed.medium, removed.group_idx) == ([9], "CPU", 3)
    assert isinstance(cleared, AllBlocksCleared)
    assert batch(rank=4).rank == 4


@pytest.mark.parametrize("wrap", [False, True])
def test_a_map_names_its_type_under_type(wrap: bool) -> None:
    stored = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": 7, "token_ids": [5], "block_size": 1}
    made = [stored | {"of_tomorrow": 1}, {"type": "BlockRemoved", "block_hashes": [2]}, {"type": "AllBlocksCleared"}]
    payload = pack({"ts": 1.0, "events": made, "data_parallel_rank": 2} if wrap else [1.0, made, 2])
    decoded = decode(payload)
    assert decoded is not None
    assert [type(e) for e in decoded.events] == [BlockStored, BlockRemoved, AllBlocksCleared]
    assert (decoded.rank, decoded.malformed) == (2, 0)
    first = decoded.events[0]
    assert isinstance(first, BlockStored)
    assert first.parent_block_hash == 7


@pytest.mark.parametrize("length", range(5, 13))
def test_trailing_fields_may_be_missing_or_new(length: int) -> None:
    full = [*STORED, 4, "GPU", "a", None, 0, "mla_attention", None, "of tomorrow"]
    (event,) = batch(full[:length]).events
    assert isinstance(event, BlockStored)
    assert event.medium == ("GPU" if length > 6 else None)


def test_a_batch_without_a_rank_is_of_rank_0() -> None:
    for payload in ([1.0, []], [1.0, [], None], {"ts": 1, "events": []}):
        assert decode(pack(payload)) == Batch([])


def test_hashes_are_numbers_or_the_last_eight_of_their_bytes() -> None:
    sha = bytes(range(32))
    assert numbers([5, 2**64 - 1, -1, sha, b"\1\2", b""]) == [
        5, 2**64 - 1, 2**64 - 1, int.from_bytes(sha[24:], "big"), 0x0102, 0,
    ]  # fmt: skip
    (event,) = batch(["BlockStored", [sha, 3], sha, [1, 2], 1]).events
    assert isinstance(event, BlockStored)
    assert event.block_hashes == [sha, 3]


@pytest.mark.parametrize(
    ("keys", "adapter", "texts"),
    [
        (None, None, {}),
        ([None, None], None, {}),
        ([["salt"], None], None, {0: ("salt",)}),
        ([["adapter", "salt"], ["adapter"]], "adapter", {0: ("salt",)}),
        ([["image"], [["image", -3]]], None, {0: ("image",), 1: ("image",)}),
        ([[b"\x01\xff"], "no list"], None, {0: ("01ff",)}),
        ([[7], []], None, {0: ("7",)}),
    ],
)
def test_extra_keys_are_texts_of_their_block(keys: object, adapter: str | None, texts: dict[int, object]) -> None:
    (event,) = batch([*STORED, None, None, adapter, keys]).events
    assert isinstance(event, BlockStored)
    assert event.extras() == texts


@pytest.mark.parametrize(
    "broken",
    [
        ["BlockMoved", [1]],
        ["BlockStored", [1]],
        ["BlockStored", ["text"], None, [1], 1],
        ["BlockStored", [1], None, [-1], 1],
        ["BlockStored", [1], None, [2**32], 1],
        ["BlockStored", [1], None, [1.5], 1],
        ["BlockStored", [1], None, [1], 0],
        ["BlockRemoved", 3],
        {"type": "BlockRemoved"},
        {"block_hashes": [1]},
        [],
        7,
        None,
    ],
)
def test_a_broken_event_is_counted_and_the_others_stand(broken: object) -> None:
    decoded = batch(["AllBlocksCleared"], broken, ["BlockRemoved", [3]])
    assert len(decoded.events) == 2
    assert decoded.malformed == 1


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"\xc1", b"\x93\x01", pack(3), pack([1]), pack([1, 2]), pack({"ts": 1}), b"\x91" * 100_000,
        pack([1.0, []]) + b"x", b"\x92\x01\xdd\xff\xff\xff\xff",
    ],
)  # fmt: skip
def test_what_is_no_batch_is_none(payload: bytes) -> None:
    assert decode(payload) is None


def test_a_deeply_nested_event_is_malformed() -> None:
    decoded = decode(b"\x92\x01\x91" + b"\x91" * 500 + b"\x01")
    assert decoded is not None
    assert (decoded.events, decoded.malformed) == ([], 1)


def test_a_batch_beyond_its_bound_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_EVENTS", 3)
    decoded = batch(*[["AllBlocksCleared"]] * 5)
    assert (len(decoded.events), decoded.malformed) == (3, 2)


@fuzzed
@given(st.binary(max_size=200))
def test_any_bytes_raise_nothing(payload: bytes) -> None:
    decode(payload)
    decode(b"\x92\x01\x91" + payload)


@fuzzed
@given(st.data())
def test_a_payload_with_a_byte_changed_raises_nothing(data: st.DataObject) -> None:
    payload = bytearray(pack([1.0, [[*STORED, None, "GPU", "adapter", [["salt"]], 0, "full_attention"]], 0]))
    payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    decoded = decode(bytes(payload))
    for event in decoded.events if decoded else ():
        if isinstance(event, BlockStored):
            event.extras()
            numbers(event.block_hashes)
