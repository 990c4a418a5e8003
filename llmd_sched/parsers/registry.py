"""Which parser reads a request: the longest path suffix wins, a parser without suffixes is the fallback.

A suffix that begins with a slash is a whole path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmd_sched.errors import BadRequest
from llmd_sched.parsers.anthropic import AnthropicParser
from llmd_sched.parsers.grpc import VLLMGrpcParser
from llmd_sched.parsers.media import Estimate, Sizes
from llmd_sched.parsers.openai import OpenAIParser
from llmd_sched.parsers.passthrough import PassthroughParser
from llmd_sched.parsers.prompt import MediaParser
from llmd_sched.parsers.sglang import SGLangParser
from llmd_sched.parsers.vllm import VLLMParser
from llmd_sched.plugin import Parsed, Parser

PARSERS: dict[str, type[Parser]] = {
    "openai-parser": OpenAIParser,
    "anthropic-parser": AnthropicParser,
    "vllmhttp-parser": VLLMParser,
    "vllmgrpc-parser": VLLMGrpcParser,
    "sglanghttp-parser": SGLangParser,
    "passthrough-parser": PassthroughParser,
}

DEFAULT_PATH = "/v1/completions"


class ParserRegistry:
    """Parsers in configured order; a second one of the same type never gets a turn."""

    def __init__(self, parsers: Sequence[Parser], estimate: Estimate | None = None) -> None:
        """``estimate``: what the media of a prompt count."""
        pairs = [(suffix, parser) for parser in parsers for suffix in parser.suffixes]
        self._by_suffix = sorted(pairs, key=lambda pair: -len(pair[0]))
        self._fallback = next((p for p in parsers if not p.suffixes), None)
        self._estimate = estimate or Estimate()

    def parse(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Parsed:
        """Raises BadRequest: no parser for the path, or the parser's own complaint. ``headers`` may have hints."""
        path = path.partition("?")[0] or DEFAULT_PATH
        parser = next((p for suffix, p in self._by_suffix if _claims(suffix, path)), self._fallback)
        if parser is None:
            raise BadRequest(f"no parser registered matching path suffix {path}")
        if isinstance(parser, MediaParser):
            return parser.read(path, body, Sizes(self._estimate, headers or {}))
        return parser.parse(path, body)


def _claims(suffix: str, path: str) -> bool:
    return path == suffix if suffix.startswith("/") else path.endswith(suffix)
