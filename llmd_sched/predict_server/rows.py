"""The rows of llm-d's predictor API, and what our features and samples make of them. Pure: no clock, no I/O.

Each request becomes two feature rows, one per target, because the reference's rows differ by target: its TPOT rows are
trained with prefix score 0 and no generated token while predictions carry the real score and 1, and its TTFT ignores
generated tokens. So TTFT rows never see generated tokens, TPOT rows never see the prefix score, and both 0 and 1
generated token count as 1. That way training and serving agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from llmd_sched.predict import features as f
from llmd_sched.types import Array, Sample

MAX_ROWS = 10_000
POD_TYPES = ("", "prefill", "decode")
"""The engine classes of this server: an endpoint's role. Any other ``pod_type`` counts as none."""
TTFT, TPOT = 0, 1
"""Where a target is in everything that has one entry per target."""

Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Milliseconds = Annotated[float, Meta(ge=0.0, le=1e9)]


class BadRow(ValueError):
    """A feature's value cannot be; the message says of which row."""


class Row(msgspec.Struct, frozen=True, gc=False):
    """What the API calls a prediction request; other fields in it are ignored.

    The encoder sizes (multimodal input, in tokens) are checked and not used: no feature of ours holds them.
    """

    kv_cache_percentage: Share
    input_token_length: Count
    num_request_waiting: Count
    num_request_running: Count
    num_tokens_generated: Count
    prefix_cache_score: Share
    pod_type: str | None = ""
    prefill_tokens_in_flight: Count = 0
    decode_tokens_in_flight: Count = 0
    encoder_matched_size: Count = 0
    encoder_input_size: Count = 0

    def check(self, path: str) -> None:
        """BadRow for what the schema cannot say; ``path`` is the row's place in the body."""
        matched, whole = self.encoder_matched_size, self.encoder_input_size
        if matched > whole:
            raise BadRow(f"Expected encoder_matched_size <= encoder_input_size ({whole}), got {matched} - at `{path}`")


class Entry(Row, frozen=True, gc=False, kw_only=True):
    """A row and what was measured, 0 = not observed. Its ``timestamp`` is ignored: the order of arrival counts, since
    the clocks of several routers need not agree."""

    actual_ttft_ms: Milliseconds
    actual_tpot_ms: Milliseconds


class Bulk(msgspec.Struct, frozen=True):
    requests: Annotated[list[Row], Meta(min_length=1, max_length=MAX_ROWS)]


class LooseBulk(msgspec.Struct, frozen=True):
    """The same with rows that are yet to be read, each by itself."""

    requests: Annotated[list[msgspec.Raw], Meta(min_length=1, max_length=MAX_ROWS)]


class Training(msgspec.Struct, frozen=True):
    entries: list[Entry]


_COPIED = (
    (f.INPUT, "input_token_length"),
    (f.WAITING, "num_request_waiting"),
    (f.RUNNING, "num_request_running"),
    (f.INFLIGHT_REQUESTS, "num_request_running"),  # the router's own count of open requests (its scrape is no feature)
    (f.KV_USAGE, "kv_cache_percentage"),
    (f.INFLIGHT_PREFILL, "prefill_tokens_in_flight"),
    (f.RESIDENT, "decode_tokens_in_flight"),
)
"""Our feature and the field it is."""
_COPIED_TO = [position for position, _ in _COPIED]
_COMPUTED_FROM = ("prefix_cache_score", "num_tokens_generated")
_values = attrgetter(*[name for _, name in _COPIED], *_COMPUTED_FROM)
_row = msgspec.json.Decoder(Row, strict=False)
_CODES = {name: float(code) for code, name in enumerate(POD_TYPES)}


def check(rows: Sequence[Row], name: str) -> None:
    """``Row.check`` of each; ``name`` is what the body calls the list."""
    for number, row in enumerate(rows):
        row.check(f"$.{name}[{number}]")


def read_each(raws: Sequence[msgspec.Raw]) -> tuple[dict[int, Row], dict[int, str]]:
    """The rows that can be used and what is wrong with the others, by their place."""
    rows, errors = {}, {}
    for number, raw in enumerate(raws):
        try:
            row = _row.decode(raw)
            row.check("$")
            rows[number] = row
        except (msgspec.DecodeError, BadRow) as error:
            errors[number] = str(error)
    return rows, errors


def feature_rows(rows: Sequence[Row]) -> NDArray[np.float64]:
    """(2, n, F): what TTFT is predicted from, then what TPOT is. What the API does not carry is 0, priority normal."""
    given = np.array([_values(row) for row in rows], dtype=np.float64).reshape(len(rows), -1)
    prefix, generated = given[:, -2], given[:, -1]
    both = np.zeros((2, len(rows), len(f.FEATURES)))
    both[:, :, _COPIED_TO] = given[:, : len(_COPIED)]
    both[:, :, f.PRIORITY_CLASS] = 1.0
    both[:, :, f.ENGINE_CLASS] = [_CODES.get(row.pod_type or "", 0.0) for row in rows]
    both[:, :, f.UNCACHED] = both[:, :, f.INPUT]
    both[TTFT, :, f.UNCACHED] *= 1.0 - prefix
    both[TTFT, :, f.PREFIX_MATCH] = prefix
    both[TPOT, :, f.EXPECTED_OUTPUT] = np.maximum(generated, 1.0)
    return both


def samples(
    entries: Sequence[Entry], both: NDArray[np.float64], predicted_ms: NDArray[np.float64], version: int, at_s: Array
) -> Iterator[Sample]:
    """One sample per label of each entry, so an entry gives none, one or two.

    ``both`` (2, n, F) are the entries' feature rows, ``predicted_ms`` (2, n) what the model ``version`` says of them,
    ``at_s`` (n,) when they arrived.
    """
    rows, (ttft_ms, tpot_ms), times_s = both.tolist(), predicted_ms.tolist(), at_s.tolist()
    for i, entry in enumerate(entries):
        said = (ttft_ms[i], tpot_ms[i], version, times_s[i])
        if entry.actual_ttft_ms > 0.0:
            yield Sample(tuple(rows[TTFT][i]), entry.actual_ttft_ms, None, *said)
        if entry.actual_tpot_ms > 0.0:
            yield Sample(tuple(rows[TPOT][i]), None, entry.actual_tpot_ms, *said)
