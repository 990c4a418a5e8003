"""vLLM's gRPC service: prompts out of its requests, token counts out of its replies.

The service is ``vllm.grpc.engine.VllmEngine`` of ``vllm_engine.proto`` (github.com/lightseekorg/smg,
crates/grpc_client/proto, whose servicer vLLM runs; vLLM's own earlier copy had the same requests). Field numbers read:

    GenerateRequest      tokenized 2, text 3 (one of the two), sampling_params 4, stream 5, mm_inputs 7
    EmbedRequest         tokenized 2
    TokenizedInput       input_ids 2
    SamplingParams       max_tokens 8
    MultimodalInputs     mm_placeholders 5
    GenerateResponse     chunk 1, complete 2 (one of the two)
    GenerateStreamChunk  token_ids 1, prompt_tokens 2, completion_tokens 3, cached_tokens 4
    GenerateComplete     output_ids 1, finish_reason 2, prompt_tokens 3, completion_tokens 4, cached_tokens 5
    EmbedResponse        embedding 1, prompt_tokens 2

On the wire each message is framed: a flag (1 = compressed), its length in 4 bytes, big-endian, and its bytes
(github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md). There is no model in a request: the engine serves one.
"""

from __future__ import annotations

from llmd_sched.errors import BadRequest
from llmd_sched.parsers.protobuf import Malformed, fields, number, part
from llmd_sched.parsers.tokens import packed_ids
from llmd_sched.parsers.usage import Details, Usage
from llmd_sched.plugin import Parsed, Parser

SERVICE = "vllm.grpc.engine.VllmEngine/"

MAX_FRAME_BYTES = 4 << 20
"""Of a reply's message that is read; gRPC clients accept no larger ones unless told to."""

_HEAD_BYTES = 5
_BYTES_PER_ID = 4


class VLLMGrpcParser(Parser, frozen=True):
    """Generate and Embed of vLLM's gRPC service; its other methods pass through."""

    def parse(self, path: str, body: bytes) -> Parsed:
        method = path.rpartition("/")[2]
        try:
            if method == "Generate":
                return _generate(_message(body))
            if method == "Embed":
                return _embed(_message(body))
        except Malformed as e:
            raise BadRequest(f"invalid or unsupported gRPC payload for {method}: {e}") from None
        return Parsed(names_model=False)


_OTHERS = (
    "Abort",
    "GetLoads",
    "GetModelInfo",
    "GetServerInfo",
    "GetTokenizer",
    "HealthCheck",
    "SubscribeKvEvents",
)
VLLMGrpcParser.suffixes = tuple(SERVICE + method for method in ("Generate", "Embed", *_OTHERS))


def _message(body: bytes) -> memoryview:
    """The one message of a request."""
    if len(body) < _HEAD_BYTES:
        raise Malformed(f"a frame begins with {_HEAD_BYTES} bytes, got {len(body)} in all")
    if body[0] == 1:
        raise Malformed("compressed messages are not supported; send them with grpc-encoding identity")
    if body[0]:
        raise Malformed(f"flag {body[0]}; accepted: 0")
    size, got = int.from_bytes(body[1:_HEAD_BYTES], "big"), len(body) - _HEAD_BYTES
    if size != got:
        raise Malformed(f"the frame announces {size} bytes, {got} follow")
    return memoryview(body)[_HEAD_BYTES:]


def _generate(message: memoryview) -> Parsed:
    prompt, limit, stream, media = b"", None, False, 0
    for field, value in fields(message):
        if field == 2:
            prompt = _input_ids(part(value))
        elif field == 3:
            prompt = bytes(part(value))
        elif field == 4:
            limit = next((number(v) for f, v in fields(part(value)) if f == 8), None)
        elif field == 5:
            stream = bool(number(value))
        elif field == 7:
            media = sum(f == 5 for f, _ in fields(part(value)))
    return _parsed(prompt, "tokenized input_ids or text", limit, stream, media)


def _embed(message: memoryview) -> Parsed:
    prompt = b""
    for field, value in fields(message):
        if field == 2:
            prompt = _input_ids(part(value))
    return _parsed(prompt, "tokenized input_ids")


