"""TLS of the ext_proc and admin ports: certificates, their reload, and which versions and cipher suites are spoken.

grpc is imported where it is used, not here: it reads its cipher suites from the environment when it is first
imported, so ``TlsPolicy.announce`` has to come before.
"""

from __future__ import annotations

import datetime
import logging
import ssl
import sys
import threading
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from llmd_sched.errors import ConfigError

if TYPE_CHECKING:
    import grpc

T = TypeVar("T")

VALID_DAYS = 3650
KEY, CHAIN = "tls.key", "tls.crt"

TLS12_SUITES = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
}
"""IANA's name -> OpenSSL's. All others of TLS 1.2 are forbidden on HTTP/2 (RFC 9113, appendix A), which gRPC is."""

TLS13_SUITES = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
"""Always on: neither gRPC nor Python's ssl can choose among them."""

GRPC_SUITES = "GRPC_SSL_CIPHER_SUITES"
GRPC_TLS13_ONLY = "ECDHE-PSK-AES128-CBC-SHA"
"""gRPC for Python has no switch for the version (grpc/grpc#37305). A suite that needs a shared key, which is never
set, leaves TLS 1.2 with nothing to agree on."""


class TlsPolicy(msgspec.Struct, frozen=True):
    """What a client may speak."""

    tls13_only: bool = False
    suites: tuple[str, ...] = ()
    """OpenSSL's names of the TLS 1.2 suites, best first; empty = those the library prefers."""

    def announce(self, environ: MutableMapping[str, str]) -> None:
        """Tell gRPC, all of it in this process; call it before anything imports grpc. Raises ConfigError after."""
        wanted = GRPC_TLS13_ONLY if self.tls13_only else ":".join(self.suites)
        if not wanted or environ.get(GRPC_SUITES) == wanted:
            return
        if "grpc" in sys.modules:
            raise ConfigError(f"gRPC is already loaded; start the process with {GRPC_SUITES}={wanted}", "--tls-*")
        environ[GRPC_SUITES] = wanted

    def apply(self, context: ssl.SSLContext) -> None:
        """The same for a port that is not gRPC's."""
        context.minimum_version = ssl.TLSVersion.TLSv1_3 if self.tls13_only else ssl.TLSVersion.TLSv1_2
        if self.suites:
            context.set_ciphers(":".join(self.suites))


def read_policy(min_version: str = "", cipher_suites: str = "") -> TlsPolicy:
    """From ``--tls-min-version`` and ``--tls-cipher-suites`` (comma separated). Raises ConfigError for what neither
    library can keep, rather than keeping something else."""
    if min_version not in ("", "VersionTLS12", "VersionTLS13"):
        raise ConfigError(
            f"{min_version!r} cannot be served, gRPC speaks TLS 1.2 and 1.3; accepted: VersionTLS12, VersionTLS13",
            "--tls-min-version",
        )
    names = [name for part in cipher_suites.split(",") if (name := part.strip())]
    where = "--tls-cipher-suites"
    unknown = [name for name in names if name not in TLS12_SUITES and name not in TLS13_SUITES]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is none of {', '.join((*TLS12_SUITES, *TLS13_SUITES))}", where)
    named = {name for name in names if name in TLS13_SUITES}
    if named and len(named) < len(TLS13_SUITES):
        raise ConfigError(f"TLS 1.3 suites cannot be chosen: name all or none of {', '.join(TLS13_SUITES)}", where)
    suites = tuple(TLS12_SUITES[name] for name in names if name in TLS12_SUITES)
    return TlsPolicy(min_version == "VersionTLS13" or (bool(named) and not suites), suites)


