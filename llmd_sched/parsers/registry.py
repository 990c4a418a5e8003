"""Which parser reads a request: the longest path suffix wins, a parser without suffixes is the fallback."""

from __future__ import annotations

from collections.abc import Sequence

from llmd_sched.errors import BadRequest
from llmd_sched.parsers.anthropic import AnthropicParser
from llmd_sched.parsers.openai import OpenAIParser
from llmd_sched.parsers.passthrough import PassthroughParser
from llmd_sched.parsers.vllm import VLLMParser
from llmd_sched.plugin import Parsed, Parser

PARSERS: dict[str, type[Parser]] = {
    "openai-parser": OpenAIParser,
    "anthropic-parser": AnthropicParser,
    "vllmhttp-parser": VLLMParser,
    "passthrough-parser": PassthroughParser,
}

DEFAULT_PATH = "/v1/completions"


class ParserRegistry:
    """Parsers in configured order; a second one of the same type never gets a turn."""

    def __init__(self, parsers: Sequence[Parser]) -> None:
        pairs = [(suffix, parser) for parser in parsers for suffix in parser.suffixes]
        self._by_suffix = sorted(pairs, key=lambda pair: -len(pair[0]))
        self._fallback = next((p for p in parsers if not p.suffixes), None)

    def parse(self, path: str, body: bytes) -> Parsed:
        """Raises BadRequest: no parser for the path, or the parser's own complaint."""
        path = path.partition("?")[0] or DEFAULT_PATH
        for suffix, parser in self._by_suffix:
            if path.endswith(suffix):
                return parser.parse(path, body)
        if self._fallback is None:
            raise BadRequest(f"no parser registered matching path suffix {path}")
        return self._fallback.parse(path, body)
