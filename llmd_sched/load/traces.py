"""Public traces as workloads: when requests came and how long they were. The text is ours.

A trace is read row by row as its items are used, so memory does not grow with the file; of a trace with
same-timestamp rows, the rows of two timestamps are held.
"""

from __future__ import annotations

import csv
import itertools
import math
import random
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import msgspec

from llmd_sched.errors import SchedError
from llmd_sched.load.workload import MAX_INPUT_TOKENS, Item, Span

AZURE_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
BLOCK_TOKENS = 512
"""What one hash id of a Mooncake trace stands for."""
BUCKET_S = 3.0
"""What the Mooncake conversation trace rounds its timestamps to, about."""
ACCEPTED = (
    f"accepted are an Azure LLM trace (CSV with the columns {','.join(AZURE_COLUMNS)}) and a Mooncake trace "
    "(JSON lines with timestamp in ms, input_length, output_length and one id per 512 tokens in hash_ids)"
)


class TraceError(SchedError):
    """A trace cannot be read; the text names the file, the line and what is accepted."""


def read_trace(
    path: str | Path, speed: float = 1.0, duration_s: float = math.inf, limit: int | None = None
) -> Iterator[Item]:
    """The items of a trace file, whichever of the accepted kinds it is (told by its first line).

    The file is read twice: once at this call, so that a bad row is a `TraceError` before anything was sent, and again,
    row by row, as the items are used. ``speed`` divides all times; ``duration_s`` is the time the replay takes after
    that: items with ``at_s < duration_s`` are kept, of them the first ``limit``. ValueError for a speed that is
    not positive.
    """
    if speed <= 0:
        raise ValueError(f"the speed is {speed:g}, and must be positive")
    reader = mooncake_jsonl if _first_line(path).lstrip().startswith("{") else azure_csv
    try:
        if next(reader(path), None) is None:
            _refuse(path, 2, "there are no rows")
        for _ in reader(path, speed, duration_s, limit):
            pass
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: {error}; {ACCEPTED}") from error
    return reader(path, speed, duration_s, limit)


def azure_csv(
    path: str | Path, speed: float = 1.0, duration_s: float = math.inf, limit: int | None = None
) -> Iterator[Item]:
    """Items of an Azure LLM inference trace: completions whose text is unique to the row, so no prefix is shared."""
    return _paced(_azure_items(path), speed, duration_s, limit)


def mooncake_jsonl(
    path: str | Path, speed: float = 1.0, duration_s: float = math.inf, limit: int | None = None, seed: int = 0
) -> Iterator[Item]:
    """Items of a Mooncake trace: every hash id stands for the same 2048 bytes wherever it occurs.

    Rows of one timestamp are spread uniformly over the 3 s before speed-up that the trace rounds to, or up to the next
    timestamp if that is sooner.
    """
    return _paced(_mooncake_items(path, random.Random(seed)), speed, duration_s, limit)


def _paced(items: Iterator[Item], speed: float, duration_s: float, limit: int | None) -> Iterator[Item]:
    for item in itertools.islice(items, limit):
        at_s = item.at_s / speed
        if at_s >= duration_s:
            return
        yield msgspec.structs.replace(item, at_s=at_s)


def _azure_items(path: str | Path) -> Iterator[Item]:
    last_s, start = 0.0, None
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        if (header := next(rows, [])) != AZURE_COLUMNS:
            _refuse(path, 1, f"the columns are {','.join(header)[:80]!r}")
        for line, row in enumerate(rows, start=2):
            if not row:
                continue
            try:
                stamp, context, generated = row
                when = datetime.fromisoformat(stamp)
                start = start or when
                at_s = (when - start).total_seconds()
                tokens, output_tokens = int(context), int(generated)
            except (ValueError, TypeError) as error:
                _refuse(path, line, str(error))
            _check(path, line, at_s - last_s, tokens, output_tokens)
            last_s = at_s
            prompt = (Span(f"azure-{line}", max(tokens, 1)),)
            yield Item(at_s=at_s, session=f"azure-{line}", prompt=prompt, output_tokens=max(output_tokens, 1))


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]
    line: int = 0

    def item(self, at_s: float) -> Item:
        tokens_left = self.input_length
        prompt = []
        for block in self.hash_ids:
            prompt.append(Span(f"block-{block}", min(tokens_left, BLOCK_TOKENS)))
            tokens_left -= BLOCK_TOKENS
        session = f"mooncake-{self.line}"
        return Item(at_s=at_s, session=session, prompt=tuple(prompt), output_tokens=max(self.output_length, 1))


def _mooncake_rows(path: str | Path) -> Iterator[_MooncakeRow]:
    decoder = msgspec.json.Decoder(_MooncakeRow)
    last_ms = -math.inf
    with Path(path).open("rb") as file:
        for line, text in enumerate(file, start=1):
            if text.isspace():
                continue
            try:
                row = decoder.decode(text)
            except msgspec.MsgspecError as error:
                _refuse(path, line, str(error))
            row.line = line
            _check(path, line, row.timestamp - last_ms, row.input_length, row.output_length)
            if not row.input_length or len(row.hash_ids) != math.ceil(row.input_length / BLOCK_TOKENS):
                _refuse(path, line, f"{len(row.hash_ids)} hash_ids do not make {row.input_length} tokens")
            last_ms = row.timestamp
            yield row


def _mooncake_items(path: str | Path, rng: random.Random) -> Iterator[Item]:
    start_ms = None
    for rows, width_s in _buckets(path):
        start_ms = rows[0].timestamp if start_ms is None else start_ms
        from_s = (rows[0].timestamp - start_ms) / 1000
        offsets_s = [0.0] if len(rows) == 1 else sorted(rng.uniform(0, width_s) for _ in rows)
        for row, offset_s in zip(rows, offsets_s, strict=True):
            yield row.item(from_s + offset_s)


def _buckets(path: str | Path) -> Iterator[tuple[list[_MooncakeRow], float]]:
    """The rows of each timestamp, and the seconds over which to spread them."""
    held: list[_MooncakeRow] = []
    for _, same_time in itertools.groupby(_mooncake_rows(path), key=lambda row: row.timestamp):
        rows = list(same_time)
        if held:
            yield held, min(BUCKET_S, (rows[0].timestamp - held[0].timestamp) / 1000)
        held = rows
    if held:
        yield held, BUCKET_S


def _first_line(path: str | Path) -> str:
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            line = file.readline(1 << 20)
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read ({error}); {ACCEPTED}") from error
    return line or _refuse(path, 1, "the file is empty")


def _check(path: str | Path, line: int, step: float, input_tokens: int, output_tokens: int) -> None:
    if step < 0:
        _refuse(path, line, "the time is before that of the row above")
    if not 0 <= input_tokens <= MAX_INPUT_TOKENS or output_tokens < 0:
        _refuse(path, line, f"{input_tokens} input and {output_tokens} output tokens are out of range")


def _refuse(path: str | Path, line: int, what: str) -> NoReturn:
    raise TraceError(f"{path}, line {line}: {what}; {ACCEPTED}") from None
