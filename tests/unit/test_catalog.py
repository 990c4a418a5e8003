"""What a configuration means: defaults filled in, references checked, and the same again after a round trip."""

from __future__ import annotations

from random import Random
from typing import ClassVar

import pytest
import yaml

from llmd_sched.catalog import TYPES, Declared, Resolved, build_parsers, build_router, resolve
from llmd_sched.config import DEFAULT_CONFIG, load
from llmd_sched.errors import ConfigError
from llmd_sched.parsers.openai import OpenAIParser
from llmd_sched.parsers.passthrough import PassthroughParser
from llmd_sched.plugin import Attribute, ProducerPlugin, Reads
from llmd_sched.sched.scorers import QueueScorer
from tests.builders import CONFIG_HEAD, INFLIGHT, LATENCY, PREFIX, as_builtins, endpoints, pool_of

PARSERS = ("openai-parser", "anthropic-parser", "vllmhttp-parser", "passthrough-parser")
"""Those that read a request when none is named."""


ALWAYS = ("utilization-detector", "metrics-data-source", "core-metrics-extractor")
"""Further plugins that are there though nobody named them."""


def resolved(body: str) -> Resolved:
    return resolve(load(CONFIG_HEAD + body), allow_experimental=True)


def refs(one: Resolved) -> list[str]:
    return [p.plugin_ref for p in one.profiles[0].plugins]


def test_the_built_in_configuration_resolves_to_the_reference_blend() -> None:
    one = resolve(load(DEFAULT_CONFIG))
    assert [(p.plugin_ref, p.weight) for p in one.profiles[0].plugins] == [
        ("queue-scorer", 2.0),
        ("kv-cache-utilization-scorer", 2.0),
        ("prefix-cache-scorer", 3.0),
        ("max-score-picker", None),
    ]
    assert one.producers == (PREFIX,)
    assert one.parsers == PARSERS


def test_the_live_profile_has_the_configured_weights_and_one_where_none_is_given() -> None:
    one = resolved(
        "plugins: [{type: queue-scorer}, {type: kv-cache-utilization-scorer}, {type: token-load-scorer}]\n"
        "schedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorer, weight: 0}, "
        "{pluginRef: kv-cache-utilization-scorer, weight: 2.5}, {pluginRef: token-load-scorer}]}]"
    )
    profile = build_router(one, pool_of(endpoints(1)), Random(0)).scheduling.profiles[one.profiles[0].name]
    assert (profile.name, [weight for _, weight in profile.scorers]) == ("p", [0.0, 2.5, 1.0])


def test_without_profiles_one_holds_every_declared_filter_scorer_and_picker() -> None:
    one = resolved(
        "plugins: [{type: slo-headroom-tier-filter}, {type: openai-parser}, {type: queue-scorer},"
        " {type: inflight-load-producer}, {type: random-picker}]"
    )
    assert one.profiles[0].name == "default"
    assert refs(one) == ["slo-headroom-tier-filter", "queue-scorer", "random-picker"]


def test_a_configuration_without_anything_still_picks() -> None:
    one = resolved("")
    assert refs(one) == ["max-score-picker"]
    assert set(one.plugins) == {"max-score-picker", "single-profile-handler", *PARSERS, *ALWAYS}


@pytest.mark.parametrize(
    ("plugins", "picker"),
    [
        ("[{type: queue-scorer}]", "max-score-picker"),
        ("[{type: queue-scorer}, {type: random-picker}]", "random-picker"),
        ("[{type: queue-scorer}, {type: weighted-random-picker, name: dice}]", "dice"),
        ("[{type: random-picker}, {type: queue-scorer}, {type: weighted-random-picker}]", "random-picker"),
    ],
)
def test_a_profile_without_a_picker_takes_the_first_declared_or_else_max_score(plugins: str, picker: str) -> None:
    one = resolved(f"plugins: {plugins}\nschedulingProfiles: [{{name: p, plugins: [{{pluginRef: queue-scorer}}]}}]")
    assert refs(one) == ["queue-scorer", picker]


def test_a_profile_with_a_picker_keeps_it() -> None:
    one = resolved(
        "plugins: [{type: random-picker}, {type: max-score-picker}]\n"
        "schedulingProfiles: [{name: p, plugins: [{pluginRef: max-score-picker}]}]"
    )
    assert refs(one) == ["max-score-picker"]


