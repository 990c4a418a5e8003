"""Every configuration we ship loads, resolves, and opens with what it is for."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import yaml

from llmd_sched.catalog import build_parsers, build_router, resolve
from llmd_sched.config import KIND, load
from tests.builders import as_builtins, asking, endpoints, pool_of, prompt, streamed

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(
    path
    for folder in ("configs", "llmd_sched")
    for path in (ROOT / folder).rglob("*.y*ml")
    if f"kind: {KIND}" in path.read_text()
)
every_config = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())


def test_the_local_configuration_is_among_them() -> None:
    assert ROOT / "llmd_sched" / "local.yaml" in SHIPPED


@every_config
def test_a_shipped_configuration_opens_with_a_comment(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first.split()) > 3


@every_config
def test_a_shipped_configuration_routes_a_request(path: Path) -> None:
    resolved = resolve(load(path.read_text()))
    router = build_router(resolved, pool_of(endpoints(3)), Random(0))
    assert build_parsers(resolved).parse("/v1/completions", b'{"model":"m","prompt":"x"}') is not None
    for i in range(20):
        decision = router.choose(asking(prompt(2, seed=i % 3), ttft_slo_ms=500.0), None, i / 100)
        router.finish(decision.ticket, streamed(), i / 100 + 0.005)
    assert not router.open
    assert not any(router.producer_errors.values()), router.last_producer_error


@every_config
def test_a_shipped_configuration_resolves_the_same_from_its_own_document(path: Path) -> None:
    resolved = resolve(load(path.read_text()))
    assert resolve(load(yaml.safe_dump(as_builtins(resolved.as_document())))) == resolved
