"""A vLLM V1 engine as a step machine: continuous batching, chunked prefill, prefix cache, preemption.

Time is an argument and every result is a value, so the schedule is a pure function of the requests submitted (and of
the noise generator, if one is given). A driver calls ``step`` at the end of the step before; between the two calls the
gauges show the step in flight, as a scrape of a real server would. What is reproduced: one token budget for decodes and
prompt chunks alike, running requests before waiting ones, head-of-line blocking, recompute preemption.
"""

from __future__ import annotations

import enum
import heapq
import math
import random
from itertools import count

import msgspec

from llmd_sched.sim.batch import Batch, Sequence, SimRequest, Step
from llmd_sched.sim.kvcache import BLOCK_TOKENS, BlockPool, blocks_for
from llmd_sched.sim.steptime import Preset

__all__ = ["Counters", "Engine", "EngineConfig", "Policy", "Refusal", "SimRequest", "Step"]


class Policy(enum.StrEnum):
    """Who is next, and who is preempted."""

    FCFS = "fcfs"
    """In order of arrival; the most recently admitted is preempted."""
    PRIORITY = "priority"
    """Lower number first, ties by arrival; the highest number, latest arrival is preempted."""


class Refusal(enum.StrEnum):
    """Why a request was not taken."""

    TOO_LONG = "too-long"
    """Prompt plus output exceed ``max_model_len``."""
    QUEUE_FULL = "queue-full"
    """``max_waiting`` requests wait already."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine is. The preset brings its block count, token budget and sequence limit."""

    preset: Preset
    max_model_len: int | None = None
    """Longest prompt plus output in tokens; None is what the KV cache holds."""
    max_waiting: int = 1000
    policy: Policy = Policy.FCFS
    noise_sigma: float = 0.0
    """Each step's duration is multiplied by a log-normal of mean 1 and this sigma; 0 is no noise."""

    def __post_init__(self) -> None:
        preset, capacity = self.preset, self.preset.kv_blocks * BLOCK_TOKENS
        if not 1 <= preset.max_num_seqs <= preset.max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs must be 1 to max_num_batched_tokens ({preset.max_num_batched_tokens}), "
                f"not {preset.max_num_seqs}"
            )
        if self.max_model_len is not None and not 2 <= self.max_model_len <= capacity:
            raise ValueError(
                f"max_model_len must be 2 to {capacity} tokens (what {preset.kv_blocks} KV blocks hold), "
                f"not {self.max_model_len}"
            )
        if self.max_waiting < 0 or not 0 <= self.noise_sigma < 1:
            raise ValueError(
                f"max_waiting must be >= 0 and noise_sigma in [0, 1), not {self.max_waiting}, {self.noise_sigma}"
            )

    @property
    def longest_tokens(self) -> int:
        return self.max_model_len or self.preset.kv_blocks * BLOCK_TOKENS


class Counters(msgspec.Struct):
    """Totals since the start; only grow."""

    prompt_tokens: int = 0
    """Of prompts whose first token has come out."""
    generation_tokens: int = 0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
    preemptions: int = 0