def test_a_profile_handler_is_added_unless_there_is_one() -> None:
    assert resolved("").plugins["single-profile-handler"].type == "single-profile-handler"
    named = resolved("plugins: [{type: single-profile-handler, name: only}]")
    assert [n for n, d in named.plugins.items() if d.type == "single-profile-handler"] == ["only"]


def test_parsers_referenced_but_not_declared_are_added() -> None:
    one = resolved("requestHandler: {parsers: [{pluginRef: passthrough-parser}]}")
    assert one.parsers == ("passthrough-parser",)
    assert "openai-parser" not in one.plugins


def test_a_declared_parser_is_referenced_by_its_name() -> None:
    one = resolved("plugins: [{type: passthrough-parser, name: raw}]\nrequestHandler: {parsers: [{pluginRef: raw}]}")
    assert one.parsers == ("raw",)
    assert build_parsers(one).parse("/anything", b"x").names_model is False


def test_the_deprecated_parser_field_counts_only_without_the_new_one() -> None:
    assert resolved("parser: {pluginRef: passthrough-parser}").parsers == ("passthrough-parser",)
    both = "parser: {pluginRef: passthrough-parser}\nrequestHandler: {parsers: [{pluginRef: openai-parser}]}"
    assert resolved(both).parsers == ("openai-parser",)


def test_parsers_come_in_the_order_they_are_referenced() -> None:
    one = resolved("requestHandler: {parsers: [{pluginRef: passthrough-parser}, {pluginRef: openai-parser}]}")
    assert [type(p) for p in one.of(one.parsers)] == [PassthroughParser, OpenAIParser]


@pytest.mark.parametrize(
    ("plugin", "producers"),
    [
        ("{type: queue-scorer}", ()),
        ("{type: prefix-cache-scorer}", (PREFIX,)),
        ("{type: token-load-scorer}", (INFLIGHT,)),
        ("{type: active-request-scorer}", (INFLIGHT,)),
        ("{type: prefix-cache-affinity-filter}", (PREFIX, INFLIGHT)),
        (
            "{type: prefix-cache-affinity-filter, parameters: {ttftSource: latencyPredictor}}",
            (PREFIX, INFLIGHT, LATENCY),
        ),
        ("{type: latency-scorer}", (PREFIX, INFLIGHT, LATENCY)),
        ("{type: slo-headroom-tier-filter}", (PREFIX, INFLIGHT, LATENCY)),
        ("{type: predicted-latency-producer}", (PREFIX, INFLIGHT, LATENCY)),
    ],
)
def test_missing_producers_are_added_with_all_they_need(plugin: str, producers: tuple[str, ...]) -> None:
    one = resolved(f"plugins: [{plugin}]")
    assert sorted(one.producers) == sorted(producers)
    assert set(producers) <= set(one.plugins)


def test_an_optional_need_does_not_add_a_producer() -> None:
    assert resolved("plugins: [{type: inflight-load-producer}]").producers == (INFLIGHT,)


@pytest.mark.parametrize("first", [INFLIGHT, LATENCY])
def test_readers_run_after_makers_whatever_the_order_of_declaration(first: str) -> None:
    order = resolved(f"plugins: [{{type: {first}}}, {{type: latency-scorer}}, {{type: {PREFIX}}}]").producers
    assert order.index(PREFIX) < order.index(INFLIGHT) < order.index(LATENCY)


def test_an_optional_need_orders_producers_too() -> None:
    assert resolved(f"plugins: [{{type: {INFLIGHT}}}, {{type: {PREFIX}}}]").producers == (PREFIX, INFLIGHT)


def test_a_named_producer_satisfies_a_need_that_asks_for_it() -> None:
    one = resolved(
        f"plugins: [{{type: {PREFIX}, name: cpu}}, "
        "{type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: cpu}}]"
    )
    assert one.producers == ("cpu",)


def test_two_producers_of_a_kind_stand_side_by_side() -> None:
    one = resolved(
        f"plugins: [{{type: {PREFIX}, name: cpu, parameters: {{autoTune: false}}}}, {{type: prefix-cache-scorer}}, "
        "{type: prefix-cache-scorer, name: cpu-scorer, parameters: {prefixMatchInfoProducerName: cpu}}]"
    )
    assert set(one.producers) == {PREFIX, "cpu"}


