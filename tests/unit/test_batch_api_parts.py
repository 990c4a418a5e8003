"""The API's small parts, each on its own."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import msgspec
import pytest

from batchgw import webhooks
from batchgw.api.bodies import expiry_of_form, refusal
from batchgw.api.files import disposition, range_of
from batchgw.api.forms import MAX_FIELD_BYTES, MAX_FIELDS, Event, Field, FileData, FileEnd, FileStart, FormReader, clean
from batchgw.api.metrics import template
from batchgw.api.pages import page_of
from batchgw.api.settings import ApiSettings, Quotas
from batchgw.api.windows import window_s
from batchgw.errors import InvalidRequest, MissingParameter, RangeNotSatisfiable
from batchgw.records import Delivery
from batchgw.seal import Seal
from batchgw.store.base import Page

KEY = base64.b64encode(b"k" * 32).decode()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("24h", 86400), ("7d", 604800), ("90m", 5400), ("1h30m", 5400), ("5s", 5), ("100ms", 0.1), ("1.5h", 5400),
        ("2w", 1209600), ("PT24H", 86400), ("P7D", 604800), ("P1DT12H", 129600), ("P1W", 604800), ("PT1H30M5S", 5405),
        ("PT0.5H", 1800), ("0h", 0),
    ],
)  # fmt: skip
def test_a_window_is_read(text: str, seconds: float) -> None:
    assert window_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "24",
        "h",
        "-1h",
        "24 h",
        "1h-30m",
        "P",
        "PT",
        "P1DT",
        "P1Y",
        "P1M",
        "1e3s",
        "24H",
        "٢h",
        "1" * 80 + "s",
        "nan",
    ],
)
def test_what_is_no_window_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(ValueError, match="24h"):
        window_s(text)


def form(*parts: tuple[str, bytes], boundary: str = "xyz", end: bytes = b"--") -> bytes:
    head = f"--{boundary}\r\nContent-Disposition: form-data; "
    body = b"".join(head.encode() + names.encode() + b"\r\n\r\n" + value + b"\r\n" for names, value in parts)
    return body + f"--{boundary}".encode() + end + b"\r\n"


def read(data: bytes, piece: int = 1 << 20) -> list[Event]:
    """Pieces of a file joined."""
    reader, found = FormReader("multipart/form-data; boundary=xyz"), list[Event]()
    for at in range(0, len(data), piece):
        for event in reader.feed(data[at : at + piece]):
            last = found[-1] if found else None
            if isinstance(event, FileData) and isinstance(last, FileData):
                found[-1] = FileData(last.data + event.data)
            else:
                found.append(event)
    reader.close()
    return found


@pytest.mark.parametrize("piece", [1, 3, 17, 4096])
def test_a_form_reads_alike_however_its_bytes_are_cut(piece: int) -> None:
    content = b"\r\n--xy" * 50 + b"\r\n--xy\r\n-" + bytes(range(256))
    data = form(('name="purpose"', b"batch"), ('name="file"; filename="a.jsonl"', content))
    assert read(data, piece) == [Field("purpose", "batch"), FileStart("file", "a.jsonl"), FileData(content), FileEnd()]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (form(('name="purpose"', b"batch"))[:-6], "closing boundary"),
        (form(('name="purpose"', b"x" * (MAX_FIELD_BYTES + 1))), "more than"),
        (form(*[('name="p"', b"x")] * (MAX_FIELDS + 1)), "fields"),
        (form(('name="purpose"', b"\xff")), "UTF-8"),
        (b"no form at all", "not valid"),
        (b"--xyz\r\n" + b"a" * 100_000, "not valid"),
        (b"--xyz\r\n" + b"a: b\r\n" * 1000, "not valid"),
    ],
)
def test_a_broken_form_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        read(data)


@pytest.mark.parametrize("kind", ["", "application/json", "multipart/form-data", "multipart/form-data; boundary="])
def test_another_content_type_is_refused_by_name(kind: str) -> None:
    with pytest.raises(InvalidRequest, match="multipart/form-data with a boundary"):
        FormReader(kind)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("a.jsonl", "a.jsonl"), ("../../etc/passwd", "passwd"), ("C:\\x\\b.jsonl", "b.jsonl"), ("/", ""), ("..", ""),
        ("a\r\nb\x00.txt", "ab.txt"), ("данные.jsonl", "данные.jsonl"), ("x" * 300, "x" * 255), (".", ""), ("", ""),
    ],
)  # fmt: skip
def test_a_filename_is_its_last_part_without_control_characters(given: str, kept: str) -> None:
    assert clean(given) == kept


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("a.jsonl", 'attachment; filename="a.jsonl"'),
        ('a".txt', "attachment; filename=\"a_.txt\"; filename*=UTF-8''a%22.txt"),
        ("ä.txt", "attachment; filename=\"_.txt\"; filename*=UTF-8''%C3%A4.txt"),
    ],
)
def test_a_filename_cannot_break_out_of_its_header(name: str, header: str) -> None:
    assert disposition(name) == header


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-9", (0, 10)), ("bytes=5-", (5, 100)), ("bytes=-10", (90, 100)), ("bytes=-1000", (0, 100)),
        ("bytes=90-1000", (90, 100)), ("bytes=99-99", (99, 100)), ("", None), ("bytes=-", None), ("bytes=9-5", None),
        ("bytes=0-1,5-6", None), ("lines=0-1", None), ("bytes=a-b", None),
    ],
)  # fmt: skip
def test_a_range_is_read_or_passed_over(header: str, expected: tuple[int, int] | None) -> None:
    assert range_of(header, 100) == expected


@pytest.mark.parametrize(
    ("header", "size"), [("bytes=100-", 100), ("bytes=200-300", 100), ("bytes=-0", 100), ("bytes=0-", 0)]
)
def test_a_range_beyond_the_end_is_refused_with_the_size(header: str, size: int) -> None:
    with pytest.raises(RangeNotSatisfiable) as refused:
        range_of(header, size)
    assert refused.value.headers["content-range"] == f"bytes */{size}"


@pytest.mark.parametrize(
    ("after", "cursor"), [(None, None), ("", None), ("0", 0), ("2", 2), ("file-1", "file-1"), ("1" * 12, "1" * 12)]
)
def test_a_cursor_is_an_id_or_a_number(after: str | None, cursor: str | int | None) -> None:
    assert page_of(after, 20, "asc") == Page(cursor, 20, descending=False)


def test_a_negative_offset_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="after"):
        page_of("-1", 20, "desc")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"expires_after[anchor]": "created_at"}, "expires_after[seconds]"),
        ({"expires_after[seconds]": "3600"}, "expires_after[anchor]"),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "expires_after.anchor"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"}, "expires_after.seconds"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "2592001"}, "expires_after.seconds"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "1h"}, "expires_after[seconds]"),
    ],
)
def test_an_expiry_that_is_none_is_refused_by_field(fields: dict[str, str], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        expiry_of_form(fields)
    assert refused.value.param == param


def test_an_expiry_is_seconds_or_nothing() -> None:
    assert expiry_of_form({}) is None
    assert expiry_of_form({"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}) == 3600


class _Asked(msgspec.Struct):
    name: str
    metadata: dict[str, str] = {}


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        (b"{}", MissingParameter, "name"),
        (b'{"name": 1}', InvalidRequest, "name"),
        (b'{"name": "a", "metadata": {"k": 1}}', InvalidRequest, "metadata[]"),
        (b"[]", InvalidRequest, None),
    ],
)
def test_a_refused_body_names_its_parameter(body: bytes, kind: type[InvalidRequest], param: str | None) -> None:
    with pytest.raises(msgspec.ValidationError) as wrong:
        msgspec.json.decode(body, type=_Asked)
    refused = refusal(str(wrong.value))
    assert (type(refused), refused.param) == (kind, param)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pass_through_headers": ("Authorization",)}, "headerKeys"),
        ({"pass_through_headers": ("COOKIE",)}, "headerKeys"),
        ({"pass_through_headers": ("Host",)}, "cannot be passed"),
        ({"pass_through_headers": ("a\r\nb",)}, "cannot be passed"),
        ({"header_keys": ("short",)}, "32"),
        ({"trust_tenant_header": "cidrs"}, "trustedCidrs"),
        ({"trusted_cidrs": ("10.0.0.1/8",)}, "trustedCidrs"),
        ({"tenant_header": "a b"}, "tenantHeader"),
        ({"default_tenant": ""}, "defaultTenant"),
        ({"max_line_count": 0}, "max_line_count"),
        ({"min_window_s": 10.0, "max_window_s": 5.0}, "minWindowS"),
        ({"extra_endpoints": ("//evil",)}, "extraEndpoints"),
        ({"extra_endpoints": ("http://x/y",)}, "extraEndpoints"),
        ({"quotas": Quotas(open_batches=-1)}, "quotas"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_start(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ApiSettings(**changes).check()


def test_settings_that_work_are_taken() -> None:
    ApiSettings().check()
    ApiSettings(
        pass_through_headers=("Authorization", "X-Team"), header_keys=(KEY,), extra_endpoints=("/v1/rerank",),
        trust_tenant_header="cidrs", trusted_cidrs=("10.0.0.0/8", "::1/128"),
    ).check()  # fmt: skip


def test_headers_are_sealed_and_open_again_with_an_older_key() -> None:
    other = base64.b64encode(b"o" * 32).decode()
    headers = {"Authorization": "Bearer secret"}
    sealed = Seal([KEY]).seal(headers)
    assert b"secret" not in sealed
    assert sealed != Seal([KEY]).seal(headers), "a nonce of its own each time"
    assert Seal([other, KEY]).open(sealed) == headers
    assert Seal([KEY]).open(Seal().seal({"X-Team": "a"})) == {"X-Team": "a"}


@pytest.mark.parametrize("change", [lambda s: s[:-1] + b"x", lambda s: b"\2" + s[1:], lambda s: b"", lambda s: s[:5]])
def test_a_seal_that_was_tampered_with_does_not_open(change: Any) -> None:
    sealed = change(Seal([KEY]).seal({"Authorization": "Bearer secret"}))
    with pytest.raises(ValueError, match="none of the configured keys"):
        Seal([KEY]).open(sealed)


def test_an_event_is_signed_as_the_standard_says() -> None:
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    headers = webhooks.sign(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_two_secrets_give_two_signatures() -> None:
    secrets = [base64.b64encode(bytes([i]) * 32).decode() for i in (1, 2)]
    signed = webhooks.sign(f"whsec_{secrets[0]} whsec_{secrets[1]}", "evt", 5, b"body")["webhook-signature"]
    macs = [hmac.digest(bytes([i]) * 32, b"evt.5.body", hashlib.sha256) for i in (1, 2)]
    assert signed == " ".join("v1," + base64.b64encode(mac).decode() for mac in macs)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_!!!", "whsec_" + base64.b64encode(b"short").decode()])
def test_a_secret_that_is_none_is_refused_and_not_repeated(secret: str) -> None:
    with pytest.raises(ValueError, match="whsec_") as refused:
        webhooks.sign(secret, "evt", 5, b"")
    assert secret in ("", "whsec_") or secret not in str(refused.value)


def test_the_payload_is_openais() -> None:
    delivery = Delivery(
        id="evt_1", webhook="w", batch_id="batch_1", tenant="t", event="batch.completed", created_s=5.7, due_s=6.0
    )
    assert json.loads(webhooks.payload(delivery)) == {
        "id": "evt_1", "object": "event", "created_at": 5, "type": "batch.completed", "data": {"id": "batch_1"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/v1/files", "/v1/files"), ("/v1/files/file-1", "/v1/files/{file_id}"), ("/health", "/health"),
        ("/v1/files/file-1/content", "/v1/files/{file_id}/content"),
        ("/v1/batches/b/cancel", "/v1/batches/{batch_id}/cancel"),
        ("/v1/uploads/u/parts", "/v1/uploads/{upload_id}/parts"), ("/v1/files/a/b/c", "other"), ("/", "other"),
        ("/v1/models", "other"), ("/wp-login.php", "other"),
    ],
)  # fmt: skip
def test_paths_of_metrics_are_templates(path: str, label: str) -> None:
    assert template(path) == label