def _parsed(prompt: bytes, needed: str, limit: int | None = None, stream: bool = False, media: int = 0) -> Parsed:
    if not prompt:
        raise Malformed(f"must have {needed}")
    return Parsed(prompts=(prompt,), max_output_tokens=limit, streaming=stream, names_model=False, media=media)


def _input_ids(message: memoryview) -> bytes:
    ids = packed_ids(message, 2)
    if ids is None:
        raise Malformed("tokenized is not a list of token ids between 0 and 4294967295")
    return ids


class ReplyFrames:
    """Token counts out of a reply, fed chunk by chunk as it comes. What cannot be read says nothing; no error comes.

    A streaming engine counts in each chunk's ``completion_tokens`` what is new, and in the last message only what came
    with that; others count up. So the output is the ids that came, or the largest count of them if that is more.
    """

    def __init__(self) -> None:
        self._held = bytearray()
        self._lost = False
        self._prompt: int | None = None
        self._cached: int | None = None
        self._streamed = 0
        self._complete = 0
        self._most = 0
        self._read = False

    @property
    def usage(self) -> Usage | None:
        """None until a message with counts has been read."""
        if self._prompt is None and not self._read:
            return None
        return Usage(
            prompt_tokens=self._prompt,
            completion_tokens=max(self._streamed, self._complete, self._most) if self._read else None,
            prompt_tokens_details=None if self._cached is None else Details(cached_tokens=self._cached),
        )

    def feed(self, chunk: bytes) -> None:
        if self._lost:
            return
        self._held += chunk
        at = 0
        while len(self._held) - at >= _HEAD_BYTES:
            begin = at + _HEAD_BYTES
            end = begin + int.from_bytes(self._held[at + 1 : begin], "big")
            if end - begin > MAX_FRAME_BYTES:
                self._lost = True
                self._held.clear()
                return
            if end > len(self._held):
                break
            if not self._held[at]:
                self._message(bytes(self._held[begin:end]))
            at = end
        del self._held[:at]

    def _message(self, message: bytes) -> None:
        try:
            parts = list(fields(message))
            if any(isinstance(value, int) for _, value in parts):  # only EmbedResponse has numbers of its own
                self._embedded(parts)
                return
            for field, value in parts:
                if field == 1:
                    self._chunk(part(value))
                elif field == 2:
                    self._finished(part(value))
        except Malformed:
            pass

    def _embedded(self, parts: list[tuple[int, int | memoryview]]) -> None:
        self._prompt = next((number(value) for field, value in parts if field == 2), None)

    def _chunk(self, message: memoryview) -> None:
        counts = {field: number(value) for field, value in fields(message) if field in (2, 3, 4)}
        self._streamed += len(packed_ids(message, 1) or b"") // _BYTES_PER_ID
        self._most = max(self._most, counts.get(3, 0))
        self._input(counts.get(2), counts.get(4))

    def _finished(self, message: memoryview) -> None:
        counts = {field: number(value) for field, value in fields(message) if field in (3, 4, 5)}
        ids = len(packed_ids(message, 1) or b"") // _BYTES_PER_ID
        self._complete += max(ids, counts.get(4, 0))  # one such message for each of n answers
        self._input(counts.get(3), counts.get(5))

    def _input(self, prompt: int | None, cached: int | None) -> None:
        """A count of 0 is not written; where the prompt is counted, that is what a missing cached count means."""
        self._read = True
        if prompt:
            self._prompt, self._cached = prompt, cached or 0


def usage_in_frames(reply: bytes) -> Usage | None:
    """The counts of a whole reply; None when it has none."""
    frames = ReplyFrames()
    frames.feed(reply)
    return frames.usage


def usage_in_last_frame(tail: bytes) -> Usage | None:
    """What the end of a reply that was cut somewhere says: of its last message the prompt and cached tokens.

    How many tokens came out only the whole reply says. Tries where a frame may begin that ends with ``tail``.
    """
    for begin in range(len(tail) - _HEAD_BYTES, -1, -1):
        if tail[begin] == 0 and int.from_bytes(tail[begin + 1 : begin + _HEAD_BYTES], "big") == (
            len(tail) - begin - _HEAD_BYTES
        ):
            found = usage_in_frames(tail[begin:])
            if found is not None and found.prompt_tokens is not None:
                return Usage(prompt_tokens=found.prompt_tokens, prompt_tokens_details=found.prompt_tokens_details)
    return None
