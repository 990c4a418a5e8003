"""Who asks: the tenant, from an API key or from a header that somebody trusted has set."""

from __future__ import annotations

import hashlib
import re
from ipaddress import ip_address, ip_network

from fastapi import Request

from batchgw.api.settings import ApiSettings
from batchgw.errors import Forbidden, InvalidKey, InvalidRequest
from batchgw.store.base import ApiKeys

MAX_TENANT_CHARS = 256
MAX_KEY_CHARS = 512
KEY_FORM = "expected is 'Authorization: Bearer sk-...'"

_BEARER = re.compile(rf"bearer +([\x21-\x7e]{{1,{MAX_KEY_CHARS}}}) *", re.IGNORECASE)
_TENANT = re.compile(rf"[\x20-\x7e]{{1,{MAX_TENANT_CHARS}}}")


def hashed(key: str) -> str:
    """What is stored of an API key. Keys are long and random, so a plain hash keeps them secret."""
    return hashlib.sha256(key.encode()).hexdigest()


class Auth:
    """A dependency of every route under /v1; leaves the tenant in ``request.state.tenant``."""

    def __init__(self, settings: ApiSettings, keys: ApiKeys) -> None:
        self._settings, self._keys = settings, keys
        self._trusted = [ip_network(cidr) for cidr in settings.trusted_cidrs]

    async def __call__(self, request: Request) -> None:
        required = self._settings.api_keys_required
        request.state.tenant = await self._of_key(request) if required else self._of_header(request)

    async def _of_key(self, request: Request) -> str:
        given = request.headers.get("authorization", "")
        if not given:
            raise InvalidKey(f"You did not provide an API key; {KEY_FORM}.")
        bearer = _BEARER.fullmatch(given)
        found = await self._keys.api_key(hashed(bearer[1])) if bearer else None
        if found is None:
            raise InvalidKey(f"Incorrect API key provided; {KEY_FORM} with a key that is not revoked.")
        return found.tenant

    def _of_header(self, request: Request) -> str:
        """The last value: a proxy that appends its own has the last word over what the client sent."""
        name = self._settings.tenant_header
        values = request.headers.getlist(name)
        tenant = values[-1].rpartition(",")[2].strip() if values else ""
        if not tenant or self._settings.trust_tenant_header == "never":
            return self._settings.default_tenant
        if self._settings.trust_tenant_header == "cidrs" and not self._trusts(request):
            raise Forbidden(f"The header {name} is not accepted from this address.", code="untrusted_tenant_header")
        if not _TENANT.fullmatch(tenant):
            raise InvalidRequest(f"The header {name} must be 1 to {MAX_TENANT_CHARS} printable ASCII characters.")
        return tenant

    def _trusts(self, request: Request) -> bool:
        try:
            peer = ip_address(request.client.host if request.client else "")
        except ValueError:
            return False
        peer = getattr(peer, "ipv4_mapped", None) or peer
        return any(peer in network for network in self._trusted)


def tenant_of(request: Request) -> str:
    tenant: str = request.state.tenant
    return tenant
