"""Who may read the metrics: TokenReview says whose a token is, SubjectAccessReview whether that user may GET /metrics.

Answers are remembered for ALLOWED_S or REFUSED_S, by a digest of the token; what the API server could not say is a
refusal and is not remembered.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable

import aiohttp
import msgspec

from llmd_sched.kube.client import ApiClient, ApiError

log = logging.getLogger(__name__)

TOKEN_REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"
ACCESS_REVIEWS = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
ALLOWED_S = 60.0
REFUSED_S = 10.0
MAX_ANSWERS = 256
MAX_TOKEN_CHARACTERS = 16 << 10
MAX_REVIEWS = 16
"""Asked for at once; more are refused, so that nobody can make us flood the API server."""


class User(msgspec.Struct, frozen=True, omit_defaults=True):
    """Passed on as it came."""

    username: str = msgspec.field(name="username", default="")
    uid: str = ""
    groups: list[str] | None = None
    extra: dict[str, list[str]] | None = None


class _TokenStatus(msgspec.Struct, frozen=True):
    authenticated: bool = False
    user: User = User()


class _TokenReview(msgspec.Struct, frozen=True):
    status: _TokenStatus = _TokenStatus()


class _AccessStatus(msgspec.Struct, frozen=True):
    allowed: bool = False


class _AccessReview(msgspec.Struct, frozen=True):
    status: _AccessStatus = _AccessStatus()


class MetricsAccess:
    def __init__(self, api: ApiClient, path: str = "/metrics", clock: Callable[[], float] = time.monotonic) -> None:
        self._api, self._path, self._clock = api, path, clock
        self._answers: dict[bytes, tuple[bool, float]] = {}
        """Digest -> answer, and until when it holds; the oldest goes first."""
        self._asking = 0

    async def may_read_metrics(self, token: str) -> bool:
        if not token or len(token) > MAX_TOKEN_CHARACTERS:
            return False
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        answer, until_s = self._answers.get(digest, (False, float("-inf")))
        if self._clock() < until_s:
            return answer
        if self._asking >= MAX_REVIEWS:
            return False
        self._asking += 1
        try:
            answer = await self._ask(token)
        except (ApiError, aiohttp.ClientError, msgspec.MsgspecError, OSError, TimeoutError) as error:
            log.warning("metrics are refused, access cannot be reviewed: %s", error or type(error).__name__)
            return False
        finally:
            self._asking -= 1
        self._remember(digest, answer)
        return answer

    async def _ask(self, token: str) -> bool:
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}}
        whose = msgspec.json.decode(await self._api.post(TOKEN_REVIEWS, body), type=_TokenReview).status
        if not whose.authenticated:
            return False
        user = whose.user
        spec = {
            "user": user.username,
            "uid": user.uid,
            "groups": user.groups or [],
            "extra": user.extra or {},
            "nonResourceAttributes": {"path": self._path, "verb": "get"},
        }
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        return msgspec.json.decode(await self._api.post(ACCESS_REVIEWS, body), type=_AccessReview).status.allowed

    def _remember(self, digest: bytes, answer: bool) -> None:
        self._answers.pop(digest, None)
        while len(self._answers) >= MAX_ANSWERS:
            del self._answers[next(iter(self._answers))]
        self._answers[digest] = answer, self._clock() + (ALLOWED_S if answer else REFUSED_S)
