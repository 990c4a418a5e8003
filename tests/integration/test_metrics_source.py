"""Metrics read where and as a configuration says: another port and path, over TLS, with metrics of one's own."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from llmd_sched.pool.pool import Pool
from llmd_sched.pool.scrape import Scraper
from llmd_sched.pool.sources import (
    CoreMetricsExtractor,
    CustomMetric,
    EngineConfig,
    MetricsDataSource,
    reading,
)
from llmd_sched.types import Endpoint

PAGE = b"depth 5\nqueue 7\n"
EXTRACTOR = CoreMetricsExtractor(
    engine_label_key="engine",
    engine_configs=(
        EngineConfig(
            name="mine",
            queued_requests_spec="queue",
            custom_metrics=(CustomMetric(attribute_key="depth", metric_spec="depth"),),
        ),
    ),
)


def certificate(folder: Path) -> tuple[Path, Path]:
    """Self-signed, for 127.0.0.1: certificate and key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "engine")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    cert_path, key_path = folder / "tls.crt", folder / "tls.key"
    cert_path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    key_path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return cert_path, key_path


@asynccontextmanager
async def engine(paths: list[str], tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Answers every request with the page, and notes its path; gives its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                paths.append(head.split()[1].decode())
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(PAGE), PAGE))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    async with server:
        yield int(server.sockets[0].getsockname()[1])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def scraper_of(source: MetricsDataSource, port: int = 1) -> Scraper:
    pool = Pool()
    pool.apply([Endpoint("one", "127.0.0.1", port, labels={"engine": "mine"})])
    return Scraper(pool, 0.05, reading=reading({"source": source, "mine": EXTRACTOR}))


def shown(scraper: Scraper) -> dict[str, float]:
    columns = scraper.pool.columns(scraper.clock())
    return {name: float(columns[name][0]) for name in ("waiting", "depth/mine") if name in columns}


def unreachable(scraper: Scraper) -> list[str]:
    """Endpoints that are left out while another can be reached."""
    pool = scraper.pool
    pool.apply([*pool.endpoints, Endpoint("another", "127.0.0.2", 9)])
    return [e.name for e in pool.endpoints if e not in pool.candidates(None, 0.0).endpoints]


async def closed_port() -> int:
    async with engine([]) as port:
        return port


async def test_only_an_endpoint_whose_own_port_is_closed_counts_as_unreachable() -> None:
    port = await closed_port()
    for source, left_out in ((MetricsDataSource(), ["one"]), (MetricsDataSource(port=port), [])):
        scraper = scraper_of(source, port if not source.port else 8000)
        await scraper.start()
        try:
            await until(lambda scraper=scraper: scraper.errors > 2)
            assert unreachable(scraper) == left_out
        finally:
            await scraper.stop()


async def test_a_page_is_read_at_the_port_and_path_of_its_source() -> None:
    paths: list[str] = []
    async with engine(paths) as port:
        scraper = scraper_of(MetricsDataSource(port=port, path="/stats"))
        await scraper.start()
        try:
            await until(lambda: shown(scraper) == {"waiting": 7.0, "depth/mine": 5.0})
            assert set(paths) == {"/stats"}
        finally:
            await scraper.stop()


@pytest.mark.parametrize("verifies", [True, False])
async def test_a_page_is_read_over_tls(tmp_path: Path, verifies: bool) -> None:
    cert, key = certificate(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(cert, key)
    paths: list[str] = []
    async with engine(paths, tls) as port:
        source = MetricsDataSource(scheme="https", ca_cert_path=str(cert) if verifies else "")
        scraper = scraper_of(source, port)
        await scraper.start()
        try:
            await until(lambda: shown(scraper) == {"waiting": 7.0, "depth/mine": 5.0})
            await until(lambda: len(paths) >= 3)
        finally:
            await scraper.stop()


async def test_a_certificate_nobody_vouches_for_is_refused_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = certificate(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(cert, key)
    caplog.set_level(logging.WARNING)
    async with engine([], tls) as port:
        scraper = scraper_of(MetricsDataSource(scheme="https", insecure_skip_verify=False), port)
        await scraper.start()
        try:
            await until(lambda: scraper.errors > 2)
            assert unreachable(scraper) == []  # it is there, only not trusted
        finally:
            await scraper.stop()
    (said,) = [r.getMessage() for r in caplog.records if "cannot read" in r.getMessage()]
    assert f"cannot read https://127.0.0.1:{port}/metrics" in said
    assert "certificate" in said.lower()


async def test_a_server_asks_for_our_certificate_and_gets_it(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=cert)
    tls.load_cert_chain(cert, key)
    tls.verify_mode = ssl.CERT_REQUIRED
    async with engine([], tls) as port:
        source = MetricsDataSource(scheme="https", client_cert_path=str(cert), client_key_path=str(key))
        scraper = scraper_of(source, port)
        await scraper.start()
        try:
            await until(lambda: "depth/mine" in shown(scraper))
        finally:
            await scraper.stop()
