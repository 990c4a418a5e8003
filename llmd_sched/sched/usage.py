"""Expressions over the token counts of a reply: sums, differences and multiples, and comparisons of them.

    usage.prompt_tokens + 2 * usage.completion_tokens
    has(usage.completion_tokens) && usage.prompt_tokens > 1000

The reference evaluates CEL; this is the part of it that such costs are written in. An expression is parsed once, to a
constant and a factor per count, and everything else is refused with what is accepted.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType

import msgspec

from llmd_sched.types import Outcome

MAX_CHARACTERS = 1000
MAX_DEPTH = 20
"""Parentheses and signs inside one another."""

ACCEPTED = (
    "accepted are numbers, usage.prompt_tokens, usage.completion_tokens, usage.total_tokens and "
    "usage.prompt_tokens_details.cached_tokens, with +, -, parentheses and * by a number"
)
ACCEPTED_CONDITION = (
    f"a condition compares two of them (== != < <= > >=) or is has(...) or !has(...), joined by && and ||; {ACCEPTED}"
)


def _total(outcome: Outcome) -> int | None:
    prompt, output = outcome.prompt_tokens, outcome.output_tokens
    return None if prompt is None or output is None else prompt + output


COUNTS: Mapping[str, Callable[[Outcome], int | None]] = MappingProxyType(
    {
        "usage.prompt_tokens": lambda outcome: outcome.prompt_tokens,
        "usage.completion_tokens": lambda outcome: outcome.output_tokens,
        "usage.total_tokens": _total,
        "usage.prompt_tokens_details.cached_tokens": lambda outcome: outcome.cached_tokens,
        "usage.prompt_token_details.cached_tokens": lambda outcome: outcome.cached_tokens,
    }
)
"""The last two are OpenAI's name and the reference's own."""

COMPARISONS: Mapping[str, Callable[[float, float], bool]] = MappingProxyType(
    {"==": operator.eq, "!=": operator.ne, "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
)

_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]+)?)|([A-Za-z_][\w.]*)|(&&|\|\||[=!<>]=|[-+*()<>!]))\s*", re.ASCII)


class Linear(msgspec.Struct, frozen=True):
    """``constant`` plus each count times its factor."""

    constant: float = 0.0
    factors: Mapping[str, float] = msgspec.field(default_factory=dict)

    def value(self, outcome: Outcome) -> float | None:
        """None when a count it needs was not reported."""
        value = self.constant
        for name, factor in self.factors.items():
            count = COUNTS[name](outcome)
            if count is None:
                return None
            value += factor * count
        return value

    def plus(self, other: Linear, times: float = 1.0) -> Linear:
        factors = dict(self.factors)
        for name, factor in other.factors.items():
            factors[name] = factors.get(name, 0.0) + times * factor
        return Linear(self.constant + times * other.constant, factors)


class Test(msgspec.Struct, frozen=True):
    """``left comparison right``; false when a count is missing."""

    left: Linear
    comparison: str
    right: Linear

    def holds(self, outcome: Outcome) -> bool:
        left, right = self.left.value(outcome), self.right.value(outcome)
        return left is not None and right is not None and COMPARISONS[self.comparison](left, right)


class Has(msgspec.Struct, frozen=True):
    """Whether a count was reported, or with ``negated`` was not."""

    name: str
    negated: bool = False

    def holds(self, outcome: Outcome) -> bool:
        return (COUNTS[self.name](outcome) is None) == self.negated


class Condition(msgspec.Struct, frozen=True):
    """All tests of any one of the groups."""

    groups: tuple[tuple[Test | Has, ...], ...]

    def holds(self, outcome: Outcome) -> bool:
        return any(all(test.holds(outcome) for test in group) for group in self.groups)


@lru_cache(maxsize=64)
def expression(text: str) -> Linear:
    """Raises ValueError with what is accepted."""
    parser = _Parser(text, ACCEPTED)
    made = parser.sum()
    parser.end()
    return made


@lru_cache(maxsize=64)
def condition(text: str) -> Condition:
    """Raises ValueError with what is accepted."""
    parser = _Parser(text, ACCEPTED_CONDITION)
    groups = [parser.group()]
    while parser.take("||"):
        groups.append(parser.group())
    parser.end()
    return Condition(tuple(groups))


class _Parser:
    """Recursive descent: ``*`` binds tighter than ``+``, ``&&`` tighter than ``||``."""

    def __init__(self, text: str, accepted: str) -> None:
        self._text, self._accepted = text, accepted
        self._depth = 0
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"an expression of {len(text)} characters; at most {MAX_CHARACTERS} are accepted")
        self._left = self._tokens()[::-1]
        """What is still to be read, the next one last."""

    def _tokens(self) -> list[str]:
        tokens, at = [], 0
        while at < len(self._text):
            found = _TOKEN.match(self._text, at)
            if found is None:
                raise self._unexpected(self._text[at : at + 20].strip())
            tokens.append(found[0].strip())
            at = found.end()
        return tokens

    def _unexpected(self, what: str) -> ValueError:
        return ValueError(f"{self._text.strip()!r}: unexpected {what or 'end'}; {self._accepted}")

    def take(self, token: str) -> bool:
        if self._left and self._left[-1] == token:
            self._left.pop()
            return True
        return False

    def _next(self) -> str:
        if not self._left:
            raise self._unexpected("")
        return self._left.pop()

    def _expect(self, token: str) -> None:
        found = self._next()
        if found != token:
            raise self._unexpected(found)

    def end(self) -> None:
        if self._left:
            raise self._unexpected(self._left[-1])

    def group(self) -> tuple[Test | Has, ...]:
        tests = [self._test()]
        while self.take("&&"):
            tests.append(self._test())
        return tuple(tests)

    def _test(self) -> Test | Has:
        negated = self.take("!")
        if negated or (self._left and self._left[-1] == "has"):
            return self._has(negated)
        left, found = self.sum(), self._next()
        if found not in COMPARISONS:
            raise self._unexpected(found)
        return Test(left, found, self.sum())

    def _has(self, negated: bool) -> Has:
        self._expect("has")
        self._expect("(")
        name = self._next()
        if name not in COUNTS:
            raise self._unexpected(name)
        self._expect(")")
        return Has(name, negated)

    def sum(self) -> Linear:
        value = self._product()
        while self._left and self._left[-1] in ("+", "-"):
            sign = 1.0 if self._left.pop() == "+" else -1.0
            value = value.plus(self._product(), sign)
        return value

    def _product(self) -> Linear:
        value = self._factor()
        while self.take("*"):
            by = self._factor()
            if value.factors and by.factors:
                raise self._unexpected("product of two counts")
            value = Linear().plus(by, value.constant) if by.factors else Linear().plus(value, by.constant)
        return value

    def _factor(self) -> Linear:
        token = self._next()
        if token in COUNTS:
            return Linear(factors={token: 1.0})
        if token[0].isdigit():
            return Linear(float(token))
        self._depth += 1
        if token not in ("(", "-") or self._depth > MAX_DEPTH:
            raise self._unexpected(token)
        value = self.sum() if token == "(" else Linear().plus(self._factor(), -1.0)
        if token == "(":
            self._expect(")")
        self._depth -= 1
        return value


def whole(value: float | None) -> int:
    """Without its fraction; 0 for what is not known, or no number."""
    return int(value) if value is not None and math.isfinite(value) else 0
