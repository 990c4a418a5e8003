"""What a model will read of a conversation, in its order, as bytes: four of them count as one token.

Text is its UTF-8, without separators. An image, a video or a sound is as many equal tokens as it counts.
"""

from __future__ import annotations

import zlib

from llmd_sched.parsers.images import data_of
from llmd_sched.parsers.media import Sizes
from llmd_sched.plugin import Parsed, Parser

MAX_MEDIA_TOKENS = 131_072
"""Of all media of one request; what would go beyond adds nothing, however large a few bytes claim to be."""


class Prompt:
    """Grows part by part."""

    def __init__(self, sizes: Sizes) -> None:
        self.media = 0
        self._sizes = sizes
        self._text = bytearray()
        self._tokens_left = MAX_MEDIA_TOKENS

    def __bytes__(self) -> bytes:
        return bytes(self._text)

    def add(self, text: str | bytes | None) -> None:
        if text:
            self._text += text.encode() if isinstance(text, str) else text

    def image(self, address: str, base64: str = "") -> None:
        """``address`` tells one image from another; ``base64`` is the image where ``address`` is no data URL."""
        self._stand_in(address, self._sizes.image(base64 or data_of(address)))

    def video(self, address: str) -> None:
        self._stand_in(address, self._sizes.video())

    def audio(self, content: str) -> None:
        self._stand_in(content, self._sizes.audio(content))

    def _stand_in(self, address: str, tokens: int) -> None:
        """Must not shift what follows: so aligned, and whole tokens, which differ from one address to another."""
        self.media += 1
        tokens = min(tokens, self._tokens_left)
        self._tokens_left -= tokens
        if tokens:
            self._text += bytes(-len(self._text) % 4)
            self._text += zlib.crc32(address.encode()).to_bytes(4, "little") * tokens


class MediaParser(Parser, frozen=True):
    """A parser of bodies that may have media in them."""

    def parse(self, path: str, body: bytes) -> Parsed:
        return self.read(path, body, Sizes())

    def read(self, path: str, body: bytes, sizes: Sizes) -> Parsed:
        """``parse``, with media counted by ``sizes``."""
        raise NotImplementedError
