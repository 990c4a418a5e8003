"""What images, videos and sounds count, and the parameters that say so."""

from __future__ import annotations

import base64
import json
import struct
import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.parsers.images import MAX_HEAD_CHARACTERS, MAX_SIDE, data_of, image_size
from llmd_sched.parsers.media import Estimate, Sizes
from llmd_sched.parsers.openai import OpenAIParser
from llmd_sched.parsers.producer import RenderBackend, TokenProducer
from llmd_sched.parsers.prompt import MAX_MEDIA_TOKENS, Prompt
from llmd_sched.plugin import Parsed
from tests.builders import fuzzed


def estimate(**parameters: object) -> Estimate:
    return msgspec.convert(parameters, Estimate)


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height) + bytes(20)


def jpeg(width: int, height: int, before: int = 10, marker: int = 0xC0) -> bytes:
    comment = b"\xff\xfe" + struct.pack(">H", before + 2) + bytes(before)
    frame = b"\xff\xff" + bytes([marker]) + struct.pack(">HBHH", 17, 8, height, width) + bytes(10)
    return b"\xff\xd8" + comment + frame


def webp(kind: bytes, rest: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 100) + b"WEBP" + kind + struct.pack("<I", 50) + rest + bytes(20)


def text_of(image: bytes) -> str:
    return base64.b64encode(image).decode()


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (png(1920, 1080), (1920, 1080)),
        (b"GIF89a" + struct.pack("<HH", 320, 200) + bytes(20), (320, 200)),
        (b"GIF87a" + struct.pack("<HH", 1, 1) + bytes(20), (1, 1)),
        (jpeg(640, 480), (640, 480)),
        (jpeg(640, 480, marker=0xC2), (640, 480)),
        (jpeg(640, 480, before=60_000), (640, 480)),
        (webp(b"VP8 ", bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", 1234 | 0x4000, 777)), (1234, 777)),
        (webp(b"VP8L", b"\x2f" + struct.pack("<I", 1233 | 776 << 14)), (1234, 777)),
        (webp(b"VP8X", bytes(4) + (1233).to_bytes(3, "little") + (776).to_bytes(3, "little")), (1234, 777)),
        (webp(b"VP8?", bytes(20)), None),
        (png(0, 5), None),
        (png(MAX_SIDE + 1, 5), None),
        (png(5, 5)[:20], None),
        (jpeg(640, 480)[:14], None),
        (jpeg(640, 480)[:4], None),
        (jpeg(640, 480, marker=0xC4), None),
        (b"\xff\xd8" + b"\xff\xfe\xff\xff" * 3, None),
        (b"\xff\xd8" + b"\xff" * 200_000, None),
        (b"BM" + bytes(60), None),
        (b"", None),
    ],
)
def test_an_image_says_its_size_in_its_first_bytes(image: bytes, size: tuple[int, int] | None) -> None:
    assert image_size(text_of(image)) == size


def test_only_the_beginning_of_an_image_is_looked_at() -> None:
    assert image_size(text_of(png(5, 6)) + "!" * 10_000_000) == (5, 6)
    assert image_size(text_of(jpeg(5, 6, before=60_000))[:MAX_HEAD_CHARACTERS]) == (5, 6)


@pytest.mark.parametrize("text", ["é", "!!!!", "iVBORw0KGgo", "====", "/9j/", "\n\n\n\n"])
def test_what_is_no_image_has_no_size(text: str) -> None:
    assert image_size(text) is None


