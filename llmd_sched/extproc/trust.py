"""Whose word counts: headers that steer the scheduler are honoured only from trusted peers, and dropped otherwise.

A client that could set them would choose its own priority, model, deadline or model server.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping, Sequence

from llmd_sched import headers as names
from llmd_sched.errors import ConfigError

ANY = "any"
MAX_SOURCES = 256

SYSTEM = frozenset(
    (
        names.DESTINATION,
        names.DESTINATION_SUBSET,
        names.DESTINATION_SCORES,
        *names.FAIRNESS_ID,
        *names.OBJECTIVE,
        *names.MODEL_REWRITE,
        *names.TTFT_SLO_MS,
        *names.TPOT_SLO_MS,
        names.PREFILLER,
        names.ENCODERS,
        names.DATA_PARALLEL,
        names.TEST_SELECTION,
    )
)
"""Headers that only the operator's own proxies and gateways should set. Not among them are those that clients are
meant to send: the session's id, and its token, which is signed (unsigned ones belong here)."""


class TrustedSources:
    """``--trusted-header-source``: networks as CIDR, or ``any``. Raises ConfigError for what is neither."""

    def __init__(self, sources: Sequence[str]) -> None:
        where = "--trusted-header-source"
        if len(sources) > MAX_SOURCES:
            raise ConfigError(f"{len(sources)} networks are more than the {MAX_SOURCES} accepted", where)
        self.any = ANY in sources
        self._networks = []
        for source in sources:
            if source != ANY:
                try:
                    self._networks.append(ipaddress.ip_network(source))
                except ValueError as error:
                    raise ConfigError(f"{error}; accepted are {ANY!r} and networks as 10.0.0.0/8", where) from None

    def trusts(self, peer: str) -> bool:
        """``peer`` is an IP address, with or without a port. What is no address (a socket file, nothing) is trusted
        only where anybody is."""
        if self.any:
            return True
        try:
            address = ipaddress.ip_address(_host(peer))
        except ValueError:
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in network for network in self._networks)


def _host(peer: str) -> str:
    if peer.startswith("["):
        return peer[1:].partition("]")[0]
    return peer.partition(":")[0] if peer.count(":") == 1 else peer


def strip(headers: Mapping[str, str], untrusted: Collection[str] = SYSTEM) -> tuple[dict[str, str], list[str]]:
    """``headers`` (lower-case names) without the ``untrusted`` ones, and the names to remove before the request goes
    upstream, where a model server might believe them too."""
    removed = [name for name in headers if name in untrusted]
    return {name: value for name, value in headers.items() if name not in untrusted}, removed
