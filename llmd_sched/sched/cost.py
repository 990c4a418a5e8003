"""Where a request costs all requests together the least time. Ours."""

from __future__ import annotations

import math

import numpy as np

from llmd_sched.plugin import Attribute, Reads, Scorer, reads
from llmd_sched.types import Array, Candidates, Request

LEAST_REMAINING = 0.25
"""Of the expected output: so much is still to come, at least, of a request that has outlived its estimate."""


FREE_SHARE = 0.5
"""Of an endpoint's cache: while what is asked again needs no more than this, a second copy costs nothing."""


class RequestCostScorer(Scorer, frozen=True):
    """The least total cost in time, by the latency predictions: min(cost) / cost, so that the best scores 1.

    cost = own time (TTFT + expected output x TPOT)
         + ``othersWeight`` x what it takes from the requests there: all of them wait for its prefill, and each of their
           remaining tokens takes longer while it decodes beside them
         + ``copyWeight`` x the price of a second copy: the prefill of what another endpoint holds already, times the
           mean number of requests of an endpoint, plus one; as far as the prompts that come again do not all fit into
           the endpoint's cache (nothing when they need half of it, all when they fill it)
         + ``sloWeight`` x the latency objectives lost by it, its own and others', at its mean own time each

    Going for the own time alone is as bad as taking turns where caches matter: a miss costs the newcomer little and
    every neighbour a stall, fills a second cache with the same blocks, and draws the next turns there too. The first
    of these is seen in the requests at hand, the other two are not; ``copyWeight`` stands for them. All terms are in
    the same unit, so engines of different speed need no tuning.
    """

    others_weight: float = 1.0
    copy_weight: float = 3.0
    slo_weight: float = 0.3
    latency_prediction_info_producer_name: str = ""
    in_flight_load_producer_name: str = ""
    prefix_match_info_producer_name: str = ""

    def check(self) -> None:
        weights = {"othersWeight": self.others_weight, "copyWeight": self.copy_weight, "sloWeight": self.slo_weight}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be a finite number, 0 or more")

    def reads(self) -> tuple[Reads, ...]:
        return (
            reads(Attribute.LATENCY, self.latency_prediction_info_producer_name, detailed=True),
            reads(Attribute.INFLIGHT_LOAD, self.in_flight_load_producer_name),
            reads(Attribute.PREFIX_MATCH, self.prefix_match_info_producer_name, required=False, detailed=True),
        )

    def score(self, request: Request, candidates: Candidates) -> Array:
        cost_ms = self.cost_ms(candidates)
        if cost_ms is None:
            return np.zeros(len(candidates))
        return np.asarray(cost_ms.min(initial=np.inf) / cost_ms)

    def cost_ms(self, candidates: Candidates) -> Array | None:
        """(n,), positive; None without predictions."""
        latency, in_flight = (need.producer for need in self.reads()[:2])
        ttft_ms = candidates.get(f"ttft_ms/{latency}")
        if ttft_ms is None:
            return None

        def column(name: str) -> Array:
            return candidates.column(f"{name}/{latency}")

        output = column("expected_output_tokens")
        there = candidates.column(f"inflight_requests/{in_flight}")
        own_ms = ttft_ms + output * column("smooth_tpot_ms")
        stall_ms = column("prefill_ms") * there
        slow_ms = column("slowdown_ms") * np.minimum(
            self._remaining_tokens(candidates, in_flight, output), output * there
        )
        copy_ms = column("copy_ms") * (1.0 + there.mean()) * self._scarcity(candidates)
        cost_ms = own_ms + self.others_weight * (stall_ms + slow_ms) + self.copy_weight * copy_ms
        slo_losses = candidates.get(f"slo_losses/{latency}")
        if slo_losses is not None:
            cost_ms += self.slo_weight * slo_losses * own_ms.mean()
        return np.asarray(np.maximum(cost_ms, 1e-3))

    def _scarcity(self, candidates: Candidates) -> Array:
        """0..1; 1 where nobody measures it."""
        pressure = candidates.get(f"prefix_pressure/{self.reads()[2].producer}")
        if pressure is None:
            return np.ones(len(candidates))
        return np.minimum(np.maximum(pressure / FREE_SHARE - 1.0, 0.0), 1.0)

    def _remaining_tokens(self, candidates: Candidates, in_flight: str, output: Array) -> Array:
        """Of all requests there together, were they all to get ``output``."""
        expected = output * candidates.column(f"inflight_requests/{in_flight}")
        return np.maximum(expected - candidates.column(f"generated_tokens/{in_flight}"), LEAST_REMAINING * expected)
