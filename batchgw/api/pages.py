"""Lists: cursors (an object's id, or a number of objects to pass over) and the page object."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Literal, Protocol, TypeVar

from fastapi import Query

from batchgw.api.objects import ListObject
from batchgw.errors import InvalidRequest
from batchgw.store.base import Listed, Page

After = Annotated[str | None, Query(description="An object's id, or how many objects to pass over.", max_length=100)]
Order = Annotated[Literal["asc", "desc"], Query(description="By time of creation.")]

MAX_OFFSET_DIGITS = 9


class HasId(Protocol):
    @property
    def id(self) -> str: ...


R = TypeVar("R")
W = TypeVar("W", bound=HasId)


def page_of(after: str | None, limit: int, order: str) -> Page:
    """Raises InvalidRequest for a negative offset."""
    cursor: str | int | None = after or None
    if after and re.fullmatch(rf"-?\d{{1,{MAX_OFFSET_DIGITS}}}", after, re.ASCII):
        cursor = int(after)
        if cursor < 0:
            raise bad_cursor(after)
    return Page(after=cursor, limit=limit, descending=order == "desc")


def bad_cursor(after: str | None) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid value for 'after': {after!r}; an id of this list or an offset from 0 is expected",
        "after",
        "invalid_cursor",
    )


def list_of(listed: Listed[R], shown: Callable[[R], W], none: str | None = None) -> ListObject[W]:
    """``none`` stands for the ids of an empty page."""
    data = tuple(map(shown, listed.items))
    first, last = (data[0].id, data[-1].id) if data else (none, none)
    return ListObject(data, first, last, listed.has_more)
