"""The manifests we ship: they parse, open with what they are for, and say to us what they seem to say."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from llmd_sched.kube.objects import PoolName, read_objective, read_pool, read_rewrite
from llmd_sched.kube.rewrites import snapshot
from llmd_sched.kube.selector import parse

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))


def documents(*kinds: str) -> list[dict[str, Any]]:
    every = [d for path in FILES for d in yaml.safe_load_all(path.read_text())]
    return [d for d in every if d["kind"] in kinds]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_manifest_opens_with_what_it_is_for_and_every_object_is_named(path: Path) -> None:
    assert path.read_text().startswith("# ")
    for document in yaml.safe_load_all(path.read_text()):
        assert document["apiVersion"]
        assert document["metadata"]["name"]


def test_the_pools_objects_are_of_the_pool_the_deployment_names() -> None:
    name = PoolName("vllm-pool")
    args = documents("Deployment")[0]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert f"--pool-name={name.name}" in args
    (pool,) = [read_pool(json.dumps(d).encode()) for d in documents("InferencePool")]
    objectives = [read_objective(json.dumps(d).encode()) for d in documents("InferenceObjective")]
    rewrites = [read_rewrite(json.dumps(d).encode()) for d in documents("InferenceModelRewrite")]
    assert (pool.selector, pool.ports) == (parse("app=vllm"), (8000,))
    assert all(name.is_meant(made.ref) for made in (*objectives, *rewrites))
    objects = snapshot(objectives, rewrites)
    assert objects.priority("interactive") == 100
    rng = Random(0)
    models = [found.model for found in (objects.rewrite("llama", rng) for _ in range(1000)) if found]
    assert 60 < models.count("llama-v2") < 150
    assert len(models) == 1000


def test_the_roles_allow_what_is_asked_of_the_server() -> None:
    rules = [rule for role in documents("Role", "ClusterRole") for rule in role["rules"]]
    allowed = {
        (group, resource, verb)
        for rule in rules
        for group in rule.get("apiGroups", ())
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    for verb in ("list", "watch"):
        assert ("", "pods", verb) in allowed
        assert ("inference.networking.k8s.io", "inferencepools", verb) in allowed
        for group in ("llm-d.ai", "inference.networking.x-k8s.io"):
            assert {(group, "inferenceobjectives", verb), (group, "inferencemodelrewrites", verb)} <= allowed
    assert {("coordination.k8s.io", "leases", verb) for verb in ("get", "create", "update")} <= allowed
    assert ("authentication.k8s.io", "tokenreviews", "create") in allowed
    assert ("authorization.k8s.io", "subjectaccessreviews", "create") in allowed
