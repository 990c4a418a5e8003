"""The admin port over real HTTP and TLS on loopback, and the certificate of the gRPC port as a client sees it."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc import aio
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from llmd_sched.admin import server as admin
from llmd_sched.admin.auth import TokenFile
from llmd_sched.admin.decisions import Decisions
from llmd_sched.admin.server import AdminServer
from llmd_sched.extproc.tls import GRPC_SUITES, TlsPolicy, certificate, grpc_credentials, read_policy, server_context
from llmd_sched.types import Decision, End, Endpoint, Outcome, Request

PATIENCE_S = 20.0
TOKEN = "operator-token-0123456789"
PAGES = ("/metrics", "/debug/plugins/state", "/debug/decisions")


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[aiohttp.ClientSession, int]]:
    registry = options.pop("registry", None) or CollectorRegistry()
    server = AdminServer(lambda: generate_latest(registry), **options)
    async with asyncio.timeout(PATIENCE_S):
        port = await server.start("127.0.0.1", 0)
        try:
            scheme = "https" if options.get("ssl_context") else "http"
            async with aiohttp.ClientSession(f"{scheme}://127.0.0.1:{port}") as session:
                yield session, port
        finally:
            await server.stop()


async def get(session: aiohttp.ClientSession, path: str, **options: Any) -> tuple[int, str]:
    async with session.get(path, **options) as reply:
        return reply.status, await reply.text()


def counted() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("llm_d_epp_request", "Requests.", ("model",), registry=registry).labels("m").inc(3)
    return registry


def ring(count: int) -> Decisions:
    made = Decisions()
    for i in range(count):
        request = Request(id=f"r{i}", model="m", prompts=(b"the patient's name is Rosalind",))
        picked = (Endpoint(f"e{i % 2}", f"10.0.0.{i % 2}", 80),)
        decision = Decision(ticket=f"t{i}", request=request, picked=picked, scores={}, prediction=None, at_s=0.0)
        made.add(decision, 1_700_000_000.0 + i)
    made.finish("t0", Outcome(end=End.FINISHED, status=200))
    return made


async def test_metrics_are_text_and_compressed_where_asked_for() -> None:
    async with serving(registry=counted()) as (session, _):
        async with session.get("/metrics") as reply:
            assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            assert reply.headers["Content-Encoding"] == "gzip"
            compressed = await reply.text()
        async with session.get("/metrics", headers={"Accept-Encoding": "identity"}) as reply:
            assert "Content-Encoding" not in reply.headers
            assert await reply.text() == compressed
    assert 'llm_d_epp_request_total{model="m"} 3.0' in compressed


class Slow(Collector):
    """Counts renderings, and keeps each until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.renderings = 0

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        self.renderings += 1
        assert self.go.wait(PATIENCE_S)
        yield GaugeMetricFamily("rendering", "Which one.", value=self.renderings)


async def test_scrapes_at_the_same_time_share_one_rendering_and_hold_nothing_else_up() -> None:
    slow, registry = Slow(), CollectorRegistry()
    registry.register(slow)
    asked = 0

    async def counting(token: str) -> bool:
        nonlocal asked
        asked += 1
        return True

    async with serving(registry=registry, authorize=counting) as (session, _):
        bearer = {"headers": {"Authorization": f"Bearer {TOKEN}"}}
        scrapes = [asyncio.create_task(get(session, "/metrics", **bearer)) for _ in range(20)]
        gone = asyncio.create_task(get(session, "/metrics", **bearer))
        while asked < 21 or not slow.renderings:
            await asyncio.sleep(0.01)
        for _ in range(20):
            assert (await get(session, "/healthz"))[0] == 200
        gone.cancel()
        slow.go.set()
        pages = await asyncio.gather(*scrapes)
        assert set(pages) == {pages[0]}
        assert pages[0][0] == 200
        assert "rendering 1.0" in pages[0][1]
        assert "rendering 2.0" in (await get(session, "/metrics", **bearer))[1]


async def test_a_page_that_takes_too_long_is_given_up() -> None:
    slow, registry = Slow(), CollectorRegistry()
    registry.register(slow)
    async with serving(registry=registry, request_s=0.1) as (session, _):
        assert await get(session, "/metrics") == (503, "not answered within 0.1 s\n")
        slow.go.set()


