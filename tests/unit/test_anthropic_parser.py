"""Messages in every form the API knows, usage out of its replies, and junk that must only ever be a 400."""

from __future__ import annotations

import contextlib
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.errors import BadRequest
from llmd_sched.extproc.reply import TAIL_BYTES, ReplyReader, read_outcome
from llmd_sched.parsers.anthropic import BILLING_MARK, AnthropicParser
from llmd_sched.parsers.openai import OpenAIParser
from llmd_sched.parsers.passthrough import PassthroughParser
from llmd_sched.parsers.prompt import MAX_MEDIA_TOKENS
from llmd_sched.parsers.registry import PARSERS, ParserRegistry
from llmd_sched.parsers.rewrite import with_model
from llmd_sched.parsers.usage import usage_in_tail
from llmd_sched.plugin import Parsed
from llmd_sched.types import End, Outcome
from tests.builders import fuzzed

IMAGE_TOKENS = 225
"""An image of unknown size: 640 x 360 pixels at 1024 pixels per token."""

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HELLO = [{"role": "user", "content": "hello"}]
IMAGE = {"type": "image", "source": {"type": "url", "url": "http://a/1.png"}}


def parse(body: object, path: str = PATH) -> Parsed:
    return AnthropicParser().parse(path, body if isinstance(body, bytes) else json.dumps(body).encode())


def prompt_of(*messages: dict[str, object], **fields: object) -> bytes:
    (prompt,) = parse({"model": "m", "messages": list(messages), **fields}).prompts
    return prompt


def user(*blocks: object) -> dict[str, object]:
    return {"role": "user", "content": list(blocks)}


def text(words: str) -> dict[str, object]:
    return {"type": "text", "text": words}


def picture(address: str) -> bytes:
    return zlib.crc32(address.encode()).to_bytes(4, "little") * IMAGE_TOKENS