class Reloaded(Generic[T]):
    """What is made of some files, and made again once they change; what cannot be made leaves the last one in place.

    Looked at when asked rather than by a timer, from any thread. ``make`` raises ConfigError: here at once, later it
    is logged, once per complaint, and tried again the next time.
    """

    def __init__(self, paths: Sequence[Path], make: Callable[[], T]) -> None:
        self._paths, self._make = paths, make
        self._lock = threading.Lock()
        self._complaint = ""
        self._stamps = self._look()
        self.value = make()

    def _look(self) -> list[tuple[int, ...]]:
        """Changes with the files, and when one is replaced (an updated Secret swaps a link). A missing one is ()."""
        return [_stamp(path) for path in self._paths]

    def refresh(self) -> bool:
        """Whether ``value`` is new."""
        with self._lock:
            stamps = self._look()  # before reading: what is written meanwhile is seen the next time
            if stamps == self._stamps:
                return False
            try:
                self.value = self._make()
            except ConfigError as error:
                if str(error) != self._complaint:
                    logging.getLogger(__name__).error("the last good one stays in use: %s", error)
                self._complaint = str(error)
                return False
            self._stamps, self._complaint = stamps, ""
            return True


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def grpc_credentials(folder: str, *, reload: bool = False) -> grpc.ServerCredentials:
    """For ``add_secure_port``, of grpc and of grpc.aio. With ``reload`` the folder is looked at whenever a client
    connects; connections that are open keep what they have. Raises ConfigError."""
    import grpc

    if not (folder and reload):
        return grpc.ssl_server_credentials([certificate(folder)])
    source = Reloaded(_files(folder), lambda: grpc.ssl_server_certificate_configuration([certificate(folder)]))
    # None means no change, which the stubs do not know.
    return grpc.dynamic_ssl_server_credentials(source.value, lambda: source.value if source.refresh() else None)  # type: ignore[arg-type, return-value]


def server_context(
    folder: str, policy: TlsPolicy, *, client_ca: str = "", flag: str = "--metrics-cert-dir"
) -> ssl.SSLContext:
    """For asyncio's servers; the folder, and the file of those who may sign clients' certificates, are looked at
    whenever a client connects. Raises ConfigError."""

    def made() -> ssl.SSLContext:
        certificate(folder, flag)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        policy.apply(context)
        _load(context, folder, client_ca, flag)
        return context

    if not folder:
        raise ConfigError("TLS here needs a folder with tls.key and tls.crt", flag)
    paths = [*_files(folder), *([Path(client_ca)] if client_ca else [])]
    live = _LiveContext(ssl.PROTOCOL_TLS_SERVER)
    live.source = Reloaded(paths, made)
    return live


def _load(context: ssl.SSLContext, folder: str, client_ca: str, flag: str) -> None:
    key, chain = _files(folder)
    try:
        context.load_cert_chain(chain, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls.key and tls.crt do not go together: {error}", flag) from None
    if client_ca:
        try:
            context.load_verify_locations(client_ca)
        except (OSError, ssl.SSLError) as error:
            reason = f"{client_ca} is not a readable file of PEM certificates: {error}"
            raise ConfigError(reason, "--metrics-client-ca-file") from None
        context.verify_mode = ssl.CERT_REQUIRED


class _LiveContext(ssl.SSLContext):
    """Stands for the newest context: each connection gets what is good when it is made."""

    source: Reloaded[ssl.SSLContext]

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        self.source.refresh()
        return self.source.value.wrap_bio(*args, **options)


def _files(folder: str) -> tuple[Path, Path]:
    return Path(folder, KEY), Path(folder, CHAIN)


def certificate(folder: str, flag: str = "--cert-path") -> tuple[bytes, bytes]:
    """(private key, certificate chain) as PEM: ``tls.key`` and ``tls.crt`` of ``folder``, or self-signed without one.

    Raises ConfigError when the folder lacks them, or holds what is no pair (half of it written, say).
    """
    if not folder:
        return _self_signed()
    try:
        key, chain = (path.read_bytes() for path in _files(folder))
    except OSError as e:
        raise ConfigError(f"{flag} needs tls.key and tls.crt: {e.strerror}", str(e.filename)) from None
    try:
        private = serialization.load_pem_private_key(key, password=None)
        leaf = x509.load_pem_x509_certificates(chain)[0]
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise ConfigError(f"{flag} needs an unencrypted PEM key and a PEM certificate chain: {e}", folder) from None
    if leaf.public_key() != private.public_key():
        raise ConfigError(f"{flag}: tls.key is not the key of the first certificate in tls.crt", folder)
    return key, chain


def _self_signed() -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "llmd-sched")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return pem, built.public_bytes(serialization.Encoding.PEM)
