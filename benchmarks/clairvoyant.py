"""The arm that knows everything: how far the policies are from what is possible.

It knows how long every reply will be, what a step takes, what each engine and its cache hold, when the step under way
ends, hidden slowdowns, and the requests to come. It does not know the noise and stalls of steps to come, nor events
before they happen. At each arrival it tries the endpoints that look best: on copies of all engines
(``benchmarks.rollout``) it sends the request there and the next arrivals where a cheap cost, of exact knowledge too,
wants them, and lets all end. It takes the endpoint after which the ends of all these requests together are earliest.

No policy can do this. Still it is a reference and no proven bound: it sees ``arrivals`` ahead, in which the cheap cost
decides, improves one decision at a time, and its picture of a full cache is rough. It looks at mean E2E only.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from itertools import islice

import msgspec

from benchmarks.rollout import Ask, Lane
from llmd_sched.sim.cluster import Cluster
from llmd_sched.sim.openai import block_hashes
from llmd_sched.sim.scenario import Arrival, ClusterSpec, Record

NAME = "clairvoyant"
CONFIG = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins: [{type: random-picker}]\n"
"""Of the router, which is left one endpoint to choose."""


class Foresight(msgspec.Struct, frozen=True, kw_only=True):
    """How hard it thinks."""

    candidates: int = 4
    """Endpoints tried out, the cheapest first; with 1 the cheap cost decides."""
    arrivals: int = 64
    """Looked ahead."""
    copy_weight: float = 1.0
    """What a prompt costs that is computed here though another engine has it cached, beyond the computation itself."""


class Clairvoyant(Cluster):
    """A run in which every request goes where that is best for all. The configuration of ``spec`` is not used."""

    def __init__(self, spec: ClusterSpec, foresight: Foresight | None = None) -> None:
        self.foresight = foresight or Foresight()
        self._ahead: deque[Ask] = deque()
        """The request that arrives next, and all after it."""
        super().__init__(msgspec.structs.replace(spec, config=CONFIG))

    def run(self, arrivals: Iterable[Arrival]) -> list[Record]:
        """As of ``Cluster``, but all arrivals are read first."""
        known = list(arrivals)
        self._ahead = deque(_ask(number, one, self.spec.network_s) for number, one in enumerate(known))
        return super().run(known)

    def subset(self, one: Arrival) -> Collection[str] | None:
        """The one best endpoint; None when nobody is there to serve."""
        ask = self._ahead.popleft()
        servers = [server for server in self._servers.values() if server.listed and server.alive]
        if not servers:
            return None
        lanes = [Lane(s.engine, s.due_s if s.awake else self.now_s, s.slowdown) for s in servers]
        costs = costs_s(ask, lanes, self.foresight.copy_weight)
        order = sorted(range(len(lanes)), key=costs.__getitem__)[: self.foresight.candidates]
        ahead = list(islice(self._ahead, self.foresight.arrivals))
        best = min(order, key=lambda i: self._outcome_s(lanes, i, ask, ahead)) if len(order) > 1 else order[0]
        return {servers[best].endpoint.hostport}

    def _outcome_s(self, lanes: Sequence[Lane], first: int, ask: Ask, ahead: Iterable[Ask]) -> float:
        """Sum of the times at which all that are known have ended, and of the prices of copies."""
        weight = self.foresight.copy_weight
        lanes = [lane.copy() for lane in lanes]
        paid_s = weight * copies_s(ask, lanes)[first]
        lanes[first].place(ask)
        for one in ahead:
            for lane in lanes:
                lane.run_to(one.reached_s)
            costs = costs_s(one, lanes, weight)
            best = costs.index(min(costs))
            paid_s += weight * copies_s(one, lanes)[best]
            lanes[best].place(one)
        for lane in lanes:
            lane.run_to(math.inf)
        return paid_s + sum([end_s for lane in lanes for end_s, _ in lane.ended])


def costs_s(ask: Ask, lanes: Sequence[Lane], copy_weight: float) -> list[float]:
    """Per lane, about what the request costs all there together, itself included."""
    copies = copies_s(ask, lanes)
    return [_cost_s(ask, lane) + copy_weight * copy_s for lane, copy_s in zip(lanes, copies, strict=True)]


def _cost_s(ask: Ask, lane: Lane) -> float:
    """Its wait, its prompt, which all there wait for, its tokens, and what it adds to the tokens of others: half way
    between those who are there now, and as many all the time, as others come where they end."""
    preset, there, output = lane.preset, lane.requests, ask.output_tokens
    context = ask.prompt_tokens + output / 2
    token_s = preset.step_s(0, 0.0, there + 1, int(lane.context_tokens + context))
    beside_s = preset.sequence_s + preset.decode_context_token_s * context
    beside_tokens = (lane.shared_tokens(output) + output * there) / 2
    wait_s = max(0.0, lane.now_s - ask.reached_s) + lane.prefill_s(0, lane.queued_tokens)
    compute_s = lane.prefill_s(lane.cached_tokens(ask), ask.prompt_tokens) * (1 + there)
    return wait_s + compute_s + lane.slowdown * (output * token_s + beside_s * beside_tokens)


def copies_s(ask: Ask, lanes: Sequence[Lane]) -> list[float]:
    """Per lane, what all there wait while it computes what another lane has cached."""
    cached = [lane.cached_tokens(ask) for lane in lanes]
    most = max(cached)
    beside = 1 + sum([lane.requests for lane in lanes]) / len(lanes)
    return [lane.prefill_s(tokens, most) * beside for lane, tokens in zip(lanes, cached, strict=True)]


def _ask(number: int, one: Arrival, network_s: float) -> Ask:
    asked = one.request
    hashes = block_hashes(b"".join(asked.prompts), asked.cache_salt)
    return Ask(f"ahead-{number}", one.at_s + network_s, asked.input_tokens, one.output_tokens, hashes)
