"""Whose a request is, by its headers and cookies."""

from __future__ import annotations

import pytest

from llmd_sched.catalog import resolve
from llmd_sched.config import load
from llmd_sched.errors import ConfigError
from llmd_sched.plugin import Attribute
from llmd_sched.sched.identities import AGENT_HEADERS, MAX_ID_CHARACTERS, AgentIdentity, SessionIdProducer
from tests.builders import CONFIG_HEAD


@pytest.mark.parametrize(
    ("headers", "session"),
    [
        ({"x-session-id": "s1"}, "s1"),
        ({"x-session-id": ""}, ""),
        ({}, ""),
        ({"cookie": "x-session-id=s1"}, ""),
        ({"x-session-id": "x" * 9000}, "x" * MAX_ID_CHARACTERS),
    ],
)
def test_a_session_is_a_header(headers: dict[str, str], session: str) -> None:
    assert SessionIdProducer(header_name="X-Session-Id").of(headers) == session


@pytest.mark.parametrize(
    ("cookie", "session"),
    [
        ("sid=s1", "s1"),
        ("theme=dark; sid=s1; lang=en", "s1"),
        ('sid="s 1"', "s 1"),
        ("sid=", ""),
        ("SID=s1", ""),
        ("xsid=s1", ""),
        ("theme=dark", ""),
        ("", ""),
        (";;;", ""),
        ("sid", ""),
        ("\x00=1; sid=s1", "s1"),
        ("sid=" + "x" * 9000, "x" * MAX_ID_CHARACTERS),
    ],
)
def test_a_session_is_a_cookie(cookie: str, session: str) -> None:
    assert SessionIdProducer(cookie_name="sid").of({"cookie": cookie}) == session
    assert SessionIdProducer(cookie_name="sid").of({}) == ""


def test_only_the_header_that_is_needed_is_asked_for() -> None:
    assert SessionIdProducer(header_name="X-Chat").headers() == ("x-chat",)
    assert SessionIdProducer(cookie_name="sid").headers() == ("cookie",)
    assert AgentIdentity(additional_session_headers=("X-Mine",)).headers() == ("x-mine", *AGENT_HEADERS)


@pytest.mark.parametrize(
    ("headers", "session"),
    [
        ({"x-claude-code-session-id": "a"}, "a"),
        ({"x-session-affinity": "b"}, "b"),
        ({"session-id": "c"}, "c"),
        ({"session_id": "d"}, "d"),
        ({"session_id": "d", "session-id": "c"}, "c"),
        ({"session-id": "c", "x-claude-code-session-id": "a"}, "a"),
        ({"x-claude-code-session-id": "", "session_id": "d"}, "d"),
        ({"x-session-id": "e"}, ""),
        ({"x-mine": "f", "x-claude-code-session-id": "a"}, "f"),
        ({"x-claude-code-session-id": "x" * 9000}, "x" * MAX_ID_CHARACTERS),
        ({}, ""),
    ],
)
def test_an_agents_session_is_the_first_header_that_is_there(headers: dict[str, str], session: str) -> None:
    assert AgentIdentity(additional_session_headers=("X-Mine",)).of(headers) == session


def test_only_the_agents_identity_names_a_flow() -> None:
    assert AgentIdentity.names_flow
    assert not SessionIdProducer.names_flow
    assert AgentIdentity.provides is SessionIdProducer.provides is Attribute.SESSION_ID


@pytest.mark.parametrize(
    ("plugin", "says"),
    [
        ("{type: session-id-producer}", "exactly one of headerName and cookieName"),
        ("{type: session-id-producer, parameters: {headerName: a, cookieName: b}}", "exactly one of headerName"),
        ("{type: agent-identity, parameters: {additionalSessionHeaders: [a, '']}}", "must not hold empty names"),
    ],
)
def test_a_configuration_error_says_what_is_accepted(plugin: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        resolve(load(CONFIG_HEAD + f"plugins: [{plugin}]"), allow_experimental=True)
    assert error.value.path == "$.plugins[0].parameters"
