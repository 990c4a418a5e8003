"""Bearer tokens: which header holds one, and which one opens the port."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from llmd_sched.admin.auth import MAX_FILE_BYTES, MAX_TOKEN_CHARS, TokenFile, bearer, tokens_of
from llmd_sched.errors import ConfigError

FIRST, SECOND = "first-token-0123456789", "second.token~0123456789=="


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer abc", "abc"),
        ("bearer   abc ", "abc"),
        ("BEARER a.b-c_d~e+f/g==", "a.b-c_d~e+f/g=="),
        (None, None),
        ("", None),
        ("Bearer", None),
        ("Bearer ", None),
        ("Basic abc", None),
        ("Bearer a b", None),
        ("Bearer a\x00", None),
        ("Bearer é", None),
        ("Bearer " + "a" * (MAX_TOKEN_CHARS + 1), None),
    ],
)
def test_a_bearer_token_is_read_from_its_header_alone(header: str | None, token: str | None) -> None:
    assert bearer(header) == token


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "tokens"
    write(made, f"# operators\n{FIRST}\n\n  {SECOND}  \n")
    return made


def write(path: Path, text: str, mode: int = 0o600) -> None:
    """As Kubernetes does it: another file in its place."""
    new = path.with_name("new")
    new.write_text(text)
    new.chmod(mode)
    os.replace(new, path)


async def test_every_token_of_the_file_opens_and_no_other_does(path: Path) -> None:
    tokens = TokenFile(str(path))
    assert await tokens(FIRST)
    assert await tokens(SECOND)
    for other in ("", FIRST[:-1], FIRST + "x", FIRST.upper(), "# operators", "operators", FIRST + "\n"):
        assert not await tokens(other), other


async def test_a_changed_file_is_read_again(path: Path) -> None:
    tokens = TokenFile(str(path))
    write(path, "third-token-0123456789")
    assert await tokens("third-token-0123456789")
    assert not await tokens(FIRST)


async def test_a_file_that_becomes_unusable_leaves_its_tokens_in_place_and_says_so_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = TokenFile(str(path))
    write(path, "short")
    assert await tokens(FIRST)
    assert await tokens(SECOND)
    assert [record.message for record in caplog.records] == [
        f"the tokens that were good stay: {path}: line 1 is no bearer token: 16 to {MAX_TOKEN_CHARS} letters, digits "
        "or -._~+/, then any ="
    ]
    os.unlink(path)
    assert await tokens(FIRST)
    assert len(caplog.records) == 2
    write(path, SECOND)
    assert not await tokens(FIRST)
    assert await tokens(SECOND)


def test_a_file_open_to_everybody_is_warned_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    TokenFile(str(path))
    assert not caplog.records
    path.chmod(0o644)
    TokenFile(str(path))
    assert [(r.levelno, "open to every user" in r.message) for r in caplog.records] == [(logging.WARNING, True)]


def test_a_missing_file_is_an_error_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the token file: No such file"):
        TokenFile(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "0 tokens; 1 to 100 are accepted"),
        (b"# nothing\n", "0 tokens"),
        (b"\n".join([b"t" * 16] * 101), "101 tokens"),
        (b"good-token-0123456789\nwith space 0123456789\n", "line 2 is no bearer token"),
        (b"\xff" * 20, "line 1 is no bearer token"),
        (b"t" * (MAX_TOKEN_CHARS + 1), "line 1 is no bearer token"),
        (b"#" * (MAX_FILE_BYTES + 1), "at most 1048576 bytes"),
    ],
)
def test_a_bad_token_file_is_refused_by_line_and_its_tokens_are_not_told(text: bytes, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        tokens_of(text, "tokens")
    assert "with space" not in str(caught.value)
