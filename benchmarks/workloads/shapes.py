"""The shapes synthetic workloads have: independent requests, users who share system prompts, long conversations.

Arrivals never depend on how fast anybody answers. Where a conversation goes on, its next turn comes at or after a
planned time: when the reply would have ended had its first token taken ``planned_ttft_s`` and each token
``planned_tpot_s``, plus the time to think. A slower cluster is asked the next turn early; a faster one later than a
real client would.

The text of a prompt is its system prompt's, then its conversation's, which grows: turn by turn a question and, because
no reply is known in advance, placeholder text of the reply's length. So a turn's prompt begins with all of the turn
before, and with the same bytes.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from benchmarks.workloads.draws import Draw, Fixed, whole
from llmd_sched.load.workload import Item, Span
from llmd_sched.sim.scenario import Arrival, arrival

CONTEXT_TOKENS_MAX = 131_072
"""A conversation that would grow beyond it is over (the longest context Qwen3-32B is served with)."""

Stages = tuple[tuple[float, float], ...]
"""(from_s, factor) in order of time: from then on the rate is ``factor`` times the rate asked for."""
STEADY: Stages = ((0.0, 1.0),)

_LEAD_CYCLES = 20


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """A named stream of requests. Its name is part of the seed, of the texts and of the requests' ids."""

    name: str

    def arrivals(self, rate_per_s: float, duration_s: float, seed: int) -> Iterator[Arrival]:
        """In order of ``at_s``, from 0 to ``duration_s``; lazy. ValueError for a rate that is not positive."""
        raise NotImplementedError


class ItemWorkload(Workload, frozen=True, kw_only=True):
    """One tenant's workload, which the live client can send as well: its requests are items."""

    def items(self, rate_per_s: float, duration_s: float, seed: int) -> Iterator[Item]:
        """As ``arrivals``, without rendering the prompts."""
        raise NotImplementedError

    def arrivals(self, rate_per_s: float, duration_s: float, seed: int) -> Iterator[Arrival]:
        """The items rendered; ``fairness_id`` is the name, and ids tell the requests of all arms apart alike."""
        for number, item in enumerate(self.items(rate_per_s, duration_s, seed)):
            prompt = b"".join([span.text() for span in item.prompt])
            ids = {"id": f"{self.name}-{number}", "fairness_id": self.name}
            yield arrival(item.at_s, prompt, item.output_tokens, streaming=item.streaming, **ids)


class Independent(ItemWorkload, frozen=True, kw_only=True):
    """Poisson arrivals of single requests, no two of which share a prefix."""

    question_tokens: Draw
    output_tokens: Draw
    stages: Stages = STEADY

    def items(self, rate_per_s: float, duration_s: float, seed: int) -> Iterator[Item]:
        rng = random.Random(f"{seed} {self.name}")
        for number, at_s in enumerate(poisson_times(rng, rate_per_s, duration_s, self.stages)):
            session = f"{self.name}-{seed}-{number}"
            prompt = (Span(session, whole(self.question_tokens, rng)),)
            yield Item(at_s=at_s, session=session, prompt=prompt, output_tokens=whole(self.output_tokens, rng))


class _User(NamedTuple):
    """One of a group's users before the next question. Orders by when it may be asked, then by turn."""

    ready_s: float
    place: int
    group: int
    serial: int
    begun: int
    """Conversations so far."""
    history_tokens: int


