"""Bodies in every form the API knows, usage out of every kind of reply, and junk that must only ever be a 400."""

from __future__ import annotations

import contextlib
import json
import struct
import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.errors import BadRequest
from llmd_sched.parsers.openai import OpenAIParser
from llmd_sched.parsers.rewrite import with_model
from llmd_sched.parsers.usage import usage_in_tail
from llmd_sched.plugin import Parsed
from tests.builders import fuzzed

IMAGE_TOKENS = 225
"""An image of unknown size: 640 x 360 pixels at 1024 pixels per token."""

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def parse(path: str, body: object) -> Parsed:
    return OpenAIParser().parse(path, body if isinstance(body, bytes) else json.dumps(body).encode())


def chat(*contents: object, **fields: object) -> Parsed:
    return parse(CHAT, {"model": "m", "messages": [{"role": "user", "content": c} for c in contents], **fields})


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
        ("/v1/chat/completions/render", {"messages": [{"role": "user", "content": "hello"}]}),
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/completions/render", {"prompt": "hello"}),
        ("/v1/embeddings", {"input": "hello"}),
        ("/v1/responses", {"input": "hello"}),
        ("/v1/conversations", {"items": [{"type": "message", "content": "hello"}]}),
        ("/v1/images/generations", {"prompt": "hello"}),
    ],
)
def test_every_path_yields_model_stream_and_a_prompt(path: str, fields: dict[str, object]) -> None:
    parsed = parse(path, {"model": "m", "stream": True, "cache_salt": "s", **fields})
    assert (parsed.model, parsed.streaming, parsed.cache_salt, parsed.names_model) == ("m", True, "s", True)
    assert len(parsed.prompts) == 1
    assert b"hello" in parsed.prompts[0]
    assert any(path.endswith(suffix) for suffix in OpenAIParser.suffixes)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("fields", [{}, {"stream": None, "cache_salt": None, "max_tokens": None}, {"stream": False}])
def test_what_is_absent_or_null_has_its_default(path: str, fields: dict[str, object]) -> None:
    asked = {"messages": [{"role": "user", "content": "x"}]} if path == CHAT else {"prompt": "x"}
    parsed = parse(path, {**asked, **fields})
    assert (parsed.model, parsed.streaming, parsed.cache_salt, parsed.max_output_tokens) == ("", False, "", None)


