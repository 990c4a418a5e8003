"""Token ids in: their bytes, their limits, and junk that must only ever be a 400."""

from __future__ import annotations

import contextlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.errors import BadRequest
from llmd_sched.parsers.openai import OpenAIParser
from llmd_sched.parsers.passthrough import PassthroughParser
from llmd_sched.parsers.registry import PARSERS, ParserRegistry
from llmd_sched.parsers.rewrite import with_model
from llmd_sched.parsers.vllm import VLLMParser
from llmd_sched.plugin import Parsed
from tests.builders import fuzzed

PATH = "/inference/v1/generate"
FEATURES = {"mm_hashes": {"image": ["ab"]}, "mm_placeholders": {"image": [{"offset": 1, "length": 2}]}}


def parse(body: object) -> Parsed:
    return VLLMParser().parse(PATH, body if isinstance(body, bytes) else json.dumps(body).encode())


def test_every_field_is_read() -> None:
    parsed = parse(
        {
            "request_id": "r",
            "model": "m",
            "token_ids": [1, 258, 4294967295],
            "sampling_params": {"max_tokens": 7, "temperature": 0.5, "stop": ["x"]},
            "features": FEATURES,
            "stream": True,
            "cache_salt": "s",
            "priority": 3,
        }
    )
    assert parsed == Parsed(
        model="m",
        prompts=(struct.pack("<3I", 1, 258, 4294967295),),
        max_output_tokens=7,
        streaming=True,
        cache_salt="s",
        names_model=True,
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sampling_params": {}},
        {"sampling_params": {"max_tokens": None}, "stream": False},
        {"model": None, "stream": None, "cache_salt": None, "sampling_params": None, "features": None},
    ],
)
def test_what_is_absent_or_null_has_its_default(fields: dict[str, object]) -> None:
    assert parse({"token_ids": [5], **fields}) == Parsed(prompts=(b"\5\0\0\0",))


def test_ids_are_the_same_prompt_here_and_in_a_completion() -> None:
    completion = OpenAIParser().parse("/v1/completions", b'{"prompt":[7,70000,0]}')
    assert parse({"token_ids": [7, 70000, 0]}).prompts == completion.prompts


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "invalid generate request: must have token_ids field"),
        ({"token_ids": None}, "must have token_ids field"),
        ({"token_ids": []}, "must have token_ids field"),
        ({"prompt": "x"}, "must have token_ids field"),
        ({"token_ids": [-1]}, "invalid generate request: token ids must be between 0 and 4294967295"),
        ({"token_ids": [2**32]}, "between 0 and 4294967295"),
        ({"token_ids": [1, 2**70]}, "between 0 and 4294967295"),
        ({"token_ids": "abc"}, r"\$\.token_ids"),
        ({"token_ids": 3}, r"\$\.token_ids"),
        ({"token_ids": ["1"]}, r"\$\.token_ids\[0\]"),
        ({"token_ids": [1.5]}, "got `float`"),
        ({"token_ids": [True]}, "got `bool`"),
        ({"token_ids": [[1]]}, "got `array`"),
        ({"token_ids": [None]}, "got `null`"),
        ({"token_ids": [1], "model": 3}, r"\$\.model"),
        ({"token_ids": [1], "stream": "yes"}, r"\$\.stream"),
        ({"token_ids": [1], "cache_salt": 1}, r"\$\.cache_salt"),
        ({"token_ids": [1], "sampling_params": 1}, r"\$\.sampling_params"),
        ({"token_ids": [1], "sampling_params": {"max_tokens": "9"}}, r"\$\.sampling_params\.max_tokens"),
        (b"", "error unmarshaling request bodyMap: "),
        (b"{", "error unmarshaling request bodyMap: "),
        (b"[]", "error unmarshaling request bodyMap: "),
        (b"null", "error unmarshaling request bodyMap: "),
        (b"\xff\xfe", "error unmarshaling request bodyMap: "),
        (b'{"token_ids":[1]}x', "error unmarshaling request bodyMap: "),
        (b'{"model":"\xff","token_ids":[1]}', "error unmarshaling request bodyMap: "),
    ],
)
def test_a_body_that_cannot_be_generated_from_is_refused(body: object, message: str) -> None:
    with pytest.raises(BadRequest, match=message) as error:
        parse(body)
    assert error.value.status == 400


