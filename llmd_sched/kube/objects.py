"""What is read of Kubernetes objects, and no more: pools, pods, objectives and rewrites from their JSON.

Each ``read_...`` takes one object as bytes. What cannot be used raises ValueError or msgspec.ValidationError, which
say the field; a pod that should get no traffic is None.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

import msgspec

from llmd_sched.errors import ConfigError
from llmd_sched.kube.selector import Selector, from_labels, parse
from llmd_sched.types import Endpoint

POOL_GROUP = "inference.networking.k8s.io"
NEW_GROUP, LEGACY_GROUP = "llm-d.ai", "inference.networking.x-k8s.io"
MAX_TARGET_PORTS = 8
ACTIVE_PORTS = "llm-d.ai/active-ports"
LEGACY_ACTIVE_PORTS = "inference.networking.k8s.io/active-ports"
MAX_ACTIVE_PORTS_CHARACTERS = 256

_POD_NAME = re.compile(r"(.+)-[a-z0-9]+-[a-z0-9]+")

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Meta(msgspec.Struct, frozen=True, rename="camel"):
    """``metadata``, as far as anybody here looks."""

    name: str = ""
    namespace: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    resource_version: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


class Ref(msgspec.Struct, frozen=True):
    """Which pool an object is for; one that names no group means ours."""

    name: str
    group: str | None = None
    kind: str = "InferencePool"


class PoolName(msgspec.Struct, frozen=True):
    """The pool this process picks endpoints of."""

    name: str
    namespace: str = "default"
    group: str = POOL_GROUP

    def is_meant(self, ref: Ref | None) -> bool:
        if ref is None or ref.name != self.name or ref.kind != "InferencePool":
            return False
        return ref.group is None or ref.group == self.group


class PickerRef(msgspec.Struct, frozen=True, rename="camel"):
    """The service that picks for the pool, and what the proxy does without it."""

    name: str = ""
    failure_mode: str = "FailClose"


class PoolSpec(msgspec.Struct, frozen=True):
    """Which pods are in the pool, and which of their ports serve."""

    selector: Selector
    ports: tuple[int, ...]
    app_protocol: str = "http"
    picker: PickerRef = PickerRef()


class Pod(msgspec.Struct, frozen=True):
    """A pod that may get traffic. ``active_ports``: the annotation's text, None without one."""

    name: str
    namespace: str
    address: str
    labels: dict[str, str]
    active_ports: str | None = None


class Objective(msgspec.Struct, frozen=True):
    name: str
    priority: int
    ref: Ref


class Target(msgspec.Struct, frozen=True, rename="camel"):
    """One model a rule may send to."""

    model_rewrite: str
    weight: int | None = None


class Rule(msgspec.Struct, frozen=True):
    """``models``: those it is for; None = every model."""

    models: tuple[str, ...] | None
    targets: tuple[Target, ...]


class Rewrite(msgspec.Struct, frozen=True):
    name: str
    created_at: str
    """RFC 3339 in UTC, so text order is time order."""
    rules: tuple[Rule, ...]
    ref: Ref | None


class _TargetPort(msgspec.Struct, frozen=True):
    number: Port


class _LabelSelector(msgspec.Struct, frozen=True, rename="camel"):
    match_labels: dict[str, str]


class _PoolSpec(msgspec.Struct, frozen=True, rename="camel"):
    selector: _LabelSelector
    target_ports: Annotated[tuple[_TargetPort, ...], msgspec.Meta(min_length=1, max_length=MAX_TARGET_PORTS)]
    app_protocol: str | None = None
    endpoint_picker_ref: PickerRef = PickerRef()


class _Pool(msgspec.Struct, frozen=True):
    spec: _PoolSpec


class _Condition(msgspec.Struct, frozen=True):
    type: str
    status: str


class _PodStatus(msgspec.Struct, frozen=True):
    pod_ip: str = msgspec.field(name="podIP", default="")
    conditions: tuple[_Condition, ...] | None = None


class _Pod(msgspec.Struct, frozen=True):
    metadata: Meta
    status: _PodStatus = _PodStatus()


class _ObjectiveSpec(msgspec.Struct, frozen=True, rename="camel"):
    pool_ref: Ref
    priority: int | None = None


class _Objective(msgspec.Struct, frozen=True):
    metadata: Meta
    spec: _ObjectiveSpec


class _ModelMatch(msgspec.Struct, frozen=True):
    value: str
    type: str = "Exact"


class _Match(msgspec.Struct, frozen=True):
    model: _ModelMatch | None = None


class _Rule(msgspec.Struct, frozen=True):
    matches: tuple[_Match, ...] | None = None
    targets: tuple[Target, ...] | None = None


