"""Endpoints from a file: every mistake is named with the file and the entry, and a bad file changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.errors import ConfigError
from llmd_sched.pool import discovery
from llmd_sched.pool.discovery import MAX_FILE_BYTES, FileDiscovery, FileWatcher, read_entries
from llmd_sched.pool.pool import Pool
from tests.builders import fuzzed

GOOD = "{name: a, address: 10.0.0.1, port: 8000}"


def entries_of(*lines: str) -> str:
    return "endpoints:\n" + "".join(f"- {line}\n" for line in lines)


def test_an_entry_has_defaults_for_what_is_optional() -> None:
    (entry,) = read_entries(entries_of(GOOD), "f.yaml")
    assert (entry.name, entry.address, entry.port, entry.namespace, entry.labels) == (
        "a",
        "10.0.0.1",
        8000,
        "default",
        {},
    )


@pytest.mark.parametrize("port", ["8000", '"8000"', "1", "65535"])
def test_a_port_may_be_a_number_or_text(port: str) -> None:
    assert len(read_entries(entries_of(f"{{name: a, address: 10.0.0.1, port: {port}}}"), "f")) == 1


@pytest.mark.parametrize("address", ["10.0.0.1", '"::1"', '"fd00::1"', "vllm-0.vllm.svc", "localhost"])
def test_addresses_and_host_names_are_accepted(address: str) -> None:
    assert len(read_entries(entries_of(f"{{name: a, address: {address}, port: 80}}"), "f")) == 1


def test_json_is_accepted_too() -> None:
    text = '{"endpoints": [{"name": "a", "address": "10.0.0.1", "port": "80", "labels": {"llm-d.ai/role": "decode"}}]}'
    assert read_entries(text, "f")[0].labels == {"llm-d.ai/role": "decode"}


@pytest.mark.parametrize("text", ["endpoints: []", "{}"])
def test_a_file_may_list_nobody(text: str) -> None:
    assert read_entries(text, "f") == []


@pytest.mark.parametrize(
    ("entry", "where", "message"),
    [
        ("{address: 10.0.0.1, port: 80}", "", "missing required field `name`"),
        ("{name: b, port: 80}", "", "missing required field `address`"),
        ("{name: b, address: 10.0.0.1}", "", "missing required field `port`"),
        ("{name: b, address: 10.0.0.1, port: 80, zone: x}", "", "unknown field `zone`; accepted: name, address, port"),
        ("{name: '', address: 10.0.0.1, port: 80}", ".name", "must not be empty"),
        ("{name: a, address: 10.0.0.2, port: 80}", ".name", "default/a is listed twice"),
        ("{name: 3, address: 10.0.0.1, port: 80}", ".name", "Expected `str`"),
        ("{name: b, address: '', port: 80}", ".address", "must be an IPv4 or IPv6 address or a host name"),
        ("{name: b, address: '10.0.0.1:80', port: 80}", ".address", "without a port"),
        ("{name: b, address: 'host:80', port: 80}", ".address", "without a port"),
        ("{name: b, address: '[::1]', port: 80}", ".address", "must be an"),
        ("{name: b, address: 'http://host', port: 80}", ".address", "must be an"),
        ("{name: b, address: 'two hosts', port: 80}", ".address", "must be an"),
        ("{name: b, address: 10.0.0.1, port: 0}", ".port", "from 1 to 65535"),
        ("{name: b, address: 10.0.0.1, port: 65536}", ".port", "from 1 to 65535"),
        ("{name: b, address: 10.0.0.1, port: -80}", ".port", "from 1 to 65535"),
        ("{name: b, address: 10.0.0.1, port: http}", ".port", "from 1 to 65535"),
        ("{name: b, address: 10.0.0.1, port: ''}", ".port", "from 1 to 65535"),
        ("{name: b, address: 10.0.0.1, port: '²'}", ".port", "from 1 to 65535"),
        ("{name: b, address: 10.0.0.1, port: 80.5}", ".port", "Expected `int | str`"),
        ("{name: b, address: 10.0.0.1, port: true}", ".port", "Expected `int | str`"),
        ("{name: b, address: 10.0.0.1, port: 80, labels: {tier: 1}}", ".labels[...]", "Expected `str`"),
    ],
)
def test_a_bad_entry_is_named_by_file_and_index(entry: str, where: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_entries(entries_of(GOOD, entry), "pool.yaml")
    assert error.value.path == f"pool.yaml: $.endpoints[1]{where}"
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("endpoints: 3", "Expected `array`"),
        ("servers: []", "unknown field `servers`; accepted: endpoints"),
        ("endpoints: [", "not valid YAML"),
        ("endpoints: []\nendpoints: []", "given twice"),
        ("[]", "Expected `object`"),
        ("false", "Expected `object`"),
        ("text", "Expected `object`"),
        ("# " + "x" * MAX_FILE_BYTES, "are accepted"),
    ],
    ids=lambda value: value[:20],
)
def test_a_bad_file_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_entries(text, "pool.yaml")
    assert str(error.value).startswith("pool.yaml: ")
    assert message in str(error.value)


def test_too_many_endpoints_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "MAX_ENDPOINTS", 2)
    lines = [f"{{name: e{i}, address: 10.0.0.{i}, port: 80}}" for i in range(3)]
    assert len(read_entries(entries_of(*lines[:2]), "f")) == 2
    with pytest.raises(ConfigError, match="3 endpoints; at most 2"):
        read_entries(entries_of(*lines), "f")


def test_the_same_name_in_two_namespaces_is_two_endpoints() -> None:
    second = "{name: a, namespace: b, address: 10.0.0.1, port: 8000}"
    assert len(read_entries(entries_of(GOOD, second), "f")) == 2


@fuzzed
@given(
    st.dictionaries(
        st.sampled_from(["name", "address", "port", "namespace", "labels"]), st.text(max_size=6), max_size=5
    )
)
def test_any_entry_raises_nothing_but_config_errors(fields: dict[str, str]) -> None:
    with contextlib.suppress(ConfigError):
        read_entries(json.dumps({"endpoints": [fields]}), "f")


class Files:
    """A pool, its file and its watcher."""

    def __init__(self, folder: Path, text: str = "") -> None:
        self.path = folder / "pool.yaml"
        self.pool = Pool()
        self.watcher = FileWatcher(FileDiscovery(path=str(self.path), watch_file=True), self.pool)
        if text:
            self.path.write_text(text)

    def replace(self, text: str) -> None:
        """By rename, as an updated mount does."""
        other = self.path.with_suffix(".new")
        other.write_text(text)
        os.replace(other, self.path)

    def members(self) -> list[str]:
        return [f"{e.key}@{e.hostport}" for e in self.pool.endpoints]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What host names resolve to; others do not."""
    known: dict[str, list[str]] = {}

    async def look_up(self: object, host: str, port: object, **how: object) -> list[tuple[object, ...]]:
        host.encode("idna")  # as the resolver does
        if host not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in known[host]]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", look_up)
    return known


