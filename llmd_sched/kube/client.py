"""A REST client for the Kubernetes API: requests with a bound on time and size, and watch streams.

Inside a pod the address comes from the environment, the token and the authority from the service account's folder;
outside one, LLMD_KUBE_API may name a server, ``kubectl proxy`` for instance. The token is read again every
TOKEN_EVERY_S and after a 401, because it expires; the authority is read once.
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from llmd_sched.errors import ConfigError, SchedError

API_VARIABLE = "LLMD_KUBE_API"
"""``http://HOST:PORT`` of an API server that asks for no token, as ``kubectl proxy`` does; wins over the pod's own."""
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TOKEN_EVERY_S = 60.0
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
STREAM_SILENCE_S = 120.0
"""A watch that sends nothing for so long is dead: a server sends a bookmark about once a minute."""
MAX_BODY_BYTES = 64 << 20
MAX_MESSAGE_CHARACTERS = 500


class ApiError(SchedError):
    """The API server refused. ``status`` is that of HTTP, or of the Status object in a watch."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"status {status}: {message[:MAX_MESSAGE_CHARACTERS]}")
        self.status = status


class Status(msgspec.Struct, frozen=True):
    """What a server says went wrong."""

    code: int = 0
    message: str = ""


class ApiClient:
    """``token_file`` may be None, for a server that asks for none. Close it when done."""

    def __init__(
        self,
        base_url: str,
        token_file: Path | None = None,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._token_file = token_file
        self._tls = tls
        self._clock = clock
        self._token = ""
        self._token_until_s = float("-inf")
        self._session: aiohttp.ClientSession | None = None

    async def get(self, path: str, params: Mapping[str, str] | None = None) -> bytes:
        return await self._request("GET", path, params)

    async def post(self, path: str, body: Any) -> bytes:
        return await self._request("POST", path, body=body)

    async def put(self, path: str, body: Any) -> bytes:
        return await self._request("PUT", path, body=body)

    async def _request(
        self, method: str, path: str, params: Mapping[str, str] | None = None, body: Any = None
    ) -> bytes:
        """Raises ApiError; aiohttp.ClientError, OSError or TimeoutError when the server cannot be talked to."""
        limits = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
        data = None if body is None else msgspec.json.encode(body)
        async with self._opened(method, path, params, limits, data) as response:
            return await _bounded(response.content)

    @asynccontextmanager
    async def stream(self, path: str, params: Mapping[str, str]) -> AsyncIterator[aiohttp.StreamReader]:
        """The bytes of a reply without an end. Raises as requests do, now and while it is read."""
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=STREAM_SILENCE_S)
        async with self._opened("GET", path, params, limits, None) as response:
            yield response.content

    @asynccontextmanager
    async def _opened(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None,
        limits: aiohttp.ClientTimeout,
        data: bytes | None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._session is None:
            self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        async with self._session.request(
            method,
            self._base_url + path,
            params=params,
            data=data,
            headers=self._headers(),
            timeout=limits,
            ssl=self._tls or True,
            allow_redirects=False,
        ) as response:
            if response.status >= 300:
                if response.status == 401:
                    self._token_until_s = float("-inf")
                raise ApiError(response.status, await _message(response))
            yield response

    def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._token_file is not None:
            now_s = self._clock()
            if now_s >= self._token_until_s:
                self._token = self._token_file.read_text().strip()
                self._token_until_s = now_s + TOKEN_EVERY_S
            headers["Authorization"] = f"Bearer {self._token}"
        return headers

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


async def _bounded(content: aiohttp.StreamReader, most_bytes: int = MAX_BODY_BYTES) -> bytes:
    parts, received = [], 0
    async for part in content.iter_any():
        received += len(part)
        if received > most_bytes:
            raise ApiError(200, f"a reply of more than {most_bytes} bytes")
        parts.append(part)
    return b"".join(parts)


async def _message(response: aiohttp.ClientResponse) -> str:
    text = await response.content.read(1 << 16)
    try:
        return msgspec.json.decode(text, type=Status).message or response.reason or ""
    except msgspec.MsgspecError:
        return text.decode(errors="replace").strip() or response.reason or ""


def in_cluster(environ: Mapping[str, str], folder: Path = SERVICE_ACCOUNT) -> ApiClient:
    """The client of a pod, or of the server API_VARIABLE names. Raises ConfigError when there is neither."""
    named = environ.get(API_VARIABLE, "")
    if named:
        if not re.fullmatch(r"http://[^/?#@]+:[0-9]{1,5}/?", named):
            raise ConfigError(f"{named!r} is not http://HOST:PORT, such as kubectl proxy listens on", API_VARIABLE)
        return ApiClient(named)
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise ConfigError(
            "not set, so this is no pod of a cluster; to run outside one, list the model servers in --endpoints-file",
            "KUBERNETES_SERVICE_HOST",
        )
    token, authority = folder / "token", folder / "ca.crt"
    try:
        token.read_text()
        tls = ssl.create_default_context(cafile=str(authority))
    except (OSError, ssl.SSLError) as e:
        raise ConfigError(
            f"the service account's token and ca.crt cannot be used: {e.strerror or e}; "
            "the pod must not set automountServiceAccountToken: false",
            str(folder),
        ) from None
    return ApiClient(f"https://{f'[{host}]' if ':' in host else host}:{port}", token, tls)


def namespace_of(environ: Mapping[str, str], folder: Path = SERVICE_ACCOUNT) -> str:
    """``NAMESPACE``, else the service account's, else ``default``."""
    if environ.get("NAMESPACE"):
        return environ["NAMESPACE"]
    try:
        return (folder / "namespace").read_text().strip() or "default"
    except OSError:
        return "default"
