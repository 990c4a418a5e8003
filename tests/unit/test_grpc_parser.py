"""vLLM's gRPC requests and replies, as the real protobuf library writes them, and junk that must only ever be a 400."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.errors import BadRequest
from llmd_sched.parsers.grpc import (
    MAX_FRAME_BYTES,
    SERVICE,
    ReplyFrames,
    VLLMGrpcParser,
    usage_in_frames,
    usage_in_last_frame,
)
from llmd_sched.parsers.protobuf import MAX_FIELDS, Malformed, fields
from llmd_sched.parsers.usage import Usage
from llmd_sched.plugin import Parsed
from tests.builders import fuzzed

MESSAGES = {
    "SamplingParams": {"temperature": (1, "float"), "max_tokens": (8, "uint32"), "stop": (10, "string*")},
    "TokenizedInput": {"original_text": (1, "string"), "input_ids": (2, "uint32*")},
    "Range": {"offset": (1, "uint32"), "length": (2, "uint32")},
    "MultimodalInputs": {"mm_placeholders": (5, "Range*"), "mm_hashes": (6, "string*")},
    "GenerateRequest": {
        "request_id": (1, "string"),
        "tokenized": (2, "TokenizedInput"),
        "text": (3, "string"),
        "sampling_params": (4, "SamplingParams"),
        "stream": (5, "bool"),
        "mm_inputs": (7, "MultimodalInputs"),
        "data_parallel_rank": (9, "int32"),
    },
    "EmbedRequest": {"request_id": (1, "string"), "tokenized": (2, "TokenizedInput")},
    "Chunk": {
        "token_ids": (1, "uint32*"),
        "prompt_tokens": (2, "uint32"),
        "completion_tokens": (3, "uint32"),
        "cached_tokens": (4, "uint32"),
        "index": (7, "uint32"),
    },
    "Complete": {
        "output_ids": (1, "uint32*"),
        "finish_reason": (2, "string"),
        "prompt_tokens": (3, "uint32"),
        "completion_tokens": (4, "uint32"),
        "cached_tokens": (5, "uint32"),
        "index": (8, "uint32"),
    },
    "GenerateResponse": {"chunk": (1, "Chunk"), "complete": (2, "Complete")},
    "EmbedResponse": {"embedding": (1, "float*"), "prompt_tokens": (2, "uint32"), "embedding_dim": (3, "uint32")},
}
"""The parts of vllm_engine.proto that matter here."""


def message_classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="vllm_engine_test.proto", package="t", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, described in MESSAGES.items():
        made = file.message_type.add(name=name)
        for field, (number, kind) in described.items():
            label = kinds.LABEL_REPEATED if kind.endswith("*") else kinds.LABEL_OPTIONAL
            kind = kind.rstrip("*")
            one = made.field.add(name=field, number=number, label=label)
            if kind in MESSAGES:
                one.type, one.type_name = kinds.TYPE_MESSAGE, f".t.{kind}"
            else:
                one.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {n: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"t.{n}")) for n in MESSAGES}


CLASSES = message_classes()


def frame(message: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + struct.pack(">I", len(message)) + message


def framed(kind: str, **contents: object) -> bytes:
    return frame(CLASSES[kind](**contents).SerializeToString())


def parse(body: bytes, method: str = "Generate") -> Parsed:
    return VLLMGrpcParser().parse("/" + SERVICE + method, body)


def words(*ids: int) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


def test_every_field_is_read() -> None:
    body = framed(
        "GenerateRequest",
        request_id="r",
        tokenized={"original_text": "hi", "input_ids": [1, 258, 2**32 - 1]},
        sampling_params={"temperature": 0.5, "max_tokens": 7, "stop": ["x", "y"]},
        stream=True,
        mm_inputs={"mm_placeholders": [{"offset": 1, "length": 2}, {"offset": 5, "length": 2}], "mm_hashes": ["a"]},
        data_parallel_rank=3,
    )
    assert parse(body) == Parsed(
        prompts=(words(1, 258, 2**32 - 1),), max_output_tokens=7, streaming=True, names_model=False, media=2
    )


@pytest.mark.parametrize(
    ("contents", "parsed"),
    [
        ({"tokenized": {"input_ids": [5]}}, Parsed(prompts=(words(5),), names_model=False)),
        ({"text": "héllo"}, Parsed(prompts=("héllo".encode(),), names_model=False)),
        ({"text": "x", "stream": False, "sampling_params": {}}, Parsed(prompts=(b"x",), names_model=False)),
    ],
)
def test_what_is_absent_has_its_default(contents: dict[str, object], parsed: Parsed) -> None:
    assert parse(framed("GenerateRequest", **contents)) == parsed


def test_what_is_to_be_embedded_are_token_ids() -> None:
    body = framed("EmbedRequest", request_id="r", tokenized={"input_ids": [1, 2]})
    assert parse(body, "Embed") == Parsed(prompts=(words(1, 2),), names_model=False)


def test_ids_that_are_not_packed_are_read_too() -> None:
    assert parse(frame(b"\x12\x04\x10\x07\x10\x08")).prompts == (words(7, 8),)


def test_an_id_list_of_a_megabyte_is_read() -> None:
    ids = list(range(200_000, 450_000))
    assert parse(framed("GenerateRequest", tokenized={"input_ids": ids})).prompts == (words(*ids),)


@pytest.mark.parametrize("method", ["HealthCheck", "Abort", "GetModelInfo", "GetServerInfo", "GetLoads"])
@pytest.mark.parametrize("body", [b"", b"junk", frame(b"", flag=1)])
def test_other_methods_pass_through_unread_and_nobody_follows_their_replies(method: str, body: bytes) -> None:
    assert SERVICE + method in VLLMGrpcParser.suffixes
    assert parse(body, method) == Parsed(names_model=False)


GOOD = framed("GenerateRequest", text="hi")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "a frame begins with 5 bytes, got 0 in all"),
        (GOOD[:4], "a frame begins with 5 bytes, got 4 in all"),
        (GOOD[:-1], "the frame announces 4 bytes, 3 follow"),
        (GOOD + b"x", "the frame announces 4 bytes, 5 follow"),
        (GOOD + GOOD, "the frame announces 4 bytes, 13 follow"),
        (b"\x01" + GOOD[1:], "compressed messages are not supported; send them with grpc-encoding identity"),
        (b"\x02" + GOOD[1:], "flag 2; accepted: 0"),
        (frame(b""), "must have tokenized input_ids or text"),
        (framed("GenerateRequest", request_id="r"), "must have tokenized input_ids or text"),
        (framed("GenerateRequest", tokenized={"input_ids": []}), "must have tokenized input_ids or text"),
        (frame(b"\x1a\x05hi"), "5 bytes announced at byte 2, 2 left"),
        (frame(b"\x1a"), "a number without an end at byte 1"),
        (frame(b"\x1a" + b"\xff" * 11), "a number without an end at byte 1"),
        (frame(b"\x18\x01"), "a number where bytes are expected"),
        (frame(b"\x2a\x01x"), "no number of 32 bits where one is expected"),
        (frame(b"\x12\x02\x10\x80"), "tokenized is not a list of token ids between 0 and 4294967295"),
        (frame(b"\x12\x07\x12\x05\xff\xff\xff\xff\x1f"), "tokenized is not a list of token ids"),
        (frame(b"\x22\x07\x40\xff\xff\xff\xff\xff\x7f"), "no number of 32 bits"),
        (frame(b"\x1b\x1c"), "wire type 3"),
        (frame(b"\x00\x00"), "field number 0"),
        (frame(b"\x1d\x00"), "4 bytes announced"),
        (frame(b"\x08\x00" * (MAX_FIELDS + 1)), f"more than {MAX_FIELDS} fields"),
    ],
)
def test_a_body_that_cannot_be_generated_from_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(BadRequest, match="invalid or unsupported gRPC payload for Generate: .*" + message) as error:
        parse(body)
    assert error.value.status == 400


def test_an_embedding_needs_tokens() -> None:
    with pytest.raises(BadRequest, match="for Embed: must have tokenized input_ids"):
        parse(framed("EmbedRequest", request_id="r"), "Embed")


def test_as_many_fields_as_the_limit_are_read() -> None:
    assert len(list(fields(b"\x08\x00" * MAX_FIELDS))) == MAX_FIELDS
    with pytest.raises(Malformed):
        list(fields(b"\x08\x00" * MAX_FIELDS + b"\x08\x00"))


METHODS = st.sampled_from(["Generate", "Embed"])


@fuzzed
@given(METHODS, st.binary(max_size=60), st.booleans())
def test_any_bytes_raise_nothing_but_bad_requests(method: str, body: bytes, is_framed: bool) -> None:
    with contextlib.suppress(BadRequest):
        parse(frame(body) if is_framed else body, method)


@fuzzed
@given(st.data())
def test_a_request_with_one_byte_changed_raises_nothing_but_bad_requests(data: st.DataObject) -> None:
    body = bytearray(
        framed("GenerateRequest", tokenized={"input_ids": [1, 300]}, sampling_params={"max_tokens": 9}, stream=True)
    )
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadRequest):
        parse(bytes(body))


# --- usage out of replies ---------------------------------------------------------------------------------------------


def chunk(*ids: int, prompt: int = 9, output: int | None = None, cached: int = 4) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": len(ids) if output is None else output}
    return framed("GenerateResponse", chunk={"token_ids": ids, **counts, "cached_tokens": cached})


def complete(*ids: int, prompt: int = 9, output: int | None = None, cached: int = 4) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": len(ids) if output is None else output}
    contents = {"output_ids": ids, "finish_reason": "stop", **counts, "cached_tokens": cached}
    return framed("GenerateResponse", complete=contents)


def counts(usage: Usage | None) -> tuple[int | None, int | None, int | None] | None:
    return None if usage is None else (usage.prompt, usage.cached, usage.output)


EMBEDDED = framed("EmbedResponse", embedding=[0.5] * 1000, prompt_tokens=12, embedding_dim=1000)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (complete(5, 6, 7), (9, 4, 3)),
        (complete(5, 6, 7, cached=0), (9, 0, 3)),
        (complete(*range(100_000, 103_000)), (9, 4, 3000)),
        (complete(output=8), (9, 4, 8)),
        (complete(5) + complete(6, 7), (9, 4, 3)),  # two answers
        (chunk(5) + chunk(6) + chunk(7) + complete(), (9, 4, 3)),  # each counts what is new
        (chunk(5) + chunk(6) + chunk(7) + complete(7), (9, 4, 3)),
        (chunk(5, output=1) + chunk(6, output=2) + complete(output=2), (9, 4, 2)),  # each counts up
        (chunk(output=1) + chunk(output=2) + chunk(output=3), (9, 4, 3)),
        (chunk(prompt=0, cached=0) + chunk(5, prompt=0, cached=0) + complete(), (9, 4, 1)),
        (chunk(5), (9, 4, 1)),
        (EMBEDDED, (12, None, None)),
        (b"", None),
        (frame(b""), None),
        (frame(b"\xff\xff\xff"), None),
        (b"\x01" + complete(5)[1:], None),
        (frame(b"\xff\xff\xff") + complete(5), (9, 4, 1)),
        (complete(5)[:-1], None),
        (chunk(5) + complete(6)[:-1], (9, 4, 1)),
        (b'{"error": "not found"}', None),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_reply_says_what_it_counted_however_it_is_cut_into_chunks(reply: bytes, expected: object, size: int) -> None:
    frames = ReplyFrames()
    for at in range(0, len(reply), size):
        frames.feed(reply[at : at + size])
    assert counts(frames.usage) == expected
    assert counts(usage_in_frames(reply)) == expected


def test_an_unknown_earlier_form_of_a_reply_says_nothing() -> None:
    """It has a text, the request's id, where a chunk is now."""
    usage = usage_in_frames(frame(b"\x0a\x03abc\x12\x04\x0a\x02\x05\x06"))
    assert usage is None or usage.prompt is None


