"""The Envoy bootstrap for either data path, as one document. ``llmd-sched envoy-config`` prints it.

Numbers come from the contract (routing cluster, health checks) and from what the lean path needs: BUFFERED answers
413 beyond the connection's buffer limit, so that limit follows the largest body the scheduler accepts.

On the lean path a request with a body of known length costs one message each way: its headers are not sent, the few
that matter ride along with the body as attributes. Envoy then applies no header mutation, so the destination is read
from the dynamic metadata, and a buffer filter behind ext_proc holds the headers back until the body is answered. All
other requests (no body, unknown length, a model to be rewritten, headers not to be trusted) send their headers too.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import msgspec

from llmd_sched import headers as names
from llmd_sched.extproc.messages import ATTRIBUTES, PEER_ATTRIBUTE, header_attribute
from llmd_sched.extproc.reply import TAIL_BYTES
from llmd_sched.extproc.trust import SYSTEM

_TYPE = "type.googleapis.com/"
LB_CLUSTER, SCHED_CLUSTER, FALLBACK_CLUSTER = "model_servers", "scheduler", "fallback"
EXT_PROC_FILTER = "envoy.filters.http.ext_proc"
EXT_PROC_SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"


class EnvoySettings(msgspec.Struct, frozen=True, kw_only=True):
    """What differs from one Envoy to another."""

    path: str = "lean"
    """lean or duplex."""
    listen_host: str = "0.0.0.0"
    listen_port: int = 8081
    admin_port: int = 19000
    """0 leaves the admin interface out."""
    scheduler_host: str = "127.0.0.1"
    scheduler_port: int = 9002
    scheduler_tls: bool = False
    fail_open: bool = False
    """Let requests pass when the scheduler cannot be asked: to ``fallback`` in turn, or to Envoy's own 503 without."""
    fallback: tuple[tuple[str, int], ...] = ()
    """(host, port) of model servers that may be used without being chosen."""
    read_headers: tuple[str, ...] = ()
    """Request headers the scheduler's plugins look at, beyond those it always reads."""
    send_headers: bool = False
    """The scheduler sets request headers, so it is always sent them."""
    tell_peer: bool = False
    """Tell the scheduler the client's address (``--trusted-header-source``)."""
    max_body_bytes: int = 8 << 20
    message_timeout_s: float = 1000.0
    access_log_flush_s: float = 0.05


def bootstrap(settings: EnvoySettings) -> dict[str, Any]:
    """The whole document; ``json.dumps`` of it is a valid Envoy config file."""
    document: dict[str, Any] = {
        "static_resources": {
            "listeners": [_listener(settings)],
            "clusters": _clusters(settings),
        },
        "node": {"id": "llmd-envoy", "cluster": "llmd"},
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": _TYPE
                        + "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                        "max_active_downstream_connections": 50000,
                    },
                }
            ]
        },
    }
    if settings.admin_port:
        document["admin"] = {"address": _address("127.0.0.1", settings.admin_port)}
    return document