def test_every_field_is_read() -> None:
    parsed = parse({"model": "m", "messages": HELLO, "max_tokens": 9, "stream": True, "cache_salt": "s"})
    assert parsed == Parsed(
        model="m", prompts=(b"userhello",), max_output_tokens=9, streaming=True, cache_salt="s", names_model=True
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stream": None, "max_tokens": None, "cache_salt": None, "system": None, "tools": None},
        {"stream": False, "system": "", "metadata": {"user_id": "u"}, "thinking": {"type": "enabled"}},
        {"system": []},
    ],
)
def test_what_is_absent_or_null_has_its_default(fields: dict[str, object]) -> None:
    assert parse({"messages": HELLO, **fields}) == Parsed(prompts=(b"userhello",))


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        ("héllo", "héllo".encode()),
        ("", b""),
        (None, b""),
        ([], b""),
        ([text("one"), text("two")], b"onetwo"),
        ([{"text": "no type"}], b"no type"),
        ([{"type": "text", "text": None}], b""),
        ([{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}, "citations": [{"a": 1}]}], b"x"),
        ([{"type": "thinking", "thinking": "hm", "signature": "sig"}], b"hm"),
        ([{"type": "thinking", "thinking": None}], b""),
        ([{"type": "redacted_thinking", "data": "opaque"}], b""),
        ([{"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}], b't1f{"a": 1}'),
        ([{"type": "tool_use", "id": "t1", "name": "f", "input": None}], b"t1f"),
        ([{"type": "tool_use"}], b""),
        ([{"type": "tool_result", "tool_use_id": "t1", "content": "42"}], b"42"),
        ([{"type": "tool_result", "tool_use_id": "t1", "content": [text("4"), text("2")]}], b"42"),
        ([{"type": "tool_result", "tool_use_id": "t1", "content": None, "is_error": True}], b""),
        ([{"type": "tool_result", "tool_use_id": "t1"}], b""),
        ([{"type": "tool_result", "content": [{"type": "tool_reference", "tool_name": "f"}]}], b""),
        ([{"type": "tool_result", "content": {"type": "a_new_kind"}}], b""),
        ([{"type": "document", "source": {"type": "base64", "data": "eHg="}}], b""),
        ([{"type": "search_result", "source": "http://a", "title": "t", "content": [text("x")]}], b""),
        ([{"type": "code_execution_tool_result", "content": {"stdout": "x"}}], b""),
        ([{"type": "a_new_kind", "anything": [1]}], b""),
    ],
)
def test_a_message_is_its_role_and_what_the_model_reads_of_its_blocks(content: object, prompt: bytes) -> None:
    assert prompt_of({"role": "assistant", "content": content}) == b"assistant" + prompt


def test_tools_then_system_text_then_messages_without_separators() -> None:
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    prompt = prompt_of(*HELLO, {"role": "assistant", "content": "hi"}, tools=tools, system="be brief")
    assert prompt == json.dumps(tools).encode() + b"be briefuserhelloassistanthi"


def test_a_longer_conversation_begins_with_the_shorter_one() -> None:
    assert prompt_of(*HELLO, {"role": "assistant", "content": "hi"}, system="s").startswith(
        prompt_of(*HELLO, system="s")
    )


BILLING = text(f"{BILLING_MARK}: cc_version=2.1; cch=a7f3;")


@pytest.mark.parametrize(
    ("system", "prompt"),
    [
        ("be brief", b"be brief"),
        ([text("be "), text("brief")], b"be brief"),
        ([BILLING, text("be brief")], b"be brief"),
        ([text("be "), BILLING, text("brief")], b"be brief"),
        ([BILLING], b""),
        ([text(f"about {BILLING_MARK}")], f"about {BILLING_MARK}".encode()),
        (f"{BILLING_MARK}: a text, not a block", f"{BILLING_MARK}: a text, not a block".encode()),
    ],
)
def test_system_text_is_read_without_the_billing_block(system: object, prompt: bytes) -> None:
    assert prompt_of(*HELLO, system=system) == prompt + b"userhello"


def test_a_billing_block_is_dropped_where_a_message_has_the_role_system_and_nowhere_else() -> None:
    assert prompt_of({"role": "system", "content": [BILLING, text("x")]}) == b"systemx"
    assert BILLING_MARK.encode() in prompt_of(user(BILLING))
    assert BILLING_MARK.encode() in prompt_of(user({"type": "tool_result", "content": [BILLING]}))


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ({"type": "url", "url": "http://a/1.png"}, "http://a/1.png"),
        ({"type": "base64", "media_type": "image/png", "data": "aGk="}, "aGk="),
        ({"type": "file", "file_id": "file_1"}, "file_1"),
        ("http://a/1.png", "http://a/1.png"),
        ({"type": "url"}, ""),
        (None, ""),
    ],
)
@pytest.mark.parametrize("inside_a_tool_result", [False, True])
def test_an_image_stands_for_whole_tokens_and_differs_by_what_it_is(
    source: object, address: str, inside_a_tool_result: bool
) -> None:
    blocks: list[object] = [text("a"), {"type": "image", "source": source}, text("b")]
    if inside_a_tool_result:
        blocks = [{"type": "tool_result", "content": blocks}]
    assert prompt_of(user(*blocks)) == b"usera\0\0\0" + picture(address) + b"b"


def test_the_same_image_is_the_same_bytes_as_in_an_openai_body() -> None:
    body = {"messages": [user(text("a"), {"type": "image_url", "image_url": {"url": "http://a/1.png"}})]}
    assert OpenAIParser().parse("/v1/chat/completions", json.dumps(body).encode()).prompts == (
        prompt_of(user(text("a"), IMAGE)),
    )


