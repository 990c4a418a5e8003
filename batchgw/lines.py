"""Batch input: what a file of requests holds, whether each line may run, and in which order.

Pure. Bytes are fed as they arrive; memory is one line, the errors kept, and about 200 bytes a line. A ``Scan`` tells
what was found; the plan says where each line is and sorts lines with a common prompt prefix together.

Plan: ``PLAN`` rows, little endian. ``offset``, ``length`` in bytes of the input file, without the line's newline;
``line`` counts from 0; ``model`` indexes ``Scan.models``; ``prefix`` is the first link of the line's prefix chain;
``prompt_bytes`` is UTF-8 text, each embedded medium counted as ``MEDIA_BYTES``.
"""

from __future__ import annotations

import struct
from hashlib import blake2b

import msgspec
import numpy as np
from numpy.typing import NDArray

from batchgw.prompts import Body, Line, chain, embedding_inputs, explain, prompt
from batchgw.records import LineError, Scan

ENDPOINTS = (
    "/v1/responses",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/completions",
    "/v1/moderations",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/videos",
)
"""What a batch may ask, as OpenAI has it."""

MAX_ERRORS = 100
MAX_MODELS = 1000
MAX_EMBEDDING_INPUTS = 50_000
"""OpenAI's limit over all lines of a file."""
MAX_CUSTOM_ID_CHARS = 512
MAX_MODEL_CHARS = 256
SHOWN_CHARS = 80
"""How much of a user's own text an error repeats."""

PLAN = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("line", "<u4"),
        ("model", "<u2"),
        ("prefix", "<u8"),
        ("prompt_bytes", "<u4"),
    ]
)
_ROW = struct.Struct("<QIIHQI")
BOM = b"\xef\xbb\xbf"

Plan = NDArray[np.void]


class Limits(msgspec.Struct, frozen=True):
    """What one input file may hold; ``endpoints`` are the URLs its lines may name."""

    endpoints: tuple[str, ...] = ENDPOINTS
    max_lines: int = 50_000
    max_line_bytes: int = 64 << 20


