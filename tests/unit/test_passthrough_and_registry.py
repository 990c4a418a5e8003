"""Which parser reads a request."""

from __future__ import annotations

from typing import ClassVar

import msgspec
import pytest

from llmd_sched.errors import BadRequest
from llmd_sched.parsers.anthropic import AnthropicParser
from llmd_sched.parsers.media import Estimate, ImageEstimate, StaticImage
from llmd_sched.parsers.openai import OpenAIParser
from llmd_sched.parsers.passthrough import PassthroughParser
from llmd_sched.parsers.registry import DEFAULT_PATH, PARSERS, ParserRegistry
from llmd_sched.plugin import Parsed, Parser

PROMPT = b'{"model":"m","prompt":"x"}'
MESSAGES = b'{"model":"m","messages":[{"role":"user","content":"x"}]}'


class Short(Parser, frozen=True):
    """Claims a short suffix and says its name."""

    suffixes: ClassVar[tuple[str, ...]] = ("completions", "own")
    name: str = "short"

    def parse(self, path: str, body: bytes) -> Parsed:
        return Parsed(model=f"{self.name} {path}")


@pytest.mark.parametrize("body", [b"", b"\x00\xff", b"{", PROMPT])
def test_passthrough_looks_into_nothing(body: bytes) -> None:
    assert PassthroughParser().parse("/any", body) == Parsed(names_model=False)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", PROMPT),
        ("/v1/chat/completions", MESSAGES),
        ("/prefix/of/a/tenant/v1/chat/completions", MESSAGES),
        ("/v1/completions/render", PROMPT),
        ("/v1/chat/completions/render", MESSAGES),
        ("/v1/completions?stream=1", PROMPT),
        ("/v1/completions?next=/v1/embeddings", PROMPT),
        ("", PROMPT),
        ("?a", PROMPT),
        ("/v1/mycompletions", PROMPT),  # a plain suffix test, no segment boundary
    ],
)
def test_the_longest_suffix_wins_and_the_query_has_no_say(path: str, body: bytes) -> None:
    assert ParserRegistry([PassthroughParser(), OpenAIParser()]).parse(path, body).model == "m"


def test_the_longest_suffix_wins_across_parsers_in_any_order() -> None:
    for parsers in ([Short(), OpenAIParser()], [OpenAIParser(), Short()]):
        registry = ParserRegistry(parsers)
        assert registry.parse("/v1/chat/completions", MESSAGES).model == "m"
        assert registry.parse("/v1/own", b"").model == "short /v1/own"


def test_of_two_parsers_for_a_suffix_the_first_is_asked() -> None:
    assert ParserRegistry([Short(name="a"), Short(name="b")]).parse("/own", b"").model == "a /own"


def test_an_empty_path_means_completions() -> None:
    assert DEFAULT_PATH == "/v1/completions"
    assert ParserRegistry([Short()]).parse("", b"").model == "short /v1/completions"


@pytest.mark.parametrize("path", ["/v1/models", "/", "/v1/completions/", "/v1/Completions", "/health"])
def test_a_path_nobody_claims_goes_to_the_fallback(path: str) -> None:
    assert ParserRegistry([OpenAIParser(), PassthroughParser()]).parse(path, b"\xff").names_model is False


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions/"])
def test_without_a_fallback_such_a_path_is_a_bad_request(path: str) -> None:
    with pytest.raises(BadRequest, match=f"no parser registered matching path suffix {path}"):
        ParserRegistry([OpenAIParser()]).parse(path, PROMPT)


def test_without_any_parser_everything_is_a_bad_request() -> None:
    with pytest.raises(BadRequest):
        ParserRegistry([]).parse("/v1/completions", PROMPT)


def test_a_claimed_path_with_a_bad_body_does_not_fall_back() -> None:
    with pytest.raises(BadRequest):
        ParserRegistry([OpenAIParser(), PassthroughParser()]).parse("/v1/completions", b"{")


def test_every_parser_but_the_fallback_claims_paths() -> None:
    assert [name for name, kind in PARSERS.items() if not kind.suffixes] == ["passthrough-parser"]


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/generate", "sglang"),
        ("/generate?x=1", "sglang"),
        ("/v1/generate", "passthrough"),
        ("/tenant/generate", "passthrough"),
        ("/inference/v1/generate", "vllm"),
        ("/vllm.grpc.engine.VllmEngine/Generate", "grpc"),
        ("/tenant/vllm.grpc.engine.VllmEngine/Embed", "grpc"),
        ("/vllm.grpc.engine.VllmEngine/HealthCheck", "grpc"),
        ("/other.Service/Generate", "passthrough"),
    ],
)
def test_a_suffix_with_a_slash_before_it_is_a_whole_path(path: str, asked: str) -> None:
    complaints = {"sglang": "input_ids field", "vllm": "token_ids field", "grpc": "gRPC"}
    registry = ParserRegistry([kind() for kind in PARSERS.values()])
    if asked in complaints and "Health" not in path:
        with pytest.raises(BadRequest, match=complaints[asked]):
            registry.parse(path, b"{}")
    else:
        assert registry.parse(path, b"{}") == Parsed(names_model=False)


def test_what_media_count_is_configured_once_for_all_parsers_and_hinted_at_by_headers() -> None:
    estimate = Estimate(image=ImageEstimate(mode="static", static=StaticImage(static_token=3)))
    registry = ParserRegistry([OpenAIParser(), AnthropicParser()], estimate)
    openai = {"type": "image_url", "image_url": {"url": "u"}}
    anthropic = {"type": "image", "source": {"type": "url", "url": "u"}}
    video = {"type": "video_url", "video_url": {"url": "v"}}
    for path, part in (("/v1/chat/completions", openai), ("/v1/messages", anthropic)):
        body = msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": [part]}]})
        parsed = registry.parse(path, body)
        assert (len(parsed.prompts[0]), parsed.media) == (4 + 4 * 3, 1)
    body = msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": [video]}]})
    hints = {"x-llm-d-video-duration-seconds": "2", "x-llm-d-video-resolution": "64x32"}
    assert len(registry.parse("/v1/chat/completions", body, hints).prompts[0]) == 4 + 4 * 2 * 2 * 2
