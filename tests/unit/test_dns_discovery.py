"""Endpoints from DNS: every address is one, a name that does not resolve changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

import msgspec
import pytest

from llmd_sched.pool import dns
from llmd_sched.pool.dns import DnsDiscovery, DnsWatcher
from llmd_sched.pool.pool import Pool
from llmd_sched.types import Endpoint

PARAMS = DnsDiscovery(host="vllm", port=8000)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What names resolve to; a missing one does not."""
    known: dict[str, list[str]] = {}

    async def getaddrinfo(self: object, host: str, *args: object, **kwargs: object) -> list[tuple[object, ...]]:
        if host not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return [(0, 0, 0, "", (address, 0)) for address in known[host]]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return known


async def after(monkeypatch: pytest.MonkeyPatch, watcher: DnsWatcher, *steps: Callable[[], object]) -> list[list[str]]:
    """Members after the start and after a refresh that follows each step; time is not waited for."""
    seen: list[list[str]] = []
    waiting = list(steps)

    async def sleep(seconds: float) -> None:
        assert seconds == 5.0
        seen.append([e.hostport for e in watcher.pool.endpoints])
        if not waiting:
            raise asyncio.CancelledError
        waiting.pop(0)()

    monkeypatch.setattr(dns.asyncio, "sleep", sleep)
    await watcher._refresh()
    with contextlib.suppress(asyncio.CancelledError):
        await watcher._run()
    return seen


async def test_every_address_of_the_name_is_an_endpoint(names: dict[str, list[str]]) -> None:
    names["vllm"] = ["10.0.0.2", "10.0.0.1", "10.0.0.2", "fd00::1"]
    pool = Pool()
    watcher = DnsWatcher(msgspec.structs.replace(PARAMS, labels={"a": "b"}, namespace="n"), pool)
    await watcher.start()
    await watcher.stop()
    assert pool.endpoints == [
        Endpoint("vllm-10.0.0.1", "10.0.0.1", 8000, "n", {"a": "b"}),
        Endpoint("vllm-10.0.0.2", "10.0.0.2", 8000, "n", {"a": "b"}),
        Endpoint("vllm-fd00::1", "fd00::1", 8000, "n", {"a": "b"}),
    ]


async def test_addresses_that_come_and_go_are_followed(
    names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names["vllm"] = ["10.0.0.1"]
    seen = await after(
        monkeypatch,
        DnsWatcher(PARAMS, Pool()),
        lambda: names.update(vllm=["10.0.0.2", "10.0.0.1"]),
        lambda: names.update(vllm=["10.0.0.2"]),
        names.clear,
        lambda: names.update(vllm=["10.0.0.3"]),
    )
    both = ["10.0.0.1:8000", "10.0.0.2:8000"]
    assert seen == [both[:1], both, both[1:], both[1:], ["10.0.0.3:8000"]]


async def test_a_name_that_resolves_only_later_is_said_once_and_then_used(
    names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = DnsWatcher(PARAMS, Pool())
    seen = await after(monkeypatch, watcher, *[lambda: None] * 3, lambda: names.update(vllm=["10.0.0.1"]))
    assert seen == [[], [], [], [], ["10.0.0.1:8000"]]
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said.startswith("vllm: does not resolve: ")
    assert "every 5s" in said


async def test_the_same_addresses_in_another_order_change_nothing(
    names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names["vllm"] = ["10.0.0.1", "10.0.0.2"]
    watcher, told = DnsWatcher(PARAMS, Pool()), []
    watcher.pool.on_change.append(told.append)
    await after(monkeypatch, watcher, names["vllm"].reverse, lambda: None)
    assert len(told) == 1


async def test_more_addresses_than_the_limit_are_cut_and_said(
    names: dict[str, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    names["vllm"] = [f"10.0.{i // 250}.{i % 250}" for i in range(dns.MAX_ADDRESSES + 1)]
    watcher = DnsWatcher(PARAMS, Pool())
    await watcher._refresh()
    await watcher._refresh()
    assert len(watcher.pool) == dns.MAX_ADDRESSES
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"host": ""}, "host name, without a port"),
        ({"host": "vllm:8000"}, "host name, without a port"),
        ({"port": 0}, "from 1 to 65535"),
        ({"port": 65536}, "from 1 to 65535"),
        ({"namespace": ""}, "namespace"),
        ({"refreshInterval": "5"}, "not a duration"),
        ({"refreshInterval": "1ms"}, "from 100ms to 1h"),
        ({"refreshInterval": "2h"}, "from 100ms to 1h"),
    ],
)
def test_parameters_that_cannot_be_are_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        msgspec.convert({"host": "vllm", "port": 8000, **fields}, DnsDiscovery).check()


def test_the_defaults_are_the_documented_ones() -> None:
    PARAMS.check()
    assert (PARAMS.refresh_interval, PARAMS.labels, PARAMS.namespace) == ("5s", {}, "default")