class _BadLine(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


class Scanner:
    """``feed`` the bytes of one file in order, then ``finish`` once. No clock, no input or output."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._decode = msgspec.json.Decoder(Line).decode
        self._line = bytearray()
        self._line_bytes = 0  # of the line under way, also where it is too long to be kept
        self._at = 0
        self._number = 0  # lines ended so far
        self._blank = 0  # blank lines at the end so far: an error once another line follows
        self._requests = 0
        self._errors: list[LineError] = []
        self._error_count = 0
        self._first_use: dict[bytes, int] = {}
        self._models: dict[str, int] = {}
        self._urls: dict[str, int] = {}
        self._inputs = 0
        self._prompt_bytes = 0
        self._rows = bytearray()
        self._chains = bytearray()
        self._full = False

    def feed(self, data: bytes) -> None:
        start = 0
        while not self._full and (end := data.find(b"\n", start)) >= 0:
            self._keep(data, start, end)
            self._end_line(newline=1)
            start = end + 1
        if not self._full:
            self._keep(data, start, len(data))

    def finish(self) -> tuple[Scan, Plan]:
        """The plan is empty when there are errors."""
        if self._line_bytes and not self._full:
            self._end_line(newline=0)
        if not self._requests and not self._error_count:
            self._note("empty_file", "The file holds no request: one JSON object per line is expected.", None, None)
        scan = Scan(
            lines=self._requests,
            models=tuple(self._models),
            urls=tuple(self._urls),
            errors=tuple(self._errors),
            error_count=self._error_count,
            prompt_bytes=self._prompt_bytes,
        )
        return scan, self._plan() if not self._error_count else np.empty(0, PLAN)

    def _keep(self, data: bytes, start: int, end: int) -> None:
        self._line_bytes += end - start
        if self._line_bytes <= self._limits.max_line_bytes:
            self._line += memoryview(data)[start:end]
        else:
            self._line.clear()

    def _end_line(self, newline: int) -> None:
        blank = self._line_bytes <= self._limits.max_line_bytes and not self._line.strip()
        if self._number >= self._limits.max_lines * (2 if blank else 1):
            self._stop()
            return
        raw, length, offset = bytes(self._line), self._line_bytes, self._at
        self._line.clear()
        self._line_bytes = 0
        self._at += length + newline
        self._number += 1
        if offset == 0 and raw.startswith(BOM):
            raw, offset = raw[len(BOM) :], len(BOM)
        if blank or (offset == len(BOM) and not raw.strip()):
            self._blank += 1
            return
        self._note_blank_lines()
        self._requests += 1
        try:
            self._request(raw, length, offset)
        except _BadLine as bad:
            self._note(bad.code, bad.message, bad.param, self._number)

    def _stop(self) -> None:
        """Nothing after it is looked at."""
        self._full = True
        limit = self._limits.max_lines
        self._note("too_many_tasks", f"The file holds more than {limit} lines, which is the limit.", None, limit + 1)

    def _note(self, code: str, message: str, param: str | None, line: int | None) -> None:
        self._error_count += 1
        if len(self._errors) < MAX_ERRORS:
            self._errors.append(LineError(code=code, message=message, param=param, line=line))

    def _note_blank_lines(self) -> None:
        for line in range(self._number - self._blank, self._number):
            self._note("invalid_json_line", "This line is blank; one JSON object per line is expected.", None, line)
        self._blank = 0

    def _request(self, raw: bytes, length: int, offset: int) -> None:
        if length > self._limits.max_line_bytes:
            limit = self._limits.max_line_bytes
            raise _BadLine("line_too_long", f"This line has {length} bytes; at most {limit} are accepted.")
        line = self._decoded(raw)
        self._check_envelope(line)
        self._check_body(line.body)
        self._check_against_others(line)
        text, size = prompt(line.body)
        links = chain(line.body.model, bytes(line.body.tools), text)
        model = self._models.setdefault(line.body.model, len(self._models))
        prefix = int.from_bytes(links[:8], "little")
        self._rows += _ROW.pack(offset, len(raw), self._number - 1, model, prefix, size)
        self._chains += links
        self._prompt_bytes += size

    def _decoded(self, raw: bytes) -> Line:
        try:
            try:
                return self._decode(raw)
            except msgspec.ValidationError:
                wrong = explain(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            wrong = "invalid_json_line", "This line is not parseable as valid JSON.", None
        raise _BadLine(*wrong)

    def _check_envelope(self, line: Line) -> None:
        if not line.custom_id:
            raise _BadLine(
                "missing_required_parameter", "custom_id is empty; a unique string is expected.", "custom_id"
            )
        if len(line.custom_id) > MAX_CUSTOM_ID_CHARS:
            raise _BadLine(
                "invalid_custom_id",
                f"custom_id has {len(line.custom_id)} characters; at most {MAX_CUSTOM_ID_CHARS} are accepted.",
                "custom_id",
            )
        if line.method != "POST":
            raise _BadLine("invalid_method", f"method is {_shown(line.method)}; only 'POST' is accepted.", "method")
        if line.url not in self._limits.endpoints:
            accepted = ", ".join(self._limits.endpoints)
            raise _BadLine("invalid_url", f"url is {_shown(line.url)}; accepted are {accepted}.", "url")

    def _check_body(self, body: Body) -> None:
        if not body.model:
            raise _BadLine(
                "missing_required_parameter", "body.model is empty; a model's name is expected.", "body.model"
            )
        if len(body.model) > MAX_MODEL_CHARS:
            raise _BadLine("invalid_model", f"body.model is longer than {MAX_MODEL_CHARS} characters.", "body.model")
        if body.stream is not None and body.stream is not False:
            raise _BadLine(
                "stream_unsupported", "body.stream must be false or absent: a batch does not stream.", "body.stream"
            )

    def _check_against_others(self, line: Line) -> None:
        digest = blake2b(line.custom_id.encode(), digest_size=16).digest()
        first = self._first_use.setdefault(digest, self._number)
        if first != self._number:
            raise _BadLine(
                "duplicate_custom_id",
                f"custom_id {_shown(line.custom_id)} is already used on line {first}; each must be unique.",
                "custom_id",
            )
        url = next(iter(self._urls), line.url)
        if line.url != url:
            raise _BadLine(
                "url_mismatch", f"url is {line.url} but earlier lines have {url}; a batch has one endpoint.", "url"
            )
        self._urls[url] = 1
        if line.body.model not in self._models and len(self._models) == MAX_MODELS:
            raise _BadLine("too_many_models", f"More than {MAX_MODELS} models in one file.", "body.model")
        if line.url == "/v1/embeddings":
            self._count_inputs(embedding_inputs(line.body.input))

    def _count_inputs(self, inputs: int) -> None:
        before, self._inputs = self._inputs, self._inputs + inputs
        if before <= MAX_EMBEDDING_INPUTS < self._inputs:
            raise _BadLine(
                "too_many_inputs", f"More than {MAX_EMBEDDING_INPUTS} embedding inputs up to this line.", "body.input"
            )

    def _plan(self) -> Plan:
        rows = np.frombuffer(bytes(self._rows), PLAN)
        links = np.frombuffer(bytes(self._chains), "<u8").reshape(len(rows), -1)
        order = np.lexsort((rows["line"], *links.T[::-1], rows["model"]))
        return rows[order]


def read_plan(data: bytes) -> Plan:
    """Rows of a plan file, or of a slice of it cut at multiples of ``PLAN.itemsize``. Read-only."""
    return np.frombuffer(data, PLAN)


def refusals(scan: Scan, endpoint: str) -> tuple[LineError, ...]:
    """Why a batch for ``endpoint`` cannot run on the file scanned; empty when it can."""
    errors = list(scan.errors)
    if scan.error_count > len(errors):
        more = f"{scan.error_count - len(errors)} more lines have errors; the first {len(errors)} are listed."
        errors.append(LineError("more_errors", more))
    if not errors and scan.urls != (endpoint,):
        message = f"url is {scan.urls[0]} but the batch's endpoint is {endpoint}; they must be equal on every line."
        errors.append(LineError("url_mismatch", message, "url", 1))
    return tuple(errors)


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "...")
