"""vLLM's request bodies of token ids in, token ids out."""

from __future__ import annotations

import msgspec

from llmd_sched.errors import BadRequest
from llmd_sched.parsers.openai import decoded, token_bytes
from llmd_sched.plugin import Parsed, Parser


class _Sampling(msgspec.Struct):
    max_tokens: int | None = None


class _Generate(msgspec.Struct):
    """Unlike in OpenAI's formats ``model`` may be null: vLLM's own clients write out what they leave unset."""

    model: str | None = None
    stream: bool | None = None
    cache_salt: str | None = None
    token_ids: list[int] | None = None
    sampling_params: _Sampling | None = None


_GENERATE = msgspec.json.Decoder(_Generate)


class VLLMParser(Parser, frozen=True):
    """vLLM's generate path, whose prompt is token ids; no tokenizer has a say, so the count is exact."""

    def parse(self, path: str, body: bytes) -> Parsed:
        b = decoded(_GENERATE, body)
        if not b.token_ids:
            raise BadRequest("invalid generate request: must have token_ids field")
        return Parsed(
            model=b.model or "",
            prompts=(token_bytes(b.token_ids, "generate"),),
            max_output_tokens=b.sampling_params.max_tokens if b.sampling_params else None,
            streaming=bool(b.stream),
            cache_salt=b.cache_salt or "",
        )


VLLMParser.suffixes = ("inference/v1/generate",)
