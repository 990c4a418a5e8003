"""A simulated engine run ahead of time, far cheaper than it runs itself: requests as numbers, decoding in leaps.

While nobody starts or ends, a step adds one token to everybody, and so many such steps have a closed form. Steps that
compute prompts are taken one by one, in order of arrival and in the engine's chunks. So without noise the ends are the
engine's own (``sim.engine``), as long as its cache has room. Where it has not, a lane approximates: room is counted
in tokens, a prompt starts when all of it fits, nobody is preempted, and what is cached stays so.

It reads the private state of an engine, which must stand still while its lanes are in use.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence as Items
from typing import NamedTuple

from llmd_sched.sim.batch import Sequence
from llmd_sched.sim.engine import Engine
from llmd_sched.sim.kvcache import BLOCK_TOKENS

_FUZZ_STEPS = 1e-9
"""A step that ends this much before a time, in steps, ends at it."""


class Ask(NamedTuple):
    """A request to come, with all that will be true of it."""

    id: str
    reached_s: float
    """When it reaches an engine."""
    prompt_tokens: int
    output_tokens: int
    hashes: Items[int]
    """Of the prompt's full blocks, as ``SimRequest`` has them."""


class _Job(NamedTuple):
    """A prompt to be computed, and how far its reply goes."""

    id: str
    ready_s: float
    cached_tokens: int
    new_tokens: int
    """For which room must be found before it starts."""
    target: int
    last: int
    """Both as of ``Sequence``."""


