"""The reflector against an API server double: lists, watches, and everything that goes wrong with a watch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random

import msgspec
import pytest
import pytest_asyncio

from llmd_sched.kube import watch
from llmd_sched.kube.client import ApiClient
from llmd_sched.kube.objects import Meta
from llmd_sched.kube.watch import Reflector, Source
from tests.integration.kube_api import NAMESPACE, OBJECTIVES, PODS, KubeApi, objective_object, pod_object, running

PODS_SOURCE = Source("v1", "pods", NAMESPACE, label_selector="app=vllm")
OPTIONAL_SOURCE = Source("llm-d.ai/v1alpha2", "inferenceobjectives", NAMESPACE, optional=True)


class _Named(msgspec.Struct):
    metadata: Meta
    status: dict[str, object] = {}


def ip_of(raw: bytes) -> object:
    return msgspec.json.decode(raw, type=_Named).status.get("podIP")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(watch, "MAX_BACKOFF_S", 0.05)
    monkeypatch.setattr(watch, "ABSENT_EVERY_S", 0.02)


class Followed:
    """A server, a reflector of its pods' addresses, and how often that told of a change."""

    def __init__(self, api: KubeApi, client: ApiClient, source: Source = PODS_SOURCE) -> None:
        self.api, self.changes = api, 0
        self.reflector: Reflector[object] = Reflector(client, source, ip_of, self._changed, Random(0))

    def _changed(self) -> None:
        self.changes += 1

    @property
    def shown(self) -> dict[str, object]:
        return {key.partition("/")[2]: ip for key, ip in self.reflector.objects.items()}

    async def shows(self, **expected: str) -> None:
        await until(lambda: self.shown == expected)

    async def watched(self, kind: str = PODS) -> None:
        await until(lambda: bool(self.api.open(kind)))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def following(api: KubeApi, client: ApiClient, source: Source = PODS_SOURCE) -> AsyncIterator[Followed]:
    made = Followed(api, client, source)
    made.reflector.start()
    try:
        yield made
    finally:
        await made.reflector.stop()


@pytest_asyncio.fixture
async def followed() -> AsyncIterator[Followed]:
    """Two pods are listed, and the watch is open."""
    async with running() as (api, client):
        await api.put(PODS, pod_object("a", "10.0.0.1"))
        await api.put(PODS, pod_object("b", "10.0.0.2"))
        async with following(api, client) as made:
            await made.watched()
            await made.shows(a="10.0.0.1", b="10.0.0.2")
            yield made


async def test_what_is_there_is_listed_and_changes_are_watched(followed: Followed) -> None:
    api = followed.api
    await api.put(PODS, pod_object("c", "10.0.0.3"))
    await followed.shows(a="10.0.0.1", b="10.0.0.2", c="10.0.0.3")
    await api.put(PODS, pod_object("a", "10.0.0.9"))
    await api.delete(PODS, "b")
    await followed.shows(a="10.0.0.9", c="10.0.0.3")
    assert api.counted(PODS) == {"list": 1, "watch": 1}
    assert followed.changes in (3, 4)  # two events that come together are one change


async def test_the_server_selects_by_label_and_a_pod_that_loses_it_goes(followed: Followed) -> None:
    await followed.api.put(PODS, pod_object("x", "10.0.0.8", app="other"))
    await followed.api.put(PODS, pod_object("b", "10.0.0.2", app="other"))
    await followed.shows(a="10.0.0.1")
    assert all(query["labelSelector"] == "app=vllm" for _, _, query in followed.api.requests)


async def test_an_event_that_changes_nothing_kept_is_not_told(followed: Followed) -> None:
    changes = followed.changes
    beat = await followed.api.put(PODS, pod_object("a", "10.0.0.1", annotations={"heartbeat": "1"}))
    await until(lambda: followed.reflector._version == beat["metadata"]["resourceVersion"])
    await followed.api.put(PODS, pod_object("c", "10.0.0.3"))
    await followed.shows(a="10.0.0.1", b="10.0.0.2", c="10.0.0.3")
    assert followed.changes == changes + 1


async def test_a_list_of_many_comes_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PAGE_OBJECTS", 3)
    async with running() as (api, client):
        for i in range(10):
            await api.put(PODS, pod_object(f"p{i}", f"10.0.0.{i}"))
        async with following(api, client) as made:
            await until(lambda: made.reflector.synced)
            assert len(made.shown) == 10
            assert made.changes == 1
            assert [q.get("continue") for _, _, q in api.requests if "limit" in q] == [None, "3", "6", "9"]


async def test_objects_beyond_the_limit_are_not_kept_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "MAX_OBJECTS", 2)
    async with running() as (api, client):
        for i in range(4):
            await api.put(PODS, pod_object(f"p{i}", f"10.0.0.{i}"))
        async with following(api, client) as made:
            await until(lambda: made.reflector.synced)
            assert set(made.shown) == {"p0", "p1"}
    assert len([r for r in caplog.records if "more than 2" in r.getMessage()]) == 1


