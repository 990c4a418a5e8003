"""What trainer and parent say to each other: four bytes of length, big-endian, then msgpack.

The parent sends one ``Start`` and then ``Batch`` after ``Batch``; the child answers with a ``Report`` after each fit
and at least every ``HEARTBEAT_S``, so that silence means it hangs.
"""

from __future__ import annotations

import msgspec

from llmd_sched.types import Sample

MAX_FRAME_BYTES = 64 << 20
HEARTBEAT_S = 1.0


class Start(msgspec.Struct, frozen=True, tag="start"):
    """The first frame: the model in use, and when to refit (as ``InlineTrainer`` takes it)."""

    model: bytes
    interval_s: float
    first_samples: int
    least_new: int
    state_path: str = ""
    """Where the window is restored from and kept; empty = nowhere."""


class Batch(msgspec.Struct, frozen=True, tag="batch"):
    samples: list[Sample]
    classes: tuple[str, ...]
    """Names of the engine classes in the rows, by number."""


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """Empty the window."""


class Counts(msgspec.Struct):
    """What a trainer did, as totals of its life."""

    samples: int = 0
    """Samples of which at least one label was taken."""
    refused: int = 0
    """Labels that were no measurement."""
    fits: int = 0
    failed: int = 0
    """Fits that ended in an error."""
    published: int = 0
    rejected: int = 0
    """Fits of one target that the gate refused."""
    drifts: int = 0
    """Times the live error of one target left what its fit had promised."""
    fallbacks: int = 0
    """Times trees were dropped because the base alone did better."""

    def __add__(self, other: Counts) -> Counts:
        names = self.__struct_fields__
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})


class Held(msgspec.Struct, frozen=True):
    """What the window holds of one target."""

    rows_by_class: dict[int, int] = {}
    oldest_s: float = float("nan")
    newest_s: float = float("nan")
    """When its oldest and newest label were taken; NaN while it is empty."""

    @property
    def rows(self) -> int:
        return sum(self.rows_by_class.values())


class Report(msgspec.Struct, frozen=True):
    """What a fit came to, or just a sign of life (``model`` None)."""

    model: bytes | None
    counts: Counts
    """Totals of this child's life."""
    held: dict[str, Held]
    """By target."""
    fit_cpu_ms: float
    """Of the last fit; 0 before the first."""


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


def frame(message: Start | Batch | Forget | Report) -> bytes:
    """The message with its length before it. NumPy's scalars pass as floats; TypeError for anything else unknown."""
    body = msgspec.msgpack.encode(message, enc_hook=float)
    return len(body).to_bytes(4, "big") + body
