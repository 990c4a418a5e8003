"""Label selectors as text, ``app=vllm,tier in (a,b),!old``: the syntax of ``kubectl -l``, without ``>`` and ``<``."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from llmd_sched.sched.labels import Requirement, check_key, check_value, matches

MAX_SELECTOR_CHARACTERS = 4096

_SET = re.compile(r"(\S+)\s+(in|notin)\s*\(([^()]*)\)")
_EQUAL = re.compile(r"([^\s=!]+)\s*(==|=|!=)\s*([^\s=!]*)")
_EXISTS = re.compile(r"(!?)\s*([^\s=!()]+)")
_COMMA = re.compile(r",(?![^()]*\))")

ACCEPTED = "accepted are key=value, key!=value, key in (a,b), key notin (a,b), key and !key, separated by commas"


class Selector(msgspec.Struct, frozen=True):
    """All of it must hold; without any requirement it matches everything."""

    equal: Mapping[str, str] = msgspec.field(default_factory=dict)
    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        return matches(self.equal, self.requirements, labels)

    def __str__(self) -> str:
        """The text form, as an API server takes it."""
        return ",".join([f"{key}={value}" for key, value in self.equal.items()] + [*map(_text, self.requirements)])


def parse(text: str) -> Selector:
    """Raises ValueError naming the part that is wrong and what is accepted."""
    if len(text) > MAX_SELECTOR_CHARACTERS:
        raise ValueError(f"a selector of {len(text)} characters; at most {MAX_SELECTOR_CHARACTERS} are accepted")
    equal: dict[str, str] = {}
    requirements: list[Requirement] = []
    for part in _COMMA.split(text) if text.strip() else ():
        requirement = _requirement(part.strip())
        if requirement.operator == "In" and len(requirement.values) == 1 and requirement.key not in equal:
            equal[requirement.key] = requirement.values[0]
        else:
            requirements.append(requirement)
    return Selector(equal, tuple(requirements))


def _requirement(part: str) -> Requirement:
    if found := _SET.fullmatch(part):
        key, operator, values = found.groups()
        words = tuple(word.strip() for word in values.split(","))
        made = Requirement(key=key, operator="In" if operator == "in" else "NotIn", values=words)
    elif found := _EQUAL.fullmatch(part):
        key, operator, value = found.groups()
        made = Requirement(key=key, operator="NotIn" if operator == "!=" else "In", values=(value,))
    elif found := _EXISTS.fullmatch(part):
        made = Requirement(key=found[2], operator="DoesNotExist" if found[1] else "Exists")
    else:
        raise ValueError(f"{part!r} is no label requirement: {ACCEPTED}")
    made.check()
    return made


def from_labels(labels: Mapping[str, str]) -> Selector:
    """``matchLabels``. Raises ValueError when one of them can be nobody's label."""
    for key, value in labels.items():
        check_key(key)
        check_value(value)
    return Selector(dict(labels))


def _text(requirement: Requirement) -> str:
    match requirement.operator:
        case "Exists":
            return requirement.key
        case "DoesNotExist":
            return f"!{requirement.key}"
        case operator:
            return f"{requirement.key} {operator.lower()} ({','.join(requirement.values)})"