@pytest.mark.parametrize(
    ("body", "path", "message"),
    [
        ("plugins: [{type: warp}]", "$.plugins[0].type", "unknown plugin type 'warp'; known: active-request-scorer, "),
        ("plugins: [{type: queue-scorer}, {type: queue-scorer}]", "$.plugins[1].type", "'queue-scorer' is used twice"),
        (
            "plugins: [{type: queue-scorer, name: a}, {type: random-picker, name: a}]",
            "$.plugins[1].name",
            "'a' is used twice",
        ),
        (
            "plugins: [{type: latency-scorer, parameters: {ttftWieght: 1}}]",
            "$.plugins[0].parameters",
            "unknown field `ttftWieght`; accepted: ttftWeight, tpotWeight, headroomSelectionStrategy, ",
        ),
        ("plugins: [{type: queue-scorer, parameters: {a: 1}}]", "$.plugins[0].parameters", "this takes no parameters"),
        (
            "plugins: [{type: max-score-picker, parameters: {maxNumOfEndpoints: many}}]",
            "$.plugins[0].parameters.maxNumOfEndpoints",
            "Expected `int`",
        ),
        (
            "plugins: [{type: max-score-picker, parameters: {maxNumOfEndpoints: 0}}]",
            "$.plugins[0].parameters",
            "at least 1",
        ),
        ("schedulingProfiles: [{name: ''}]", "$.schedulingProfiles[0].name", "must not be empty"),
        ("schedulingProfiles: [{name: a}, {name: b}]", "$.plugins", "no profile handler for 2 profiles"),
        ("schedulingProfiles: [{name: a}, {name: a}]", "$.schedulingProfiles[1].name", "'a' is used twice"),
        (
            "plugins: [{type: single-profile-handler}]\nschedulingProfiles: [{name: a}, {name: b}]",
            "$.schedulingProfiles",
            "single-profile-handler runs one",
        ),
        (
            "schedulingProfiles: [{name: a, plugins: [{pluginRef: nobody}]}]",
            "$.schedulingProfiles[0].plugins[0].pluginRef",
            "undefined plugin 'nobody'; declared: none",
        ),
        (
            "plugins: [{type: random-picker}]\n"
            "schedulingProfiles: [{name: a, plugins: [{pluginRef: random-picker, weight: 2}]}]",
            "$.schedulingProfiles[0].plugins[0].weight",
            "only a scorer takes a weight",
        ),
        (
            "plugins: [{type: random-picker}, {type: max-score-picker}]\n"
            "schedulingProfiles: [{name: a, plugins: [{pluginRef: random-picker}, {pluginRef: max-score-picker}]}]",
            "$.schedulingProfiles[0].plugins",
            "more than one picker: random-picker, max-score-picker",
        ),
        (
            "plugins: [{type: single-profile-handler}, {type: single-profile-handler, name: b}]",
            "$.plugins",
            "multiple profile handlers found: single-profile-handler, b",
        ),
        (
            "requestHandler: {parsers: [{pluginRef: x}]}",
            "$.requestHandler.parsers[0].pluginRef",
            "undefined plugin 'x'",
        ),
        ("parser: {pluginRef: x}", "$.parser.pluginRef", "undefined plugin 'x'"),
        (
            "plugins: [{type: queue-scorer}]\nrequestHandler: {parsers: [{pluginRef: queue-scorer}]}",
            "$.requestHandler.parsers[0].pluginRef",
            "cannot stand here",
        ),
        ("dataLayer: {discovery: {pluginRef: x}}", "$.dataLayer.discovery.pluginRef", "undefined plugin 'x'"),
        (
            "plugins: [{type: queue-scorer}]\ndataLayer: {discovery: {pluginRef: queue-scorer}}",
            "$.dataLayer.discovery.pluginRef",
            "accepted types: file-discovery, dns-discovery",
        ),
        (
            "plugins: [{type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: precise}}]",
            "$",
            "reads PrefixCacheMatchInfo from 'precise', which is not declared",
        ),
        (
            f"plugins: [{{type: {INFLIGHT}}}, "
            f"{{type: prefix-cache-scorer, parameters: {{prefixMatchInfoProducerName: {INFLIGHT}}}}}]",
            "$",
            "which does not make it",
        ),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_its_place(body: str, path: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolved(body)
    assert error.value.path == path
    assert message in str(error.value)


@pytest.mark.parametrize("weight", [".nan", ".inf"])
def test_a_weight_must_be_a_finite_number(weight: str) -> None:
    body = f"schedulingProfiles: [{{name: a, plugins: [{{pluginRef: queue-scorer, weight: {weight}}}]}}]"
    with pytest.raises(ConfigError, match=r"weight"):
        resolved("plugins: [{type: queue-scorer}]\n" + body)


class _Loop(ProducerPlugin, frozen=True):
    """Reads what the other makes."""

    provides: ClassVar[Attribute] = Attribute.PREFIX_MATCH
    other: str = ""

    def reads(self) -> tuple[Reads, ...]:
        return (Reads(Attribute.PREFIX_MATCH, self.other),)


def test_producers_that_read_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TYPES, "loop", _Loop)
    with pytest.raises(ConfigError, match=r"producers read each other in a circle: .* -> "):
        resolved(
            "plugins: [{type: loop, name: a, parameters: {other: b}}, {type: loop, name: b, parameters: {other: a}}]"
        )


def test_a_producer_may_stand_in_a_profile() -> None:
    one = resolved(
        f"plugins: [{{type: {INFLIGHT}}}, {{type: queue-scorer}}]\n"
        f"schedulingProfiles: [{{name: a, plugins: [{{pluginRef: {INFLIGHT}}}, {{pluginRef: queue-scorer}}]}}]"
    )
    assert refs(one) == [INFLIGHT, "queue-scorer", "max-score-picker"]
    profile = build_router(one, pool_of(endpoints(1)), Random(0)).scheduling.profiles[one.profiles[0].name]
    assert [type(scorer) for scorer, _ in profile.scorers] == [QueueScorer]


def test_discovery_is_taken_from_the_data_layer() -> None:
    one = resolved(
        "plugins: [{type: file-discovery, parameters: {path: p.yaml}}]\n"
        "dataLayer: {discovery: {pluginRef: file-discovery}}"
    )
    assert one.discovery == "file-discovery"
    assert resolved("").discovery is None


ROUND_TRIPS = {
    "nothing": "",
    "everything by default": "plugins: [{type: latency-scorer}, {type: prefix-cache-affinity-filter}]",
    "names and parameters": (
        f"plugins: [{{type: {PREFIX}, name: cpu, parameters: {{blockSize: 32}}}}, "
        "{type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: cpu, matchLengthWeight: 0.5}}, "
        "{type: active-request-scorer, parameters: {requestTimeout: 5m}}, {type: random-picker, name: dice}, "
        "{type: file-discovery, parameters: {path: e.yaml, watchFile: true}}]\n"
        "schedulingProfiles: [{name: p, plugins: [{pluginRef: prefix-cache-scorer, weight: 0}, {pluginRef: dice}]}]\n"
        "dataLayer: {discovery: {pluginRef: file-discovery}}\n"
        "requestHandler: {parsers: [{pluginRef: passthrough-parser}]}"
    ),
}


@pytest.mark.parametrize("body", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_a_resolved_configuration_survives_its_own_document(body: str) -> None:
    one = resolved(body)
    again = resolve(load(yaml.safe_dump(as_builtins(one.as_document()), sort_keys=False)))
    assert again == one


def test_the_resolved_document_leaves_nothing_to_default() -> None:
    document = resolved("plugins: [{type: latency-scorer}]").as_document()
    assert {p["name"] for p in document["plugins"]} >= {"latency-scorer", PREFIX, INFLIGHT, LATENCY, "max-score-picker"}
    assert next(p for p in document["plugins"] if p["name"] == "latency-scorer")["parameters"]["tpotWeight"] == 0.2


def test_an_unreferenced_plugin_stays_declared() -> None:
    one = resolved("plugins: [{type: queue-scorer}, {type: random-picker}]\nschedulingProfiles: [{name: p}]")
    assert isinstance(one.plugins["queue-scorer"], Declared)
    assert refs(one) == ["random-picker"]
