"""The REST client: tokens that change, refusals, limits, what a pod must have; and who may read the metrics."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from llmd_sched.errors import ConfigError
from llmd_sched.extproc.tls import certificate
from llmd_sched.kube import access, client
from llmd_sched.kube.access import MetricsAccess
from llmd_sched.kube.client import ApiClient, ApiError, in_cluster, namespace_of
from tests.integration.kube_api import NAMESPACE, PODS, KubeApi, pod_object, running

PATH = f"/api/v1/namespaces/{NAMESPACE}/pods"


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest_asyncio.fixture
async def api() -> AsyncIterator[KubeApi]:
    async with running() as (made, _):
        yield made


async def test_the_token_is_read_again_after_a_while_and_after_a_401(api: KubeApi, tmp_path: Path) -> None:
    file, clock = tmp_path / "token", Clock()
    file.write_text("first\n")
    made = ApiClient(f"http://127.0.0.1:{api.port}/", file, clock=clock)
    await made.get(PATH)
    file.write_text("second")
    await made.get(PATH)
    clock.now_s = client.TOKEN_EVERY_S
    await made.get(PATH)
    file.write_text("third")
    api.statuses = [401]
    with pytest.raises(ApiError, match="status 401: as the test wants it"):
        await made.get(PATH)
    await made.get(PATH)
    await made.close()
    assert [b.removeprefix("Bearer ") for b in api.bearers] == ["first", "first", "second", "second", "third"]


async def test_a_reply_beyond_the_limit_is_refused(api: KubeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client._bounded, "__defaults__", (1000,))
    await api.put(PODS, pod_object("a", "10.0.0.1", annotations={"big": "x" * 2000}))
    made = ApiClient(f"http://127.0.0.1:{api.port}")
    with pytest.raises(ApiError, match="more than 1000 bytes"):
        await made.get(PATH)
    await made.close()


async def test_a_server_that_is_not_there_is_a_connection_error() -> None:
    made = ApiClient("http://127.0.0.1:1")
    with pytest.raises(OSError, match="connect"):
        await made.get(PATH)
    await made.close()


def test_outside_a_cluster_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--endpoints-file") as caught:
        in_cluster({}, tmp_path)
    assert caught.value.path == "KUBERNETES_SERVICE_HOST"


def test_a_service_account_that_is_not_mounted_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="automountServiceAccountToken") as caught:
        in_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, tmp_path)
    assert caught.value.path == str(tmp_path)


@pytest.mark.parametrize(
    ("host", "url"), [("10.0.0.1", "https://10.0.0.1:6443"), ("fd00::1", "https://[fd00::1]:6443")]
)
def test_a_pod_finds_its_server(tmp_path: Path, host: str, url: str) -> None:
    (tmp_path / "token").write_text("t")
    (tmp_path / "ca.crt").write_bytes(certificate("")[1])
    made = in_cluster({"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": "6443"}, tmp_path)
    assert made._base_url == url


async def test_a_pod_trusts_its_cluster_authority_and_no_other(tmp_path: Path) -> None:
    key, chain = certificate("")
    (tmp_path / "token").write_text("t")
    (tmp_path / "key").write_bytes(key)
    (tmp_path / "ca.crt").write_bytes(chain)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "ca.crt", tmp_path / "key")
    api = KubeApi()
    await api.start(tls=tls)
    environ = {"KUBERNETES_SERVICE_HOST": "localhost", "KUBERNETES_SERVICE_PORT": str(api.port)}
    trusting = in_cluster(environ, tmp_path)
    assert b"items" in await trusting.get(PATH, {"limit": "1"})
    (tmp_path / "ca.crt").write_bytes(certificate("")[1])
    wary = in_cluster(environ, tmp_path)
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await wary.get(PATH)
    assert api.bearers == ["Bearer t"]
    for made in (trusting, wary):
        await made.close()
    await api.stop()


def test_the_namespace_is_the_variables_else_the_service_accounts(tmp_path: Path) -> None:
    assert namespace_of({}, tmp_path) == "default"
    (tmp_path / "namespace").write_text("from-account\n")
    assert namespace_of({}, tmp_path) == "from-account"
    assert namespace_of({"NAMESPACE": "named"}, tmp_path) == "named"


@pytest_asyncio.fixture
async def reviewed(api: KubeApi) -> AsyncIterator[tuple[KubeApi, MetricsAccess, Clock]]:
    api.tokens = {
        "by-name": {"username": "prometheus", "groups": ["g"]},
        "by-group": {"username": "x", "uid": "1", "groups": ["monitoring"], "extra": {"k": ["v"]}},
        "other": {"username": "somebody"},
    }
    api.readers = {"prometheus", "monitoring"}
    made, clock = ApiClient(f"http://127.0.0.1:{api.port}"), Clock()
    yield api, MetricsAccess(made, clock=clock), clock
    await made.close()


@pytest.mark.parametrize(
    ("token", "may", "requests"),
    [
        ("by-name", True, 2),
        ("by-group", True, 2),
        ("other", False, 2),
        ("unknown", False, 1),
        ("", False, 0),
        ("x" * (access.MAX_TOKEN_CHARACTERS + 1), False, 0),
    ],
)
async def test_a_token_may_read_when_its_user_may(
    reviewed: tuple[KubeApi, MetricsAccess, Clock], token: str, may: bool, requests: int
) -> None:
    api, made, _ = reviewed
    assert await made.may_read_metrics(token) is may
    assert await made.may_read_metrics(token) is may
    assert len(api.requests) == requests


async def test_answers_are_forgotten_in_time_and_refusals_sooner(
    reviewed: tuple[KubeApi, MetricsAccess, Clock],
) -> None:
    api, made, clock = reviewed
    assert await made.may_read_metrics("by-name")
    assert not await made.may_read_metrics("new")
    api.tokens["new"] = {"username": "prometheus"}
    clock.now_s = access.REFUSED_S
    assert await made.may_read_metrics("new")
    api.readers = set()
    assert await made.may_read_metrics("by-name")
    clock.now_s = access.ALLOWED_S
    assert not await made.may_read_metrics("by-name")


async def test_a_review_that_failed_is_a_refusal_that_is_not_remembered(
    reviewed: tuple[KubeApi, MetricsAccess, Clock],
) -> None:
    api, made, _ = reviewed
    api.statuses = [500]
    assert not await made.may_read_metrics("by-name")
    assert await made.may_read_metrics("by-name")


async def test_only_so_many_answers_are_remembered(
    reviewed: tuple[KubeApi, MetricsAccess, Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "MAX_ANSWERS", 3)
    api, made, _ = reviewed
    for i in range(10):
        await made.may_read_metrics(f"guess {i}")
    assert len(made._answers) == 3
    asked = len(api.requests)
    await made.may_read_metrics("guess 9")
    assert len(api.requests) == asked


async def test_more_reviews_at_once_than_the_limit_are_refused(
    reviewed: tuple[KubeApi, MetricsAccess, Clock],
) -> None:
    api, made, _ = reviewed
    made._asking = access.MAX_REVIEWS
    assert not await made.may_read_metrics("by-name")
    assert not api.requests
    made._asking -= 1
    assert await made.may_read_metrics("by-name")
