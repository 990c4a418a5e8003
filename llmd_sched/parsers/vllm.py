"""vLLM's request bodies of token ids in, token ids out."""

from __future__ import annotations

import msgspec

from llmd_sched.errors import BadRequest
from llmd_sched.parsers.body import ABSENT, decoded, taken_ids, token_bytes
from llmd_sched.plugin import Parsed, Parser


class _Sampling(msgspec.Struct):
    max_tokens: int | None = None


class _Fields(msgspec.Struct):
    """Unlike in OpenAI's formats ``model`` may be null: vLLM's own clients write out what they leave unset."""

    model: str | None = None
    stream: bool | None = None
    cache_salt: str | None = None
    sampling_params: _Sampling | None = None


class _Generate(_Fields):
    token_ids: list[int] | None = None


class _GenerateOfIds(_Fields, rename={"ids": "token_ids"}):
    ids: msgspec.Raw = ABSENT


_GENERATE = msgspec.json.Decoder(_Generate)
_GENERATE_OF_IDS = msgspec.json.Decoder(_GenerateOfIds)


class VLLMParser(Parser, frozen=True):
    """vLLM's generate path, whose prompt is token ids; no tokenizer has a say, so the count is exact."""

    def parse(self, path: str, body: bytes) -> Parsed:
        if taken := taken_ids(_GENERATE_OF_IDS, body, "token_ids", flat=True):
            return _parsed(taken[0], taken[1][0])
        b = decoded(_GENERATE, body)
        if not b.token_ids:
            raise BadRequest("invalid generate request: must have token_ids field")
        return _parsed(b, token_bytes(b.token_ids, "generate"))


VLLMParser.suffixes = ("inference/v1/generate",)


def _parsed(body: _Fields, prompt: bytes) -> Parsed:
    return Parsed(
        model=body.model or "",
        prompts=(prompt,),
        max_output_tokens=body.sampling_params.max_tokens if body.sampling_params else None,
        streaming=bool(body.stream),
        cache_salt=body.cache_salt or "",
    )