@pytest.mark.parametrize(
    ("path", "fields", "limit"),
    [
        (COMPLETIONS, {"max_tokens": 7}, 7),
        (COMPLETIONS, {"max_completion_tokens": 7}, None),
        (CHAT, {"max_tokens": 7}, 7),
        (CHAT, {"max_completion_tokens": 5, "max_tokens": 7}, 5),
        (RESPONSES, {"max_output_tokens": 9}, 9),
        (RESPONSES, {"max_tokens": 9}, None),
    ],
)
def test_the_clients_output_cap_is_read_by_its_name_on_each_path(
    path: str, fields: dict[str, object], limit: int | None
) -> None:
    asked = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "input": "x"}
    assert parse(path, {**asked, **fields}).max_output_tokens == limit


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("héllo", ("héllo".encode(),)),
        (["a", "bc"], (b"a", b"bc")),
        ([1, 258], (struct.pack("<2I", 1, 258),)),
        ([[1], [2, 3]], (struct.pack("<I", 1), struct.pack("<2I", 2, 3))),
        ([4294967295], (b"\xff\xff\xff\xff",)),
        ("x" * 100_000, (b"x" * 100_000,)),
        ("\U0001f600", ("\U0001f600".encode(),)),
    ],
)
def test_a_prompt_may_be_text_or_token_ids_one_or_many(prompt: object, prompts: tuple[bytes, ...]) -> None:
    assert parse(COMPLETIONS, {"prompt": prompt}).prompts == prompts


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (COMPLETIONS, {}, "must have prompt field"),
        (COMPLETIONS, {"prompt": ""}, "must have prompt field"),
        (COMPLETIONS, {"prompt": None}, "must have prompt field"),
        (COMPLETIONS, {"prompt": []}, "must have prompt field"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt must be a string, strings, token ids or lists of token ids"),
        (COMPLETIONS, {"prompt": [-1]}, "between 0 and 4294967295"),
        (COMPLETIONS, {"prompt": [2**32]}, "between 0 and 4294967295"),
        (COMPLETIONS, {"prompt": [[2**70]]}, "between 0 and 4294967295"),
        (COMPLETIONS, {"prompt": [1.5]}, "got `float`"),
        (COMPLETIONS, {"prompt": [True]}, "got `bool`"),
        (COMPLETIONS, {"prompt": {"a": 1}}, r"\$\.prompt"),
        (COMPLETIONS, {"prompt": "x", "model": 3}, r"\$\.model"),
        (COMPLETIONS, {"prompt": "x", "stream": "yes"}, r"\$\.stream"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": "9"}, r"\$\.max_tokens"),
        (CHAT, {}, "must have valid messages field"),
        (CHAT, {"messages": []}, "must have valid messages field"),
        (CHAT, {"messages": None}, "must have valid messages field"),
        (CHAT, {"messages": "hi"}, r"\$\.messages"),
        (CHAT, {"messages": [{"content": "x"}]}, "role"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}]}, "."),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": None}}]}]}, "."),
        (RESPONSES, {}, "must have input field"),
        (RESPONSES, {"input": None}, "must have input field"),
        (RESPONSES, {"input": ""}, "must have input field"),
        (RESPONSES, {"input": []}, "must have input field"),
        (RESPONSES, b'{"input": [ ]}', "must have input field"),
        ("/v1/embeddings", {}, "must have input field"),
        ("/v1/images/generations", {}, "must have prompt field"),
        ("/v1/images/generations", {"prompt": ""}, "must have prompt field"),
        ("/v1/conversations", {}, "must have items field"),
        ("/v1/conversations", {"items": []}, "must have items field"),
        ("/v1/conversations", {"items": None}, "must have items field"),
    ],
)
def test_a_body_that_lacks_what_its_path_needs_is_refused(path: str, body: object, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        parse(path, body)


@pytest.mark.parametrize("path", ["/v1/" + suffix for suffix in OpenAIParser.suffixes])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b"{}x",
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b"\x00" * 9,
    ],
)
def test_a_body_that_is_no_json_object_is_refused(path: str, body: bytes) -> None:
    with pytest.raises(BadRequest, match="error unmarshaling request bodyMap: "):
        parse(path, body)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_a_body_nested_without_end_is_refused(path: str, opening: bytes) -> None:
    with pytest.raises(BadRequest):
        parse(path, b'{"metadata":' + opening * 100_000)


def test_chat_prompts_are_roles_and_contents_in_order() -> None:
    assert chat("one", [{"type": "text", "text": "two"}, {"type": "text", "text": "three"}]).prompts == (
        b"useroneusertwothree",
    )


def test_a_message_without_content_is_its_role() -> None:
    assert parse(CHAT, {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}).prompts == (
        b"assistant",
    )


def test_a_longer_conversation_begins_with_the_shorter_one() -> None:
    shorter, longer = chat("one"), chat("one", "two")
    assert longer.prompts[0].startswith(shorter.prompts[0])


def test_tools_come_before_the_messages() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    parsed = chat("x", tools=tools)
    assert parsed.prompts == (json.dumps(tools).encode() + b"userx",)


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize("field", ["tools", "instructions"])
def test_a_null_field_prompts_the_same_as_an_absent_one(path: str, field: str) -> None:
    asked = {"messages": [{"role": "user", "content": "x"}], "input": "x"}
    assert parse(path, {**asked, field: None}).prompts == parse(path, asked).prompts


def test_instructions_and_tools_come_before_the_input() -> None:
    (prompt,) = parse(
        RESPONSES, {"input": [{"role": "user", "content": "zz"}], "instructions": "aa", "tools": [{"n": "bb"}]}
    ).prompts
    assert prompt.index(b"aa") < prompt.index(b"bb") < prompt.index(b"zz")


@pytest.mark.parametrize("picture", [{"url": "http://a/1.png"}, "http://a/1.png"])
def test_an_image_stands_for_whole_tokens_and_differs_by_its_address(picture: object) -> None:
    (prompt,) = chat([{"type": "text", "text": "look"}, {"type": "image_url", "image_url": picture}]).prompts
    assert prompt == b"userlook" + zlib.crc32(b"http://a/1.png").to_bytes(4, "little") * IMAGE_TOKENS


def test_an_image_is_aligned_so_that_what_follows_does_not_shift() -> None:
    (prompt,) = chat([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "u"}]).prompts
    assert len(prompt) == 8 + 4 * IMAGE_TOKENS
    assert prompt.startswith(b"usera\0\0\0")


