"""Whose a request is, as its headers tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from llmd_sched.plugin import Attribute, Identity

MAX_ID_CHARACTERS = 512
"""A longer value is cut, so that no client fills our tables with its names."""

AGENT_HEADERS = ("x-claude-code-session-id", "x-session-affinity", "session-id", "session_id")


class SessionIdProducer(Identity, frozen=True):
    """The client's session, from the header ``headerName`` or the cookie ``cookieName``; exactly one of them."""

    provides: ClassVar[Attribute] = Attribute.SESSION_ID

    header_name: str = ""
    cookie_name: str = ""

    def check(self) -> None:
        if bool(self.header_name) == bool(self.cookie_name):
            raise ValueError("exactly one of headerName and cookieName must be given")

    def headers(self) -> tuple[str, ...]:
        return (self.header_name.lower() or "cookie",)

    def of(self, headers: Mapping[str, str]) -> str:
        value = headers.get(self.headers()[0], "")
        return (self._cookie(value) if self.cookie_name else value)[:MAX_ID_CHARACTERS]

    def _cookie(self, header: str) -> str:
        """Split by hand: the standard library's reader gives up at the first cookie it does not like."""
        pairs = (pair.partition("=") for pair in header.split(";"))
        return next((value.strip().strip('"') for name, _, value in pairs if name.strip() == self.cookie_name), "")


class AgentIdentity(Identity, frozen=True):
    """The session of an agent, which is its request's fairness id where no header gives one.

    The first header that is there: ``additionalSessionHeaders``, then those that known agents send.
    """

    provides: ClassVar[Attribute] = Attribute.SESSION_ID
    names_flow: ClassVar[bool] = True

    additional_session_headers: tuple[str, ...] = ()

    def check(self) -> None:
        if not all(self.additional_session_headers):
            raise ValueError("additionalSessionHeaders must not hold empty names")

    def headers(self) -> tuple[str, ...]:
        return (*(name.lower() for name in self.additional_session_headers), *AGENT_HEADERS)

    def of(self, headers: Mapping[str, str]) -> str:
        return next((headers[name] for name in self.headers() if headers.get(name)), "")[:MAX_ID_CHARACTERS]


IDENTITIES: dict[str, type[Identity]] = {
    "session-id-producer": SessionIdProducer,
    "agent-identity": AgentIdentity,
}
