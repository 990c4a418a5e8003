"""What is read of Kubernetes objects: pools, pods and their ports, objectives, rewrites, and a pool made of flags."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from llmd_sched.errors import ConfigError
from llmd_sched.kube.objects import (
    ACTIVE_PORTS,
    LEGACY_ACTIVE_PORTS,
    Pod,
    PoolName,
    PoolSpec,
    Ref,
    active_ports,
    endpoints,
    read_objective,
    read_pod,
    read_pool,
    read_rewrite,
    standalone,
)
from llmd_sched.kube.selector import parse
from llmd_sched.types import Endpoint

READY = [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": "True"}]


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def pod(status: Any = None, **meta: Any) -> bytes:
    made = {"podIP": "10.0.0.1", "conditions": READY, "phase": "Running"} if status is None else status
    metadata = {"name": "p", "namespace": "n", "labels": {"app": "vllm"}, "uid": "u", "managedFields": [{}], **meta}
    return encoded({"metadata": metadata, "spec": {"containers": []}, "status": made})


def pool(ports: Any, **spec: Any) -> bytes:
    return encoded({"spec": {"selector": {"matchLabels": {"app": "vllm"}}, "targetPorts": ports, **spec}})


def test_a_ready_pod_is_kept_with_what_routing_needs() -> None:
    assert read_pod(pod()) == Pod("p", "n", "10.0.0.1", {"app": "vllm"})


@pytest.mark.parametrize(
    "raw",
    [
        pod(status={}),
        pod(status={"podIP": "10.0.0.1"}),
        pod(status={"podIP": "10.0.0.1", "conditions": None}),
        pod(status={"conditions": READY}),
        pod(status={"podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "False"}]}),
        pod(status={"podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "Unknown"}]}),
        pod(deletionTimestamp="2026-01-01T00:00:00Z"),
    ],
)
def test_a_pod_that_is_not_ready_or_is_terminating_gets_no_traffic(raw: bytes) -> None:
    assert read_pod(raw) is None


@pytest.mark.parametrize(
    ("annotations", "kept"),
    [
        (None, None),
        ({"other": "x"}, None),
        ({ACTIVE_PORTS: "8000"}, "8000"),
        ({LEGACY_ACTIVE_PORTS: "8001"}, "8001"),
        ({ACTIVE_PORTS: "8000", LEGACY_ACTIVE_PORTS: "8001"}, "8000"),
        ({ACTIVE_PORTS: "8" * 5000}, "8" * 256),
    ],
)
def test_the_active_ports_come_from_the_annotation_or_its_old_name(annotations: Any, kept: str | None) -> None:
    made = read_pod(pod(annotations=annotations))
    assert made is not None
    assert made.active_ports == kept


@pytest.mark.parametrize(
    ("text", "ports", "bad"),
    [
        ("8000", {8000}, ()),
        (" 8000 , 8001", {8000, 8001}, ()),
        ("", set(), ("",)),
        ("8000,", {8000}, ("",)),
        ("8000,x,0,65536,-1,8001abc", {8000}, ("x", "0", "65536", "-1", "8001abc")),
    ],
)
def test_entries_that_are_no_port_are_told_apart(text: str, ports: set[int], bad: tuple[str, ...]) -> None:
    assert active_ports(text) == (ports, bad)


def test_every_target_port_of_every_pod_is_an_endpoint_named_by_its_rank() -> None:
    spec = PoolSpec(parse("app=vllm"), (8000, 8001))
    one, two = Pod("a", "n", "10.0.0.1", {"app": "vllm"}), Pod("b", "n", "fd00::1", {"app": "vllm"})
    assert endpoints([two, one], spec) == [
        Endpoint("a-rank-0", "10.0.0.1", 8000, "n", {"app": "vllm"}),
        Endpoint("a-rank-1", "10.0.0.1", 8001, "n", {"app": "vllm"}),
        Endpoint("b-rank-0", "fd00::1", 8000, "n", {"app": "vllm"}),
        Endpoint("b-rank-1", "fd00::1", 8001, "n", {"app": "vllm"}),
    ]


@pytest.mark.parametrize(
    ("annotation", "names"),
    [("8001", ["p-rank-1"]), ("8001,9999,x", ["p-rank-1"]), ("9999", []), (None, ["p-rank-0", "p-rank-1"])],
)
def test_active_ports_restrict_the_endpoints_and_keep_their_rank(annotation: str | None, names: list[str]) -> None:
    spec = PoolSpec(parse("app=vllm"), (8000, 8001))
    made = endpoints([Pod("p", "n", "10.0.0.1", {"app": "vllm"}, annotation)], spec)
    assert [e.name for e in made] == names


def test_a_pod_the_selector_no_longer_matches_is_no_endpoint() -> None:
    assert endpoints([Pod("p", "n", "10.0.0.1", {"app": "other"})], PoolSpec(parse("app=vllm"), (8000,))) == []


def test_a_pool_says_its_selector_ports_protocol_and_picker() -> None:
    ref = {"name": "epp", "kind": "Service", "port": {"number": 9002}, "failureMode": "FailOpen"}
    ports = [{"number": 8000}, {"number": 8001}, {"number": 8000}]
    made = read_pool(pool(ports, appProtocol="kubernetes.io/h2c", endpointPickerRef=ref))
    assert (made.selector, made.ports, made.app_protocol) == (parse("app=vllm"), (8000, 8001), "kubernetes.io/h2c")
    assert (made.picker.name, made.picker.failure_mode) == ("epp", "FailOpen")


def test_a_pool_without_a_protocol_speaks_http_and_fails_closed() -> None:
    made = read_pool(pool([{"number": 8000}]))
    assert (made.app_protocol, made.picker.failure_mode) == ("http", "FailClose")


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (pool([]), "targetPorts"),
        (pool([{"number": 1 + i} for i in range(9)]), "targetPorts"),
        (pool([{"number": 0}]), r"targetPorts\[0\].number"),
        (pool([{"number": 70000}]), r"targetPorts\[0\].number"),
        (encoded({"spec": {"targetPorts": [{"number": 1}]}}), "selector"),
        (encoded({}), "spec"),
        (pool([{"number": 1}], selector={"matchLabels": {"a": "b c"}}), "label value"),
    ],
)
def test_a_pool_that_cannot_be_says_which_field(raw: bytes, says: str) -> None:
    with pytest.raises((msgspec.ValidationError, ValueError), match=says):
        read_pool(raw)


@pytest.mark.parametrize(
    ("priority", "is_"), [({"priority": 7}, 7), ({"priority": -3}, -3), ({}, 0), ({"priority": None}, 0)]
)
def test_an_objective_has_a_priority_and_none_means_zero(priority: dict[str, Any], is_: int) -> None:
    made = read_objective(encoded({"metadata": {"name": "o"}, "spec": {"poolRef": {"name": "pool"}, **priority}}))
    assert (made.name, made.priority, made.ref) == ("o", is_, Ref("pool"))


@pytest.mark.parametrize(
    ("ref", "meant"),
    [
        (None, False),
        (Ref("pool"), True),
        (Ref("other"), False),
        (Ref("pool", "inference.networking.k8s.io"), True),
        (Ref("pool", "llm-d.ai"), False),
        (Ref("pool", "", "InferencePool"), False),
        (Ref("pool", None, "Service"), False),
    ],
)
def test_a_reference_is_to_our_pool_when_name_kind_and_group_say_so(ref: Ref | None, meant: bool) -> None:
    assert PoolName("pool").is_meant(ref) is meant


def test_rules_without_targets_or_matches_are_read_as_what_they_are() -> None:
    rules = [
        {"targets": [{"modelRewrite": "generic"}]},
        {"matches": [], "targets": [{"modelRewrite": "generic-too"}]},
        {
            "matches": [{"model": {"type": "Exact", "value": "a"}}, {"model": {"value": "b"}}],
            "targets": [{"modelRewrite": "t", "weight": 3}],
        },
        {"matches": [{"model": {"type": "Prefix", "value": "c"}}], "targets": [{"modelRewrite": "t"}]},
        {"matches": [{"model": {"value": "d"}}], "targets": []},
        {"matches": [{"model": {"value": "e"}}]},
    ]
    meta = {"name": "r", "creationTimestamp": "2026-01-01T00:00:00Z"}
    made = read_rewrite(encoded({"metadata": meta, "spec": {"poolRef": {"name": "pool"}, "rules": rules}}))
    assert (made.name, made.created_at) == ("r", "2026-01-01T00:00:00Z")
    assert [rule.models for rule in made.rules] == [None, None, ("a", "b"), ()]
    assert made.rules[2].targets[0].weight == 3


def test_flags_make_a_pool_named_after_the_deployment() -> None:
    name, spec = standalone("app=vllm", [8000, 8001, 8000], "my-epp-6d8f9c7b5-x2x4z", "prod")
    assert (name, spec.ports, spec.selector) == (PoolName("my-epp", "prod"), (8000, 8001), parse("app=vllm"))


@pytest.mark.parametrize(
    ("selector", "ports", "pod_name", "path"),
    [
        ("app=a b", [1], "e-1-2", "--endpoint-selector"),
        ("", [1], "e-1-2", "--endpoint-selector"),
        ("a=b", [], "e-1-2", "--endpoint-target-ports"),
        ("a=b", range(1, 10), "e-1-2", "--endpoint-target-ports"),
        ("a=b", [0], "e-1-2", "--endpoint-target-ports"),
        ("a=b", [1], "", "POD_NAME"),
        ("a=b", [1], "epp-0", "POD_NAME"),
    ],
)
def test_flags_that_make_no_pool_are_named(selector: str, ports: list[int], pod_name: str, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        standalone(selector, ports, pod_name, "default")
    assert caught.value.path == path