@fuzzed
@given(st.sampled_from([b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF0000WEBPVP8X", b"\xff\xd8\xff"]), st.binary(max_size=60))
def test_any_bytes_have_a_size_or_none(magic: bytes, rest: bytes) -> None:
    size = image_size(text_of(magic + rest))
    assert size is None or (0 < size[0] <= MAX_SIDE and 0 < size[1] <= MAX_SIDE)


@pytest.mark.parametrize(
    ("address", "data"),
    [
        ("data:image/png;base64,aGk=", "aGk="),
        ("data:image/png;name=x;base64,aGk=", "aGk="),
        ("data:image/png,plain", ""),
        ("data:text/plain;base64,aGk=", ""),
        ("http://a/base64,aGk=", ""),
        ("", ""),
    ],
)
def test_an_image_may_come_in_its_address(address: str, data: str) -> None:
    assert data_of(address) == data


HD = text_of(png(1920, 1080))


@pytest.mark.parametrize(
    ("parameters", "image", "tokens"),
    [
        ({}, "", 225),
        ({}, HD, 2025),
        ({}, text_of(png(10, 10)), 1),
        ({}, "not an image", 225),
        ({"dynamic": {"factor": 784}}, HD, 2644),
        ({"dynamic": {"factor": 0}}, HD, 2025),
        ({"defaultResolution": {"width": 1024, "height": 1024}}, "", 1024),
        ({"defaultResolution": {"width": 1024, "height": 1024}}, HD, 2025),
        ({"mode": "static", "static": {"staticToken": 280}}, HD, 280),
        ({"mode": "static"}, HD, 1),
        ({"mode": "static", "static": {"staticToken": 0}}, "", 1),
    ],
)
def test_an_image_counts_by_its_pixels_or_always_the_same(
    parameters: dict[str, object], image: str, tokens: int
) -> None:
    assert Sizes(estimate(image=parameters)).image(image) == tokens


DURATION, RESOLUTION, FPS = "x-llm-d-video-duration-seconds", "x-llm-d-video-resolution", "x-llm-d-video-fps"
QWEN = {"frames": {"maxFrames": 16, "minFrames": 4, "sampled": {"sampleFPS": 2, "temporalPatchSize": 2}}}
GEMMA = {
    "tokensPerFrame": {"mode": "static", "static": {"numTokensPerFrame": 70}},
    "frames": {"mode": "strided", "strided": {"defaultSourceFPS": 24, "frameStride": 24}},
}


@pytest.mark.parametrize(
    ("parameters", "headers", "tokens"),
    [
        ({}, {}, 20 * 225),
        ({}, {DURATION: "3.5"}, 7 * 225),
        ({}, {RESOLUTION: "64x32"}, 20 * 2),
        ({}, {RESOLUTION: " 64X32 "}, 20 * 2),
        ({}, {FPS: "60"}, 20 * 225),  # of the source; the model samples as it does
        ({}, {DURATION: "0.1"}, 1),
        ({"defaultDuration": 5}, {}, 10 * 225),
        ({"defaultDuration": 0}, {}, 20 * 225),
        ({"defaultDuration": 5}, {DURATION: "1"}, 2 * 225),
        ({"defaultResolution": {"width": 32, "height": 32}}, {}, 20),
        ({"maxVideoTokens": 1000}, {}, 1000),
        ({"tokensPerFrame": {"dynamic": {"factor": 2048}}}, {}, 20 * 112),
        (QWEN, {}, 8 * 225),
        (QWEN, {DURATION: "1"}, 2 * 225),
        (QWEN, {DURATION: "5"}, 5 * 225),
        (GEMMA, {}, 10 * 70),
        (GEMMA, {FPS: "48", DURATION: "2"}, 4 * 70),
        ({"frames": {"mode": "strided"}}, {DURATION: "1"}, 24 * 225),
        ({"frames": {"mode": "strided", "strided": {"frameStride": 0, "defaultSourceFPS": 0}}}, {DURATION: "1"}, 5400),
        ({"tokensPerFrame": {"mode": "static"}}, {}, 20),
    ],
)
def test_a_video_counts_frames_by_what_a_frame_counts(
    parameters: dict[str, object], headers: dict[str, str], tokens: int
) -> None:
    assert Sizes(estimate(video=parameters), headers).video() == tokens


@pytest.mark.parametrize("header", [DURATION, RESOLUTION, FPS])
@pytest.mark.parametrize(
    "value", ["", "x", "0", "-1", "nan", "inf", "1e300", "0x5", "5x", "x5", "axb", "-4x4", "4x4x4", "²x²", "1e9x1e9"]
)
def test_a_hint_that_makes_no_sense_is_no_hint(header: str, value: str) -> None:
    assert Sizes(headers={header: value}).video() == Sizes().video()


@pytest.mark.parametrize(("content", "tokens"), [("", 1), ("a", 1), ("aGk=", 1), ("aGk=a", 2), ("x" * 4000, 1000)])
def test_a_sound_counts_four_characters_a_token(content: str, tokens: int) -> None:
    assert Sizes().audio(content) == tokens


def chat(*parts: object) -> Parsed:
    body = {"model": "m", "messages": [{"role": "user", "content": list(parts)}]}
    return OpenAIParser().parse("/v1/chat/completions", json.dumps(body).encode())


@pytest.mark.parametrize(
    ("part", "address", "tokens"),
    [
        ({"type": "image_url", "image_url": {"url": "http://a"}}, "http://a", 225),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64," + HD}}, None, 2025),
        ({"type": "video_url", "video_url": {"url": "http://v"}}, "http://v", 4500),
        ({"type": "video_url", "video_url": "http://v"}, "http://v", 4500),
        ({"type": "input_audio", "input_audio": {"data": "x" * 40, "format": "wav"}}, "x" * 40, 10),
        ({"type": "audio_url", "audio_url": {"url": "http://s"}}, "http://s", 2),
    ],
)
def test_media_of_a_chat_stand_as_aligned_tokens_that_differ_by_address(
    part: dict[str, object], address: str | None, tokens: int
) -> None:
    address = address or "data:image/png;base64," + HD
    parsed = chat({"type": "text", "text": "a"}, part, {"type": "text", "text": "b"})
    assert parsed.prompts == (b"usera\0\0\0" + zlib.crc32(address.encode()).to_bytes(4, "little") * tokens + b"b",)
    assert parsed.media == 1


def test_a_few_bytes_that_claim_to_be_huge_images_do_not_make_a_huge_prompt() -> None:
    huge = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + text_of(png(MAX_SIDE, MAX_SIDE))}}
    parsed = chat(*[huge] * 50, {"type": "text", "text": "end"})
    assert len(parsed.prompts[0]) == len("user") + 4 * MAX_MEDIA_TOKENS + len("end")
    assert parsed.media == 50


def test_a_prompt_is_its_parts_in_order() -> None:
    prompt = Prompt(Sizes())
    for part in ("a", b"b", None, "", "é"):
        prompt.add(part)
    assert bytes(prompt) == "abé".encode()


# --- the plugin's parameters ------------------------------------------------------------------------------------------


def producer(**parameters: object) -> TokenProducer:
    made = msgspec.convert(parameters, TokenProducer)
    made.check()
    return made


def test_without_parameters_tokens_are_estimated() -> None:
    assert producer().backend is None
    assert producer(estimate={"image": {"mode": "static"}}).backend is None


@pytest.mark.parametrize(
    ("parameters", "backend"),
    [
        ({"modelName": "m"}, RenderBackend()),
        ({"modelName": "m", "vllm": {}}, RenderBackend()),
        (
            {"modelName": "m", "vllm": {"url": "https://r:1", "timeout": "500ms", "mmTimeout": "1m"}},
            RenderBackend(url="https://r:1", timeout="500ms", mm_timeout="1m"),
        ),
    ],
)
def test_a_model_name_or_vllm_asks_a_server(parameters: dict[str, object], backend: RenderBackend) -> None:
    assert producer(**parameters).backend == backend


def test_timeouts_are_durations() -> None:
    backend = RenderBackend(timeout="1m30s", mm_timeout="250ms")
    assert (backend.timeout_s, backend.mm_timeout_s) == (90.0, 0.25)
    assert (RenderBackend().timeout_s, RenderBackend().mm_timeout_s) == (5.0, 30.0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"modelName": "m", "udsTokenizerConfig": {"socketFile": "/s"}},
            "udsTokenizerConfig is not supported; accepted",
        ),
        ({"udsTokenizerConfig": {}}, "udsTokenizerConfig is not supported"),
        ({"modelName": "m", "vllm": {}, "estimate": {}}, "only one of vllm and estimate"),
        ({"vllm": {}}, "vllm needs modelName"),
        ({"modelName": "m", "vllm": {"url": "localhost:8000"}}, "accepted: http:// or https:// and a host"),
        ({"modelName": "m", "vllm": {"url": ""}}, "vllm.url is ''"),
        ({"modelName": "m", "vllm": {"timeout": "soon"}}, "'soon' is not a duration"),
        ({"modelName": "m", "vllm": {"timeout": "0"}}, "vllm.timeout is '0'; accepted: a duration above 0"),
        ({"modelName": "m", "vllm": {"mmTimeout": "0s"}}, "vllm.mmTimeout is '0s'"),
    ],
)
def test_backends_that_do_not_go_together_or_cannot_work_are_refused(
    parameters: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        producer(**parameters)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"estimate": {"picture": {}}}, "unknown field `picture`"),
        ({"vllm": {"http": "x"}}, "unknown field `http`"),
        ({"estimate": {"image": {"mode": "sometimes"}}}, "Invalid enum value 'sometimes'"),
        ({"estimate": {"image": {"dynamic": {"factor": -1}}}}, ">= 0"),
        ({"estimate": {"image": {"defaultResolution": {"width": 0}}}}, ">= 1"),
        ({"estimate": {"video": {"frames": {"mode": "all"}}}}, "Invalid enum value 'all'"),
        ({"estimate": {"video": {"defaultDuration": -1}}}, ">= 0"),
    ],
)
def test_parameters_that_are_wrong_by_themselves_are_refused(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        producer(**parameters)


def test_an_estimate_asks_for_the_headers_that_hint_at_videos() -> None:
    assert set(producer().headers()) == {DURATION, RESOLUTION, FPS}
