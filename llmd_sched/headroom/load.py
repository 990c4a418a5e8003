"""What runs on one endpoint, how fast it must be stepping, and what it would look like without batch."""

from __future__ import annotations

import math

from llmd_sched.headroom.steps import Calibration, StepModel

RATE_TAU_S = 1.0
STRETCH_TAU_S = 2.0
MAX_STRETCH = 8.0
"""Of the step time by batch, that is believed."""

SAMPLE_EVERY_S = 1.0
SAMPLE_TOKENS = 16
"""Fewer tokens say little about the gap between them."""

MAX_PREFILL_SHARE = 0.9
"""Of an engine's time spent on interactive prompts; beyond this it is overloaded whatever batch does."""

UNSEEN_AFTER_S = 2.0
"""Requests that we did not send are believed in when an engine has shown them for so long: what it tells is late."""

UNSEEN_CONTEXT_TOKENS = 1000.0

LENGTHS_MEMORY = 0.995
"""Weight of a finished batch request when the next one ends."""


class Flight:
    """One request on the endpoint, and where its calibration window began."""

    __slots__ = (
        "batch",
        "compute_tokens",
        "load",
        "mark_s",
        "prefilled",
        "prompt_tokens",
        "started",
        "steps",
        "tokens",
    )

    def __init__(self, prompt_tokens: int, compute_tokens: int, batch: bool) -> None:
        self.prompt_tokens = prompt_tokens
        self.compute_tokens = compute_tokens
        """Of the prompt, those not cached."""
        self.batch = batch
        self.started: float | None = None
        """The step counter when its first token came."""
        self.tokens = 0
        """Reported since the first, in all."""
        self.mark_s = self.steps = self.load = self.prefilled = 0.0


class Side:
    """Interactive or batch requests of an endpoint together."""

    __slots__ = ("decoding", "prompt_tokens", "running", "started")

    def __init__(self) -> None:
        self.running = 0
        self.decoding = 0
        self.prompt_tokens = 0
        self.started = 0.0
        """Sum of the step counts at which those that decode began to."""

    def context_tokens(self, steps: float) -> float:
        """Each that decodes has grown by one token with every step since."""
        return max(0.0, self.prompt_tokens + self.decoding * steps - self.started)


