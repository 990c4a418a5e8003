"""The certificate of the ext_proc port: from a folder, or made up at start, as the reference does."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from llmd_sched.errors import ConfigError

VALID_DAYS = 3650


def certificate(folder: str) -> tuple[bytes, bytes]:
    """(private key, certificate chain) as PEM: ``tls.key`` and ``tls.crt`` of ``folder``, or self-signed without one.

    Raises ConfigError when the folder lacks them.
    """
    if not folder:
        return _self_signed()
    try:
        return (Path(folder, "tls.key").read_bytes(), Path(folder, "tls.crt").read_bytes())
    except OSError as e:
        raise ConfigError(f"--cert-path needs tls.key and tls.crt: {e.strerror}", str(e.filename)) from None


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