def test_images_beyond_the_limit_add_nothing_wherever_they_are() -> None:
    fit, *_ = divmod(MAX_MEDIA_TOKENS, IMAGE_TOKENS)
    messages = [user(*[IMAGE] * 200), user({"type": "tool_result", "content": [IMAGE] * 200}), user(*[IMAGE] * 300)]
    parsed = parse({"messages": messages})
    assert parsed.prompts[0].count(picture("http://a/1.png")) == fit
    assert parsed.prompts[0].count(picture("http://a/1.png")[:4]) == MAX_MEDIA_TOKENS
    assert parsed.media == 700


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "invalid messages request: must have valid messages field"),
        ({"messages": []}, "must have valid messages field"),
        ({"messages": None}, "must have valid messages field"),
        ({"messages": "hi"}, r"\$\.messages"),
        ({"messages": {"role": "user"}}, r"\$\.messages"),
        ({"messages": ["hi"]}, r"\$\.messages\[0\]"),
        ({"messages": [{"content": "x"}]}, "missing required field `role`"),
        ({"messages": [{"role": None, "content": "x"}]}, r"\$\.messages\[0\]\.role"),
        ({"messages": [{"role": "user", "content": 3}]}, r"\.content"),
        ({"messages": [user("x")]}, r"\.content\[0\]"),
        ({"messages": [user({"type": 3})]}, r"\.type"),
        ({"messages": [user(text(""), {"type": "text", "text": 3})]}, r"\.text"),
        ({"messages": [user({"type": "thinking", "thinking": 3})]}, r"\.thinking"),
        ({"messages": [user({"type": "tool_use", "id": 3})]}, r"\.id"),
        ({"messages": [user({"type": "tool_use", "name": 3})]}, r"\.name"),
        ({"messages": [user({"type": "tool_result", "content": 3})]}, r"\.content"),
        ({"messages": [user({"type": "tool_result", "content": ["x"]})]}, r"\.content"),
        ({"messages": [user({"type": "image", "source": 3})]}, r"\.source"),
        ({"messages": [user({"type": "image", "source": {"data": 3}})]}, r"\.source\.data"),
        ({"messages": [user({"type": "image", "source": {"url": 3}})]}, r"\.source\.url"),
        ({"messages": HELLO, "system": 3}, r"\$\.system"),
        ({"messages": HELLO, "system": ["x"]}, r"\$\.system"),
        ({"messages": HELLO, "model": 3}, r"\$\.model"),
        ({"messages": HELLO, "stream": "yes"}, r"\$\.stream"),
        ({"messages": HELLO, "max_tokens": "9"}, r"\$\.max_tokens"),
        ({"messages": HELLO, "max_tokens": 1.5}, r"\$\.max_tokens"),
    ],
)
def test_a_body_that_is_no_conversation_is_refused(body: object, message: str) -> None:
    with pytest.raises(BadRequest, match=message) as error:
        parse(body)
    assert error.value.status == 400


@pytest.mark.parametrize("path", [PATH, COUNT])
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
    ],
)
def test_a_body_that_is_no_json_object_is_refused(path: str, body: bytes) -> None:
    with pytest.raises(BadRequest, match="error unmarshaling request bodyMap: "):
        parse(body, path)


@pytest.mark.parametrize("opening", [b'{"metadata":', b'{"messages":[', b'{"system":[', b'{"tools":'])
def test_a_body_nested_without_end_is_refused(opening: bytes) -> None:
    with pytest.raises(BadRequest):
        parse(opening * 100_000)


@pytest.mark.parametrize("fields", [{}, {"messages": HELLO}, {"messages": 3, "stream": True, "max_tokens": 7}])
def test_counting_tokens_runs_nothing_so_it_has_a_model_and_no_prompt(fields: dict[str, object]) -> None:
    assert parse({"model": "m", **fields}, COUNT) == Parsed(model="m")


@pytest.mark.parametrize(
    ("path", "prompts"),
    [(PATH, 1), ("/tenant" + PATH, 1), (PATH + "?beta=true", 1), (COUNT, 0), (COUNT + "?beta=true", 0)],
)
def test_the_registry_gives_both_paths_to_this_parser(path: str, prompts: int) -> None:
    registry = ParserRegistry([PassthroughParser(), OpenAIParser(), PARSERS["anthropic-parser"]()])
    parsed = registry.parse(path, json.dumps({"model": "m", "messages": HELLO}).encode())
    assert (parsed.model, len(parsed.prompts)) == ("m", prompts)