class Lane:
    """What an engine will do. ``now_s`` is when its next step begins, ``ended`` who ends here and when."""

    def __init__(self, engine: Engine, due_s: float, slowdown: float = 1.0) -> None:
        """``due_s``: when the step under way ends or the next is due; any time before that with nothing to do."""
        self.preset = engine.config.preset
        self.slowdown = slowdown
        self.now_s = due_s
        self.ended: list[tuple[float, str]] = []
        self.context_tokens = 0
        """Of those that decode."""
        self.queued_tokens = 0
        """Of prompts, not yet computed."""
        self._cache = engine._pool
        self._steps = 0
        self._decoding: list[tuple[int, str, int, float]] = []
        """A heap of (step at which it ends, id, tokens in the end, tokens of room it then leaves)."""
        self._queue: deque[_Job] = deque()
        self._progress: int | None = None
        """Tokens computed of the first in the queue; None when it has not started."""
        self._room_tokens: float = engine._pool.free_blocks * BLOCK_TOKENS
        self._placed: list[Items[int]] = []
        """Prompts sent here since the engine was looked at."""
        self._depths: dict[str, int] = {}
        self._take_over(engine)

    @property
    def decoding(self) -> int:
        return len(self._decoding)

    @property
    def requests(self) -> int:
        return len(self._decoding) + len(self._queue)

    def copy(self) -> Lane:
        made: Lane = Lane.__new__(Lane)
        made.__dict__.update(self.__dict__)
        made.ended, made._decoding, made._placed = self.ended.copy(), self._decoding.copy(), self._placed.copy()
        made._queue = self._queue.copy()
        return made  # the depths are of the engine's own cache, so they stay shared

    def cached_tokens(self, ask: Ask) -> int:
        """Of its prompt; one token at least has to be computed."""
        blocks = self._depths.get(ask.id)
        if blocks is None:
            blocks = self._depths[ask.id] = self._depth(ask.hashes)
        for other in self._placed:
            blocks = max(blocks, _common(ask.hashes, other))
        return min(blocks, (ask.prompt_tokens - 1) // BLOCK_TOKENS) * BLOCK_TOKENS

    def place(self, ask: Ask) -> None:
        ready_s = ask.reached_s + self.preset.request_overhead_s
        last = ask.prompt_tokens + ask.output_tokens - 1
        self._enqueue(ask.id, ready_s, ask.hashes, self.cached_tokens(ask), ask.prompt_tokens, last)

    def shared_tokens(self, output_tokens: int) -> int:
        """Tokens that those here have yet to decode beside a newcomer of so many, itself left out."""
        steps = self._steps
        decoding = sum([min(end - steps, output_tokens) for end, *_ in self._decoding])
        return decoding + sum([min(job.last - job.target, output_tokens) for job in self._queue])

    def prefill_s(self, from_tokens: int, to_tokens: int) -> float:
        """To compute these tokens of a prompt."""
        preset, tokens = self.preset, to_tokens - from_tokens
        pairs = tokens * (from_tokens + to_tokens) / 2
        return self.slowdown * (preset.prefill_token_s * tokens + preset.attention_pair_s * pairs)

    def run_to(self, to_s: float) -> None:
        """Every step that begins before then; infinity is the end of all requests."""
        while self.now_s < to_s and (self._decoding or self._queue):
            if self._queue and self._prefill():
                continue
            head_s = self._queue[0].ready_s if self._queue else math.inf
            if self._decoding:
                self._leap(min(to_s, head_s) if head_s > self.now_s else to_s)
            elif head_s >= to_s:
                break
            else:
                self.now_s = max(self.now_s, head_s)

    def _take_over(self, engine: Engine) -> None:
        ending = {sequence.id for sequence in engine._ending}
        running = list(engine._running.values())
        held_blocks = sum([len(sequence.blocks) for sequence in running])
        own = BLOCK_TOKENS * self._cache.held_blocks / held_blocks if held_blocks else 0.0  # tokens of room per block
        for sequence in running:
            left = sequence.last - sequence.computed
            if sequence.id in ending:
                self._room_tokens += own * len(sequence.blocks)
            elif sequence.decoding:
                self.context_tokens += sequence.computed
                leaves = own * len(sequence.blocks) + left
                self._decoding.append((left, sequence.id, sequence.last, leaves))
            else:
                self._progress = sequence.computed
                target = sequence.target
                self._room_tokens -= target - sequence.computed
                self._append(_Job(sequence.id, self.now_s, sequence.computed, target, target, sequence.last))
        heapq.heapify(self._decoding)
        for *_, waiting in sorted(engine._waiting):
            self._requeue(self.now_s, waiting)
        for ready_s, _, arriving in sorted(engine._arriving):
            self._requeue(ready_s, arriving)

    def _requeue(self, ready_s: float, sequence: Sequence) -> None:
        blocks = max([self._depth(sequence.hashes), *(_common(sequence.hashes, other) for other in self._placed)])
        cached_tokens = min(blocks, (sequence.target - 1) // BLOCK_TOKENS) * BLOCK_TOKENS
        self._enqueue(sequence.id, ready_s, sequence.hashes, cached_tokens, sequence.target, sequence.last)

    def _enqueue(
        self, name: str, ready_s: float, hashes: Items[int], cached_tokens: int, target: int, last: int
    ) -> None:
        hits = range(min(self._depth(hashes), cached_tokens // BLOCK_TOKENS))
        idle = len(hits) - bisect_left(hits, True, key=lambda i: self._is_idle(hashes[i]))
        new_tokens = target - cached_tokens + idle * BLOCK_TOKENS
        self._append(_Job(name, ready_s, cached_tokens, new_tokens, target, last))
        self._placed.append(hashes)

    def _append(self, job: _Job) -> None:
        self.queued_tokens += job.target - job.cached_tokens
        self._queue.append(job)

    def _depth(self, hashes: Items[int]) -> int:
        """Blocks in the engine's cache. A chain of blocks loses its last ones first."""
        cached = self._cache._cached
        return bisect_left(range(len(hashes)), True, key=lambda i: hashes[i] not in cached)

    def _is_idle(self, block_hash: int) -> bool:
        """Whether nobody holds the block, so that taking it takes room."""
        copies = self._cache._cached.get(block_hash)
        return not copies or not self._cache._holders[copies[0]]

    def _prefill(self) -> bool:
        """A step that computes prompts; False when none can start."""
        preset, there, tokens, pairs = self.preset, len(self._decoding), 0, 0.0
        left, chunks, done = preset.max_num_batched_tokens - there, 0, []
        while self._queue and left > 0 and (self._progress is not None or self._starts(there + chunks)):
            job, before = self._queue[0], self._progress or 0
            chunk = min(job.target - before, left)
            pairs += chunk * (before + chunk / 2)
            tokens, left, chunks = tokens + chunk, left - chunk, chunks + 1
            self._progress = before + chunk
            if self._progress == job.target:
                done.append(self._queue.popleft())
                self._progress = None
        if not tokens:
            return False
        self.now_s += self.slowdown * preset.step_s(tokens, pairs, there + chunks, self.context_tokens)
        self.queued_tokens -= tokens
        self._count(1)
        for job in done:
            self._decode(job)
        return True

    def _starts(self, sequences: int) -> bool:
        """Whether the first in the queue starts now; an empty engine takes anybody."""
        job = self._queue[0]
        full = sequences >= self.preset.max_num_seqs or (sequences and job.new_tokens > self._room_tokens)
        if full or job.ready_s > self.now_s:
            return False
        self._progress = job.cached_tokens
        self._room_tokens -= job.new_tokens
        return True

    def _decode(self, job: _Job) -> None:
        """Its first token has come out."""
        left = job.last - job.target
        self.context_tokens += job.target
        heapq.heappush(self._decoding, (self._steps + left, job.id, job.last, job.new_tokens + left))
        self._end()

    def _leap(self, to_s: float) -> None:
        """To the next end, or to the first step that begins then or later."""
        preset, there = self.preset, len(self._decoding)
        steps = self._decoding[0][0] - self._steps
        pace_s = self.slowdown * preset.step_s(0, 0.0, there, self.context_tokens)
        growth_s = self.slowdown * preset.decode_context_token_s * there
        if to_s < math.inf:
            gap_s, slope_s = to_s - self.now_s, pace_s - growth_s / 2
            until = 2 * gap_s / (slope_s + math.sqrt(slope_s * slope_s + 2 * growth_s * gap_s))
            steps = min(steps, max(1, math.ceil(until - _FUZZ_STEPS)))
        self.now_s += steps * pace_s + growth_s * (steps * (steps - 1) / 2)
        self._count(steps)

    def _count(self, steps: int) -> None:
        grown = steps * len(self._decoding)
        self._steps += steps
        self.context_tokens += grown
        self._room_tokens -= grown
        self._end()

    def _end(self) -> None:
        while self._decoding and self._decoding[0][0] <= self._steps:
            _, name, last, leaves = heapq.heappop(self._decoding)
            self.context_tokens -= last
            self._room_tokens += leaves
            self.ended.append((self.now_s, name))


def _common(one: Items[int], other: Items[int]) -> int:
    """Leading blocks that are equal; the hashes are chained, so an equal one means that all before it are."""
    if not one or not other or one[0] != other[0]:
        return 0
    return bisect_left(range(min(len(one), len(other))), True, key=lambda i: one[i] != other[i])