@pytest.mark.parametrize("opening", [b'{"a":', b'{"token_ids":[', b'{"features":'])
def test_a_body_nested_without_end_is_refused(opening: bytes) -> None:
    with pytest.raises(BadRequest, match="error unmarshaling request bodyMap: "):
        parse(opening * 100_000)


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("[1, 258]", (struct.pack("<2I", 1, 258),)),
        (" [ 1 ,258 ] ", (struct.pack("<2I", 1, 258),)),
        ("[[1], [2, 3]]", (struct.pack("<I", 1), struct.pack("<2I", 2, 3))),
        ('"hello"', (b'"hello"',)),
        ('["a", "b"]', (b'["a", "b"]',)),
        ('[1, "a"]', (b'[1, "a"]',)),
        ("[1, [2]]", (b"[1, [2]]",)),
        ("[[1], [2], 3]", (b"[[1], [2], 3]",)),
        ("[[1], []]", (struct.pack("<I", 1), b"")),
        ("[[[1]]]", (b"[[[1]]]",)),
        ("[1.5]", (b"[1.5]",)),
        ('{"a": 1}', (b'{"a": 1}',)),
    ],
)
def test_token_ids_to_embed_are_tokens_and_anything_else_is_its_json(value: str, prompts: tuple[bytes, ...]) -> None:
    assert OpenAIParser().parse("/v1/embeddings", f'{{"input":{value}}}'.encode()).prompts == prompts


@pytest.mark.parametrize("value", ["[-1]", "[4294967296]", "[[1], [-1]]"])
def test_token_ids_to_embed_have_the_same_limits(value: str) -> None:
    with pytest.raises(BadRequest, match="invalid embeddings request: token ids must be between 0 and 4294967295"):
        OpenAIParser().parse("/v1/embeddings", f'{{"input":{value}}}'.encode())


@pytest.mark.parametrize(
    "body",
    [
        b'{"token_ids":[7],"token_ids":[1, 2]}',
        b'{"features":{"token_ids":[7]},"token_ids":[1,2]}',
        b'{"features":{"token_ids":[7,8]},"token\\u005fids":[1,2]}',
        b'{"a":"\\"token_ids\\":[7]","token_ids" :\n[ 1\t, 2 ] }\n',
        b'{"a":"token_ids","b":[7],"token_ids":[1,2]}',
        b'{"token_ids":[1,2],"features":{"token_ids":[7]}}',
        b'{"token_ids":[1,2],"x":{"token_ids":null}}',
    ],
)
def test_the_ids_are_those_of_the_field_wherever_else_its_name_stands(body: bytes) -> None:
    assert parse(body).prompts == (struct.pack("<2I", 1, 2),)


def test_an_error_behind_a_long_list_is_said_to_be_where_it_is() -> None:
    with pytest.raises(BadRequest, match=r"byte 10\d\d\d"):
        parse(b'{"token_ids":[' + b",".join([b"1"] * 5000) + b'],"model":}')


def test_a_rewritten_model_leaves_the_ids_as_they_were() -> None:
    body = b'{"token_ids":[1, 2,3],"model":"old","sampling_params":{"max_tokens":4}}'
    rewritten = with_model(body, "new")
    assert rewritten == body.replace(b"old", b"new")
    assert (parse(rewritten).model, parse(rewritten).prompts) == ("new", parse(body).prompts)


@pytest.mark.parametrize("path", [PATH, "/tenant" + PATH, PATH + "?x=/v1/completions"])
def test_the_registry_gives_the_path_to_this_parser(path: str) -> None:
    registry = ParserRegistry([PassthroughParser(), OpenAIParser(), PARSERS["vllmhttp-parser"]()])
    assert registry.parse(path, b'{"model":"m","token_ids":[1]}').prompts == (b"\1\0\0\0",)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(["model", "token_ids", "sampling_params", "stream", "cache_salt", "features"])


@fuzzed
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_the_bytes_read_back_as_the_ids(ids: list[int]) -> None:
    (prompt,) = parse({"token_ids": ids}).prompts
    assert list(struct.unpack(f"<{len(ids)}I", prompt)) == ids


@fuzzed
@given(st.dictionaries(FIELDS, JSON, max_size=6))
def test_any_object_raises_nothing_but_bad_requests(body: dict[str, object]) -> None:
    with contextlib.suppress(BadRequest):
        parse(body)


@fuzzed
@given(st.dictionaries(FIELDS, JSON, max_size=6), JSON)
def test_any_object_with_ids_raises_nothing_but_bad_requests(body: dict[str, object], sampling: object) -> None:
    with contextlib.suppress(BadRequest):
        parse({**body, "token_ids": [1, 2], "sampling_params": sampling})


@fuzzed
@given(JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=80))
def test_any_text_raises_nothing_but_bad_requests(body: bytes) -> None:
    with contextlib.suppress(BadRequest):
        parse(body)
