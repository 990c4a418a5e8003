"""The producer: parameters, columns, speculation, and numbered batches with restarts and gaps."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
import pytest

from llmd_sched.config import convert
from llmd_sched.errors import ConfigError
from llmd_sched.plugin import Attribute
from llmd_sched.prefix import precise
from llmd_sched.prefix.precise import PrecisePrefixCache, PrecisePrefixCacheProducer, Publisher, rank_of
from llmd_sched.prefix.precise_config import BYTES_PER_KEY, CostAwareMemory
from llmd_sched.types import Candidates, Endpoint, Request, Stage
from tests.builders import candidates, decision, endpoint, endpoints, request

NAME = "precise"
TOPIC = b"kv@10.0.0.1:8000@m"
pack = msgspec.msgpack.encode


def parameters(given: Mapping[str, object]) -> PrecisePrefixCacheProducer:
    plugin = convert(given, PrecisePrefixCacheProducer)
    plugin.check()
    return plugin


def opened(members: list[Endpoint], **given: object) -> PrecisePrefixCache:
    live = parameters(given).open(NAME)
    live.endpoints_changed(members)
    return live


def tokens(blocks: int, first: int = 0) -> list[int]:
    return list(range(1000 + 16 * first, 1000 + 16 * (first + blocks)))


def asking(blocks: int, **fields: object) -> Request:
    return request(prompts=(np.array(tokens(blocks), dtype="<u4").tobytes(),), **fields)


def payload(blocks: int = 2, first: int = 0, rank: int = 0, medium: str = "GPU") -> bytes:
    """Blocks of the same prompt, named by their position."""
    hashes = [100 + i for i in range(first, first + blocks)]
    parent = 99 + first if first else None
    return pack([0.0, [["BlockStored", hashes, parent, tokens(blocks, first), 16, None, medium]], rank])


def hear(live: PrecisePrefixCache, publisher: Publisher, number: int, data: bytes, topic: bytes = TOPIC) -> int | None:
    missing = live.announce(publisher, topic, number)
    live.receive(publisher, number, data)
    return missing


def produced(live: PrecisePrefixCache, asked: Request, view: Candidates, now_s: float = 0.0) -> dict[str, list[float]]:
    return {name.partition("/")[0]: values.tolist() for name, values in live.produce(asked, view, now_s).items()}


def cached(live: PrecisePrefixCache, members: list[Endpoint], blocks: int = 9, now_s: float = 0.0) -> list[float]:
    view = Candidates(members, candidates(len(members)).columns)
    return produced(live, asking(blocks), view, now_s)["prefix_cached_blocks"]


def test_columns_say_what_each_endpoint_holds_and_what_it_is_worth() -> None:
    members = endpoints(3)
    live = opened(members)
    hear(live, Publisher(members[1].server), 0, payload(4, medium="CPU"))
    assert produced(live, asking(6), candidates(3)) == {
        "prefix_match_blocks": [0.0, 3.0, 0.0],  # 4 x 0.8, cut
        "prefix_cached_blocks": [0.0, 4.0, 0.0],
        "prefix_total_blocks": [6.0] * 3,
        "prefix_block_tokens": [16.0] * 3,
    }
    assert live.params.provides is Attribute.PREFIX_MATCH
    assert (live.lookups, live.hit_blocks) == (1, 4)


def test_a_weighted_sum_is_not_cut_below_a_whole_number_it_equals() -> None:
    members = endpoints(1)
    live = opened(members)
    hear(live, Publisher(members[0].server), 0, payload(10, medium="cpu"))
    assert produced(live, asking(10), candidates(1))["prefix_match_blocks"] == [8.0]


def test_several_prompts_are_summed_and_none_is_nothing() -> None:
    members = endpoints(2)
    live = opened(members)
    hear(live, Publisher(members[0].server), 0, payload(3))
    one = asking(2).prompts[0]
    columns = produced(live, request(prompts=(one, one, b"short")), candidates(2))
    assert (columns["prefix_cached_blocks"], columns["prefix_total_blocks"]) == ([4.0, 0.0], [4.0, 4.0])
    assert produced(live, request(), candidates(2))["prefix_total_blocks"] == [0.0, 0.0]
    assert len(live.produce(asking(2), candidates(0), 0.0)) == 4


@pytest.mark.parametrize(("fields", "blocks"), [({"target_model": "other"}, 0), ({"cache_salt": "salt"}, 0), ({}, 2)])
def test_another_model_or_salt_shares_nothing(fields: dict[str, object], blocks: int) -> None:
    members = endpoints(1)
    live = opened(members)
    hear(live, Publisher(members[0].server), 0, payload(2))
    assert produced(live, asking(2, **fields), candidates(1))["prefix_cached_blocks"] == [blocks]


def test_the_request_of_a_salted_prompt_finds_its_blocks() -> None:
    members = endpoints(1)
    live = opened(members)
    event = ["BlockStored", [1, 2], None, tokens(2), 16, None, "GPU", None, [["salt"], None]]
    hear(live, Publisher(members[0].server), 0, pack([0.0, [event], 0]))
    assert produced(live, asking(2, cache_salt="salt"), candidates(1))["prefix_cached_blocks"] == [2.0]


def test_an_endpoint_that_leaves_or_moves_is_forgotten() -> None:
    members = endpoints(3)
    live = opened(members)
    publishers = [Publisher(e.server) for e in members]
    for publisher in publishers:
        hear(live, publisher, 0, payload(2))
    moved = endpoint(0, address="10.9.9.9")
    live.endpoints_changed([moved, members[2]])
    assert cached(live, [moved, members[2]]) == [0.0, 2.0]
    hear(live, publishers[1], 1, payload(2))
    assert live.feed.counts.unknown_endpoints == 1
    newcomer = endpoint(8)
    live.endpoints_changed([moved, members[2], newcomer])
    assert cached(live, [newcomer, moved, members[2]]) == [0.0, 0.0, 2.0]
    live.endpoints_changed([])
    assert len(live.index) == 0


@pytest.mark.parametrize(
    ("numbers", "held", "restarts", "gaps", "missed"),
    [
        ([0, 1, 2], 6, 0, 0, 0),
        ([7, 8, 9], 6, 0, 0, 0),  # what was before we listened is no gap
        ([7, 9, 12], 6, 0, 2, 3),
        ([7, 8, 0], 0, 1, 0, 0),  # only the last batch is left, and its parent is not known
        ([7, 8, 8], 0, 1, 1, 8),
        ([7, 8, 2], 0, 1, 1, 2),
    ],
)
def test_numbers_tell_gaps_and_restarts(numbers: list[int], held: int, restarts: int, gaps: int, missed: int) -> None:
    members = endpoints(2)
    live, publisher = opened(members), Publisher(members[0].server)
    hear(live, Publisher(members[1].server), 3, payload(1))
    for i, number in enumerate(numbers):
        hear(live, publisher, number, payload(2, 2 * i))
    counts = live.feed.counts
    assert cached(live, members) == [held, 1.0]
    assert (counts.restarts, counts.gaps, counts.missed_batches) == (restarts, gaps, missed)


def test_a_replay_fills_a_gap_and_what_comes_twice_is_applied_once() -> None:
    members = endpoints(1)
    live, publisher = opened(members), Publisher(members[0].server)
    hear(live, publisher, 0, payload(1))
    assert live.announce(publisher, TOPIC, 3) == 1
    for number in (1, 2, 3, 4):
        live.receive(publisher, number, payload(1, number))
    live.receive(publisher, 3, payload(1, 3))
    assert hear(live, publisher, 4, payload(1, 4)) is None
    assert hear(live, publisher, 5, payload(1, 5)) is None
    counts = live.feed.counts
    assert cached(live, members) == [6.0]
    assert (counts.gaps, counts.restarts, counts.repeated_batches) == (0, 0, 2)
    live.receive(publisher, 6, pack([0.0, [["BlockRemoved", [105]]], 0]))
    assert cached(live, members) == [5.0]  # held once, so one removal is enough


def test_a_new_engine_is_asked_for_all_it_said() -> None:
    members = endpoints(1)
    live, publisher = opened(members), Publisher(members[0].server)
    assert live.announce(publisher, TOPIC, 5) == 0
    live.receive(publisher, 5, payload(1))
    assert live.announce(publisher, TOPIC, 3) == 0
    assert live.announce(publisher, TOPIC, 0) is None


def test_the_lead_may_say_that_an_engine_restarted() -> None:
    members = endpoints(2)
    live = opened(members)
    for member in members:
        hear(live, Publisher(member.server), 0, payload(2))
    live.engine_restarted(members[0])
    live.engine_restarted(endpoint(9))
    assert cached(live, members) == [0.0, 2.0]
    assert live.feed.counts.restarts == 1


@pytest.mark.parametrize("topic", [b"", b"kv@pod", b"kv@@", b"\xff"])
def test_a_batch_of_an_unknown_model_is_counted(topic: bytes) -> None:
    members = endpoints(1)
    live, publisher = opened(members), Publisher(members[0].server)
    hear(live, publisher, 0, payload(), topic)
    assert (len(live.index), live.feed.counts.unknown_endpoints) == (0, 1)
    hear(live, publisher, 1, b"\xc1")
    assert live.feed.counts.malformed_batches == 1


@pytest.mark.parametrize(
    ("topic", "rank", "position"),
    [
        (b"kv@10.0.0.1:8000@m", 0, 0),
        (b"kv@10.0.0.1@m", 0, 0),
        (b"kv@e0@m@x", 0, 0),
        (b"kv@default/e0@m", 0, 0),
        (b"kv@pod@m", 1, 2),
        (b"kv@10.0.0.7@m", 1, 2),
        (b"kv@10.0.0.7@m", 5, None),
        (b"kv@pod-rank-1@m", 0, 2),
        (b"kv@[fd00::1]:8000@m", 0, 3),
        (b"kv@fd00::1@m", 0, 3),
        (b"kv@somebody@m", 0, None),
        (b"kv@e0", 0, None),
        (b"", 0, None),
    ],
)
def test_a_topic_names_an_endpoint(topic: bytes, rank: int, position: int | None) -> None:
    ranks = [endpoint(i, name=f"pod-rank-{i}", address="10.0.0.7", port=8000 + i) for i in (0, 1)]
    members = [endpoint(0), *ranks, endpoint(3, address="fd00::1")]
    live = opened(members)
    assert live.server(topic, rank) == (None if position is None else members[position].server)


def test_a_rank_is_in_the_endpoints_name() -> None:
    assert [rank_of(endpoint(0, name=name)) for name in ("a", "a-rank-0", "a-rank-12", "rank-3-b")] == [0, 0, 12, 0]


def routed(live: PrecisePrefixCache, members: list[Endpoint], position: int, now_s: float, blocks: int = 3) -> None:
    view, asked = Candidates(members, candidates(len(members)).columns), asking(blocks)
    live.produce(asked, view, now_s)
    live.chosen(decision("t", asked, members[position]), view, position, now_s)


def test_a_routed_prompt_counts_as_cached_for_a_while() -> None:
    members = endpoints(2)
    live = opened(members, speculativeIndexing=True, speculativeTTL="500ms")
    routed(live, members, 1, 10.0)
    assert cached(live, members, now_s=10.4) == [0.0, 3.0]
    assert cached(live, members, now_s=10.5) == [0.0, 0.0]
    assert len(live.index) == 0


def test_what_an_engine_confirms_outlives_speculation() -> None:
    members = endpoints(1)
    live = opened(members, speculativeIndexing=True)
    routed(live, members, 0, 10.0)
    hear(live, Publisher(members[0].server), 0, payload(2))
    assert cached(live, members, now_s=11.0) == [3.0]
    assert cached(live, members, now_s=12.0) == [2.0]


def test_speculation_is_off_unless_asked_for() -> None:
    members = endpoints(1)
    live = opened(members)
    routed(live, members, 0, 0.0)
    assert len(live.index) == 0


def test_speculation_for_an_endpoint_that_left_does_not_touch_its_successor() -> None:
    members = endpoints(2)
    live = opened(members[:1], speculativeIndexing=True)
    routed(live, members[:1], 0, 0.0)
    live.endpoints_changed(members[1:])
    routed(live, members[1:], 0, 1.5)
    assert cached(live, members[1:], now_s=2.5) == [3.0]


def test_who_prefills_is_speculated_about_too() -> None:
    members = endpoints(3)
    live, view, asked = opened(members, speculativeIndexing=True), candidates(3), asking(3)
    live.produce(asked, view, 0.0)
    stages = (Stage("prefill", (view.endpoints[2],), 2), Stage("other", (view.endpoints[1],), 1))
    staged = msgspec.structs.replace(decision("t", asked, view.endpoints[0]), stages=stages)
    live.chosen(staged, view, 0, 0.0)
    assert cached(live, members) == [3.0, 0.0, 3.0]


def test_speculations_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precise, "MAX_SPECULATIONS", 2)
    members = endpoints(4)
    live = opened(members, speculativeIndexing=True)
    for position in range(4):
        routed(live, members, position, 0.0)
    assert cached(live, members) == [0.0, 0.0, 3.0, 3.0]


def test_a_lookup_is_timed() -> None:
    live, times, took = opened(endpoints(1)), iter([1.0, 1.25]), []
    live.timer, live.on_lookup = lambda: next(times), took.append
    live.produce(asking(1), candidates(1), 0.0)
    assert took == [0.25]


def test_parameters_are_the_references() -> None:
    plugin = parameters(
        {
            "tokenProcessorConfig": {"blockSizeTokens": 64, "hashSeed": "42", "hashAlgorithm": "xxh64"},
            "indexerConfig": {
                "kvBlockIndexConfig": {
                    "inMemoryConfig": {"size": 1000, "podCacheSize": 3},
                    "enableMetrics": True,
                    "metricsLoggingInterval": "60s",
                },
                "kvCacheBackendConfigs": [{"name": "GPU", "weight": 1.0}, {"name": "disk", "weight": 0.5}],
            },
            "kvEventsConfig": {
                "zmqEndpoint": "tcp://*:5557",
                "topicFilter": "kv@",
                "concurrency": 8,
                "engineType": "sglang",
                "discoverPods": False,
                "podDiscoveryConfig": {
                    "podLabelSelector": "a=b, c=d",
                    "podNamespace": "x",
                    "socketPort": 5556,
                    "replaySocketPort": 5558,
                },
            },
            "speculativeIndexing": True,
            "speculativeTTL": "1s",
        }
    )
    assert plugin.token_processor_config.keys.block_tokens == 64
    assert plugin.indexer_config.kv_block_index_config.size == 1000
    assert plugin.indexer_config.weights == {"gpu": 1.0, "disk": 0.5}
    assert plugin.kv_events_config.pod_discovery_config.labels == {"a": "b", "c": "d"}
    assert parameters({"tokenProcessorConfig": {"blockSize": 32}}).token_processor_config.keys.block_tokens == 32
    assert parameters({}).indexer_config.weights == {"gpu": 1.0, "cpu": 0.8}


@pytest.mark.parametrize(
    ("size", "bytes_"), [("2GiB", 2 << 30), ("500MB", 500_000_000), (1 << 20, 1 << 20), ("1Mi", 1 << 20)]
)
def test_memory_is_counted_in_keys(size: str | int, bytes_: int) -> None:
    assert CostAwareMemory(size=size).keys == bytes_ // BYTES_PER_KEY


def within(block: dict[str, object]) -> dict[str, object]:
    return {"indexerConfig": {"kvBlockIndexConfig": block}}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (within({"redisConfig": {"address": "x"}}), "redisConfig is not supported; accepted are inMemoryConfig"),
        (within({"inMemoryConfig": {}, "costAwareMemoryConfig": {}}), "takes one of inMemoryConfig and"),
        (within({"inMemoryConfig": {"size": 0}}), "at least one key"),
        (within({"costAwareMemoryConfig": {"size": "2 gigs"}}), "not a quantity"),
        ({"indexerConfig": {"tokenizersPoolConfig": {}}}, "declare a token-producer"),
        ({"indexerConfig": {"kvCacheBackendConfigs": [{"name": "gpu", "weight": -1}]}}, "weight of 0 or more"),
        ({"tokenProcessorConfig": {"hashAlgorithm": "xxhash"}}, "accepted are cbor-fnv, xxh64"),
        ({"tokenProcessorConfig": {"blockSizeTokens": 0}}, "blockSizeTokens must be positive"),
        ({"kvEventsConfig": {"engineType": "trt"}}, "accepted are vllm, sglang"),
        ({"kvEventsConfig": {"discoverPods": False}}, "without discoverPods a zmqEndpoint is needed"),
        ({"kvEventsConfig": {"zmqEndpoint": "5557"}}, "such as tcp://"),
        ({"kvEventsConfig": {"concurrency": 0}}, "concurrency must be positive"),
        ({"kvEventsConfig": {"podDiscoveryConfig": {"socketPort": 0}}}, "socketPort must be from 1 to 65535"),
        ({"kvEventsConfig": {"podDiscoveryConfig": {"replaySocketPort": 70000}}}, "replaySocketPort must be"),
        ({"kvEventsConfig": {"podDiscoveryConfig": {"podLabelSelector": "a in (b)"}}}, "accepted is key=value"),
        ({"kvEventsConfig": {"podDiscoveryConfig": {"podLabelSelector": "a!=b"}}}, "accepted is key=value"),
        ({"speculativeTTL": "0"}, "speculativeTTL must be positive"),
        ({"speculativeTTL": "soon"}, "not a duration"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(given: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parameters(given)


def test_an_unknown_field_is_refused_with_its_path() -> None:
    with pytest.raises(ConfigError, match=r"kvEventsConfig.*unknown field `port`; accepted: zmqEndpoint"):
        parameters({"kvEventsConfig": {"port": 1}})