def test_a_part_of_another_kind_adds_nothing() -> None:
    parsed = chat([{"type": "file", "file": {"file_data": "x"}}, {"type": "video_url", "video_url": None}])
    assert (parsed.prompts, parsed.media) == ((b"user",), 0)


def call(name: object, arguments: object) -> dict[str, object]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("calls", "added"),
    [
        (None, b""),
        ([], b""),
        ([{}], b""),
        ([{"function": None}], b""),
        ([call("f", '{"city": "Z\u00fcrich"}')], 'f{"city": "Zürich"}'.encode()),
        ([call("f", {"a": 1})], b'f{"a": 1}'),
        ([call("f", "")], b"f"),
        ([call("f", None)], b"f"),
        ([call(None, "{}")], b"{}"),
        ([call("f", "{}"), call("g", "{}")], b"f{}g{}"),
    ],
)
def test_tool_calls_of_earlier_turns_are_read_as_names_and_arguments(calls: object, added: bytes) -> None:
    messages = [{"role": "assistant", "content": "hm", "tool_calls": calls}, {"role": "tool", "content": "42"}]
    assert parse(CHAT, {"messages": messages}).prompts == (b"assistanthm" + added + b"tool42",)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image_url", "url"]) | st.text(max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=10,
)
FIELDS = st.sampled_from(
    ["model", "prompt", "messages", "input", "items", "tools", "instructions", "stream", "max_tokens", "cache_salt"]
)
PATHS = st.sampled_from(OpenAIParser.suffixes)


@fuzzed
@given(PATHS, st.binary(max_size=100) | st.text(alphabet='{}[]":,\\u0d8ntrue1-. é', max_size=60).map(str.encode))
def test_any_bytes_raise_nothing_but_bad_requests(path: str, body: bytes) -> None:
    with contextlib.suppress(BadRequest):
        parse(path, body)


@fuzzed
@given(PATHS, st.dictionaries(FIELDS, JSON, max_size=5))
def test_any_object_raises_nothing_but_bad_requests(path: str, body: dict[str, object]) -> None:
    with contextlib.suppress(BadRequest):
        parse(path, body)


@fuzzed
@given(PATHS, st.lists(st.dictionaries(st.sampled_from(["role", "content"]), JSON, max_size=2), max_size=3))
def test_any_messages_raise_nothing_but_bad_requests(path: str, messages: list[object]) -> None:
    with contextlib.suppress(BadRequest):
        parse(path, {"messages": [{"role": "user", **m} for m in messages], "items": messages, "input": messages})


WHOLE = {
    "prompt_tokens": 11,
    "completion_tokens": 22,
    "total_tokens": 33,
    "prompt_tokens_details": {"cached_tokens": 4},
}


def numbers(tail: bytes) -> tuple[int | None, int | None, int | None] | None:
    usage = usage_in_tail(tail)
    return None if usage is None else (usage.prompt, usage.output, usage.cached)


def event(fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


CHUNK = event({"choices": [{"delta": {"content": "hi"}}], "usage": None})
LAST = event({"choices": [], "usage": WHOLE})
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (json.dumps({"id": "x", "choices": [], "usage": WHOLE}).encode(), (11, 22, 4)),
        (json.dumps({"usage": WHOLE}, indent=2).encode(), (11, 22, 4)),
        (json.dumps({"usage": WHOLE}, indent="\t").encode(), (11, 22, 4)),
        (b'{"usage"\t:\r\n\t{"prompt_tokens": 11, "completion_tokens": 22}}', (11, 22, None)),
        (CHUNK + CHUNK + LAST + DONE, (11, 22, 4)),
        ((CHUNK * 20 + LAST + DONE)[-1024:], (11, 22, 4)),
        (LAST + CHUNK + DONE, (11, 22, 4)),  # later events that say null do not hide it
        (CHUNK + DONE, None),
        (b"", None),
        (DONE, None),
        (LAST[: LAST.index(b"33")], None),  # cut at its end
        (LAST[LAST.index(b'usage"') :], None),  # cut at its beginning
        (event({"usage": WHOLE}) + LAST[:40], (11, 22, 4)),
        (event({"usage": {}}), (None, None, None)),
        (event({"usage": {"prompt_tokens": 1, "prompt_tokens_details": None}}), (1, None, None)),
        (event({"usage": {"prompt_tokens": 1, "prompt_tokens_details": {}}}), (1, None, None)),
        (event({"usage": {"prompt_tokens": "many"}}), None),
        (event({"usage": WHOLE}) + event({"usage": {"prompt_tokens": "many"}}), (11, 22, 4)),
        (event({"usage": {**WHOLE, "extra": {"deep": {"er": [1]}}}}), (11, 22, 4)),
        (event({"usage": 3}), None),
        (event({"content": 'the "usage": {"prompt_tokens": 99}'}), None),  # quoted inside a text
        (event({"content": "usage", "x": {"prompt_tokens": 99}}), None),
        (event({"usage": {**WHOLE, "note": 'a } or a \\"} in a text'}}), (11, 22, 4)),
    ],
)
def test_usage_is_found_in_the_tail_of_every_kind_of_reply(tail: bytes, expected: object) -> None:
    assert numbers(tail) == expected


