"""Streams put together, and cut ones continued."""

from typing import Any

import msgspec
import pytest

from batchgw.client import reply
from batchgw.client.reply import CHAT, COMPLETIONS, Assembly, BrokenStreamError, EngineError, Progress

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 17, "model": "m", "system_fingerprint": "fp"}


def event(payload: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


def usage(prompt: int, completion: int, cached: int | None = None) -> dict[str, Any]:
    counted: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion,
                               "total_tokens": prompt + completion}  # fmt: skip
    return counted if cached is None else {**counted, "prompt_tokens_details": {"cached_tokens": cached}}


def chat_stream(
    *texts: str, prompt: int = 5, finish: str | None = "stop", field: str = "content", running: bool = True
) -> bytes:
    """As vLLM writes it: the role, one event a token, then the usage alone."""
    told = lambda n: {"usage": usage(prompt, n)} if running else {}  # noqa: E731
    first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    out = event({**HEAD, "choices": [first], **told(0)})
    for i, text in enumerate(texts):
        ends = finish if i == len(texts) - 1 else None
        choice = {"index": 0, "delta": {field: text}, "logprobs": None, "finish_reason": ends, "stop_reason": None}
        out += event({**HEAD, "choices": [choice], **told(i + 1)})
    if finish is None:
        return out
    return out + event({**HEAD, "choices": [], "usage": usage(prompt, len(texts), 4)}) + b"data: [DONE]\n\n"


def chat_whole(text: str, prompt: int, completion: int, finish: str = "stop") -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None,
              "finish_reason": finish, "stop_reason": None}  # fmt: skip
    top = {**HEAD, "object": "chat.completion"}
    return {**top, "choices": [choice], "usage": usage(prompt, completion, 4)}


@pytest.mark.parametrize("size", [1, 7, 64, 100_000])
def test_a_chat_stream_cut_anywhere_gives_the_whole_reply(size: int) -> None:
    stream, assembly = chat_stream("Hel", "lo", " wörld"), Assembly(CHAT)
    counted = sum(assembly.feed(stream[i : i + size]) for i in range(0, len(stream), size))
    assert assembly.ended
    assert counted == assembly.tokens == 3
    assert assembly.reply() == chat_whole("Hello wörld", 5, 3)


def test_a_completions_stream_gives_the_whole_reply() -> None:
    head, assembly = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"}, Assembly(COMPLETIONS)
    for text, finish in (("a", None), ("b", "length")):
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}
        assembly.feed(event({**head, "choices": [choice]}))
    assembly.feed(event({**head, "choices": [], "usage": usage(3, 2)}))
    choice = {"index": 0, "text": "ab", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    assert assembly.reply() == {**head, "choices": [choice], "usage": usage(3, 2)}


def test_reasoning_is_a_field_of_the_message_and_a_reply_of_reasoning_alone_has_no_content() -> None:
    assembly = Assembly(CHAT)
    assembly.feed(chat_stream("hm", "m", field="reasoning_content"))
    assert assembly.reply()["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "hmm",
    }


def test_comments_carriage_returns_and_empty_lines_of_a_stream_are_nothing() -> None:
    assembly = Assembly(CHAT)
    assembly.feed(b": ping\r\n\r\n" + chat_stream("a").replace(b"\n", b"\r\n"))
    assert assembly.reply()["choices"][0]["message"]["content"] == "a"


def put_together(stream: bytes) -> dict[str, Any]:
    assembly = Assembly(CHAT)
    assembly.feed(stream)
    return assembly.reply()


@pytest.mark.parametrize(
    ("stream", "wrong"),
    [(chat_stream("a", finish=None), "without a finish reason"), (b"data: nonsense\n\n", "no JSON"),
     (b"data: [1]\n\n", "no JSON"), (b"", "after 0 tokens"),
     (b"data: " + b"x" * (reply.MAX_EVENT_BYTES + 1), "more than")],
)  # fmt: skip
def test_a_stream_that_stops_or_is_none_is_broken(stream: bytes, wrong: str) -> None:
    with pytest.raises(BrokenStreamError, match=wrong):
        put_together(stream)


@pytest.mark.parametrize(("code", "status"), [(503, 503), ("oops", 500), (None, 500), (200, 500)])
def test_an_error_in_the_stream_has_the_status_it_would_have_had(code: object, status: int) -> None:
    with pytest.raises(EngineError) as caught:
        Assembly(CHAT).feed(event({"error": {"message": "no", "code": code}}))
    assert caught.value.status == status


def cut(url: str, *stream: bytes, before: Progress | None = None) -> Progress:
    assembly = Assembly(url, before)
    for piece in stream:
        assembly.feed(piece)
    left = assembly.progress()
    assert left is not None
    return left


def test_a_chat_cut_twice_ends_as_if_it_had_been_one_call() -> None:
    first = cut(CHAT, chat_stream("Once ", "upon ", finish=None))
    second = cut(CHAT, chat_stream("a ", prompt=7, finish=None), before=first)
    assert (second.text, second.tokens, second.prompt_tokens) == ("Once upon a ", 3, 5)
    last = Assembly(CHAT, second)
    last.feed(chat_stream("time", prompt=8).replace(b"chatcmpl-1", b"chatcmpl-9"))
    assert last.reply() == chat_whole("Once upon a time", 5, 4)


def test_without_running_usage_the_prompt_is_told_from_the_last_call() -> None:
    first = cut(CHAT, chat_stream("a", "b", finish=None, running=False))
    assert (first.tokens, first.prompt_tokens) == (2, 0)
    last = Assembly(CHAT, first)
    last.feed(chat_stream("c", prompt=7, running=False))
    assert last.reply()["usage"] == usage(5, 3, 4)


def test_cached_tokens_of_a_continued_call_are_not_more_than_the_prompt_had() -> None:
    last = Assembly(CHAT, Progress("x", 1, "ab", 2, 3))
    last.feed(chat_stream("c", prompt=5))
    assert last.reply()["usage"] == usage(3, 3, 3)


def test_nothing_generated_leaves_nothing_and_reasoning_starts_again() -> None:
    assert Assembly(CHAT).progress() is None
    assert cut(CHAT, chat_stream("hm", finish=None, field="reasoning_content")).text == ""


ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10}


