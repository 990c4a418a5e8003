"""A stream of server-sent events becomes the whole reply that the same call without streaming would have given.

Lines are streamed so that their progress is known, and so that one that is aborted goes on where it was: the text so
far becomes part of the prompt (vLLM: ``continue_final_message``), and the usage is corrected as if there had been one
call. What cannot be put together exactly (several choices, log-probabilities, tools) is not streamed, and what cannot
be continued exactly (reasoning, grammars, penalties that count output tokens) starts again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

MAX_EVENT_BYTES = 1 << 22
"""Of one server-sent event; a stream that exceeds it is broken."""

_WHOLE_ONLY = ("logprobs", "top_logprobs", "prompt_logprobs", "tools", "functions", "audio", "modalities",
               "best_of", "suffix", "echo", "use_beam_search", "return_token_ids", "stream_options")  # fmt: skip
"""Fields with which a streamed reply is not, or not certainly, the whole one cut in pieces."""

_ONE_GO = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
           "presence_penalty", "frequency_penalty", "continue_final_message", "min_tokens")  # fmt: skip
"""Fields whose effect depends on what has been generated, which a continued call would see as prompt."""

_LIMITS = ("max_tokens", "max_completion_tokens")

Body = Mapping[str, Any]


class Progress(msgspec.Struct, frozen=True):
    """What an aborted line leaves. ``tokens`` have been generated; ``text`` is empty where it cannot be continued."""

    id: str
    created: int
    text: str
    tokens: int
    prompt_tokens: int
    """Of the original prompt; 0 where the engine had not said."""


class BrokenStreamError(Exception):
    """The stream ended early, or is none."""


class EngineError(Exception):
    """The engine said in its stream that it failed; ``status`` is the HTTP status it would have answered with."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"the engine failed with {status} in its stream")
        self.status, self.body = status, body


def streamable(url: str, body: Body) -> bool:
    """True when the whole reply can be put together from a stream."""
    if url not in (CHAT, COMPLETIONS) or body.get("n") not in (None, 1) or any(body.get(f) for f in _WHOLE_ONLY):
        return False
    # logprobs: 0 asks for the sampled token's own; False and null ask for nothing.
    logprobs = body.get("logprobs")
    return (logprobs is None or logprobs is False) and (url == CHAT or isinstance(body.get("prompt"), str))


def resumable(url: str, body: Body) -> bool:
    """True when text produced so far may be handed back as prompt."""
    if any(body.get(field) for field in _ONE_GO):
        return False
    if url == COMPLETIONS:
        return True
    messages = body.get("messages") or [{}]
    return bool(messages[-1].get("role") != "assistant")


def exhausted(body: Body, progress: Progress) -> bool:
    """True when no token is left to generate."""
    limits = [body[field] for field in _LIMITS if isinstance(body.get(field), int)]
    return bool(limits) and progress.tokens >= min(limits)


def streaming(url: str, body: Body, progress: Progress | None = None, running_usage: bool = True) -> dict[str, Any]:
    """The body to send: as stored, streamed, and going on from ``progress``.

    ``running_usage`` asks for token counts with each event (vLLM and SGLang; servers that refuse it get False).
    """
    options = {"include_usage": True, **({"continuous_usage_stats": True} if running_usage else {})}
    sent = {**body, "stream": True, "stream_options": options}
    if progress is None or not progress.text:
        return sent
    for field in _LIMITS:
        if isinstance(body.get(field), int):
            sent[field] = body[field] - progress.tokens
    if url == COMPLETIONS:
        sent["prompt"] = body["prompt"] + progress.text
        return sent
    sent["messages"] = [*body["messages"], {"role": "assistant", "content": progress.text}]
    return {**sent, "continue_final_message": True, "add_generation_prompt": False}