class EndpointLoad:
    """Fed by ``HeadroomBoard``. The steps taken are counted by the model, so no token needs to be seen."""

    def __init__(self, prior: StepModel, kv_tokens: int) -> None:
        self.calibration = Calibration(prior)
        self.kv_tokens = kv_tokens
        self.interactive = Side()
        self.batch = Side()
        self.stretch = 1.0
        """r: how much longer steps take than without batch, over the last seconds."""
        self.arrivals_per_s = 0.0
        self.prompt_tokens_per_s = 0.0
        self.batch_prompt_tokens = 1500.0
        self.batch_output_tokens = 500.0
        self.outstanding_tokens = 0
        """To be computed of prompts whose first token has not come."""
        self._steps = 0.0
        self._load = 0.0
        """Integral of the load (seconds, by the prior coefficients) over the steps."""
        self._prefilled = 0.0
        self.unseen = 0.0
        """Requests on the engine that nobody told us of: from before a restart, or of another router."""
        self._least_unseen = math.inf, math.inf
        """In the period that runs, and in the one before."""
        self._period_s = -math.inf
        """When it began."""
        self._at_s: float | None = None
        self._sampled_s = -math.inf

    @property
    def model(self) -> StepModel:
        return self.calibration.model

    @property
    def batch_context_tokens(self) -> float:
        """c_b: mean context of a batch request in mid-decode."""
        return self.batch_prompt_tokens + self.batch_output_tokens / 2

    @property
    def batch_sequence_s(self) -> float:
        """s: what one more batch request adds to every step, the prompts it drags along included."""
        drag = self.batch_prompt_tokens / self.batch_output_tokens
        return self.model.load_s(1, self.batch_context_tokens) + self.model.prefill_token_s * drag

    @property
    def prefill_share(self) -> float:
        """rho: share of time that interactive prompts take."""
        return min(self.model.prefill_token_s * self.prompt_tokens_per_s, MAX_PREFILL_SHARE)

    def without_batch(self) -> tuple[float, float]:
        """N0 and C0: by Little's law, steps r times as long have r times as many requests in flight."""
        side, unseen = self.interactive, self.unseen
        context_tokens = side.context_tokens(self._steps) / self.stretch
        return side.running / self.stretch + unseen, context_tokens + unseen * UNSEEN_CONTEXT_TOKENS

    def decoding(self) -> tuple[float, float]:
        """Sequences that decode now, batch and interactive, and their context."""
        one, other, steps, unseen = self.interactive, self.batch, self._steps, self.unseen
        context_tokens = one.context_tokens(steps) + other.context_tokens(steps)
        return one.decoding + other.decoding + unseen, context_tokens + unseen * UNSEEN_CONTEXT_TOKENS

    def engine_has(self, requests: float, now_s: float) -> None:
        """What the engine itself says it holds. More than we sent, all the time, are another's: interactive ones."""
        if now_s - self._period_s >= UNSEEN_AFTER_S:
            self._least_unseen = math.inf, self._least_unseen[0]
            self._period_s = now_s
        least, before = self._least_unseen
        least = min(least, max(0.0, requests - self.interactive.running - self.batch.running))
        self._least_unseen = least, before
        self.unseen = min(least, before)

    def step_without_batch_s(self) -> float:
        """T0."""
        return (self.model.base_s + self.model.load_s(*self.without_batch())) / (1 - self.prefill_share)

    def prefill_s(self) -> float:
        """Until all prompts without a first token are computed: in one step after the one under way."""
        steps_s = self.model.base_s + self.model.load_s(*self.decoding())
        return 1.5 * steps_s + self.model.prefill_token_s * self.outstanding_tokens

    def advance(self, now_s: float) -> None:
        """Time passes; to be called before each event and a few times a second."""
        dt_s = 0.0 if self._at_s is None else now_s - self._at_s
        self._at_s = now_s
        if dt_s > 0:
            decay = math.exp(-dt_s / RATE_TAU_S)
            self.arrivals_per_s *= decay
            self.prompt_tokens_per_s *= decay
            self._step(dt_s)
            self._stretch(dt_s)

    def arrived(self, flight: Flight) -> None:
        side = self._side(flight)
        side.running += 1
        side.prompt_tokens += flight.prompt_tokens
        self.outstanding_tokens += flight.compute_tokens
        if not flight.batch:
            self.arrivals_per_s += 1 / RATE_TAU_S
            self.prompt_tokens_per_s += flight.compute_tokens / RATE_TAU_S

    def first_token(self, flight: Flight, now_s: float) -> None:
        """Its prompt was computed, and no decode step ran meanwhile. A second report is ignored."""
        if flight.started is not None:
            return
        self._prefilled += flight.compute_tokens
        self.outstanding_tokens -= flight.compute_tokens
        self._step(-self.model.prefill_token_s * flight.compute_tokens)
        side = self._side(flight)
        side.decoding += 1
        side.started += self._steps
        flight.started = self._steps
        self._mark(flight, now_s)

    def tokens(self, flight: Flight, count: int, now_s: float, took_s: float | None = None) -> None:
        """``count`` more tokens have come out since the last report, in ``took_s`` where that is known better: a sample
        for the calibration."""
        flight.tokens += count
        steps = self._steps - flight.steps
        if flight.started is None or count < SAMPLE_TOKENS or steps <= 0:
            return
        if now_s - self._sampled_s >= SAMPLE_EVERY_S:
            prefill_s = self.model.prefill_token_s * (self._prefilled - flight.prefilled)
            gap_s = ((now_s - flight.mark_s if took_s is None else took_s) - prefill_s) / count
            if gap_s > 0:
                self.calibration.observe(gap_s, max(0.0, (self._load - flight.load) / steps))
                self._sampled_s = now_s
        self._mark(flight, now_s)

    def ended(self, flight: Flight, output_tokens: int | None, now_s: float, decode_s: float | None = None) -> None:
        """``output_tokens`` is None when it was aborted, or when nobody counted them."""
        if output_tokens is not None:
            took_s = None if flight.tokens else decode_s
            self.tokens(flight, output_tokens - 1 - flight.tokens, now_s, took_s)
            if flight.batch:
                fresh = 1 - LENGTHS_MEMORY
                self.batch_prompt_tokens += fresh * (flight.prompt_tokens - self.batch_prompt_tokens)
                self.batch_output_tokens += fresh * (output_tokens - self.batch_output_tokens)
        side = self._side(flight)
        side.running -= 1
        side.prompt_tokens -= flight.prompt_tokens
        if flight.started is not None:
            side.decoding -= 1
            side.started -= flight.started
        else:
            self.outstanding_tokens -= flight.compute_tokens

    def _side(self, flight: Flight) -> Side:
        return self.batch if flight.batch else self.interactive

    def _mark(self, flight: Flight, now_s: float) -> None:
        flight.mark_s, flight.steps, flight.load, flight.prefilled = now_s, self._steps, self._load, self._prefilled

    def _step(self, dt_s: float) -> None:
        sequences, context = self.decoding()
        if not sequences:
            return
        steps = dt_s / (self.model.base_s + self.model.load_s(sequences, context))
        self._steps += steps
        self._load += steps * self.calibration.prior.load_s(sequences, context)

    def _stretch(self, dt_s: float) -> None:
        side, base_s = self.interactive, self.model.base_s
        interactive_s = self.model.load_s(side.running, side.context_tokens(self._steps))
        alone_s = base_s + interactive_s / self.stretch
        batch_s = self.batch.running * self.batch_sequence_s if self.batch.running else 0.0
        ratio = (base_s + interactive_s + batch_s) / alone_s
        self.stretch += (min(max(ratio, 1.0), MAX_STRETCH) - self.stretch) * -math.expm1(-dt_s / STRETCH_TAU_S)