def render(settings: EnvoySettings) -> str:
    return json.dumps(bootstrap(settings), indent=2) + "\n"


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _listener(settings: EnvoySettings) -> dict[str, Any]:
    manager = {
        "@type": _TYPE + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "inference",
        "generate_request_id": True,
        "preserve_external_request_id": True,
        "stream_idle_timeout": "86400s",
        "request_timeout": "86400s",
        "common_http_protocol_options": {"headers_with_underscores_action": "REJECT_REQUEST"},
        "http2_protocol_options": {"max_concurrent_streams": 100},
        "route_config": {
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": _routes(settings)}],
        },
        # The destination is ours to say: left in, a client could have Envoy connect to any address it can reach.
        "early_header_mutation_extensions": [
            {
                "name": "envoy.http.early_header_mutation.header_mutation",
                "typed_config": {
                    "@type": _TYPE + "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
                    "mutations": [{"remove": names.DESTINATION}],
                },
            }
        ],
        "http_filters": _http_filters(settings),
    }
    if settings.path == "lean":
        manager["access_log"] = [_access_log(settings)]
    return {
        "name": "inference",
        "address": _address(settings.listen_host, settings.listen_port),
        "per_connection_buffer_limit_bytes": _buffer_limit(settings),
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _buffer_limit(settings: EnvoySettings) -> int:
    """Lean buffers the whole body; duplex streams it, and small buffers keep back-pressure close."""
    return settings.max_body_bytes + 65536 if settings.path == "lean" else 1 << 20


def _routes(settings: EnvoySettings) -> list[dict[str, Any]]:
    """Chosen requests go where they were sent. The route is looked up again once the scheduler has answered."""
    limits = {"timeout": "86400s", "idle_timeout": "86400s"}
    chosen: dict[str, Any] = {"match": {"prefix": "/"}, "route": {"cluster": LB_CLUSTER, **limits}}
    if not settings.fallback:
        lean = settings.path == "lean" and not settings.send_headers
        return [_body_only(chosen, settings), chosen] if lean else [chosen]
    chosen["match"]["headers"] = [{"name": names.DESTINATION, "present_match": True}]
    return [chosen, {"match": {"prefix": "/"}, "route": {"cluster": FALLBACK_CLUSTER, **limits}}]


def _body_only(route: dict[str, Any], settings: EnvoySettings) -> dict[str, Any]:
    """The same route for requests whose body alone tells enough: POST, of known length, no model to rewrite, and no
    header that may have to be taken off, as a stranger's is who steers the scheduler."""
    matches: list[dict[str, Any]] = [
        {"name": ":method", "string_match": {"exact": "POST"}},
        {"name": names.CONTENT_LENGTH, "range_match": {"start": 1, "end": 1 << 40}},
    ]
    absent = sorted(SYSTEM) if settings.tell_peer else names.MODEL_REWRITE
    matches += [{"name": name, "present_match": True, "invert_match": True} for name in absent]
    overrides = {"processing_mode": {**_LEAN_MODE, "request_header_mode": "SKIP"}}
    per_route = {"@type": _TYPE + "envoy.extensions.filters.http.ext_proc.v3.ExtProcPerRoute", "overrides": overrides}
    return {
        **route,
        "match": {"prefix": "/", "headers": matches},
        "typed_per_filter_config": {EXT_PROC_FILTER: per_route},
    }


def _clusters(settings: EnvoySettings) -> list[dict[str, Any]]:
    clusters = [_routing_cluster(settings), _scheduler_cluster(settings)]
    if settings.fallback:
        clusters.append(
            {
                "name": FALLBACK_CLUSTER,
                "type": "STRICT_DNS",
                "connect_timeout": "5s",
                "circuit_breakers": _circuit_breakers(),
                "load_assignment": _assignment(FALLBACK_CLUSTER, settings.fallback),
            }
        )
    return clusters


def _assignment(cluster: str, addresses: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    endpoints = [{"endpoint": {"address": _address(host, port)}} for host, port in addresses]
    return {"cluster_name": cluster, "endpoints": [{"lb_endpoints": endpoints}]}


def _http_filters(settings: EnvoySettings) -> list[dict[str, Any]]:
    """In request order; a reply passes them backwards, so Lua sees it before anything else could delay it."""
    filters = [_ext_proc(settings)]
    if settings.path == "lean":
        filters += [_buffer(settings), _lua()]
    filters.append(
        {
            "name": "envoy.filters.http.router",
            "typed_config": {
                "@type": _TYPE + "envoy.extensions.filters.http.router.v3.Router",
                "suppress_envoy_headers": True,
            },
        }
    )
    return filters


_LEAN_MODE = {
    "request_header_mode": "SEND",
    "request_body_mode": "BUFFERED",
    "request_trailer_mode": "SKIP",
    "response_header_mode": "SKIP",
    "response_body_mode": "NONE",
    "response_trailer_mode": "SKIP",
}
_DUPLEX_MODE = {
    "request_header_mode": "SEND",
    "request_body_mode": "FULL_DUPLEX_STREAMED",
    "request_trailer_mode": "SEND",
    "response_header_mode": "SEND",
    "response_body_mode": "FULL_DUPLEX_STREAMED",
    "response_trailer_mode": "SEND",
}


def _ext_proc(settings: EnvoySettings) -> dict[str, Any]:
    lean = settings.path == "lean"
    timeout = f"{settings.message_timeout_s:g}s"
    return {
        "name": EXT_PROC_FILTER,
        "typed_config": {
            "@type": _TYPE + "envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor",
            "grpc_service": {"envoy_grpc": {"cluster_name": SCHED_CLUSTER}, "timeout": "10s"},
            "failure_mode_allow": settings.fail_open,
            "message_timeout": timeout,
            "max_message_timeout": timeout,
            "processing_mode": _LEAN_MODE if lean else _DUPLEX_MODE,
            "request_attributes": _attributes(settings),
            "metadata_options": {
                "forwarding_namespaces": {"untyped": [names.NAMESPACE_SUBSET]},
                "receiving_namespaces": {"untyped": [names.NAMESPACE_LB, names.NAMESPACE_OURS]},
            },
            "mutation_rules": {"allow_all_routing": True},
        },
    }


def _attributes(settings: EnvoySettings) -> list[str]:
    """On the lean path the headers that matter, as its requests come without; see ``_body_only``."""
    headers = [*ATTRIBUTES.values(), *map(header_attribute, settings.read_headers)] if settings.path == "lean" else []
    return list(dict.fromkeys([*headers, *([PEER_ATTRIBUTE] if settings.tell_peer else [])]))


def _buffer(settings: EnvoySettings) -> dict[str, Any]:
    return {
        "name": "envoy.filters.http.buffer",
        "typed_config": {
            "@type": _TYPE + "envoy.extensions.filters.http.buffer.v3.Buffer",
            "max_request_bytes": settings.max_body_bytes,
        },
    }


def _lua() -> dict[str, Any]:
    source = resources.files("llmd_sched.extproc").joinpath("reply.lua").read_text()
    return {
        "name": "envoy.filters.http.lua",
        "typed_config": {
            "@type": _TYPE + "envoy.extensions.filters.http.lua.v3.Lua",
            "default_source_code": {"inline_string": f"local TAIL_BYTES = {TAIL_BYTES // 2}\n{source}"},
        },
    }


def _access_log(settings: EnvoySettings) -> dict[str, Any]:
    return {
        "name": "envoy.access_loggers.http_grpc",
        "typed_config": {
            "@type": _TYPE + "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
            "common_config": {
                "log_name": "llmd",
                "transport_api_version": "V3",
                "grpc_service": {"envoy_grpc": {"cluster_name": SCHED_CLUSTER}},
                "buffer_flush_interval": f"{settings.access_log_flush_s:g}s",
                "buffer_size_bytes": 65536,
            },
        },
    }


def _routing_cluster(settings: EnvoySettings) -> dict[str, Any]:
    return {
        "name": LB_CLUSTER,
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "5s",
        "per_connection_buffer_limit_bytes": _buffer_limit(settings),
        "original_dst_lb_config": _destination(settings),
        "circuit_breakers": _circuit_breakers(),
    }


def _circuit_breakers() -> dict[str, Any]:
    """Without these Envoy refuses what is beyond 1024 at once; for the scheduler that is all who stream or wait."""
    limit = 40000
    thresholds = {"max_connections": limit, "max_pending_requests": limit, "max_requests": limit, "max_retries": 1024}
    return {"thresholds": [thresholds]}


def _destination(settings: EnvoySettings) -> dict[str, Any]:
    """Where Envoy reads the chosen ``ip:port``: header and metadata say the same, and only metadata always arrives."""
    if settings.path == "lean":
        return {"metadata_key": {"key": names.NAMESPACE_LB, "path": [{"key": names.DESTINATION}]}}
    return {"use_http_header": True, "http_header_name": names.DESTINATION}


def _scheduler_cluster(settings: EnvoySettings) -> dict[str, Any]:
    cluster: dict[str, Any] = {
        "name": SCHED_CLUSTER,
        "type": "STRICT_DNS",
        "connect_timeout": "5s",
        "circuit_breakers": _circuit_breakers(),
        "per_connection_buffer_limit_bytes": _buffer_limit(settings),
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": _TYPE + "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {
                    "http2_protocol_options": {
                        "initial_stream_window_size": 1 << 20,
                        "initial_connection_window_size": 16 << 20,
                    }
                },
            }
        },
        "health_checks": [
            {
                "timeout": "2s",
                "interval": "10s",
                "no_traffic_interval": "1s",
                "unhealthy_interval": "0.5s",
                "healthy_edge_interval": "0.25s",
                "unhealthy_threshold": 3,
                "healthy_threshold": 2,
                "grpc_health_check": {"service_name": EXT_PROC_SERVICE},
            }
        ],
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "load_assignment": _assignment(SCHED_CLUSTER, ((settings.scheduler_host, settings.scheduler_port),)),
    }
    if settings.scheduler_tls:
        cluster["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": _TYPE + "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "common_tls_context": {"alpn_protocols": ["h2"]},
            },
        }
    return cluster