class Events:
    """Bytes of a stream in, payloads of its ``data:`` fields out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Payloads completed by ``data``. Raises BrokenStreamError when one grows beyond MAX_EVENT_BYTES."""
        *lines, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise BrokenStreamError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class Assembly:
    """The reply to one line, growing. ``before`` is what an earlier, aborted call produced."""

    def __init__(self, url: str, before: Progress | None = None) -> None:
        self._chat = url == CHAT
        self._events = Events()
        self._top: dict[str, Any] = {}
        self._choice: dict[str, Any] = {}
        self._fields: dict[str, list[str]] = {}
        """Streamed texts by the message's field: content, reasoning_content and the like."""
        self._counted = 0
        self._usage: dict[str, Any] = {}
        self._before = before if before is not None and before.text else None
        self.ended = False
        """The engine said [DONE]."""

    @property
    def fresh_tokens(self) -> int:
        """Generated by this call."""
        return max(self._counted, int(self._usage.get("completion_tokens") or 0))

    @property
    def tokens(self) -> int:
        """Generated for this line, the earlier calls' too."""
        return self.fresh_tokens + (self._before.tokens if self._before else 0)

    @property
    def whole(self) -> bool:
        """It has come to its end, even if [DONE] got lost."""
        return self._choice.get("finish_reason") is not None

    def feed(self, data: bytes) -> int:
        """Returns how many tokens ``data`` held. Raises BrokenStreamError and EngineError."""
        earlier = self.fresh_tokens
        for payload in self._events.feed(data):
            if payload == b"[DONE]":
                self.ended = True
            elif payload:
                self._take(payload)
        return self.fresh_tokens - earlier

    def _take(self, payload: bytes) -> None:
        try:
            event = msgspec.json.decode(payload)
            if (error := event.get("error")) is not None:
                raise EngineError(_status(error), payload)
            choices, usage = event.pop("choices", None) or [], event.pop("usage", None)
        except (msgspec.DecodeError, AttributeError) as e:
            raise BrokenStreamError(f"an event that is no JSON object: {e}") from None
        self._usage = usage or self._usage
        for key, value in event.items():
            if value is not None or key not in self._top:
                self._top.setdefault(key, value) if key in ("id", "created") else self._top.update({key: value})
        for choice in choices:
            self._take_choice(choice)

    def _take_choice(self, choice: dict[str, Any]) -> None:
        delta = choice.pop("delta", None) or {} if self._chat else {"text": choice.pop("text", None)}
        said = False
        for field, value in delta.items():
            if field != "role" and isinstance(value, str):
                self._fields.setdefault(field, []).append(value)
                said = said or bool(value)
        self._counted += said
        self._choice.update({k: v for k, v in choice.items() if v is not None or k not in self._choice})

    def _text(self, field: str) -> str:
        return "".join(self._fields.get(field, ()))

    def progress(self) -> Progress | None:
        """What to go on from when the call is cut now; None when nothing has been generated."""
        before = self._before
        if not self.tokens:
            return None
        # Reasoning cannot be handed back: the chat template would close it.
        thought = any(text for field, text in self._fields.items() if field not in ("content", "text"))
        mine = "" if thought else self._text("content" if self._chat else "text")
        return Progress(
            id=before.id if before else str(self._top.get("id", "")),
            created=before.created if before else int(self._top.get("created") or 0),
            text=(before.text if before else "") + mine if not thought else "",
            tokens=self.tokens,
            prompt_tokens=before.prompt_tokens if before else int(self._usage.get("prompt_tokens") or 0),
        )

    def reply(self) -> dict[str, Any]:
        """The whole reply. Raises BrokenStreamError when the stream stopped before its end."""
        if not self.whole:
            raise BrokenStreamError(f"the stream ended after {self.fresh_tokens} tokens without a finish reason")
        top = {**self._top, "object": "chat.completion" if self._chat else "text_completion"}
        if self._before:
            top |= {"id": self._before.id or top.get("id"), "created": self._before.created or top.get("created")}
        return {**top, "choices": [self._whole_choice()], "usage": self.usage()}

    def _whole_choice(self) -> dict[str, Any]:
        earlier = self._before.text if self._before else ""
        choice = {"index": 0, "logprobs": None, **self._choice}
        if not self._chat:
            return {**choice, "text": earlier + self._text("text")}
        others: dict[str, Any] = {f: "".join(texts) for f, texts in self._fields.items() if f != "content"}
        content = earlier + self._text("content")
        return {**choice, "message": {"role": "assistant", "content": content or (None if others else ""), **others}}

    def usage(self) -> dict[str, Any] | None:
        """As of one call: the original prompt, all tokens generated; None when the engine told nothing."""
        if not self._usage or self._before is None:
            return self._usage or None
        before = self._before
        prompt = before.prompt_tokens or max(0, int(self._usage.get("prompt_tokens") or 0) - before.tokens)
        usage = {**self._usage, "prompt_tokens": prompt, "completion_tokens": self.tokens}
        usage["total_tokens"] = prompt + self.tokens
        details = usage.get("prompt_tokens_details")
        if details and details.get("cached_tokens"):
            usage["prompt_tokens_details"] = {**details, "cached_tokens": min(details["cached_tokens"], prompt)}
        return usage


def finished(url: str, model: str, progress: Progress) -> dict[str, Any]:
    """The reply to a line that was aborted with its very last token out."""
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "length"}
    chat = url == CHAT
    choice |= {"message": {"role": "assistant", "content": progress.text}} if chat else {"text": progress.text}
    prompt, tokens = progress.prompt_tokens, progress.tokens
    return {
        "id": progress.id,
        "object": "chat.completion" if chat else "text_completion",
        "created": progress.created,
        "model": model,
        "choices": [choice],
        "usage": {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens},
    }


def _status(error: object) -> int:
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code <= 599 else 500