async def test_starting_fills_the_pool(tmp_path: Path) -> None:
    files = Files(
        tmp_path, entries_of(GOOD, "{name: b, namespace: x, address: 'FD00:0::1', port: '81', labels: {k: v}}")
    )
    await files.watcher.start()
    await files.watcher.stop()
    assert files.members() == ["default/a@10.0.0.1:8000", "x/b@[fd00::1]:81"]
    assert files.pool.endpoints[1].labels == {"k": "v"}


async def test_starting_without_the_file_fails_and_names_it(tmp_path: Path) -> None:
    files = Files(tmp_path)
    with pytest.raises(ConfigError, match=r"pool\.yaml: cannot read the endpoints file: No such file"):
        await files.watcher.start()
    await files.watcher.stop()


async def test_starting_with_a_file_that_is_no_text_fails_and_names_it(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"pool\.yaml: not UTF-8 text"):
        await files.watcher.start()


@pytest.mark.parametrize("host", ["nowhere.example", "a..b", "x" * 70 + ".example"])
async def test_starting_with_a_name_that_does_not_resolve_fails_and_names_it(
    tmp_path: Path, names: dict[str, list[str]], host: str
) -> None:
    files = Files(tmp_path, entries_of(GOOD, f"{{name: b, address: {host}, port: 80}}"))
    with pytest.raises(ConfigError, match=r"pool\.yaml: \$\.endpoints\[1\]\.address"):
        await files.watcher.start()
    await files.watcher.stop()


async def test_a_replaced_file_is_noticed_and_applied(tmp_path: Path) -> None:
    files = Files(tmp_path, entries_of(GOOD))
    await files.watcher._load()
    before = files.watcher._read_stamp()
    files.replace(entries_of(GOOD, "{name: b, address: 10.0.0.2, port: 8000}"))
    assert files.watcher._read_stamp() != before
    await files.watcher._load()
    assert files.members() == ["default/a@10.0.0.1:8000", "default/b@10.0.0.2:8000"]


async def test_a_replacement_that_says_the_same_tells_nobody(tmp_path: Path) -> None:
    files = Files(tmp_path, entries_of(GOOD))
    await files.watcher._load()
    told: list[object] = []
    files.pool.on_change.append(told.append)
    files.replace(entries_of(GOOD))
    await files.watcher._load()
    assert told == []


@pytest.mark.parametrize(
    "text", ["endpoints: [", entries_of("{name: a}"), entries_of("{name: a, address: nowhere, port: 1}")]
)
async def test_a_file_that_turns_bad_changes_nothing(tmp_path: Path, names: dict[str, list[str]], text: str) -> None:
    files = Files(tmp_path, entries_of(GOOD))
    await files.watcher._load()
    files.replace(text)
    with pytest.raises(ConfigError):
        await files.watcher._load()
    assert files.members() == ["default/a@10.0.0.1:8000"]
    assert files.watcher._read_stamp() == files.watcher._stamp  # so it is complained of once