def test_a_message_too_large_to_keep_ends_the_reading_and_not_the_reply() -> None:
    frames = ReplyFrames()
    frames.feed(chunk(5))
    frames.feed(b"\x00" + struct.pack(">I", MAX_FRAME_BYTES + 1))
    for _ in range(3):
        frames.feed(bytes(1 << 20))
    frames.feed(complete(6))
    assert counts(frames.usage) == (9, 4, 1)


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (chunk(*range(300)) + complete(7), (9, 4, None)),
        ((chunk(*range(300)) + complete(7))[40:], (9, 4, None)),
        (complete(7), (9, 4, None)),
        (EMBEDDED[-600:], None),  # begins before what is left of it
        (EMBEDDED, (12, None, None)),
        (complete(7)[1:], None),
        (complete(7)[:-1], None),
        (b"", None),
        (bytes(2048), None),
    ],
)
def test_the_end_of_a_reply_says_what_went_in(tail: bytes, expected: object) -> None:
    assert counts(usage_in_last_frame(tail)) == expected


@fuzzed
@given(st.lists(st.binary(max_size=30), max_size=6))
def test_any_reply_is_read_without_an_error(chunks: list[bytes]) -> None:
    frames = ReplyFrames()
    for one in chunks:
        frames.feed(one)
        frames.feed(frame(one))
    usage_in_last_frame(b"".join(chunks))