class Engine:
    """One engine. ``rng`` is needed only with noise; equal generators and requests give equal schedules."""

    def __init__(self, config: EngineConfig, rng: random.Random | None = None) -> None:
        if config.noise_sigma and rng is None:
            raise ValueError("noise_sigma is set, so a random.Random is needed")
        self.config = config
        self.counters = Counters()
        self._preset = config.preset
        self._rng = rng
        self._pool = BlockPool(config.preset.kv_blocks)
        self._serials = count(1)
        self._arriving: list[tuple[float, int, Sequence]] = []
        self._waiting: list[tuple[int, float, int, Sequence]] = []
        self._running: dict[str, Sequence] = {}
        self._ids: set[str] = set()
        self._ending: list[Sequence] = []
        self._busy_until_s = -math.inf

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that could be scheduled but are not; those still being tokenised do not count."""
        return len(self._waiting)

    @property
    def arriving(self) -> int:
        return len(self._arriving)

    @property
    def kv_usage(self) -> float:
        """Share of the blocks that are held, 0..1."""
        return self._pool.usage

    @property
    def held_blocks(self) -> int:
        return self._pool.held_blocks

    @property
    def next_ready_s(self) -> float | None:
        """When the next request still being tokenised can be scheduled; None without one."""
        return self._arriving[0][0] if self._arriving else None

    def submit(self, request: SimRequest) -> Refusal | None:
        """Take a request, to be scheduled from its arrival plus the fixed overhead on; or say why not."""
        if request.id in self._ids:
            raise ValueError(f"request {request.id} is already in the engine")
        if request.prompt_tokens + request.output_tokens > self.config.longest_tokens:
            return Refusal.TOO_LONG
        if len(self._arriving) + len(self._waiting) >= self.config.max_waiting:
            return Refusal.QUEUE_FULL
        self._ids.add(request.id)
        sequence = Sequence(request, next(self._serials))
        ready_s = request.arrival_s + self._preset.request_overhead_s
        heapq.heappush(self._arriving, (ready_s, sequence.serial, sequence))
        return None

    def abort(self, request_id: str) -> bool:
        """Drop a request wherever it is; False when there is none of that id."""
        if request_id not in self._ids:
            return False
        self._ids.remove(request_id)
        sequence = self._running.pop(request_id, None)
        if sequence is not None:
            self._pool.release(sequence.blocks)
            return True
        return _remove(self._arriving, request_id) or _remove(self._waiting, request_id)

    def step(self, now_s: float) -> Step | None:
        """End the step in flight and begin the next, at ``now_s``; None when there is nothing to run."""
        if now_s < self._busy_until_s:
            raise ValueError(f"the step in flight ends at {self._busy_until_s} s, which is after {now_s} s")
        self._settle()
        self._receive(now_s)
        batch = self._schedule()
        if not batch.sequences:
            return None
        duration_s = self._duration_s(batch)
        self._busy_until_s = now_s + duration_s
        self._ending = batch.finished
        self._count(batch)
        return Step(
            start_s=now_s,
            duration_s=duration_s,
            tokens=batch.tokens,
            first=[sequence.id for sequence in batch.first],
            finished=[sequence.id for sequence in batch.finished],
            admitted=batch.admitted,
            preempted=batch.preempted,
            scheduled_tokens=batch.scheduled_tokens,
        )

    def _settle(self) -> None:
        for sequence in self._ending:
            if self._running.get(sequence.id) is sequence:
                self.abort(sequence.id)
        self._ending = []

    def _receive(self, now_s: float) -> None:
        while self._arriving and self._arriving[0][0] <= now_s:
            _, _, sequence = heapq.heappop(self._arriving)
            self._enqueue(sequence, sequence.serial)

    def _enqueue(self, sequence: Sequence, order: int) -> None:
        if self.config.policy is Policy.PRIORITY:
            key = (sequence.request.priority, sequence.request.arrival_s)
        else:
            key = (0, 0.0)
        heapq.heappush(self._waiting, (*key, order, sequence))

    def _schedule(self) -> Batch:
        batch = Batch(self._preset.max_num_batched_tokens)
        # A pass can end with preemptions only (the first in line was the victim); the next one then finds the room.
        while not batch.sequences and (self._running or self._waiting):
            preempted_before = len(batch.preempted)
            self._plan_running(batch)
            self._commit(batch)
            if len(batch.preempted) == preempted_before:
                self._admit(batch)
        return batch

    def _plan_running(self, batch: Batch) -> None:
        # The hot loop. Decodes always fit the budget: at most one running request is in mid-prompt, the last one.
        quiet = batch.quiet
        for sequence in list(self._running.values()):
            if sequence.computed < sequence.quiet_until:
                quiet.append(sequence)
            elif sequence.blocks and not self._plan(sequence, batch):
                break

    def _plan(self, sequence: Sequence, batch: Batch) -> bool:
        """Reserve blocks for the sequence's next tokens, preempting others; False when it was itself preempted."""
        tokens = min(sequence.remaining, batch.left_tokens)
        while not self._pool.grow(sequence.blocks, sequence.computed + tokens):
            victim = self._victim()
            self._preempt(victim)
            batch.drop(victim)
            if victim is sequence:
                return False
        if tokens:
            batch.plan(sequence, tokens)
        return True

    def _victim(self) -> Sequence:
        if self.config.policy is Policy.PRIORITY:
            return max(self._running.values(), key=lambda s: (s.request.priority, s.request.arrival_s, s.serial))
        return self._running[next(reversed(self._running))]

    def _preempt(self, sequence: Sequence) -> None:
        del self._running[sequence.id]
        self._pool.release(sequence.blocks)
        sequence.forget()
        self.counters.preemptions += 1
        # Negative: ahead of all who never ran, and of those preempted earlier.
        self._enqueue(sequence, -next(self._serials))

    def _commit(self, batch: Batch) -> None:
        quiet, chunks = batch.planned()
        context_tokens = 0
        tokens = batch.tokens
        for sequence in quiet:
            context_tokens += sequence.computed
            sequence.computed += 1
            tokens.append(sequence.id)
        batch.decode_context_tokens += context_tokens
        batch.sequences += len(quiet)
        batch.scheduled_tokens += len(quiet)
        for sequence, chunk_tokens in chunks.items():
            self._advance(sequence, chunk_tokens, batch)

    def _admit(self, batch: Batch) -> None:
        while self._waiting and len(self._running) < self._preset.max_num_seqs and batch.left_tokens > 0:
            sequence = self._waiting[0][-1]
            if not self._start(sequence, batch):
                break
            heapq.heappop(self._waiting)

    def _start(self, sequence: Sequence, batch: Batch) -> bool:
        """Run a waiting sequence from its longest cached prefix on; False when its first chunk does not fit."""
        # At least one token must be computed, for its logits.
        hits = self._pool.longest_prefix(sequence.hashes, (sequence.target - 1) // BLOCK_TOKENS)
        cached_tokens = len(hits) * BLOCK_TOKENS
        chunk_tokens = min(sequence.target - cached_tokens, batch.left_tokens)
        blocks = self._pool.take(hits, blocks_for(cached_tokens + chunk_tokens) - len(hits))
        if blocks is None:
            return False
        sequence.blocks = blocks
        sequence.computed = cached_tokens
        self._running[sequence.id] = sequence
        if not sequence.started:
            sequence.started = True
            batch.admitted.append((sequence.id, cached_tokens))
            self.counters.prefix_queries_tokens += sequence.request.prompt_tokens
            self.counters.prefix_hits_tokens += cached_tokens
        self._advance(sequence, chunk_tokens, batch)
        return True

    def _advance(self, sequence: Sequence, tokens: int, batch: Batch) -> None:
        """Compute ``tokens`` more tokens of a sequence whose blocks are reserved."""
        before = sequence.computed
        if sequence.decoding:
            batch.decode_context_tokens += before
        else:
            batch.prefill_tokens += tokens
            batch.attention_pairs += tokens * (before + tokens / 2)
        batch.sequences += 1
        batch.scheduled_tokens += tokens
        sequence.computed = before + tokens
        # Full blocks are found by others from now on, even by requests admitted into this very step.
        for index in range(before // BLOCK_TOKENS, sequence.computed // BLOCK_TOKENS):
            self._pool.cache(sequence.blocks[index], sequence.hash_of_block(index))
        if sequence.decoding:
            self._emit(sequence, batch)

    def _emit(self, sequence: Sequence, batch: Batch) -> None:
        batch.tokens.append(sequence.id)
        if sequence.computed == sequence.request.prompt_tokens:
            batch.first.append(sequence)
        if sequence.computed == sequence.last:
            batch.finished.append(sequence)
        sequence.quiet_until = min(len(sequence.blocks) * BLOCK_TOKENS, sequence.last) - 1

    def _duration_s(self, batch: Batch) -> float:
        duration_s = self._preset.step_s(
            batch.prefill_tokens, batch.attention_pairs, batch.sequences, batch.decode_context_tokens
        )
        sigma = self.config.noise_sigma
        if sigma and self._rng is not None:
            duration_s *= math.exp(self._rng.gauss(-sigma * sigma / 2, sigma))
        return duration_s

    def _count(self, batch: Batch) -> None:
        self.counters.generation_tokens += len(batch.tokens)
        for sequence in batch.first:
            self.counters.prompt_tokens += sequence.request.prompt_tokens


def _remove(queue: list, request_id: str) -> bool:
    """Take the entry of that request out of a heap whose entries end in their sequence."""
    for index, entry in enumerate(queue):
        if entry[-1].id == request_id:
            del queue[index]
            heapq.heapify(queue)
            return True
    return False