def test_usage_of_the_responses_api_has_other_names() -> None:
    usage = {"input_tokens": 5, "input_tokens_details": {"cached_tokens": 2}, "output_tokens": 9, "total_tokens": 14}
    tail = b"event: response.completed\n" + event(
        {"type": "response.completed", "response": {"usage": usage, "user": None}}
    )
    assert numbers(tail) == (5, 9, 2)


def meta_info(finish_reason: object, completion_tokens: int, **more: object) -> bytes:
    counts = {"prompt_tokens": 9, "completion_tokens": completion_tokens, "cached_tokens": 3, **more}
    return event({"text": "hi", "meta_info": {"id": "r", "finish_reason": finish_reason, **counts}})


STOP = {"type": "stop", "matched": "}"}


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (meta_info(None, 1) + meta_info(STOP, 2) + DONE, (9, 2, 3)),
        (meta_info({"type": "length", "length": 2}, 2, cached_tokens=0), (9, 2, 0)),
        (meta_info(STOP, 2, cached_tokens=None), (9, 2, None)),
        (meta_info(None, 1) + meta_info(None, 2), None),
        (b'{"meta_info":{"prompt_tokens":9}}', None),
        (meta_info(STOP, 2) + LAST, (11, 22, 4)),
        (meta_info(STOP, "many"), None),
    ],
)
def test_sglang_counts_in_its_own_place_once_the_reply_is_finished(tail: bytes, expected: object) -> None:
    assert numbers(tail) == expected


def test_a_count_of_zero_is_a_count() -> None:
    assert numbers(event({"usage": {"prompt_tokens": 0, "completion_tokens": 0, "input_tokens": 7}})) == (0, 0, None)


