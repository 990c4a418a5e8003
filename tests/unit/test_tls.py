"""TLS settings: what is accepted is kept, and a bad certificate never takes the place of a good one."""

from __future__ import annotations

import os
import ssl
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from llmd_sched.errors import ConfigError
from llmd_sched.extproc.tls import (
    GRPC_SUITES,
    GRPC_TLS13_ONLY,
    TLS12_SUITES,
    TLS13_SUITES,
    Reloaded,
    TlsPolicy,
    certificate,
    read_policy,
    server_context,
)

ECDSA, RSA = "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384"
ALL_13 = ",".join(TLS13_SUITES)


def pair(folder: Path) -> tuple[bytes, bytes]:
    """A new certificate in the folder, each file replaced as a whole."""
    folder.mkdir(exist_ok=True)
    made = certificate("")
    for name, text in zip(("tls.key", "tls.crt"), made, strict=True):
        put(folder / name, text)
    return made


def put(path: Path, text: bytes) -> None:
    path.with_name("new").write_bytes(text)
    os.replace(path.with_name("new"), path)


@pytest.mark.parametrize(
    ("min_version", "suites", "policy"),
    [
        ("", "", TlsPolicy()),
        ("VersionTLS12", "", TlsPolicy()),
        ("VersionTLS13", "", TlsPolicy(tls13_only=True)),
        ("", f" {RSA} , {ECDSA},", TlsPolicy(suites=("ECDHE-RSA-AES256-GCM-SHA384", "ECDHE-ECDSA-AES128-GCM-SHA256"))),
        ("VersionTLS12", f"{ALL_13},{ECDSA}", TlsPolicy(suites=("ECDHE-ECDSA-AES128-GCM-SHA256",))),
        ("", ALL_13, TlsPolicy(tls13_only=True)),
        ("VersionTLS13", ECDSA, TlsPolicy(True, ("ECDHE-ECDSA-AES128-GCM-SHA256",))),
    ],
)
def test_flags_that_can_be_kept_are_read(min_version: str, suites: str, policy: TlsPolicy) -> None:
    assert read_policy(min_version, suites) == policy


@pytest.mark.parametrize(
    ("min_version", "suites", "complaint"),
    [
        ("VersionTLS10", "", "--tls-min-version: 'VersionTLS10' cannot be served, .*: VersionTLS12, VersionTLS13"),
        ("VersionTLS11", "", "'VersionTLS11' cannot be served"),
        ("1.3", "", "'1.3' cannot be served"),
        (
            "",
            "TLS_RSA_WITH_AES_128_CBC_SHA",
            "--tls-cipher-suites: 'TLS_RSA_WITH_AES_128_CBC_SHA' is none of TLS_ECDHE",
        ),
        ("", "ECDHE-RSA-AES128-GCM-SHA256", "'ECDHE-RSA-AES128-GCM-SHA256' is none of"),
        ("", f"{ECDSA},{TLS13_SUITES[0]}", "TLS 1.3 suites cannot be chosen: name all or none of TLS_AES_128"),
    ],
)
def test_flags_that_cannot_be_kept_are_refused_and_say_what_is_accepted(
    min_version: str, suites: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_policy(min_version, suites)


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (TlsPolicy(), None),
        (TlsPolicy(tls13_only=True), GRPC_TLS13_ONLY),
        (TlsPolicy(True, ("A",)), GRPC_TLS13_ONLY),
        (TlsPolicy(suites=("A", "B")), "A:B"),
    ],
)
def test_grpc_is_told_before_it_is_loaded(policy: TlsPolicy, told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "grpc", raising=False)
    environ = {"OTHER": "1"}
    policy.announce(environ)
    assert environ.get(GRPC_SUITES) == told


def test_too_late_for_grpc_is_an_error_unless_it_was_told_so_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", os)
    TlsPolicy().announce({})
    TlsPolicy(suites=("A",)).announce({GRPC_SUITES: "A"})
    with pytest.raises(ConfigError, match="gRPC is already loaded; start the process with GRPC_SSL_CIPHER_SUITES=A"):
        TlsPolicy(suites=("A",)).announce({GRPC_SUITES: "B"})


