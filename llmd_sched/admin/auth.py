"""Who may read the admin port: anybody, holders of a token in a file, or whom another authority lets in.

``Authorize`` is asked for each request that is not ``/healthz``. It gets the bearer token and says whether it opens
this port; it raises when it cannot tell, and then nobody gets in.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

from llmd_sched.errors import ConfigError

log = logging.getLogger(__name__)

Authorize = Callable[[str], Awaitable[bool]]

MAX_TOKEN_CHARS = 8192
"""Of Kubernetes, whose service account tokens have 1 to 2 thousand."""

MAX_TOKENS = 100
MIN_TOKEN_CHARS = 16
MAX_FILE_BYTES = 1 << 20

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""RFC 6750, section 2.1. It has no ``#``, which opens a comment in the file."""


def bearer(header: str | None) -> str | None:
    """The token of an ``Authorization`` header; None for anything else."""
    scheme, _, token = (header or "").strip().partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or len(token) > MAX_TOKEN_CHARS or not _TOKEN.fullmatch(token):
        return None
    return token


class TokenFile:
    """An ``Authorize`` over a file of tokens, one a line, read again when it changes.

    Raises ConfigError when the file is unusable at start; later the tokens that were good stay, and it is logged once.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._stamp: tuple[int, ...] = ()
        self._complaint = ""
        self._digests: tuple[bytes, ...] = ()
        self._read()

    async def __call__(self, token: str) -> bool:
        self._refresh()
        digest = _digest(token)
        # Digests of one length, all of them compared: the time tells neither a length nor how far a guess got.
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0

    def _refresh(self) -> None:
        try:
            if self._look() != self._stamp:
                self._read()
                self._complaint = ""
        except (OSError, ConfigError) as error:
            if str(error) != self._complaint:
                log.error("the tokens that were good stay: %s", error)
            self._complaint = str(error)

    def _look(self) -> tuple[int, ...]:
        found = self.path.stat()
        return found.st_mtime_ns, found.st_ino, found.st_size, found.st_mode

    def _read(self) -> None:
        try:
            stamp = self._look()
            with self.path.open("rb") as file:
                text = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"cannot read the token file: {error.strerror}", str(self.path)) from None
        self._digests = tuple(map(_digest, tokens_of(text, str(self.path))))
        self._stamp = stamp
        if stamp[3] & (stat.S_IROTH | stat.S_IWOTH):
            log.warning("%s is open to every user of the machine; chmod 640 would do", self.path)


def tokens_of(text: bytes, where: str) -> list[str]:
    """One a line; empty lines and those that start with ``#`` are skipped. Raises ConfigError."""
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(f"a token file has at most {MAX_FILE_BYTES} bytes", where)
    tokens = []
    for number, line in enumerate(text.decode("utf-8", "replace").splitlines(), 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if not (MIN_TOKEN_CHARS <= len(token) <= MAX_TOKEN_CHARS and _TOKEN.fullmatch(token)):
            # Not the line itself: it may be a token with a slip in it.
            limits = f"{MIN_TOKEN_CHARS} to {MAX_TOKEN_CHARS} letters, digits or -._~+/"
            raise ConfigError(f"line {number} is no bearer token: {limits}, then any =", where)
        tokens.append(token)
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise ConfigError(f"{len(tokens)} tokens; 1 to {MAX_TOKENS} are accepted, one a line", where)
    return tokens


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