async def test_events_cut_into_pieces_arrive_whole(followed: Followed) -> None:
    followed.api.pieces = 23
    for i in range(3, 8):
        await followed.api.put(PODS, pod_object(f"p{i}", f"10.0.0.{i}"))
    await until(lambda: len(followed.shown) == 7)
    assert followed.api.counted(PODS) == {"list": 1, "watch": 1}


async def test_a_watch_cut_in_the_middle_of_a_line_goes_on_from_the_last_whole_one(followed: Followed) -> None:
    api = followed.api
    (watcher,) = api.open(PODS)
    await api.put(PODS, pod_object("c", "10.0.0.3"))
    await followed.shows(a="10.0.0.1", b="10.0.0.2", c="10.0.0.3")
    seen = api.version
    watcher.version = 10**9  # the double shall not tell it of the next by itself
    after = await api.put(PODS, pod_object("d", "10.0.0.4"))
    await watcher.cut("ADDED", after)
    await until(lambda: "d" in followed.shown)
    assert api.counted(PODS) == {"list": 1, "watch": 2}
    assert api.requests[-1][2]["resourceVersion"] == str(seen)


async def test_a_dropped_connection_is_made_anew_and_nothing_is_missed(followed: Followed) -> None:
    api = followed.api
    for round_ in range(3):
        await followed.watched()
        api.open(PODS)[0].drop()
        await api.put(PODS, pod_object("a", f"10.0.1.{round_}"))
        await api.put(PODS, pod_object("b", f"10.0.2.{round_}"))
        await followed.shows(a=f"10.0.1.{round_}", b=f"10.0.2.{round_}")
    assert api.counted(PODS) == {"list": 1, "watch": 4}


async def test_a_watch_the_server_ends_in_order_is_opened_again(
    followed: Followed, caplog: pytest.LogCaptureFixture
) -> None:
    api = followed.api
    await api.put(PODS, pod_object("c", "10.0.0.3"))
    await until(lambda: "c" in followed.shown)
    api.open(PODS)[0].ended.set()
    await until(lambda: api.counted(PODS)["watch"] == 2)
    assert api.counted(PODS)["list"] == 1
    assert not caplog.records


async def test_a_bookmark_moves_the_version_a_watch_goes_on_from(followed: Followed) -> None:
    api = followed.api
    changes = followed.changes
    await api.put(OBJECTIVES, objective_object("o", 1))
    await api.bookmark(PODS)
    api.forgotten = api.version
    await asyncio.sleep(0.02)
    api.open(PODS)[0].drop()
    await until(lambda: api.counted(PODS)["watch"] == 2)
    assert api.requests[-1][2]["resourceVersion"] == str(api.version)
    assert api.counted(PODS)["list"] == 1
    assert followed.changes == changes


async def test_a_410_in_a_watch_brings_a_new_list(followed: Followed) -> None:
    api = followed.api
    (watcher,) = api.open(PODS)
    watcher.version = 10**9
    await api.delete(PODS, "a")
    await api.put(PODS, pod_object("c", "10.0.0.3"))
    await api.expire(PODS)
    await followed.shows(b="10.0.0.2", c="10.0.0.3")
    assert api.counted(PODS)["list"] == 2


async def test_a_410_when_a_watch_is_opened_brings_a_new_list(followed: Followed) -> None:
    api = followed.api
    api.open(PODS)[0].drop()
    await api.put(PODS, pod_object("c", "10.0.0.3"))
    api.forgotten = api.version
    await until(lambda: "c" in followed.shown)
    assert api.counted(PODS)["list"] == 2


async def test_a_410_in_the_middle_of_a_list_begins_it_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PAGE_OBJECTS", 1)
    async with running() as (api, client):
        await api.put(PODS, pod_object("a", "10.0.0.1"))
        await api.put(PODS, pod_object("b", "10.0.0.2"))
        api.statuses = [410]
        async with following(api, client) as made:
            await made.shows(a="10.0.0.1", b="10.0.0.2")
            await made.watched()
    assert [q.get("continue") for _, _, q in api.requests if "limit" in q] == [None, None, "1"]


async def test_a_line_beyond_the_limit_brings_a_new_list(followed: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch.Lines.__init__, "__defaults__", (1000,))
    api = followed.api
    api.open(PODS)[0].drop()
    await until(lambda: api.counted(PODS)["watch"] == 2)
    await api.put(PODS, pod_object("c", "10.0.0.3", annotations={"big": "x" * 300_000}))
    await until(lambda: "c" in followed.shown)
    assert api.counted(PODS)["list"] == 2


