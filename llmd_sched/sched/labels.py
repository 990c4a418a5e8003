"""Kubernetes label selectors: what is a valid one, and which sets of labels it matches.

The rules are those of ``k8s.io/apimachinery/pkg/labels``: all requirements must hold, and an empty selector matches
everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import msgspec

OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist")
MAX_PREFIX_CHARACTERS = 253

_NAME = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_PREFIX = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*")


class Requirement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """One entry of ``matchExpressions``. ``NotIn`` holds too where the label is absent."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises ValueError with what is accepted."""
        check_key(self.key)
        if self.operator not in OPERATORS:
            raise ValueError(f"operator {self.operator!r} of {self.key}: accepted are {', '.join(OPERATORS)}")
        takes_values = self.operator in ("In", "NotIn")
        if takes_values and not self.values:
            raise ValueError(f"operator {self.operator} of {self.key} needs at least one of values")
        if self.values and not takes_values:
            raise ValueError(f"operator {self.operator} of {self.key} takes no values")
        for value in self.values:
            check_value(value)

    def holds(self, labels: Mapping[str, str]) -> bool:
        match self.operator:
            case "In":
                return self.key in labels and labels[self.key] in self.values
            case "NotIn":
                return self.key not in labels or labels[self.key] not in self.values
            case "Exists":
                return self.key in labels
            case _:  # DoesNotExist: ``check`` let no other pass
                return self.key not in labels


def matches(equal: Mapping[str, str], requirements: Iterable[Requirement], labels: Mapping[str, str]) -> bool:
    """Whether the labels have all of ``equal`` (``matchLabels``) and meet all requirements (``matchExpressions``)."""
    return all(labels.get(key) == value for key, value in equal.items()) and all(r.holds(labels) for r in requirements)


def check_key(key: str) -> None:
    """``name`` or ``prefix/name``, the prefix a DNS subdomain. Raises ValueError saying so."""
    prefix, slash, name = key.rpartition("/")
    valid_prefix = len(prefix) <= MAX_PREFIX_CHARACTERS and _PREFIX.fullmatch(prefix) if slash else True
    if not valid_prefix or not _NAME.fullmatch(name):
        raise ValueError(
            f"{key!r} is not a label key: accepted are 1 to 63 letters, digits, '-', '_' and '.', the first and last "
            "a letter or digit, after an optional DNS name and '/'"
        )


def check_value(value: str) -> None:
    """Empty, or formed like the name of a key. Raises ValueError saying so."""
    if value and not _NAME.fullmatch(value):
        raise ValueError(
            f"{value!r} is not a label value: accepted are at most 63 letters, digits, '-', '_' and '.', the first "
            "and last a letter or digit"
        )