class _RewriteSpec(msgspec.Struct, frozen=True, rename="camel"):
    pool_ref: Ref | None = None
    rules: tuple[_Rule, ...] | None = None


class _Rewrite(msgspec.Struct, frozen=True):
    metadata: Meta
    spec: _RewriteSpec


_pool = msgspec.json.Decoder(_Pool)
_pod = msgspec.json.Decoder(_Pod)
_objective = msgspec.json.Decoder(_Objective)
_rewrite = msgspec.json.Decoder(_Rewrite)


def read_pool(raw: bytes) -> PoolSpec:
    spec = _pool.decode(raw).spec
    ports = tuple(dict.fromkeys(port.number for port in spec.target_ports))
    selector = from_labels(spec.selector.match_labels)
    return PoolSpec(selector, ports, spec.app_protocol or "http", spec.endpoint_picker_ref)


def read_pod(raw: bytes) -> Pod | None:
    """None unless it is Ready, has an address and is not being deleted."""
    pod = _pod.decode(raw)
    meta, status = pod.metadata, pod.status
    ready = any(c.type == "Ready" and c.status == "True" for c in status.conditions or ())
    if not ready or not status.pod_ip or meta.deletion_timestamp:
        return None
    annotations = meta.annotations or {}
    active = annotations.get(ACTIVE_PORTS, annotations.get(LEGACY_ACTIVE_PORTS))
    if active is not None:
        active = active[:MAX_ACTIVE_PORTS_CHARACTERS]
    return Pod(meta.name, meta.namespace, status.pod_ip, meta.labels or {}, active)


def read_objective(raw: bytes) -> Objective:
    """Without a priority it is 0."""
    made = _objective.decode(raw)
    return Objective(made.metadata.name, made.spec.priority or 0, made.spec.pool_ref)


def read_rewrite(raw: bytes) -> Rewrite:
    made = _rewrite.decode(raw)
    rules = tuple(Rule(_models(rule), rule.targets) for rule in made.spec.rules or () if rule.targets)
    return Rewrite(made.metadata.name, made.metadata.creation_timestamp or "", rules, made.spec.pool_ref)


def _models(rule: _Rule) -> tuple[str, ...] | None:
    if not rule.matches:
        return None
    return tuple(m.model.value for m in rule.matches if m.model is not None and m.model.type == "Exact")


def active_ports(text: str) -> tuple[frozenset[int], tuple[str, ...]]:
    """``8000,8001`` -> the ports, and the entries that are none."""
    words = [word.strip() for word in text.split(",")]
    good = {int(w) for w in words if re.fullmatch("[0-9]{1,5}", w) and 1 <= int(w) <= 65535}
    return frozenset(good), tuple(w for w in words if not re.fullmatch("[0-9]{1,5}", w) or int(w) not in good)


def endpoints(pods: Iterable[Pod], spec: PoolSpec) -> list[Endpoint]:
    """One endpoint for each active target port of each pod in the pool, in the order of their names.

    The number in the name is the port's place among the pool's, so it stays when another port is switched off.
    """
    made = []
    for pod in sorted(pods, key=lambda p: (p.namespace, p.name)):
        if not spec.selector.matches(pod.labels):
            continue
        active = None if pod.active_ports is None else active_ports(pod.active_ports)[0]
        for rank, port in enumerate(spec.ports):
            if active is None or port in active:
                made.append(Endpoint(f"{pod.name}-rank-{rank}", pod.address, port, pod.namespace, pod.labels))
    return made


def standalone(selector: str, ports: Iterable[int], pod_name: str, namespace: str) -> tuple[PoolName, PoolSpec]:
    """A pool without an InferencePool: from ``--endpoint-selector``, ``--endpoint-target-ports`` and ``POD_NAME``.

    Raises ConfigError naming the flag or variable.
    """
    try:
        parsed = parse(selector)
    except ValueError as e:
        raise ConfigError(str(e), "--endpoint-selector") from None
    if not selector.strip():
        raise ConfigError("must not be empty: it would select every pod of the namespace", "--endpoint-selector")
    unique = tuple(dict.fromkeys(ports))
    if not 1 <= len(unique) <= MAX_TARGET_PORTS or not all(1 <= port <= 65535 for port in unique):
        raise ConfigError(
            f"got {', '.join(map(str, unique)) or 'none'}; accepted are 1 to {MAX_TARGET_PORTS} numbers from 1 to "
            "65535, separated by commas",
            "--endpoint-target-ports",
        )
    named = _POD_NAME.fullmatch(pod_name)
    if named is None:
        raise ConfigError(
            f"{pod_name!r} is not the name of a Deployment's pod, <name>-<hash>-<hash>; the pool is named after <name>",
            "POD_NAME",
        )
    return PoolName(named[1], namespace), PoolSpec(parsed, unique)
