"""Session tokens: what was signed is read back, and nothing else is."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.sched.tokens import MAX_KEY_BYTES, MAX_TOKEN_CHARS, read, secrets_of, sign
from tests.builders import fuzzed

NEW, OLD = b"the secret that signs now", b"the secret of last month"
KEY = "prod/vllm-7f9c-abcde"


def unsigned(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def test_a_token_names_the_endpoint_it_was_signed_for() -> None:
    assert read(sign(KEY, NEW), (NEW,)) == KEY


def test_a_token_fits_in_a_header_and_a_cookie_without_quoting() -> None:
    token = sign("a" * 63 + "/" + "b" * 253, NEW)
    assert len(token) <= MAX_TOKEN_CHARS
    assert set(token) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")
    assert read(token, (NEW,)) == "a" * 63 + "/" + "b" * 253


def test_a_token_of_the_old_secret_is_good_until_the_secret_is_gone() -> None:
    token = sign(KEY, OLD)
    assert read(token, (NEW, OLD)) == KEY
    assert read(token, (NEW,)) is None
    assert read(token, ()) is None


def test_no_other_spelling_of_a_token_passes() -> None:
    token = sign(KEY, NEW)
    encoded, mac = token.split(".")
    other = sign("prod/vllm-7f9c-other", NEW)
    for forged in (
        encoded,
        encoded + ".",
        encoded + "." + mac[:-1],
        encoded + "=." + mac,
        encoded + "." + mac + "=",
        encoded + "." + mac + "." + mac,
        encoded + "." + mac.swapcase(),
        encoded + "." + other.split(".")[1],
        other.split(".")[0] + "." + mac,
        token + " ",
        " " + token,
        "." + mac,
        ".",
        "",
        "é" + token,
        "\ud800",
        "A" * MAX_TOKEN_CHARS + token,
    ):
        assert read(forged, (NEW, OLD), accept_unsigned=True) is None or forged == encoded, forged
        assert read(forged, (NEW, OLD)) is None, forged


def test_any_changed_character_spoils_a_token() -> None:
    token = sign(KEY, NEW)
    for i, was in enumerate(token):
        changed = token[:i] + ("A" if was != "A" else "B") + token[i + 1 :]
        assert read(changed, (NEW,)) is None, i


def test_a_secret_is_not_the_key_of_a_bare_mac() -> None:
    import hashlib
    import hmac

    bare = hmac.digest(NEW, KEY.encode(), hashlib.sha256)[:16]
    encoded = base64.urlsafe_b64encode(KEY.encode()).rstrip(b"=").decode()
    forged = encoded + "." + base64.urlsafe_b64encode(bare).rstrip(b"=").decode()
    assert read(forged, (NEW,)) is None


def test_the_reference_s_token_is_read_only_where_it_is_accepted() -> None:
    assert read(unsigned(KEY), (NEW,)) is None
    assert read(unsigned(KEY), (NEW,), accept_unsigned=True) == KEY
    assert read(sign(KEY, NEW), (NEW,), accept_unsigned=True) == KEY


@pytest.mark.parametrize(
    "token",
    [unsigned("no-slash"), unsigned("/name"), unsigned("ns/"), unsigned("a/b\n"), unsigned(b"a/\xff"), "a/b", "====",
     unsigned("a/" + "b" * MAX_KEY_BYTES), unsigned(KEY)[:-1]],
)  # fmt: skip
def test_what_is_no_endpoint_is_no_unsigned_token(token: str) -> None:
    assert read(token, (NEW,), accept_unsigned=True) is None


def test_a_name_that_is_too_long_is_not_signed() -> None:
    with pytest.raises(ValueError, match=f"322 bytes; at most {MAX_KEY_BYTES}"):
        sign("ns/" + "x" * 319, NEW)


@fuzzed
@given(st.text(max_size=600), st.booleans())
def test_no_text_brings_it_down_or_gets_in(text: str, accept: bool) -> None:
    found = read(text, (NEW, OLD), accept_unsigned=accept)
    assert found is None or (accept and unsigned(found) == text)


def test_secrets_are_lines_the_first_of_which_signs() -> None:
    assert secrets_of("  first-secret-of-16b\n\nsecond-secret-16b!\n") == (
        b"first-secret-of-16b",
        b"second-secret-16b!",
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("", "0 session secrets; 1 to 16"), ("\n \n", "0 session secrets"),
     ("x" * 16 + "\nshort", "secret 2 is shorter than 16"),
     ("\n".join(["s" * 16] * 17), "17 session secrets; 1 to 16")],
)  # fmt: skip
def test_unusable_secrets_are_refused_without_being_told(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        secrets_of(text)
    assert "short" not in str(caught.value).replace("shorter", "")
