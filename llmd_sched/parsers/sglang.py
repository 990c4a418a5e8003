"""SGLang's own request bodies: token ids in, token ids out."""

from __future__ import annotations

import msgspec

from llmd_sched.errors import BadRequest
from llmd_sched.parsers.body import ABSENT, decoded, taken_ids, token_bytes
from llmd_sched.plugin import Parsed, Parser


class _Sampling(msgspec.Struct):
    max_new_tokens: int | None = None


class _Fields(msgspec.Struct):
    stream: bool | None = None
    extra_key: str | None = None
    sampling_params: _Sampling | None = None


class _Generate(_Fields):
    input_ids: list[int] | None = None


class _GenerateOfIds(_Fields, rename={"ids": "input_ids"}):
    ids: msgspec.Raw = ABSENT


_GENERATE = msgspec.json.Decoder(_Generate)
_GENERATE_OF_IDS = msgspec.json.Decoder(_GenerateOfIds)


class SGLangParser(Parser, frozen=True):
    """SGLang's generate path, whose prompt is token ids; ``extra_key`` salts its cache. The body names no model."""

    def parse(self, path: str, body: bytes) -> Parsed:
        if taken := taken_ids(_GENERATE_OF_IDS, body, "input_ids", flat=True):
            return _parsed(taken[0], taken[1][0])
        b = decoded(_GENERATE, body)
        if not b.input_ids:
            raise BadRequest("invalid generate request: must have input_ids field")
        return _parsed(b, token_bytes(b.input_ids, "generate"))


SGLangParser.suffixes = ("/generate",)


def _parsed(body: _Fields, prompt: bytes) -> Parsed:
    return Parsed(
        prompts=(prompt,),
        max_output_tokens=body.sampling_params.max_new_tokens if body.sampling_params else None,
        streaming=bool(body.stream),
        cache_salt=body.extra_key or "",
        names_model=False,
    )