def test_what_is_sent_first_is_the_body_streamed() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    assert reply.streaming(CHAT, ASK) == {**ASK, "stream": True, "stream_options": options}
    assert reply.streaming(CHAT, ASK, running_usage=False)["stream_options"] == {"include_usage": True}


def test_what_is_sent_next_holds_the_text_so_far_and_asks_for_the_rest() -> None:
    left = Progress("x", 1, "so far", 4, 5)
    chat = reply.streaming(CHAT, {**ASK, "max_completion_tokens": 20}, left)
    assert chat["messages"] == [*ASK["messages"], {"role": "assistant", "content": "so far"}]
    assert (chat["continue_final_message"], chat["add_generation_prompt"]) == (True, False)
    assert (chat["max_tokens"], chat["max_completion_tokens"]) == (6, 16)
    text = reply.streaming(COMPLETIONS, {"model": "m", "prompt": "tell: ", "max_tokens": 10}, left)
    assert (text["prompt"], text["max_tokens"]) == ("tell: so far", 6)
    assert "continue_final_message" not in text
    assert len(ASK["messages"]) == 1


@pytest.mark.parametrize(
    ("url", "extra", "streamed"),
    [(CHAT, {}, True), (CHAT, {"n": 1}, True), (CHAT, {"n": 2}, False), (CHAT, {"logprobs": True}, False),
     (CHAT, {"logprobs": False}, True), (CHAT, {"tools": [{}]}, False), (CHAT, {"tools": []}, True),
     (CHAT, {"modalities": ["audio"]}, False), (CHAT, {"prompt_logprobs": 1}, False),
     (COMPLETIONS, {"prompt": "x"}, True), (COMPLETIONS, {"prompt": ["x", "y"]}, False),
     (COMPLETIONS, {"prompt": "x", "logprobs": 0}, False), (COMPLETIONS, {"prompt": "x", "echo": True}, False),
     (COMPLETIONS, {"prompt": "x", "best_of": 2}, False), ("/v1/embeddings", {"input": "x"}, False),
     ("/v1/responses", {"input": "x"}, False)],
)  # fmt: skip
def test_only_what_can_be_put_together_exactly_is_streamed(url: str, extra: dict[str, Any], streamed: bool) -> None:
    assert reply.streamable(url, {"model": "m", **extra}) is streamed


@pytest.mark.parametrize(
    ("url", "extra", "resumed"),
    [(CHAT, {}, True), (CHAT, {"messages": [{"role": "assistant", "content": "a"}]}, False),
     (CHAT, {"response_format": {"type": "json_object"}}, False), (CHAT, {"frequency_penalty": 0.5}, False),
     (CHAT, {"frequency_penalty": 0}, True), (COMPLETIONS, {"prompt": "x"}, True),
     (COMPLETIONS, {"prompt": "x", "guided_json": "{}"}, False)],
)  # fmt: skip
def test_only_what_can_be_continued_exactly_is_continued(url: str, extra: dict[str, Any], resumed: bool) -> None:
    assert reply.resumable(url, {**ASK, **extra}) is resumed


@pytest.mark.parametrize(
    ("limits", "expected"), [({"max_tokens": 4}, True), ({"max_tokens": 5}, False), ({}, False),
                             ({"max_tokens": 9, "max_completion_tokens": 4}, True)],
)  # fmt: skip
def test_a_line_cut_at_its_last_token_needs_no_further_call(limits: dict[str, int], expected: bool) -> None:
    assert reply.exhausted(limits, Progress("x", 1, "abcd", 4, 5)) is expected


def test_the_reply_to_a_line_cut_at_its_last_token_is_whole() -> None:
    made = reply.finished(CHAT, "m", Progress("x", 1, "abcd", 4, 5))
    assert made["choices"][0]["message"]["content"] == "abcd"
    assert (made["id"], made["choices"][0]["finish_reason"], made["usage"]) == ("x", "length", usage(5, 4))
