"""What trainer and parent say to each other: four bytes of length, big-endian, then msgpack.

The parent sends one ``Start`` and then ``Batch`` after ``Batch``; the child answers with a ``Report`` after each fit.
"""

from __future__ import annotations

import msgspec

from llmd_sched.types import Sample

MAX_FRAME_BYTES = 64 << 20


class Start(msgspec.Struct, frozen=True, tag="start"):
    """The first frame: the model in use, and when to refit (as ``InlineTrainer`` takes it)."""

    model: bytes
    interval_s: float
    first_samples: int
    least_new: int


class Batch(msgspec.Struct, frozen=True, tag="batch"):
    samples: list[Sample]


class Report(msgspec.Struct, frozen=True):
    """What a fit came to. The counts are totals of this child's life."""

    model: bytes | None
    samples: int
    refused: int
    rejected: int
    failed: int
    fit_cpu_ms: float


class Frames:
    """Cuts a byte stream into frames. ValueError for a length beyond MAX_FRAME_BYTES."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that ``data`` completes, in order."""
        self._pending += data
        frames = []
        while len(self._pending) >= 4:
            size = int.from_bytes(self._pending[:4], "big")
            if size > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {size} bytes, at most {MAX_FRAME_BYTES} are allowed")
            if len(self._pending) < 4 + size:
                break
            frames.append(bytes(self._pending[4 : 4 + size]))
            del self._pending[: 4 + size]
        return frames


def frame(message: Start | Batch | Report) -> bytes:
    """The message with its length before it. NumPy's scalars pass as floats; TypeError for anything else unknown."""
    body = msgspec.msgpack.encode(message, enc_hook=float)
    return len(body).to_bytes(4, "big") + body
