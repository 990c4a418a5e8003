"""How many tokens the images, videos and sounds of a prompt count, without running anything that knows the model.

An image is its pixels by a factor, read from its first bytes where they come with the request; a video is frames by
tokens of a frame, and what is known of it comes in headers, which hold for every video of the request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from llmd_sched.parsers.images import MAX_SIDE, believed, image_size

VIDEO_FPS = "x-llm-d-video-fps"
VIDEO_DURATION = "x-llm-d-video-duration-seconds"
VIDEO_RESOLUTION = "x-llm-d-video-resolution"
HINTS = (VIDEO_FPS, VIDEO_DURATION, VIDEO_RESOLUTION)

Count = Annotated[int, Meta(ge=0)]
Amount = Annotated[float, Meta(ge=0)]


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """What a YAML mapping below a plugin's parameters is."""


class Resolution(Params, frozen=True):
    """Pixels."""

    width: Annotated[int, Meta(ge=1, le=MAX_SIDE)] = 640
    height: Annotated[int, Meta(ge=1, le=MAX_SIDE)] = 360


class PerPixel(Params, frozen=True):
    factor: Count = 1024
    """Pixels of one token; 0 = 1024."""

    def tokens(self, width: int, height: int) -> int:
        return max(1, width * height // (self.factor or 1024))


class StaticImage(Params, frozen=True):
    static_token: Count = 1


class ImageEstimate(Params, frozen=True):
    """``static``: the same for every image. ``dynamic``: by its size; ``defaultResolution`` is that of any other."""

    mode: Literal["dynamic", "static"] = "dynamic"
    default_resolution: Resolution = Resolution()
    dynamic: PerPixel = PerPixel()
    static: StaticImage = StaticImage()

    def tokens(self, size: tuple[int, int] | None) -> int:
        """``size``: width and height in pixels."""
        if self.mode == "static":
            return max(1, self.static.static_token)
        default = self.default_resolution
        return self.dynamic.tokens(*(size or (default.width, default.height)))


class StaticFrame(Params, frozen=True):
    num_tokens_per_frame: Count = 1


class FrameTokens(Params, frozen=True):
    mode: Literal["dynamic", "static"] = "dynamic"
    dynamic: PerPixel = PerPixel()
    static: StaticFrame = StaticFrame()


class Sampled(Params, frozen=True):
    """The model looks at ``sampleFPS`` frames a second and merges ``temporalPatchSize`` of them."""

    sample_fps: Amount = msgspec.field(default=2.0, name="sampleFPS")
    temporal_patch_size: Count = 0


class Strided(Params, frozen=True):
    """The model looks at every ``frameStride``-th frame of the video."""

    default_source_fps: Amount = msgspec.field(default=24.0, name="defaultSourceFPS")
    frame_stride: Count = 1


class Frames(Params, frozen=True):
    """``minFrames`` and ``maxFrames`` 0: no such limit."""

    mode: Literal["sampled", "strided"] = "sampled"
    min_frames: Count = 0
    max_frames: Count = 0
    sampled: Sampled = Sampled()
    strided: Strided = Strided()

    def count(self, duration_s: float, source_fps: float) -> int:
        if self.mode == "strided":
            raw = int(duration_s * (source_fps or self.strided.default_source_fps or 24.0))
            return self._clamped(raw // max(1, self.strided.frame_stride))
        count = self._clamped(int(duration_s * (self.sampled.sample_fps or 2.0)))
        return count // max(1, self.sampled.temporal_patch_size)

    def _clamped(self, count: int) -> int:
        count = max(count, self.min_frames)
        return min(count, self.max_frames) if self.max_frames else count


class VideoEstimate(Params, frozen=True):
    """Frames times tokens of a frame, at most ``maxVideoTokens`` (0: no limit). Headers win over the defaults here."""

    tokens_per_frame: FrameTokens = FrameTokens()
    frames: Frames = Frames()
    default_resolution: Resolution = Resolution()
    default_duration: Amount = 10.0
    max_video_tokens: Count = 0

    def tokens(self, headers: Mapping[str, str]) -> int:
        duration_s = _positive(headers.get(VIDEO_DURATION, "")) or self.default_duration or 10.0
        frames = self.frames.count(duration_s, _positive(headers.get(VIDEO_FPS, "")))
        count = frames * self._per_frame(headers)
        return max(1, min(count, self.max_video_tokens) if self.max_video_tokens else count)

    def _per_frame(self, headers: Mapping[str, str]) -> int:
        if self.tokens_per_frame.mode == "static":
            return max(1, self.tokens_per_frame.static.num_tokens_per_frame)
        default = self.default_resolution
        size = _resolution(headers.get(VIDEO_RESOLUTION, "")) or (default.width, default.height)
        return self.tokens_per_frame.dynamic.tokens(*size)


class Estimate(Params, frozen=True):
    """The parameters ``estimate`` of a token-producer."""

    image: ImageEstimate = ImageEstimate()
    video: VideoEstimate = VideoEstimate()


class Sizes(msgspec.Struct, frozen=True):
    """What the media of one request count, in tokens and at least one each. ``headers`` may hold hints."""

    estimate: Estimate = Estimate()
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)

    def image(self, base64: str) -> int:
        """``base64``: the image itself, empty when it has to be fetched from elsewhere."""
        return self.estimate.image.tokens(image_size(base64) if base64 else None)

    def video(self) -> int:
        return self.estimate.video.tokens(self.headers)

    def audio(self, content: str) -> int:
        """``content``: the sound in base64, or where it is."""
        return max(1, -(-len(content) // 4))


def _positive(text: str) -> float:
    """A number above 0; 0 for anything else."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0.0 < value < 1e6 and math.isfinite(value) else 0.0


def _resolution(text: str) -> tuple[int, int] | None:
    """``WxH`` in pixels; None for anything else."""
    width, _, height = text.strip().lower().partition("x")
    if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        return None
    return believed(int(width[:8]), int(height[:8]))