class SharedPrefix(ItemWorkload, frozen=True, kw_only=True):
    """``groups`` of users; a group's users share a system prompt. The shape of inference-perf's shared_prefix.

    Poisson arrivals; each is the next turn of the user who has waited longest, so users take turns, at first in a
    random order. While all users wait for planned replies, arrivals are put off to the first planned end, which bounds
    the rate by users over planned reply time. A conversation starts anew when its context would grow too long. Without
    ``multi_turn`` there is no history: each user asks the same question over and over.
    """

    groups: int
    users: int
    """In each group."""
    system_tokens: int
    question_tokens: Draw
    output_tokens: Draw
    multi_turn: bool = True
    planned_ttft_s: float = 0.5
    planned_tpot_s: float = 0.03
    context_tokens_max: int = CONTEXT_TOKENS_MAX
    stages: Stages = STEADY

    def items(self, rate_per_s: float, duration_s: float, seed: int) -> Iterator[Item]:
        rng = random.Random(f"{seed} {self.name}")
        idle = self._everyone(rng)
        for place, at_s in enumerate(poisson_times(rng, rate_per_s, duration_s, self.stages), start=len(idle)):
            at_s = max(at_s, idle[0].ready_s)
            if at_s >= duration_s:
                return
            question, output = whole(self.question_tokens, rng), whole(self.output_tokens, rng)
            user = self._with_room(idle[0], question + output)
            yield self._item(user, at_s, question, output, seed)
            heapq.heapreplace(idle, self._after(user, place, at_s, question, output))

    def _everyone(self, rng: random.Random) -> list[_User]:
        """All users in a random order, which is a heap."""
        numbers = list(range(self.groups * self.users))
        rng.shuffle(numbers)
        return [_User(0.0, place, n % self.groups, n // self.groups, 0, 0) for place, n in enumerate(numbers)]

    def _with_room(self, user: _User, tokens: int) -> _User:
        """The user in a conversation that can take so many more: a new one, unless it is new already."""
        if user.history_tokens and self.system_tokens + user.history_tokens + tokens > self.context_tokens_max:
            return user._replace(begun=user.begun + 1, history_tokens=0)
        return user

    def _item(self, user: _User, at_s: float, question: int, output: int, seed: int) -> Item:
        system = Span(f"{self.name}-{seed}-{user.group}", self.system_tokens)
        session = f"{self.name}-{seed}-{user.group}-{user.serial}-{user.begun}"
        prompt = (system, Span(session, user.history_tokens + question))
        return Item(at_s=at_s, session=session, prompt=prompt, output_tokens=output)

    def _after(self, user: _User, place: int, at_s: float, question: int, output: int) -> _User:
        if not self.multi_turn:
            return user._replace(ready_s=at_s, place=place)
        ready_s = at_s + self.planned_ttft_s + self.planned_tpot_s * output
        return user._replace(ready_s=ready_s, place=place, history_tokens=user.history_tokens + question + output)


class _Talk(NamedTuple):
    """A conversation before its next turn. Orders by when that comes; ``user`` is unique."""

    at_s: float
    user: int
    begun: int
    turns_left: int
    history_tokens: int


class Conversations(ItemWorkload, frozen=True, kw_only=True):
    """A fixed number of users, each in one conversation after the other: inference-perf's conversation_replay.

    There are ``rate_per_s * cycle_s`` users, so ``rate_of(n)`` is the rate that n of them make. They have been at it
    for ``_LEAD_CYCLES`` when time begins, so they may be at any turn then. Every turn comes exactly when planned. All
    prompts share ``shared_tokens`` of system prompt; ``own_tokens`` more (documents, tools) belong to the conversation.
    It ends after its turns, or before when it would grow too long; the next one has new text.
    """

    shared_tokens: int
    own_tokens: Draw = Fixed(0)
    turns: Draw = Fixed(1)
    question_tokens: Draw
    output_tokens: Draw
    think_s: Draw = Fixed(0)
    planned_ttft_s: float
    planned_tpot_s: float
    context_tokens_max: int = CONTEXT_TOKENS_MAX

    @property
    def cycle_s(self) -> float:
        """Mean time from a user's turn to the next, of the distributions before clamping."""
        return self.planned_ttft_s + self.planned_tpot_s * self.output_tokens.mean + self.think_s.mean

    def rate_of(self, users: int) -> float:
        return users / self.cycle_s

    def items(self, rate_per_s: float, duration_s: float, seed: int) -> Iterator[Item]:
        _check_rate(rate_per_s)
        rng = random.Random(f"{seed} {self.name}")
        users = max(1, round(rate_per_s * self.cycle_s))
        # Without the lead more would come in the first cycles than later, and none late in its conversation.
        lead_s = _LEAD_CYCLES * self.cycle_s
        due = [self._begin(rng, rng.uniform(-lead_s, self.cycle_s - lead_s), user, 0) for user in range(users)]
        heapq.heapify(due)
        shared = Span(f"{self.name}-{seed}", self.shared_tokens)
        while due[0].at_s < duration_s:
            talk = due[0]
            session = f"{self.name}-{seed}-{talk.user}-{talk.begun}"
            context = talk.history_tokens + whole(self.question_tokens, rng)
            output, prompt = whole(self.output_tokens, rng), (shared, Span(session, context))
            if talk.at_s >= 0:
                yield Item(at_s=talk.at_s, session=session, prompt=prompt, output_tokens=output)
            heapq.heapreplace(due, self._next(rng, talk, context + output, output))

    def _next(self, rng: random.Random, talk: _Talk, history_tokens: int, output_tokens: int) -> _Talk:
        reply_s = self.planned_ttft_s + self.planned_tpot_s * output_tokens
        at_s = talk.at_s + reply_s + self.think_s.draw(rng)
        grown = self.shared_tokens + history_tokens + self.question_tokens.mean + self.output_tokens.mean
        if talk.turns_left == 1 or grown > self.context_tokens_max:
            return self._begin(rng, at_s, talk.user, talk.begun + 1)
        return talk._replace(at_s=at_s, turns_left=talk.turns_left - 1, history_tokens=history_tokens)

    def _begin(self, rng: random.Random, at_s: float, user: int, begun: int) -> _Talk:
        return _Talk(at_s, user, begun, whole(self.turns, rng), round(self.own_tokens.draw(rng)))


def poisson_times(rng: random.Random, rate_per_s: float, duration_s: float, stages: Stages = STEADY) -> Iterator[float]:
    """Times of a Poisson process before ``duration_s`` whose rate is ``rate_per_s`` times the factor of the stage."""
    _check_rate(rate_per_s)
    for (at_s, factor), (to_s, _) in itertools.pairwise((*stages, (duration_s, 0.0))):
        # The process has no memory, so each stage may begin it afresh.
        while (at_s := at_s + rng.expovariate(rate_per_s * factor)) < min(to_s, duration_s):
            yield at_s


def _check_rate(rate_per_s: float) -> None:
    if not rate_per_s > 0:
        raise ValueError(f"the request rate is {rate_per_s:g} /s, and must be positive")
