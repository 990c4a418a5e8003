"""One bound port and the application behind it."""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Generator
from typing import Any

import uvicorn
from fastapi import FastAPI

from batchgw.config import Address, Tls
from batchgw.errors import ConfigError

MAX_CONNECTIONS = 1000
"""Idle ones count; who comes after them is answered 503."""

KEEP_ALIVE_S = 75
BACKLOG = 2048


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are the service's, which has more than one thing to stop."""
        yield


class Listener:
    """``run`` answers on a ``bound`` socket until ``stop``, and what is under way then has ``stop_s``."""

    def __init__(self, app: FastAPI, on: socket.socket, stop_s: float, tls: Tls | None = None) -> None:
        certificates: dict[str, Any] = {"ssl_certfile": tls.cert_file, "ssl_keyfile": tls.key_file} if tls else {}
        config = uvicorn.Config(
            app, lifespan="off", ws="none", log_config=None, access_log=False, server_header=False, backlog=BACKLOG,
            proxy_headers=False,  # the peer is who connects: trusted networks depend on it
            limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(stop_s), **certificates,
        )  # fmt: skip
        try:
            config.load()
        except OSError as e:  # ssl.SSLError is one
            raise ConfigError(f"its certificate cannot be used: {e}", "$.tls") from None
        self._server, self._socket = _Server(config), on
        host, port = on.getsockname()[:2]
        self.url = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    async def run(self) -> None:
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Takes no new connections."""
        self._server.should_exit = True


def bound(at: Address, path: str) -> socket.socket:
    """Listening already: who connects waits for ``run``. Raises ConfigError naming the setting."""
    try:
        family, kind, proto, _, where = socket.getaddrinfo(*at, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, kind, proto)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(where)
            made.listen(BACKLOG)
            made.setblocking(False)
        except OSError:
            made.close()
            raise
        return made
    except OSError as e:
        raise ConfigError(f"cannot listen on {at.host}:{at.port}: {e.strerror}", path) from None