@pytest.mark.parametrize("path", [PATH, COUNT])
def test_a_rewritten_model_leaves_the_rest_as_it_was(path: str) -> None:
    body = b'{"max_tokens":5,"messages":[{ "role":"user", "content":"my \\"model\\":\\u00e9" }],"model":"old"}'
    rewritten = with_model(body, "new")
    assert rewritten == body.replace(b"old", b"new")
    assert (parse(rewritten, path).model, parse(rewritten, path).prompts) == ("new", parse(body, path).prompts)


KEYS = ["role", "content", "type", "text", "source", "data", "url", "thinking", "id", "name", "input"]
TYPES = st.sampled_from(["text", "image", "thinking", "tool_use", "tool_result", "document"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner | TYPES, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from(["model", "messages", "system", "tools", "stream", "max_tokens", "cache_salt"])
PATHS = st.sampled_from([PATH, COUNT])
BLOCKS = st.dictionaries(st.sampled_from(KEYS), JSON | TYPES, max_size=4)


@fuzzed
@given(PATHS, JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=80))
def test_any_text_raises_nothing_but_bad_requests(path: str, body: bytes) -> None:
    with contextlib.suppress(BadRequest):
        parse(body, path)


@fuzzed
@given(PATHS, st.dictionaries(FIELDS, JSON, max_size=6))
def test_any_object_raises_nothing_but_bad_requests(path: str, body: dict[str, object]) -> None:
    with contextlib.suppress(BadRequest):
        parse(body, path)


@fuzzed
@given(st.lists(BLOCKS, max_size=3), st.lists(BLOCKS, max_size=2) | JSON)
def test_any_blocks_raise_nothing_but_bad_requests(blocks: list[object], system: object) -> None:
    with contextlib.suppress(BadRequest):
        parse({"messages": [user(*blocks)], "system": system})


@fuzzed
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=9)), min_size=1, max_size=5))
def test_texts_read_the_same_as_strings_and_as_blocks(turns: list[tuple[str, str]]) -> None:
    expected = "".join(role + words for role, words in turns).encode()
    assert prompt_of(*({"role": role, "content": words} for role, words in turns)) == expected
    assert prompt_of(*({"role": role, "content": [text(words)]} for role, words in turns)) == expected


# --- usage out of replies ---------------------------------------------------------------------------------------------

CACHED = {"input_tokens": 10, "cache_creation_input_tokens": 20, "cache_read_input_tokens": 70}


def event(kind: str, **fields: object) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def start(**usage: object) -> bytes:
    return event("message_start", message={"id": "msg_1", "model": "m", "content": [], "usage": usage})


def deltas(count: int, words: str = "word ") -> bytes:
    one = event("content_block_delta", index=0, delta={"type": "text_delta", "text": words})
    return event("content_block_start", index=0, content_block=text("")) + one * count


def last(**usage: object) -> bytes:
    ending = event("message_delta", delta={"stop_reason": "end_turn"}, usage=usage)
    return event("content_block_stop", index=0) + ending + event("message_stop")


def outcome_of(reply: bytes, chunk_bytes: int = 10_000, content_type: str = "text/event-stream") -> Outcome:
    reader = ReplyReader(streaming=True, sent_s=0.0)
    reader.headers({":status": "200", "content-type": content_type})
    for at in range(0, len(reply), chunk_bytes):
        reader.body(reply[at : at + chunk_bytes], 1.0)
    return reader.outcome(End.FINISHED, 2.0)


def counts(outcome: Outcome) -> tuple[int | None, int | None, int | None]:
    return outcome.prompt_tokens, outcome.cached_tokens, outcome.output_tokens


@pytest.mark.parametrize("words", [1, 2, 9, 400])
@pytest.mark.parametrize("chunk_bytes", [1, 37, 1500, 10_000_000])
def test_a_stream_says_what_went_in_first_and_what_came_out_last(words: int, chunk_bytes: int) -> None:
    reply = start(**CACHED, output_tokens=1) + deltas(words) + last(output_tokens=words)
    assert counts(outcome_of(reply, chunk_bytes)) == (100, 70, words)


def test_a_stream_of_vllm_counts_the_cached_tokens_in_its_input() -> None:
    """It has no cache fields, and says the input twice."""
    reply = start(input_tokens=12, output_tokens=0) + deltas(300) + last(input_tokens=12, output_tokens=300)
    assert counts(outcome_of(reply)) == (12, None, 300)