async def test_everything_is_listed_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "RELIST_EVERY_S", 0.0)
    async with running() as (api, client), following(api, client) as made:
        await made.watched()
        api.objects[PODS] = {"unheard": pod_object("unheard", "10.0.0.5")}
        api.open(PODS)[0].drop()
        await until(lambda: "unheard" in made.shown)


async def test_a_server_that_is_away_leaves_the_picture_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    api = KubeApi()
    async with running(api) as (_, client):
        await api.put(PODS, pod_object("a", "10.0.0.1"))
        async with following(api, client) as made:
            await made.watched()
            port = api.port
            await api.stop()
            await until(lambda: made.reflector._failures >= 5)
            assert made.shown == {"a": "10.0.0.1"}
            await api.start(port)
            await api.put(PODS, pod_object("b", "10.0.0.2"))
            await made.shows(a="10.0.0.1", b="10.0.0.2")
    assert len({r.getMessage() for r in caplog.records}) == len(caplog.records) <= 3


@pytest.mark.parametrize("status", [401, 429, 500, 503])
async def test_a_refusal_is_retried(status: int) -> None:
    async with running() as (api, client):
        await api.put(PODS, pod_object("a", "10.0.0.1"))
        api.statuses = [status] * 4
        async with following(api, client) as made:
            await made.shows(a="10.0.0.1")


async def test_a_watch_that_ends_at_once_each_time_is_opened_less_and_less_often(followed: Followed) -> None:
    api = followed.api
    for _ in range(4):
        await followed.watched()
        api.open(PODS)[0].ended.set()
        await until(lambda: not api.open(PODS))
    await until(lambda: followed.reflector._failures >= 4)


async def test_an_event_makes_the_next_failure_the_first_again(followed: Followed) -> None:
    followed.reflector._failures = 10
    await followed.api.put(PODS, pod_object("c", "10.0.0.3"))
    await until(lambda: followed.reflector._failures == 0)


async def test_an_optional_kind_nobody_installed_is_empty_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    api = KubeApi()
    api.kinds.discard(OBJECTIVES)
    async with running(api) as (_, client), following(api, client, OPTIONAL_SOURCE) as made:
        await until(lambda: made.reflector.synced)
        assert (made.reflector.absent, made.shown) == (True, {})
        await until(lambda: len(api.requests) >= 5)
        assert len(caplog.records) == 1
        api.kinds.add(OBJECTIVES)
        await made.watched(OBJECTIVES)
        assert not made.reflector.absent
        api.kinds.discard(OBJECTIVES)
        api.open(OBJECTIVES)[0].drop()
        await until(lambda: made.reflector.absent)


async def test_one_404_too_many_does_not_empty_what_is_known() -> None:
    async with running() as (api, client):
        await api.put(PODS, pod_object("a", "10.0.0.1"))
        async with following(api, client) as made:
            await made.watched()
            api.statuses = [404, 404]
            api.open(PODS)[0].drop()
            await until(lambda: not api.statuses)
            await made.watched()
            assert made.shown == {"a": "10.0.0.1"}
            assert made.changes == 1


async def test_a_forbidden_kind_that_is_needed_says_what_to_allow(caplog: pytest.LogCaptureFixture) -> None:
    api = KubeApi()
    api.forbidden.add(PODS)
    async with running(api) as (_, client), following(api, client) as made:
        await until(lambda: len(api.requests) >= 4)
        assert not made.reflector.synced
        (said,) = [r.getMessage() for r in caplog.records]
        assert "must be allowed to list and watch" in said
        api.forbidden.clear()
        await until(lambda: made.reflector.synced)


async def test_an_object_that_cannot_be_read_stays_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as (api, client):
        await api.put(PODS, pod_object("a", "10.0.0.1"))
        async with following(api, client) as made:
            await made.watched()
            await api.put(PODS, {**pod_object("a", "x"), "status": 3})
            await api.put(PODS, {**pod_object("b", "x"), "status": 3})
            await api.put(PODS, pod_object("c", "10.0.0.3"))
            await made.shows(a="10.0.0.1", c="10.0.0.3")
    assert "serving/a cannot be used" in caplog.text
    assert "$.status" in caplog.text


async def test_a_callback_that_fails_does_not_end_the_following(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running() as (api, client):
        await api.put(PODS, pod_object("a", "10.0.0.1"))
        made = Followed(api, client)
        calls = [0]

        def fail_once() -> None:
            calls[0] += 1
            if calls[0] == 1:
                raise RuntimeError("a consumer's bug")

        made.reflector._on_change = fail_once
        made.reflector.start()
        await made.watched()
        await api.put(PODS, pod_object("b", "10.0.0.2"))
        await made.shows(a="10.0.0.1", b="10.0.0.2")
        await made.reflector.stop()
    assert "a consumer's bug" in caplog.text