def test_every_suite_is_one_that_openssl_knows() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    TlsPolicy(suites=tuple(TLS12_SUITES.values())).apply(context)
    old = [one["name"] for one in context.get_ciphers() if one["protocol"] == "TLSv1.2"]
    assert sorted(old) == sorted(TLS12_SUITES.values())
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    TlsPolicy(tls13_only=True).apply(context)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3


def test_a_folder_s_pair_is_read_and_made_up_without_one(tmp_path: Path) -> None:
    made = pair(tmp_path)
    assert certificate(str(tmp_path)) == made
    assert certificate("") != certificate("")


def test_a_folder_without_a_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--cert-path needs tls\.key and tls\.crt: No such file"):
        certificate(str(tmp_path))
    with pytest.raises(ConfigError, match=r"--metrics-cert-dir needs tls\.key"):
        certificate(str(tmp_path), "--metrics-cert-dir")


def encrypted(key: bytes) -> bytes:
    loaded = serialization.load_pem_private_key(key, None)
    kind = serialization.BestAvailableEncryption(b"pass")
    return loaded.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, kind)


def test_what_is_no_pair_is_refused(tmp_path: Path) -> None:
    key, chain = pair(tmp_path)
    other_key, _ = certificate("")
    unreadable = "needs an unencrypted PEM key and a PEM certificate chain"
    for name, text, complaint in (
        ("tls.key", b"", unreadable),
        ("tls.key", key[:100], unreadable),
        ("tls.key", encrypted(key), unreadable),
        ("tls.crt", b"", unreadable),
        ("tls.crt", chain[: len(chain) // 2], unreadable),
        ("tls.key", other_key, "tls.key is not the key of the first certificate in tls.crt"),
    ):
        put(tmp_path / "tls.key", key)
        put(tmp_path / "tls.crt", chain)
        assert certificate(str(tmp_path)) == (key, chain)
        put(tmp_path / name, text)
        with pytest.raises(ConfigError, match=complaint):
            certificate(str(tmp_path))


def test_a_reload_takes_a_good_pair_and_keeps_it_through_bad_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair(tmp_path)
    files = [tmp_path / "tls.key", tmp_path / "tls.crt"]
    source = Reloaded(files, lambda: certificate(str(tmp_path)))
    assert not source.refresh()

    second = pair(tmp_path)
    assert source.refresh()
    assert not source.refresh()
    assert source.value == second

    third = certificate("")
    put(files[0], third[0])
    assert not source.refresh()
    assert not source.refresh()
    assert source.value == second
    assert [r.message.partition(": ")[0] for r in caplog.records] == ["the last good one stays in use"]

    files[1].unlink()
    assert not source.refresh()
    assert len(caplog.records) == 2

    put(files[1], third[1])
    assert source.refresh()
    assert source.value == third


def test_a_bad_pair_at_start_is_an_error(tmp_path: Path) -> None:
    pair(tmp_path)
    (tmp_path / "tls.crt").write_text("half")
    with pytest.raises(ConfigError):
        server_context(str(tmp_path), TlsPolicy())


def test_the_admin_port_s_files_are_named_when_they_are_missing_or_bad(tmp_path: Path) -> None:
    pair(tmp_path / "pair")
    with pytest.raises(ConfigError, match="--metrics-cert-dir: TLS here needs a folder"):
        server_context("", TlsPolicy(), client_ca="ca.crt")
    for text in (None, "no certificate"):
        if text is not None:
            (tmp_path / "ca.crt").write_text(text)
        with pytest.raises(ConfigError, match=r"--metrics-client-ca-file: .*ca\.crt is not a readable file"):
            server_context(str(tmp_path / "pair"), TlsPolicy(), client_ca=str(tmp_path / "ca.crt"))