def test_usage_nested_without_end_is_no_usage() -> None:
    assert usage_in_tail(b'"usage":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000) is None


@fuzzed
@given(
    st.lists(
        st.sampled_from([b'"usage"', b":", b"{", b"}", b'"prompt_tokens"', b"1", b"-", b",", b"\xff", b'"', b" "]),
        max_size=30,
    )
)
def test_any_tail_is_read_without_an_error(pieces: list[bytes]) -> None:
    usage_in_tail(b"".join(pieces))


def test_every_cut_of_a_reply_gives_its_usage_or_none() -> None:
    whole = CHUNK + LAST + DONE
    for start in range(len(whole)):
        for end in (len(whole), len(whole) - len(DONE), len(whole) - len(DONE) - 20):
            assert numbers(whole[start:end]) in (None, (11, 22, 4))


@pytest.mark.parametrize(
    ("body", "rewritten"),
    [
        (b'{"model":"old","n":1}', b'{"model":"new","n":1}'),
        (b'{"n":123456789012345678901234567890,"model":"old"}', b'{"n":123456789012345678901234567890,"model":"new"}'),
        (b'{"t":1.0000000000000000001,"e":1E+2,"model":null}', b'{"t":1.0000000000000000001,"e":1E+2,"model":"new"}'),
        (b'{"s":"\\u00e9\\/","model":"old"}', b'{"s":"\\u00e9\\/","model":"new"}'),
        (
            b'{ "a" : [ 1 , { "model" : "x" } ] ,\r\n\t"model" : "old" } \n',
            b'{ "a" : [ 1 , { "model" : "x" } ] ,\r\n\t"model" : "new" } \n',
        ),
        (b'{"model":"old","a":{"model":"old"}}', b'{"model":"new","a":{"model":"old"}}'),
        (b'{"a":{"model":"old"},"model":"old"}', b'{"a":{"model":"old"},"model":"new"}'),
        (b'{"a":{"model":"old"}}', b'{"a":{"model":"old"},"model":"new"}'),
        (b'{"a":"\\"model\\":\\"old\\"","model":"old"}', b'{"a":"\\"model\\":\\"old\\"","model":"new"}'),
        (b'{"a":"model","model":"old"}', b'{"a":"model","model":"new"}'),
        (b'{"mod\\u0065l":"old"}', b'{"mod\\u0065l":"new"}'),
        (b'{"model":"\\u006fl\\"d","n":1}', b'{"model":"new","n":1}'),
        (b'{"model":"one","n":1,"model":"two"}', b'{"model":"one","n":1,"model":"new"}'),
        (b'{"model":{"a":[1]},"n":1}', b'{"model":"new","n":1}'),
        (b'{"model":"","n":1}', b'{"model":"new","n":1}'),
        (b'{"n":1}', b'{"n":1,"model":"new"}'),
        (b'{"n":1 }\n', b'{"n":1 ,"model":"new"}\n'),
        (b'{"n":"}"}', b'{"n":"}","model":"new"}'),
        (b"{}", b'{"model":"new"}'),
        (b" { } ", b' { "model":"new"} '),
    ],
)
def test_a_rewritten_body_keeps_all_other_bytes(body: bytes, rewritten: bytes) -> None:
    assert with_model(body, "new") == rewritten


@pytest.mark.parametrize("model", ["", 'quo"te', "back\\slash", "naïve", "a\nb"])
def test_any_model_name_is_written_so_that_it_reads_back(model: str) -> None:
    assert json.loads(with_model(b'{"model":"old","x":[]}', model)) == {"model": model, "x": []}


@fuzzed
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=5), st.text(max_size=8))
def test_a_rewritten_body_says_the_same_but_for_the_model(body: dict[str, object], model: str) -> None:
    assert msgspec.json.decode(with_model(json.dumps(body).encode(), model)) == {**body, "model": model}


@pytest.mark.parametrize(
    "body", [b'{"\xff":1,"prompt":"a"}', b'{"x":"\xff","prompt":"a"}', b'{"prompt":"a","prompt":"b"}']
)
def test_a_body_the_parser_accepts_can_be_rewritten_or_is_a_bad_request(body: bytes) -> None:
    with contextlib.suppress(BadRequest):
        parse(COMPLETIONS, body)
        assert with_model(body, "new") == body[:-1] + b',"model":"new"}'


LONG = b'say \\"model\\": \\"old\\" ' * 50_000


@pytest.mark.parametrize(
    ("head", "tail"),
    [
        (b'{"messages":[{"content":"', b'"}],"n":12345678901234567890, "model":"OLD"}'),
        (b'{"messages":[{"content":"', b'"}],"model":"OLD","metadata":{"model":"x"}}'),
        (b'{"messages":[{"content":"', b'"}],"model":"OLD","metadata":{"a":{"model":"x"},"b":1}}'),
        (b'{"messages":[{"content":"', b'"}],"model":"x","mod\\u0065l":"OLD"}'),
        (b'{"messages":[{"content":"', b'"}],"model":"x","model":"OLD"}'),
        (b'{"model":"OLD","messages":[{"content":"', b'"}]}'),
        (b'{"model":"OLD","messages":[{"content":"', b'","model":"x"}]}'),
        (b'{"model":"OLD","messages":[{"content":"', b'"}],"stop":["model"]}'),
        (b'{"model":"OLD","messages":[{"content":"', b'"}],"stop":["model",": \\"x\\"}"]}'),
        (b'{"model":"x","messages":[{"content":"', b'"}],"model" : "OLD" }'),
    ],
)
def test_in_a_large_body_nothing_but_the_model_changes_wherever_it_is(head: bytes, tail: bytes) -> None:
    body = head + LONG + tail
    assert with_model(body, "new") == body.replace(b"OLD", b"new")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"model":"old"', b'{"model":"old"}x'])
def test_a_body_that_is_no_json_object_cannot_be_rewritten(body: bytes) -> None:
    with pytest.raises(BadRequest, match="error unmarshaling request bodyMap: "):
        with_model(body, "new")
