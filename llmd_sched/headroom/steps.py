"""The time of an engine step, and how it is calibrated on what requests experienced."""

from __future__ import annotations

import msgspec

PRIOR_SD = 0.3
NOISE = 0.07
"""Relative, of one observed token gap."""

MEMORY = 0.998
"""Weight of a sample when the next comes; at one a second half is forgotten in six minutes."""

FACTORS = (0.3, 3.0)


class StepModel(msgspec.Struct, frozen=True, kw_only=True):
    """step_s = base_s + prefill_token_s P + sequence_s N + context_token_s C.

    P prompt tokens computed, N sequences in the step, C tokens of context of those that decode.
    """

    base_s: float = 7e-3
    prefill_token_s: float = 20e-6
    sequence_s: float = 25e-6
    context_token_s: float = 0.055e-6

    def __post_init__(self) -> None:
        if self.base_s <= 0 or min(self.prefill_token_s, self.sequence_s, self.context_token_s) < 0:
            raise ValueError(f"base_s must be positive and the other coefficients of a step 0 or more, not {self}")

    def load_s(self, sequences: float, context_tokens: float) -> float:
        """What sequences and their context add to a step."""
        return self.sequence_s * sequences + self.context_token_s * context_tokens

    def scaled(self, base: float, load: float) -> StepModel:
        """With b0 times ``base``, b2 and k times ``load``."""
        return msgspec.structs.replace(
            self,
            base_s=self.base_s * base,
            sequence_s=self.sequence_s * load,
            context_token_s=self.context_token_s * load,
        )


class Calibration:
    """Two factors, of b0 and of (b2, k), by recursive least squares with a prior at 1 and slow forgetting.

    Two, because errors of opposite sign are what hurts: the budget is a ratio, from which a common factor falls out.
    """

    def __init__(self, prior: StepModel) -> None:
        self.prior = prior
        self.model = prior
        self._factors = [1.0, 1.0]
        self._variance = [PRIOR_SD**2, 0.0, PRIOR_SD**2]
        """Of base, both, load."""

    def observe(self, gap_s: float, load_s: float) -> None:
        """A token took ``gap_s``, prefill not counted, beside a load of ``load_s`` by the prior coefficients."""
        u, v = self.prior.base_s, load_s
        p, q, r = self._variance
        noise = (NOISE * gap_s) ** 2
        pu, pv = p * u + q * v, q * u + r * v
        scale = noise + u * pu + v * pv
        error = gap_s - self._factors[0] * u - self._factors[1] * v
        low, high = FACTORS
        self._factors = [
            min(max(factor + gain / scale * error, low), high)
            for factor, gain in zip(self._factors, (pu, pv), strict=True)
        ]
        spread = (p - pu * pu / scale, q - pu * pv / scale, r - pv * pv / scale)
        self._variance = [min(one / MEMORY, PRIOR_SD**2) for one in spread]
        self.model = self.prior.scaled(*self._factors)