async def test_decisions_are_told_newest_first_and_filtered() -> None:
    async with serving(decisions=ring(10)) as (session, _):

        async def told(query: str) -> list[str]:
            status, text = await get(session, "/debug/decisions" + query)
            assert status == 200
            assert "Rosalind" not in text
            page = json.loads(text)
            assert page["truncated"] is False
            return [one["request_id"] for one in page["decisions"]]

        assert await told("") == [f"r{i}" for i in range(9, -1, -1)]
        assert await told("?limit=2") == ["r9", "r8"]
        assert await told("?endpoint=default/e1&limit=2") == ["r9", "r7"]
        assert await told("?endpoint=10.0.0.0:80&limit=1") == ["r8"]
        assert await told("?request_id=r3") == ["r3"]
        assert await told("?request_id=none") == []
        first = json.loads((await get(session, "/debug/decisions?request_id=r0"))[1])["decisions"][0]
        assert (first["outcome"]["end"], first["time"]) == ("finished", "2023-11-14T22:13:20.000+00:00")


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "1.5", "x", "", "99999999999999999999", "²"])
async def test_a_limit_that_cannot_be_is_refused(limit: str) -> None:
    async with serving() as (session, _):
        status, text = await get(session, "/debug/decisions", params={"limit": limit})
        assert status == 400
        assert "is not a whole number from 1 to 1000" in text
        status, text = await get(session, "/debug/decisions?last=5")
        assert (status, text) == (400, "'last' is none of endpoint, limit, request_id\n")


async def test_a_page_of_decisions_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "MAX_PAGE_BYTES", 1000)
    async with serving(decisions=ring(10)) as (session, _):
        text = (await get(session, "/debug/decisions"))[1]
    page = json.loads(text)
    told = [one["request_id"] for one in page["decisions"]]
    assert page["truncated"] is True
    assert told == [f"r{i}" for i in range(9, 9 - len(told), -1)]
    assert 1000 < len(text) < 2000


async def test_the_state_of_plugins_is_bounded_and_dated() -> None:
    states = {"index": {"type": "prefix", "state": list(range(500))}, "b": {"type": "x", "message": "keeps nothing"}}
    async with serving(states=lambda: states) as (session, _):
        status, text = await get(session, "/debug/plugins/state")
    page = json.loads(text)
    assert status == 200
    assert datetime.datetime.fromisoformat(page["timestamp"]).tzinfo is not None
    assert page["plugins"]["index"] == {"type": "prefix", "state": list(range(100)), "truncated": True}
    assert page["plugins"]["b"] == states["b"]


async def test_what_is_not_there_says_what_is() -> None:
    async def headroom(_: web.Request) -> web.Response:
        return web.Response(text="12")

    async def broken(_: web.Request) -> web.Response:
        raise KeyError("secret detail")

    async with serving(routes={"/v1/headroom": headroom, "/broken": broken}) as (session, _):
        pages = "/healthz, /metrics, /debug/plugins/state, /debug/decisions, /v1/headroom, /broken"
        assert await get(session, "/nothing") == (404, f"no such page; there are {pages}\n")
        assert await get(session, "/v1/headroom") == (200, "12")
        assert await get(session, "/broken") == (500, "an internal error; the log says more\n")
        for method in ("POST", "PUT", "DELETE", "HEAD"):
            async with session.request(method, "/metrics") as reply:
                assert (reply.status, reply.headers["Allow"]) == (405, "GET")
                assert await reply.text() == ("" if method == "HEAD" else f"{method} is not answered here, only GET\n")


async def test_a_request_has_no_body_and_headers_of_a_bounded_size() -> None:
    async with serving() as (session, _):
        assert await get(session, "/metrics", data=b"x" * 100) == (413, "a request here has no body\n")
        status, _text = await get(session, "/metrics", headers={"X": "y" * 10_000})
        assert status == 400
        assert (await get(session, "/healthz"))[0] == 200


BOTH_LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
"""Where we rely on what only transports do."""


