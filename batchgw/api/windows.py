"""How long a batch may take, as text: ``24h``, ``7d``, ``1h30m``, ``1.5h`` or ISO 8601 (``P1DT12H``). Pure."""

from __future__ import annotations

import re

UNIT_S = {
    "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0,
}  # fmt: skip
ACCEPTED = "a time such as '24h', '7d', '90m', '1h30m' or ISO 8601 'P1DT12H'"
MAX_CHARS = 64

_NUMBER = r"\d{1,12}(?:\.\d{1,9})?"
_STEP = re.compile(rf"({_NUMBER})(ns|us|µs|ms|[smhdw])", re.ASCII)
_GO = re.compile(rf"(?:{_STEP.pattern})+", re.ASCII)
_ISO = re.compile(
    rf"P(?=.)(?:({_NUMBER})W)?(?:({_NUMBER})D)?(?:T(?=.)(?:({_NUMBER})H)?(?:({_NUMBER})M)?(?:({_NUMBER})S)?)?", re.ASCII
)


def window_s(text: str) -> float:
    """Seconds; raises ValueError, which says what is accepted. Years and months have no fixed length: refused."""
    if len(text) <= MAX_CHARS:
        if _GO.fullmatch(text):
            return sum(float(number) * UNIT_S[unit] for number, unit in _STEP.findall(text))
        if iso := _ISO.fullmatch(text):
            steps = zip(iso.groups(), "wdhms", strict=True)
            return sum(float(number) * UNIT_S[unit] for number, unit in steps if number)
    raise ValueError(f"{text[:MAX_CHARS]!r} is not {ACCEPTED}")
