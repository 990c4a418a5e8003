"""State of live objects as JSON of a bounded size: an index of a million blocks shows a hundred of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any

MAX_ENTRIES = 100
MAX_DEPTH = 6
MAX_TEXT_CHARS = 1000


def plugin_states(states: Mapping[str, Any]) -> dict[str, Any]:
    """Each ``{type, state | message}``, its state bounded; ``truncated`` is added where something was left out."""
    shown = {}
    for name, entry in states.items():
        cut = _Cut()
        shown[name] = cut.of(entry)
        if cut.left_out:
            shown[name]["truncated"] = True
    return shown


class _Cut:
    """One walk; ``left_out`` says whether it passed everything on."""

    def __init__(self) -> None:
        self.left_out = False

    def of(self, value: Any, depth: int = 0) -> Any:
        """At every level at most MAX_ENTRIES; what JSON cannot say becomes text."""
        if hasattr(value, "tolist"):  # an array, or one number of it
            value = self._first(value).tolist() if getattr(value, "ndim", 0) else value.item()
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, bytes):
            value = value[: MAX_TEXT_CHARS + 1].hex()
        if isinstance(value, Mapping) and depth < MAX_DEPTH:
            return {self._text(key): self.of(one, depth + 1) for key, one in self._islice(value, value.items())}
        if isinstance(value, list | tuple | set | frozenset) and depth < MAX_DEPTH:
            return [self.of(one, depth + 1) for one in self._islice(value, value)]
        return self._text(value)

    def _islice(self, whole: Collection[Any], entries: Collection[Any]) -> list[Any]:
        self.left_out |= len(whole) > MAX_ENTRIES
        return list(islice(entries, MAX_ENTRIES))

    def _first(self, array: Any) -> Any:
        self.left_out |= len(array) > MAX_ENTRIES
        return array[:MAX_ENTRIES]

    def _text(self, value: Any) -> str:
        text = str(value)
        self.left_out |= len(text) > MAX_TEXT_CHARS
        return text[:MAX_TEXT_CHARS]