@BOTH_LOOPS
def test_connections_beyond_the_limit_are_told_so(
    run: Callable[[Coroutine[Any, Any, None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "MAX_CONNECTIONS", 2)
    run(_exceed_connections())


async def _exceed_connections() -> None:
    async with serving() as (_, port):
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for reader, writer in held:
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        refused = (await reading(port)).decode()
        assert refused.startswith("HTTP/1.1 503 Service Unavailable\r\n")
        assert refused.endswith("\r\n\r\ntoo many connections\n")
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
        while await reading(port, b"GET /healthz HTTP/1.0\r\n\r\n") == refused.encode():
            await asyncio.sleep(0.01)


async def reading(port: int, said: bytes = b"") -> bytes:
    """All that a new connection hears until it is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    heard = b""
    with suppress(ConnectionError):
        if said:
            writer.write(said)
        heard = await reader.read()
    with suppress(ConnectionError):
        writer.close()
        await writer.wait_closed()
    return heard


async def test_a_connection_without_a_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "IDLE_S", 0.1)
    async with serving() as (_, port):
        for said in (b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"):
            assert await reading(port, said) == b""


async def test_a_port_in_use_is_named() -> None:
    async with serving() as (_, port):
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: "):
            await AdminServer(CollectorRegistry()).start("127.0.0.1", port)


async def test_everything_but_the_health_page_asks_for_a_token(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(TOKEN)
    file.chmod(0o600)
    async with serving(authorize=TokenFile(str(file)), registry=counted(), routes={"/more": _more}) as (session, _):
        assert await get(session, "/healthz") == (200, "ok\n")
        for path in (*PAGES, "/more", "/nothing"):
            for header in (None, "Basic b3BlcmF0b3I6", "Bearer", f"Bearer {TOKEN} x"):
                async with session.get(path, headers={"Authorization": header} if header else {}) as reply:
                    assert (reply.status, reply.headers["WWW-Authenticate"]) == (401, 'Bearer realm="metrics"')
            status, text = await get(session, path, headers={"Authorization": f"Bearer {TOKEN}x"})
            assert (status, text) == (403, "this token does not open this port\n")
            right = {"Authorization": f"Bearer {TOKEN}"}
            assert (await get(session, path, headers=right))[0] == (404 if path == "/nothing" else 200)


async def _more(_: web.Request) -> web.Response:
    return web.Response(text="more")


async def test_when_tokens_cannot_be_checked_nobody_gets_in(caplog: pytest.LogCaptureFixture) -> None:
    async def away(token: str) -> bool:
        raise ConnectionError("no API server")

    async with serving(authorize=away) as (session, _):
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert await get(session, "/metrics", headers=bearer) == (503, "tokens cannot be checked now\n")
        assert (await get(session, "/healthz"))[0] == 200
    assert TOKEN not in caplog.text


# TLS


class Authority:
    """Signs certificates for 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.file = str(folder / "ca.crt")
        self._certificate = self._signed("an authority", self.key, ca=True)
        Path(self.file).write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def _signed(self, name: str, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        address = x509.SubjectAlternativeName([x509.DNSName("localhost")])
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if ca else self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(address, critical=False)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    def issue(self, name: str) -> Path:
        """Into a folder of that name, file by file, each replaced as a whole."""
        key = ec.generate_private_key(ec.SECP256R1())
        text = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        put(folder / "tls.key", text)
        put(folder / "tls.crt", self._signed(name, key, ca=False).public_bytes(serialization.Encoding.PEM))
        return folder


def put(path: Path, text: bytes) -> None:
    path.with_name("new").write_bytes(text)
    os.replace(path.with_name("new"), path)


def pem_of(folder: Path) -> str:
    return ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert((folder / "tls.crt").read_text()))


def client(**versions: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    for name, version in versions.items():
        setattr(context, name, version)
    return context


def shown(port: int, context: ssl.SSLContext) -> tuple[str, str | None, str]:
    """(certificate, version, cipher suite) of a handshake. Raises ssl.SSLError or OSError when there is none."""
    with (
        socket.create_connection(("127.0.0.1", port), PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        der, suite = secured.getpeercert(binary_form=True), secured.cipher()
        assert der
        assert suite
        return ssl.DER_cert_to_PEM_cert(der), secured.version(), suite[0]


@BOTH_LOOPS
def test_the_admin_port_shows_the_newest_good_certificate(
    run: Callable[[Coroutine[Any, Any, None]], None], tmp_path: Path
) -> None:
    run(_renew_certificate(tmp_path))


async def _renew_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    folder = authority.issue("metrics")
    async with serving(ssl_context=server_context(str(folder), TlsPolicy())) as (session, port):
        trusting = ssl.create_default_context(cafile=authority.file)
        for _ in range(2):
            async with session.get("/healthz", ssl=trusting, server_hostname="localhost") as reply:
                assert reply.status == 200
            assert (await asyncio.to_thread(shown, port, client()))[0] == pem_of(folder)
            authority.issue("metrics")
        good = (await asyncio.to_thread(shown, port, client()))[0]
        put(folder / "tls.crt", b"half a certific")
        assert (await asyncio.to_thread(shown, port, client()))[0] == good


async def test_the_admin_port_keeps_to_versions_and_suites(tmp_path: Path) -> None:
    folder = str(Authority(tmp_path).issue("metrics"))
    old = client(maximum_version=ssl.TLSVersion.TLSv1_2)
    suite = "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"
    async with serving(ssl_context=server_context(folder, read_policy("VersionTLS12", suite))) as (_, port):
        found = await asyncio.to_thread(shown, port, old)
        assert found[1:] == ("TLSv1.2", "ECDHE-ECDSA-AES256-GCM-SHA384")
        old.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
        with pytest.raises(OSError, match=r"(?i)handshake failure|eof"):
            await asyncio.to_thread(shown, port, old)
    async with serving(ssl_context=server_context(folder, read_policy("VersionTLS13"))) as (_, port):
        assert (await asyncio.to_thread(shown, port, client()))[1] == "TLSv1.3"
        with pytest.raises(OSError, match=r"(?i)protocol version|eof"):
            await asyncio.to_thread(shown, port, client(maximum_version=ssl.TLSVersion.TLSv1_2))


async def test_the_admin_port_may_ask_for_a_client_certificate(tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    (tmp_path / "other").mkdir()
    strangers = Authority(tmp_path / "other")
    context = server_context(str(ours.issue("metrics")), TlsPolicy(), client_ca=ours.file)
    async with serving(ssl_context=context) as (session, _):
        for folder, welcome in ((ours.issue("prometheus"), True), (strangers.issue("stranger"), False), (None, False)):
            asking = ssl.create_default_context(cafile=ours.file)
            if folder is not None:
                asking.load_cert_chain(folder / "tls.crt", folder / "tls.key")
            try:
                async with session.get("/healthz", ssl=asking, server_hostname="localhost") as reply:
                    assert welcome
                    assert reply.status == 200
            except (aiohttp.ClientError, OSError):
                assert not welcome


async def test_the_grpc_port_shows_the_newest_good_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    folder = authority.issue("extproc")
    server = aio.server()
    port = server.add_secure_port("127.0.0.1:0", grpc_credentials(str(folder), reload=True))
    await server.start()
    try:
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(2):
                assert (await asyncio.to_thread(shown, port, client()))[0] == pem_of(folder)
                authority.issue("extproc")
            second = (await asyncio.to_thread(shown, port, client()))[0]
            assert second == pem_of(folder)
            key = (folder / "tls.key").read_bytes()
            put(folder / "tls.key", certificate("")[0])
            assert (await asyncio.to_thread(shown, port, client()))[0] == second
            put(folder / "tls.key", key)
            assert (await asyncio.to_thread(shown, port, client()))[0] == second
    finally:
        await server.stop(0)


async def test_without_reload_the_grpc_port_keeps_its_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    folder = authority.issue("extproc")
    first = pem_of(folder)
    server = aio.server()
    port = server.add_secure_port("127.0.0.1:0", grpc_credentials(str(folder)))
    await server.start()
    try:
        authority.issue("extproc")
        assert (await asyncio.to_thread(shown, port, client()))[0] == first
    finally:
        await server.stop(0)


GRPC_SERVER = """
import asyncio, os, sys
from llmd_sched.extproc.tls import grpc_credentials, read_policy
read_policy(sys.argv[1], sys.argv[2]).announce(os.environ)

async def main():
    from grpc import aio
    server = aio.server()
    print(server.add_secure_port("127.0.0.1:0", grpc_credentials("")), flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("flags", "allowed", "refused"),
    [
        (("", ""), {"ECDHE-ECDSA-AES128-GCM-SHA256"}, set()),
        (("VersionTLS13", ""), set(), {"ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384"}),
        (
            ("VersionTLS12", "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"),
            {"ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305"},
            {"ECDHE-ECDSA-AES128-GCM-SHA256"},
        ),
    ],
)
def test_the_grpc_port_keeps_to_versions_and_suites(
    flags: tuple[str, str], allowed: set[str], refused: set[str]
) -> None:
    """In a process of its own, as gRPC reads them once."""
    environ = {name: value for name, value in os.environ.items() if name != GRPC_SUITES}
    command = [sys.executable, "-c", GRPC_SERVER, *flags]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environ, text=True, **pipes) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert shown(port, client(minimum_version=ssl.TLSVersion.TLSv1_3))[1] == "TLSv1.3"
        for suite in sorted(allowed | refused):
            context = client(maximum_version=ssl.TLSVersion.TLSv1_2)
            context.set_ciphers(suite)
            try:
                assert shown(port, context)[1:] == ("TLSv1.2", suite)
                assert suite in allowed
            except OSError:
                assert suite in refused
