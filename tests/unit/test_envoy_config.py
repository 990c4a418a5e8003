"""The Envoy bootstrap documents of both data paths. That Envoy itself accepts them is tests/acceptance's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from llmd_sched.extproc.envoy import EXT_PROC_SERVICE, EnvoySettings, bootstrap, render
from llmd_sched.extproc.reply import TAIL_BYTES
from llmd_sched.extproc.server import EXT_PROC

PATHS = ("lean", "duplex")


def document(path: str = "lean", **fields: Any) -> dict[str, Any]:
    return bootstrap(EnvoySettings(path=path, **fields))


def manager(doc: dict[str, Any]) -> dict[str, Any]:
    return doc["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]


def http_filter(doc: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [f for f in manager(doc)["http_filters"] if f["name"] == f"envoy.filters.http.{name}"]
    return found["typed_config"]


def cluster(doc: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [c for c in doc["static_resources"]["clusters"] if c["name"] == name]
    return found


def endpoint(doc: dict[str, Any]) -> dict[str, Any]:
    assigned = cluster(doc, "scheduler")["load_assignment"]["endpoints"][0]["lb_endpoints"][0]
    return assigned["endpoint"]["address"]["socket_address"]


def values_of(node: Any, key: str) -> Iterator[Any]:
    """Every value under this key, wherever it stands."""
    if isinstance(node, dict):
        if key in node:
            yield node[key]
        for value in node.values():
            yield from values_of(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from values_of(value, key)


def test_the_lean_path_buffers_the_request_and_sends_no_response() -> None:
    assert http_filter(document("lean"), "ext_proc")["processing_mode"] == {
        "request_header_mode": "SEND",
        "request_body_mode": "BUFFERED",
        "request_trailer_mode": "SKIP",
        "response_header_mode": "SKIP",
        "response_body_mode": "NONE",
        "response_trailer_mode": "SKIP",
    }


def test_the_duplex_path_sends_everything() -> None:
    assert http_filter(document("duplex"), "ext_proc")["processing_mode"] == {
        "request_header_mode": "SEND",
        "request_body_mode": "FULL_DUPLEX_STREAMED",
        "request_trailer_mode": "SEND",
        "response_header_mode": "SEND",
        "response_body_mode": "FULL_DUPLEX_STREAMED",
        "response_trailer_mode": "SEND",
    }


def test_only_the_lean_path_has_lua_and_an_access_log() -> None:
    lean = [f["name"].rpartition(".")[2] for f in manager(document("lean"))["http_filters"]]
    duplex = [f["name"].rpartition(".")[2] for f in manager(document("duplex"))["http_filters"]]
    assert lean == ["ext_proc", "buffer", "lua", "router"]
    assert duplex == ["ext_proc", "router"]
    (log,) = manager(document("lean"))["access_log"]
    assert log["typed_config"]["common_config"]["grpc_service"]["envoy_grpc"]["cluster_name"] == "scheduler"
    assert "access_log" not in manager(document("duplex"))


def test_the_lua_filter_is_the_shipped_source_with_its_tail_length() -> None:
    source = http_filter(document("lean"), "lua")["default_source_code"]["inline_string"]
    first, _, rest = source.partition("\n")
    assert first == f"local TAIL_BYTES = {TAIL_BYTES // 2}"
    assert "function envoy_on_response(handle)" in rest


DESTINATION = {
    "lean": {"metadata_key": {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint"}]}},
    "duplex": {"use_http_header": True, "http_header_name": "x-gateway-destination-endpoint"},
}


@pytest.mark.parametrize("path", PATHS)
def test_requests_go_where_the_destination_says(path: str) -> None:
    routing = cluster(document(path), "model_servers")
    assert (routing["type"], routing["lb_policy"]) == ("ORIGINAL_DST", "CLUSTER_PROVIDED")
    assert routing["original_dst_lb_config"] == DESTINATION[path]
    (host,) = manager(document(path))["route_config"]["virtual_hosts"]
    assert {r["route"]["cluster"] for r in host["routes"]} == {"model_servers"}


def test_on_the_lean_path_only_a_post_of_known_length_keeps_its_headers_back() -> None:
    (host,) = manager(document("lean"))["route_config"]["virtual_hosts"]
    short, other = host["routes"]
    (override,) = short["typed_per_filter_config"].values()
    assert override["overrides"]["processing_mode"]["request_header_mode"] == "SKIP"
    matched = {m["name"]: m for m in short["match"]["headers"]}
    assert matched[":method"]["string_match"] == {"exact": "POST"}
    assert matched["content-length"]["range_match"]["start"] == 1
    assert matched["x-llm-d-model-name-rewrite"]["invert_match"] is True
    assert "typed_per_filter_config" not in other
    assert other["match"] == {"prefix": "/"}


def test_with_a_fallback_only_chosen_requests_go_to_the_routing_cluster() -> None:
    doc = document("lean", fail_open=True, fallback=(("10.0.0.1", 8000), ("10.0.0.2", 8001)))
    (host,) = manager(doc)["route_config"]["virtual_hosts"]
    chosen, rest = host["routes"]
    assert chosen["match"]["headers"] == [{"name": "x-gateway-destination-endpoint", "present_match": True}]
    assert (chosen["route"]["cluster"], rest["route"]["cluster"]) == ("model_servers", "fallback")
    endpoints = cluster(doc, "fallback")["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert [e["endpoint"]["address"]["socket_address"]["port_value"] for e in endpoints] == [8000, 8001]


@pytest.mark.parametrize("path", PATHS)
def test_long_replies_are_not_cut_off(path: str) -> None:
    doc = document(path)
    route = manager(doc)["route_config"]["virtual_hosts"][0]["routes"][0]["route"]
    assert (route["timeout"], route["idle_timeout"]) == ("86400s", "86400s")
    assert http_filter(doc, "ext_proc")["message_timeout"] == "1000s"


@pytest.mark.parametrize("max_body_bytes", [1024, 8 << 20, 100 << 20])
def test_the_lean_path_can_buffer_the_largest_body(max_body_bytes: int) -> None:
    doc = document("lean", max_body_bytes=max_body_bytes)
    limits = list(values_of(doc, "per_connection_buffer_limit_bytes"))
    assert len(limits) == 3
    assert all(limit > max_body_bytes for limit in limits)


def test_the_duplex_path_needs_no_large_buffers() -> None:
    limits = set(values_of(document("duplex", max_body_bytes=100 << 20), "per_connection_buffer_limit_bytes"))
    assert all(limit <= 1 << 20 for limit in limits)


@pytest.mark.parametrize("path", PATHS)
def test_the_scheduler_is_health_checked_by_the_name_it_answers(path: str) -> None:
    (check,) = cluster(document(path), "scheduler")["health_checks"]
    assert check["grpc_health_check"]["service_name"] == EXT_PROC_SERVICE == EXT_PROC


@pytest.mark.parametrize("path", PATHS)
def test_a_scheduler_that_is_back_is_used_again_within_a_second(path: str) -> None:
    """Of two good checks the second waits for ``healthy_edge_interval``: ``interval``, so 10 s, when not given."""
    (check,) = cluster(document(path), "scheduler")["health_checks"]
    waits_s = [float(check[k].removesuffix("s")) for k in ("unhealthy_interval", "healthy_edge_interval")]
    assert sum(waits_s) * check["healthy_threshold"] / 2 <= 1.0


@pytest.mark.parametrize("path", PATHS)
def test_tls_to_the_scheduler_only_when_asked_for(path: str) -> None:
    assert "transport_socket" not in cluster(document(path), "scheduler")
    tls = cluster(document(path, scheduler_tls=True), "scheduler")["transport_socket"]
    assert tls["typed_config"]["@type"].endswith("UpstreamTlsContext")
    alpn = tls["typed_config"]["common_tls_context"]["alpn_protocols"]
    assert alpn == ["h2"], "gRPC servers refuse a handshake without it, and health checks do not offer it by themselves"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fail_open", [False, True])
def test_it_fails_closed_unless_told_otherwise(path: str, fail_open: bool) -> None:
    assert http_filter(document(path, fail_open=fail_open), "ext_proc")["failure_mode_allow"] is fail_open
    assert http_filter(document(path), "ext_proc")["failure_mode_allow"] is False


@pytest.mark.parametrize("path", PATHS)
def test_only_the_subset_hint_is_sent_and_only_our_metadata_is_taken(path: str) -> None:
    options = http_filter(document(path), "ext_proc")["metadata_options"]
    assert options["forwarding_namespaces"] == {"untyped": ["envoy.lb.subset_hint"]}
    assert options["receiving_namespaces"] == {"untyped": ["envoy.lb", "llmd"]}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fd00::7", "scheduler.local"])
def test_hosts_stand_without_brackets(path: str, host: str) -> None:
    doc = document(path, listen_host=host, listen_port=80, scheduler_host=host, scheduler_port=81)
    listener = doc["static_resources"]["listeners"][0]
    assert listener["address"]["socket_address"] == {"address": host, "port_value": 80}
    assert endpoint(doc) == {"address": host, "port_value": 81}


def test_the_admin_interface_is_local_and_can_be_left_out() -> None:
    assert document(admin_port=19000)["admin"]["address"]["socket_address"] == {
        "address": "127.0.0.1",
        "port_value": 19000,
    }
    assert "admin" not in document(admin_port=0)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_printed_is_the_document(path: str) -> None:
    settings = EnvoySettings(path=path, scheduler_tls=True, message_timeout_s=0.5, access_log_flush_s=0.25)
    text = render(settings)
    assert json.loads(text) == bootstrap(settings)
    assert text.endswith("}\n")
    assert '"message_timeout": "0.5s"' in text


@pytest.mark.parametrize("path", PATHS)
def test_no_cluster_keeps_envoys_own_limit_of_1024_requests_at_once(path: str) -> None:
    doc = document(path, fallback=(("10.0.0.1", 8000),))
    for name in ("model_servers", "scheduler", "fallback"):
        (limits,) = cluster(doc, name)["circuit_breakers"]["thresholds"]
        assert {limits[f"max_{what}"] for what in ("connections", "pending_requests", "requests")} == {40000}
