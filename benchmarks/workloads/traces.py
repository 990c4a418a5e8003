"""Public traces as workloads, paced to a rate and clipped; and a reader for BurstGPT, which the live client lacks."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import msgspec

from benchmarks.workloads.shapes import ItemWorkload
from llmd_sched.load.traces import TraceError, read_trace
from llmd_sched.load.workload import MAX_INPUT_TOKENS, Item, Span

BURSTGPT_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")
ACCEPTED = (
    f"accepted is a BurstGPT trace (CSV with the columns {', '.join(BURSTGPT_COLUMNS)} among others, "
    "times in seconds that do not go back)"
)


class Traced(ItemWorkload, frozen=True, kw_only=True):
    """A trace file replayed at another speed; make it with ``traced``. It is the same for every seed.

    A rate is reached on average over the whole file: its bursts stay, and a part of it may be slower or faster.
    """

    path: str
    native_rate_per_s: float
    context_tokens_max: int
    """A longer prompt loses its end, so that shared prefixes stay."""
    output_tokens_max: int

    def items(self, rate_per_s: float, duration_s: float, seed: int) -> Iterator[Item]:
        """ValueError for a rate that is not positive, TraceError when the file has changed for the worse."""
        for item in read(self.path, rate_per_s / self.native_rate_per_s, duration_s):
            output_tokens = min(item.output_tokens, self.output_tokens_max)
            prompt = _clipped(item.prompt, self.context_tokens_max)
            yield msgspec.structs.replace(item, prompt=prompt, output_tokens=output_tokens)


def traced(path: str | Path, *, context_tokens_max: int = 131_072, output_tokens_max: int = 8192) -> Traced:
    """The workload of an Azure, Mooncake or BurstGPT file, named as the file; reads all of it once, row by row.

    TraceError names file and line of what cannot be read, or says that the rows span no time.
    """
    if context_tokens_max < 1 or output_tokens_max < 1:
        raise ValueError(f"the limits must be at least 1 token, not {context_tokens_max} and {output_tokens_max}")
    rows, last_s = 0, 0.0
    for item in read(path):
        rows, last_s = rows + 1, item.at_s
    if not last_s:
        raise TraceError(f"{path}: {rows} rows that span no time have no rate; accepted are rows at two times or more")
    return Traced(
        name=Path(path).stem,
        path=str(path),
        native_rate_per_s=rows / last_s,
        context_tokens_max=context_tokens_max,
        output_tokens_max=output_tokens_max,
    )


def read(path: str | Path, speed: float = 1.0, duration_s: float = math.inf) -> Iterator[Item]:
    """The items of a trace file of any kind, told by its first line. Speed and duration as for ``read_trace``."""
    if not _is_burstgpt(path):
        return read_trace(path, speed, duration_s)
    if not speed > 0:
        raise ValueError(f"the speed is {speed:g}, and must be positive")
    return burstgpt_csv(path, speed, duration_s)


def burstgpt_csv(path: str | Path, speed: float = 1.0, duration_s: float = math.inf) -> Iterator[Item]:
    """Items of a BurstGPT trace: single requests with text of their own, since its sessions tell no prefixes.

    Rows without response tokens are requests that failed there, and are left out. Times count from the first row.
    TraceError names file and line when a bad row is reached.
    """
    start_s, last_s = None, -math.inf
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        missing = [name for name in BURSTGPT_COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            _refuse(path, 1, f"there is no column {', '.join(missing)}")
        for row in _readable(path, rows):
            time_s, tokens, output_tokens = _numbers(path, rows.line_num, row)
            if time_s < last_s:
                _refuse(path, rows.line_num, "the time is before that of the row above")
            start_s, last_s = time_s if start_s is None else start_s, time_s
            at_s = (time_s - start_s) / speed
            if at_s >= duration_s:
                return
            if output_tokens:
                session = f"burstgpt-{rows.line_num}"
                prompt = (Span(session, max(tokens, 1)),)
                yield Item(at_s=at_s, session=session, prompt=prompt, output_tokens=output_tokens)


def _readable(path: str | Path, rows: csv.DictReader[str]) -> Iterator[dict[str, str]]:
    try:
        yield from rows
    except (UnicodeDecodeError, csv.Error) as error:
        _refuse(path, rows.line_num + 1, str(error))


def _numbers(path: str | Path, line: int, row: dict[str, str]) -> tuple[float, int, int]:
    time_text, *token_texts = (row[name] for name in BURSTGPT_COLUMNS)
    try:
        time_s, (tokens, output_tokens) = float(time_text), map(int, token_texts)
    except (ValueError, TypeError) as error:
        _refuse(path, line, str(error))
    if not (math.isfinite(time_s) and 0 <= tokens <= MAX_INPUT_TOKENS and output_tokens >= 0):
        _refuse(path, line, f"time {time_s:g} with {tokens} input and {output_tokens} output tokens is out of range")
    return time_s, tokens, output_tokens


def _is_burstgpt(path: str | Path) -> bool:
    """False as well for what cannot be read, about which ``read_trace`` complains."""
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            return file.readline(4096).startswith("Timestamp,")
    except (OSError, UnicodeDecodeError):
        return False


def _clipped(prompt: tuple[Span, ...], tokens_max: int) -> tuple[Span, ...]:
    kept, left = [], tokens_max
    for span in prompt:
        if left <= 0:
            break
        kept.append(span._replace(tokens=min(span.tokens, left)))
        left -= span.tokens
    return tuple(kept)


def _refuse(path: str | Path, line: int, what: str) -> NoReturn:
    raise TraceError(f"{path}, line {line}: {what}; {ACCEPTED}") from None
