"""The words of one engine step: the request submitted, the sequence it becomes, the batch, the step that results."""

from __future__ import annotations

from collections.abc import Sequence as Items

import msgspec


class SimRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request: how long it is, and what its blocks contain."""

    id: str
    """Unique among the requests an engine holds."""
    prompt_tokens: int
    output_tokens: int
    arrival_s: float
    block_hashes: Items[int] = ()
    """Chained hashes of the leading full blocks, of the prompt and, where a workload knows it, of the output too.
    Blocks beyond them have content of their own, which nobody else asks for."""
    priority: int = 0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError(
                f"request {self.id}: prompt_tokens and output_tokens must be at least 1, "
                f"not {self.prompt_tokens} and {self.output_tokens}"
            )


class Step(msgspec.Struct, frozen=True):
    """What one step does. Its tokens come out at ``end_s``. Ids of requests aborted meanwhile are to be ignored."""

    start_s: float
    duration_s: float
    tokens: list[str]
    """Requests that emit one token each."""
    first: list[str]
    """Those of ``tokens`` for which it is the first."""
    finished: list[str]
    """Those of ``tokens`` for which it is the last."""
    admitted: list[tuple[str, int]]
    """Requests scheduled for the first time, each with the prompt tokens it found cached."""
    preempted: list[str]
    scheduled_tokens: int
    """Prompt tokens computed plus decoding sequences."""

    @property
    def end_s(self) -> float:
        return self.start_s + self.duration_s


class Sequence:
    """A request inside the engine. Until ``computed`` reaches ``target`` it prefills; then each step adds one."""

    __slots__ = (
        "blocks",
        "computed",
        "hashes",
        "id",
        "last",
        "quiet_until",
        "request",
        "serial",
        "started",
        "target",
    )

    def __init__(self, request: SimRequest, serial: int) -> None:
        self.id = request.id
        self.request = request
        self.serial = serial
        self.hashes = list(request.block_hashes)
        self.blocks: list[int] = []
        self.computed = 0
        self.target = request.prompt_tokens
        self.last = request.prompt_tokens + request.output_tokens - 1
        """Tokens computed when the last token comes out (the last one itself is never computed)."""
        self.quiet_until = -1
        """While ``computed`` is below this, a step only counts: no block fills up, none is needed, nothing ends."""
        self.started = False

    @property
    def decoding(self) -> bool:
        return self.computed >= self.target

    @property
    def remaining(self) -> int:
        """Tokens known but not computed: the rest of the prompt, or the one token sampled last."""
        return 1 if self.decoding else self.target - self.computed

    def hash_of_block(self, index: int) -> int:
        while index >= len(self.hashes):
            self.hashes.append(hash((self.serial, len(self.hashes))))
        return self.hashes[index]

    def forget(self) -> None:
        """Back to the start, with the tokens generated so far as part of what is to be computed."""
        if self.decoding:
            self.target = self.computed + 1
        self.computed = 0
        self.quiet_until = -1


class Batch:
    """One step being put together."""

    def __init__(self, budget_tokens: int) -> None:
        self.budget_tokens = budget_tokens
        self.quiet: list[Sequence] = []
        self.chunks: dict[Sequence, int] = {}
        self.chunk_tokens = 0
        """Sum of ``chunks``."""
        self.tokens: list[str] = []
        self.first: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.admitted: list[tuple[str, int]] = []
        self.preempted: list[str] = []
        self.sequences = 0
        self.prefill_tokens = 0
        self.attention_pairs = 0.0
        self.decode_context_tokens = 0
        self.scheduled_tokens = 0

    @property
    def left_tokens(self) -> int:
        """Budget not yet planned or spent."""
        return self.budget_tokens - self.scheduled_tokens - len(self.quiet) - self.chunk_tokens

    def plan(self, sequence: Sequence, tokens: int) -> None:
        self.chunks[sequence] = tokens
        self.chunk_tokens += tokens

    def drop(self, sequence: Sequence) -> None:
        """Take back what was planned for a sequence that is now preempted."""
        self.preempted.append(sequence.id)
        if sequence in self.chunks:
            self.chunk_tokens -= self.chunks.pop(sequence)
        elif sequence in self.quiet:
            self.quiet.remove(sequence)

    def planned(self) -> tuple[list[Sequence], dict[Sequence, int]]:
        """What was planned since the last call, as ``quiet`` and ``chunks``; the plan is empty again."""
        planned = self.quiet, self.chunks
        self.quiet, self.chunks, self.chunk_tokens = [], {}, 0
        return planned
