"""Token ids out of JSON and protobuf: the strict kernels against slow, plain readers."""

from __future__ import annotations

import json
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.parsers.tokens import lists_in, offset, packed_ids, take_lists, warm_up
from tests.builders import fuzzed

IDS = st.integers(0, 2**32 - 1)
SPACE = st.text(alphabet=" \t\r\n", max_size=2)


def words(*ids: int) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        (b"[1]", (words(1),)),
        (b"[0]", (words(0),)),
        (b"[1,2,3]", (words(1, 2, 3),)),
        (b" [ 1 ,\t2\r\n, 3 ] \n", (words(1, 2, 3),)),
        (b"[4294967295]", (words(2**32 - 1),)),
        (b"[[1],[2,3]]", (words(1), words(2, 3))),
        (b"[ [ 1 ] , [ 2 , 3 ] ]", (words(1), words(2, 3))),
        (b"[[7]]", (words(7),)),
    ],
)
def test_lists_of_ids_are_their_words(text: bytes, prompts: tuple[bytes, ...]) -> None:
    assert lists_in(text) == prompts


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b"]",
        b"[",
        b"[]",
        b"[ ]",
        b"[[]]",
        b"[[1],[]]",
        b"[1",
        b"[1,",
        b"[1,]",
        b"[,1]",
        b"[1,,2]",
        b"[1 2]",
        b"[1]]",
        b"[1]x",
        b"[1][2]",
        b"[[1]",
        b"[[1],]",
        b"[[1],2]",
        b"[[1]2]",
        b"[[1][2]]",
        b"[1,[2]]",
        b"[[[1]]]",
        b"[01]",
        b"[00]",
        b"[-1]",
        b"[+1]",
        b"[1.0]",
        b"[1e3]",
        b"[true]",
        b"[null]",
        b'["1"]',
        b"[4294967296]",
        b"[99999999999]",
        b"[" + b"9" * 40 + b"]",
        b"[1\x0b]",
        b"[\xc2\xa01]",
        b"{}",
        b"1",
        b'"[1]"',
    ],
)
def test_anything_else_is_left_to_others(text: bytes) -> None:
    assert lists_in(text) == ()


@fuzzed
@given(st.lists(IDS, min_size=1, max_size=40) | st.lists(st.lists(IDS, min_size=1, max_size=5), min_size=1, max_size=8))
def test_ids_read_back_whatever_the_spacing(ids: list[int]) -> None:
    lists = ids if isinstance(ids[0], list) else [ids]
    for text in (json.dumps(ids), json.dumps(ids, separators=(",", ":")), json.dumps(ids, indent=3)):
        assert lists_in(text.encode()) == tuple(words(*one) for one in lists)


@fuzzed
@given(st.text(alphabet="[],0123456789 -.e\n", max_size=30).map(str.encode) | st.binary(max_size=20))
def test_no_text_is_read_as_ids_that_json_does_not_have(text: bytes) -> None:
    prompts = lists_in(text)
    if prompts:
        ids = json.loads(text)
        assert prompts == tuple(words(*one) for one in (ids if isinstance(ids[0], list) else [ids]))


class Holder(msgspec.Struct):
    ids: msgspec.Raw = msgspec.Raw()


@pytest.mark.parametrize(
    ("body", "theirs"),
    [
        (b'{"ids":[1,2]}', True),
        (b'{"a":[9],"ids" : [ 1, 2 ] , "b":[3]}', True),
        (b'{"ids":[1,2]}\n', True),
        (b'{"a":{"ids":[1,2]}}', False),
        (b'{"a":{"ids":[1,2]},"ids":null}', False),
        (b'{"ids":[1,2],"ids":[3]}', False),
        (b'{"ids":[1,2],"ids":null}', False),
    ],
)
def test_where_lists_were_taken_from_can_be_told(body: bytes, theirs: bool) -> None:
    lists = take_lists(body, "ids")
    assert lists is not None
    assert lists.prompts == (words(1, 2),)
    assert lists.were_in(msgspec.json.decode(lists.rest, type=Holder).ids) is theirs