def test_later_numbers_hold_where_a_stream_says_them_twice() -> None:
    reply = start(input_tokens=1, cache_read_input_tokens=0, output_tokens=1) + deltas(9)
    assert counts(outcome_of(reply + last(**CACHED, output_tokens=9))) == (100, 70, 9)


@pytest.mark.parametrize("words", [2, 400])
def test_a_stream_that_breaks_off_has_its_input_and_as_many_tokens_as_events(words: int) -> None:
    """The first event says one output token, which is no count; two events besides the words have come."""
    reply = start(**CACHED, output_tokens=1) + deltas(words)
    assert counts(outcome_of(reply)) == (100, 70, words + 2)


def test_a_first_event_that_is_cut_says_nothing() -> None:
    whole = start(**CACHED, output_tokens=1)
    assert counts(outcome_of(whole[:-40])) == (None, None, 1)
    assert counts(outcome_of(whole[:-1])) == (100, 70, 1)


def test_a_text_that_quotes_a_first_event_is_none() -> None:
    quoted = start(**CACHED, output_tokens=1).decode()
    reply = start(input_tokens=5, output_tokens=1) + deltas(3, quoted) + last(output_tokens=3)
    assert counts(outcome_of(reply)) == (5, None, 3)


@pytest.mark.parametrize(("words", "expected"), [(2, (100, 70, 2)), (400, (None, None, 400))])
def test_where_only_the_end_is_seen_a_short_stream_still_says_everything(words: int, expected: object) -> None:
    """As on the lean path; a longer stream then says what came out, and nothing wrong."""
    reply = start(**CACHED, output_tokens=1) + deltas(words) + last(output_tokens=words)
    outcome = read_outcome(
        End.FINISHED,
        status=200,
        streamed=True,
        first_ms=1.0,
        e2e_ms=2.0,
        tail=reply[-TAIL_BYTES:],
        events=words + 5,
        response_bytes=len(reply),
    )
    assert counts(outcome) == expected


def test_a_whole_reply_says_everything_at_its_end() -> None:
    reply = {"id": "msg_1", "type": "message", "content": [text("x" * 2 * TAIL_BYTES)], "stop_reason": "end_turn"}
    body = json.dumps({**reply, "usage": {**CACHED, "output_tokens": 6}}).encode()
    assert counts(outcome_of(body, content_type="application/json")) == (100, 70, 6)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({**CACHED, "output_tokens": 6}, (100, 70, 6)),
        ({"input_tokens": 10, "output_tokens": 6}, (10, None, 6)),
        ({"input_tokens": 10, "cache_read_input_tokens": None, "output_tokens": 0}, (10, None, 0)),
        ({"input_tokens": 0, "cache_read_input_tokens": 0}, (0, 0, None)),
        ({"output_tokens": 6}, (None, None, 6)),
        ({"cache_read_input_tokens": 7}, (None, 7, None)),
        ({**CACHED, "cache_creation": {"ephemeral_5m_input_tokens": 20}, "service_tier": "standard"}, (100, 70, None)),
        ({"input_tokens": 9, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 6}, (9, 4, 6)),
        ({"prompt_tokens": 9, "input_tokens": 1, "cache_read_input_tokens": 1}, (9, 1, None)),
    ],
)
def test_anthropics_input_is_what_is_new_and_what_is_cached(usage: dict[str, object], expected: object) -> None:
    found = usage_in_tail(json.dumps({"usage": usage}).encode())
    assert found is not None
    assert (found.prompt, found.cached, found.output) == expected


@fuzzed
@given(st.integers(0, 1500), st.integers(1, 3000))
def test_every_cut_of_a_stream_gives_its_numbers_or_none(end: int, chunk_bytes: int) -> None:
    whole = start(**CACHED, output_tokens=1) + deltas(5) + last(output_tokens=5)
    prompt, cached, _ = counts(outcome_of(whole[:end], chunk_bytes))
    assert (prompt, cached) in ((100, 70), (None, None))