async def test_a_host_name_is_resolved(tmp_path: Path, names: dict[str, list[str]]) -> None:
    names["vllm-0"] = ["10.1.0.1"]
    files = Files(tmp_path, entries_of("{name: a, address: vllm-0, port: 80}"))
    await files.watcher._load()
    assert files.members() == ["default/a@10.1.0.1:80"]


async def test_a_name_follows_its_address(tmp_path: Path, names: dict[str, list[str]]) -> None:
    names["vllm-0"] = ["10.1.0.1"]
    files = Files(tmp_path, entries_of("{name: a, address: vllm-0, port: 80}"))
    await files.watcher._load()
    names["vllm-0"] = ["10.1.0.2"]
    await files.watcher._apply(files.watcher._entries)
    assert files.members() == ["default/a@10.1.0.2:80"]


async def test_a_name_of_several_addresses_stays_with_the_one_it_had(
    tmp_path: Path, names: dict[str, list[str]]
) -> None:
    names["vllm-0"] = ["10.1.0.1", "10.1.0.2"]
    files = Files(tmp_path, entries_of("{name: a, address: vllm-0, port: 80}"))
    await files.watcher._load()
    names["vllm-0"] = ["10.1.0.2", "10.1.0.1"]
    await files.watcher._apply(files.watcher._entries)
    assert files.members() == ["default/a@10.1.0.1:80"]


async def test_a_name_that_stops_resolving_keeps_its_last_address(tmp_path: Path, names: dict[str, list[str]]) -> None:
    names["vllm-0"] = ["10.1.0.1"]
    files = Files(tmp_path, entries_of("{name: a, address: vllm-0, port: 80}"))
    await files.watcher._load()
    names.clear()
    await files.watcher._apply(files.watcher._entries)
    assert files.members() == ["default/a@10.1.0.1:80"]


class Ticks:
    """Stands in for the watcher's pause: runs one step of the test each time, then ends the loop."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self.steps = list(steps)

    async def __call__(self, seconds: float) -> None:
        if not self.steps:
            raise asyncio.CancelledError
        self.steps.pop(0)()


async def run_ticks(files: Files, monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> None:
    await files.watcher._load()
    with monkeypatch.context() as patch:
        patch.setattr(discovery.asyncio, "sleep", Ticks(*steps))
        with pytest.raises(asyncio.CancelledError):
            await files.watcher._run()


async def test_the_watcher_applies_a_change_and_survives_a_bad_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = Files(tmp_path, entries_of(GOOD))
    seen: list[list[str]] = []
    await run_ticks(
        files,
        monkeypatch,
        lambda: files.replace("endpoints: ["),
        lambda: seen.append(files.members()),
        lambda: files.replace(entries_of("{name: b, address: 10.0.0.2, port: 8000}")),
        lambda: seen.append(files.members()),
        files.path.unlink,
        lambda: files.path.write_text(entries_of(GOOD)),
        lambda: None,
    )
    assert seen == [["default/a@10.0.0.1:8000"], ["default/b@10.0.0.2:8000"]]
    assert files.members() == ["default/a@10.0.0.1:8000"]
    assert [r.message for r in caplog.records if r.levelname == "ERROR" and "not valid YAML" in r.message]


async def test_the_watcher_survives_a_name_that_cannot_be_a_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]]
) -> None:
    files = Files(tmp_path, entries_of(GOOD))
    await run_ticks(
        files,
        monkeypatch,
        lambda: files.replace(entries_of("{name: b, address: a..b, port: 80}")),
        lambda: files.replace(entries_of("{name: c, address: 10.0.0.3, port: 80}")),
        lambda: None,
    )
    assert files.members() == ["default/c@10.0.0.3:80"]


async def test_a_change_whose_name_resolves_only_later_is_applied_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]]
) -> None:
    monkeypatch.setattr(discovery, "RESOLVE_EVERY_S", 2 * discovery.WATCH_EVERY_S)
    files = Files(tmp_path, entries_of(GOOD))
    await run_ticks(
        files,
        monkeypatch,
        lambda: files.replace(entries_of(GOOD, "{name: b, address: vllm-1, port: 80}")),
        lambda: names.update({"vllm-1": ["10.1.0.9"]}),
        *[lambda: None] * 5,
    )
    assert files.members() == ["default/a@10.0.0.1:8000", "default/b@10.1.0.9:80"]


async def test_without_watching_a_changed_file_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(tmp_path, entries_of(GOOD))
    files.watcher.watch = False
    await run_ticks(files, monkeypatch, lambda: files.replace("endpoints: []"), lambda: None)
    assert files.members() == ["default/a@10.0.0.1:8000"]
