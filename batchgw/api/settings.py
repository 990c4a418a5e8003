"""What the API is configured with."""

from __future__ import annotations

import re
from ipaddress import ip_network
from typing import Literal

import msgspec

from batchgw.seal import Seal

MIB = 1 << 20
DAY_S = 24 * 3600
EXPIRY_S = (3600, 30 * DAY_S)
"""What ``expires_after`` may ask for."""

SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "x-api-key", "api-key"})
OWN_HEADERS = frozenset(
    {"connection", "content-encoding", "content-length", "content-type", "expect", "host", "keep-alive", "te"}
    | {"trailer", "transfer-encoding", "upgrade", "x-request-id", "traceparent"}
)
"""Of the connection, or made by the gateway itself: never passed through."""
_PATH = re.compile(r"(?:/[A-Za-z0-9._~:@!$&'()*+,;=-]+)+")
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")


class Quotas(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Per tenant; 0 is no limit. Checked before work is accepted: what comes at the same moment may overshoot."""

    open_batches: int = 0
    queued_lines: int = 0
    stored_bytes: int = 0

    def check(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) < 0:
                raise ValueError(f"quotas: {name} must be 0 (no limit) or more")


class ApiSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Sizes in bytes, times in seconds.

    ``trust_tenant_header``: whose tenant header is believed: everybody's (a gateway that sets it stands in front),
    that of peers within ``trusted_cidrs``, or nobody's. With ``api_keys_required`` the key alone says the tenant.
    ``header_keys``: keys that ``pass_through_headers`` are encrypted with at rest (see ``Seal``); headers that carry
    credentials are refused without one.
    """

    tenant_header: str = "X-MaaS-Username"
    default_tenant: str = "default"
    trust_tenant_header: Literal["always", "cidrs", "never"] = "always"
    trusted_cidrs: tuple[str, ...] = ()
    api_keys_required: bool = False

    max_batch_file_bytes: int = 200 * MIB
    max_file_bytes: int = 512 * MIB
    max_line_count: int = 50_000
    max_line_bytes: int = 64 * MIB
    max_part_bytes: int = 64 * MIB
    max_body_bytes: int = MIB
    batch_file_expires_after_s: int | None = 30 * DAY_S
    file_expires_after_s: int | None = None
    upload_expires_after_s: int = 3600
    min_window_s: float = 1.0
    max_window_s: float = 30.0 * DAY_S
    extra_endpoints: tuple[str, ...] = ()
    quotas: Quotas = Quotas()

    pass_through_headers: tuple[str, ...] = ()
    header_keys: tuple[str, ...] = ()

    read_idle_s: float = 60.0
    """A client may pause for as long while it sends, or while it reads."""
    request_timeout_s: float = 3600.0
    """Any request, a slow upload of the largest file included."""

    def check(self) -> None:
        self.quotas.check()
        self._check_tenants()
        self._check_headers()
        positive = [name for name in self.__struct_fields__ if name.startswith(("max_", "min_", "read_", "request_"))]
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.min_window_s > self.max_window_s:
            raise ValueError(f"minWindowS {self.min_window_s} must not exceed maxWindowS {self.max_window_s}")
        for path in self.extra_endpoints:
            if not _PATH.fullmatch(path):
                raise ValueError(f"extraEndpoints: {path!r} must be an absolute path such as /v1/rerank")

    def _check_tenants(self) -> None:
        if not _TOKEN.fullmatch(self.tenant_header):
            raise ValueError(f"tenantHeader: {self.tenant_header!r} is not a header name")
        if not self.default_tenant:
            raise ValueError("defaultTenant must not be empty")
        for cidr in self.trusted_cidrs:
            try:
                ip_network(cidr)
            except ValueError as e:
                raise ValueError(f"trustedCidrs: {e}; expected is a network such as 10.0.0.0/8") from None
        if self.trust_tenant_header == "cidrs" and not self.trusted_cidrs:
            raise ValueError("trustTenantHeader cidrs needs trustedCidrs")

    def _check_headers(self) -> None:
        Seal(self.header_keys)
        for name in self.pass_through_headers:
            if not _TOKEN.fullmatch(name) or name.lower() in OWN_HEADERS:
                raise ValueError(f"passThroughHeaders: {name!r} cannot be passed through")
            if name.lower() in SECRET_HEADERS and not self.header_keys:
                raise ValueError(
                    f"passThroughHeaders: {name} holds users' credentials, stored only encrypted: set headerKeys"
                )