@pytest.mark.parametrize(
    "body",
    [b"", b'{"ids":"[1,2]"}', b'{"a":"\\"ids\\":[1,2]"}', b'{"ids":[', b'{"ids":[1,2', b'{"ids"[1]}', b'{"ids":{}}'],
)
def test_no_lists_are_taken_from_anything_else(body: bytes) -> None:
    assert take_lists(body, "ids") is None


@pytest.mark.parametrize("body", [b'[{"ids":[1,2]}]', b'{"ids":[1,2]', b'{"ids":[1,2]]}'])
def test_what_is_left_of_a_malformed_body_is_malformed(body: bytes) -> None:
    lists = take_lists(body, "ids")
    assert lists is not None
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(lists.rest, type=Holder)


def test_what_is_left_of_a_body_is_all_but_the_lists() -> None:
    lists = take_lists(b'{"a":1, "ids": [[1],[2]] ,"b":2}', "ids")
    assert lists is not None
    assert (lists.rest, len(lists.prompts)) == (b'{"a":1, "ids": null ,"b":2}', 2)


def test_flat_lists_can_be_asked_for_alone() -> None:
    assert take_lists(b'{"ids":[[1]]}', "ids", flat=True) is None
    assert take_lists(b'{"ids":[ 1]}', "ids", flat=True) is not None


def test_a_part_says_where_it_lies() -> None:
    body = b'{"a":"x","ids":"x","b":"x"}'
    assert offset(msgspec.json.decode(body, type=Holder).ids, body) == body.index(b'"x","b"')


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def packed(number: int, *ids: int) -> bytes:
    return field(number, b"".join(map(varint, ids)))


@pytest.mark.parametrize(
    ("message", "ids"),
    [
        (b"", ()),
        (packed(2, 1, 300, 70000), (1, 300, 70000)),
        (packed(2), ()),
        (field(2, 1) + field(2, 300), (1, 300)),
        (packed(2, 1) + field(2, 2) + packed(2, 3, 4), (1, 2, 3, 4)),
        (field(1, b"text") + packed(2, 5) + field(9, 7) + field(1000, b"x"), (5,)),
        (packed(3, 1, 2) + packed(2, 5), (5,)),
        (varint(4 << 3 | 5) + b"abcd" + varint(4 << 3 | 1) + b"abcdefgh" + packed(2, 6), (6,)),
        (packed(2, 2**32 - 1), (2**32 - 1,)),
        (field(2, b"\x81\x00"), (1,)),  # more bytes than it needs, which is allowed
    ],
)
def test_repeated_numbers_are_read_packed_or_not_among_other_fields(message: bytes, ids: tuple[int, ...]) -> None:
    assert packed_ids(message, 2) == words(*ids)
    assert packed_ids(memoryview(message), 2) == words(*ids)


@pytest.mark.parametrize(
    "message",
    [
        b"\x12",
        b"\x12\x05\x01",
        b"\x12\x01\x80",
        b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\x7f\x01",
        b"\x10",
        b"\x10\x80",
        b"\x10" + b"\x80" * 12,
        field(2, 2**32),
        packed(2, 2**32),
        packed(2, 2**62),
        b"\x00\x01",
        b"\x02\x00",
        b"\x13\x14",
        b"\x16\x00",
        varint(4 << 3 | 5) + b"abc",
        varint(4 << 3 | 1) + b"abc",
        field(1, b"text")[:-1],
    ],
)
def test_a_malformed_message_has_no_ids(message: bytes) -> None:
    assert packed_ids(message, 2) is None


@fuzzed
@given(st.binary(max_size=40))
def test_any_bytes_are_a_message_or_not(message: bytes) -> None:
    ids = packed_ids(message, 2)
    assert ids is None or len(ids) % 4 == 0


@fuzzed
@given(st.lists(IDS, max_size=30), st.integers(1, 2**28))
def test_ids_of_any_field_read_back(ids: list[int], number: int) -> None:
    assert packed_ids(packed(number, *ids), number) == words(*ids)


def test_warming_up_changes_nothing() -> None:
    warm_up()
    assert lists_in(b"[3]") == (words(3),)
