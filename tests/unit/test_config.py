"""The document is read strictly, and every complaint says where."""

from __future__ import annotations

import contextlib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.catalog import resolve
from llmd_sched.config import API_VERSIONS, DEFAULT_CONFIG, MAX_CONFIG_BYTES, duration_s, load, read_yaml
from llmd_sched.errors import ConfigError
from tests.builders import CONFIG_HEAD, fuzzed

SCHEMA = (
    "apiVersion, kind, featureGates, plugins, schedulingProfiles, dataLayer, flowControl, requestHandler, parser, "
    "saturationDetector"
)


@pytest.mark.parametrize(
    ("body", "path", "message"),
    [
        ("foo: 1", "$", f"unknown field `foo`; accepted: {SCHEMA}"),
        ("plugins: 3", "$.plugins", "Expected `array`"),
        ("plugins: [{name: x}]", "$.plugins[0]", "missing required field `type`"),
        ("plugins: [{type: 3}]", "$.plugins[0].type", "Expected `str`"),
        (
            "plugins: [{type: queue-scorer}, {type: x, weight: 2}]",
            "$.plugins[1]",
            "unknown field `weight`; accepted: type, name, parameters",
        ),
        ("plugins: [{type: queue-scorer, parameters: []}]", "$.plugins[0].parameters", "Expected `object | null`"),
        ("schedulingProfiles: [{plugins: []}]", "$.schedulingProfiles[0]", "missing required field `name`"),
        (
            "schedulingProfiles: [{name: a, plugins: [{pluginRef: q, wieght: 1}]}]",
            "$.schedulingProfiles[0].plugins[0]",
            "unknown field `wieght`; accepted: pluginRef, weight",
        ),
        (
            "schedulingProfiles: [{name: a, plugins: [{pluginRef: q, weight: heavy}]}]",
            "$.schedulingProfiles[0].plugins[0].weight",
            "Expected `float | null`",
        ),
        (
            "dataLayer: {sauces: []}",
            "$.dataLayer",
            "unknown field `sauces`; accepted: injectDefaults, sources, discovery",
        ),
        ("dataLayer: {discovery: {ref: x}}", "$.dataLayer.discovery", "unknown field `ref`; accepted: pluginRef"),
        ("requestHandler: {parser: x}", "$.requestHandler", "unknown field `parser`; accepted: parsers"),
        ("requestHandler: {parsers: [{}]}", "$.requestHandler.parsers[0]", "missing required field `pluginRef`"),
        ("featureGates: [1]", "$.featureGates[0]", "Expected `str`"),
        (
            "featureGates: [haPopulateNonLeaderDatastore, warp]",
            "$.featureGates[1]",
            "unknown feature gate 'warp'; known:",
        ),
        ("featureGates: [haPopulateNonLeaderDatastore=maybe]", "$.featureGates[0]", "must be true or false"),
        ("flowControl: {maxBites: 1}", "$.flowControl", "unknown field `maxBites`; accepted: maxBytes, maxRequests"),
        ("saturationDetector: {ref: x}", "$.saturationDetector", "unknown field `ref`; accepted: pluginRef"),
    ],
)
def test_an_error_names_its_path_and_what_is_accepted(body: str, path: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(CONFIG_HEAD + body)
    assert error.value.path == path
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("", "$", "expected a mapping with apiVersion and kind, got NoneType"),
        ("[]", "$", "got list"),
        ("plugins", "$", "got str"),
        ("apiVersion: llm-d.ai/v1alpha1", "$", "missing required field `kind`"),
        ("kind: EndpointPickerConfig", "$", "missing required field `apiVersion`"),
        ("apiVersion: v2\nkind: EndpointPickerConfig", "$.apiVersion", "accepted: " + ", ".join(API_VERSIONS)),
        ("apiVersion: llm-d.ai/v1alpha1\nkind: Pod", "$.kind", "accepted: EndpointPickerConfig"),
        ("a: [1,\nb", "$", "line 2"),
        ("a: \x00", "$", "not valid YAML"),
        ("!!python/object:os.system {}", "$", "not valid YAML"),
    ],
)
def test_a_document_that_is_something_else_is_refused(text: str, path: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(text)
    assert error.value.path == path
    assert message in str(error.value)


@pytest.mark.parametrize("version", API_VERSIONS)
def test_both_api_versions_are_accepted(version: str) -> None:
    assert load(f"apiVersion: {version}\nkind: EndpointPickerConfig").api_version == version


def test_json_is_accepted_too() -> None:
    config = load('{"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig", "plugins": [{"type": "a"}]}')
    assert config.plugins[0].ref == "a"


@pytest.mark.parametrize(
    "gate",
    [
        "haPopulateNonLeaderDatastore",
        "haPopulateNonLeaderDatastore=true",
        "haPopulateNonLeaderDatastore=false",
        "flowControl=false",
    ],
)
def test_a_known_gate_is_accepted_in_every_notation(gate: str) -> None:
    assert load(CONFIG_HEAD + f"featureGates: [{gate}]").feature_gates == (gate,)


def test_a_plugin_goes_by_its_name_or_else_by_its_type() -> None:
    config = load(CONFIG_HEAD + "plugins: [{type: queue-scorer}, {type: queue-scorer, name: second}]")
    assert [p.ref for p in config.plugins] == ["queue-scorer", "second"]


def test_a_weight_not_given_is_told_from_one_given() -> None:
    text = "schedulingProfiles: [{name: a, plugins: [{pluginRef: p}, {pluginRef: q, weight: 1}]}]"
    assert [p.weight for p in load(CONFIG_HEAD + text).scheduling_profiles[0].plugins] == [None, 1.0]


def test_the_default_configuration_loads() -> None:
    assert [p.type for p in load(DEFAULT_CONFIG).plugins] == [
        "queue-scorer",
        "kv-cache-utilization-scorer",
        "prefix-cache-scorer",
    ]


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "a", 3),
        ("outer:\n  x: 1\n  x: 1\n", "x", 3),
        ("list:\n- {k: 1, k: 1}\n", "k", 2),
        ('{"j": 1, "j": 2}', "j", 1),
    ],
)
def test_a_key_given_twice_is_refused_with_its_line(text: str, key: str, line: int) -> None:
    with pytest.raises(ConfigError, match=rf"key '{key}' is given twice \(line {line}, column \d+\)"):
        read_yaml(text)


def test_the_same_key_in_different_mappings_is_no_duplicate() -> None:
    assert read_yaml("- {k: 1}\n- {k: 2}") == [{"k": 1}, {"k": 2}]


def test_a_yaml_merge_key_is_understood() -> None:
    assert read_yaml("a: &base {x: 1, y: 2}\nb: {<<: *base, y: 3}")["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize("letter", ["x", "é"])
def test_a_document_is_limited_in_bytes(letter: str) -> None:
    text = "# " + letter * (MAX_CONFIG_BYTES // len(letter.encode()))
    with pytest.raises(ConfigError, match=f"at most {MAX_CONFIG_BYTES} are accepted"):
        read_yaml(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("0s", 0.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("200ms", 0.2),
        ("1.5h", 5400.0),
        ("2m0.5s", 120.5),
        ("7us", 7e-6),
        ("9ns", 9e-9),
    ],
)
def test_a_duration_is_read_in_seconds(text: str, seconds: float) -> None:
    assert duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "-5m", "5 m", "m", "5d", "1h 30m", "1h30", "soon", "1e3s", "00"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration such as"):
        duration_s(text)


@pytest.mark.parametrize(
    "value",
    [
        "2001-13-45",
        "!!int x",
        "!!float x",
        "!!bool x",
        "!!timestamp x",
        "!!map x",
        "!!set x",
        "0b_",
        "9" * 5000,
        "[" * 3000,
        "{a: " * 3000,
        "&a [*a]",
        "&a {x: *a}",
        "!!binary é",
        "!!set {a, b}",
        r'"\ud800"',
        "{1: 2}",
        "{? [a] : b}",
        "{<<: 3}",
        ".nan",
        "\x07",
        "*nowhere",
    ],
    ids=lambda value: value[:12],
)
def test_a_value_yaml_stumbles_over_is_a_config_error(value: str) -> None:
    with pytest.raises(ConfigError):
        load(CONFIG_HEAD + f"plugins: {value}")


def load_all(text: str) -> None:
    with contextlib.suppress(ConfigError):
        resolve(load(text))


@fuzzed
@given(st.text(max_size=200))
def test_any_text_raises_nothing_but_config_errors(text: str) -> None:
    load_all(text)


@fuzzed
@given(st.text(alphabet="{}[]:,-?!&*#|>'\"%@`ab01 \n\t.~<=_xe", max_size=60))
def test_any_text_of_yaml_signs_raises_nothing_but_config_errors(text: str) -> None:
    load_all(CONFIG_HEAD + text)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.dates()
    | st.sampled_from(["queue-scorer", "max-score-picker", "latency-scorer", "default", "openai-parser"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "name", "parameters", "pluginRef", "weight", "plugins", "parsers", "discovery"])
            | st.text(max_size=5)
            | st.integers(),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)
FIELD = st.sampled_from(
    ["plugins", "schedulingProfiles", "dataLayer", "requestHandler", "parser", "featureGates", "flowControl", "other"]
)


@fuzzed
@given(st.dictionaries(FIELD, JUNK, min_size=1, max_size=3))
def test_any_value_in_any_field_raises_nothing_but_config_errors(fields: dict[str, object]) -> None:
    load_all(CONFIG_HEAD + yaml.safe_dump(fields))


@fuzzed
@given(
    st.sampled_from(
        ["prefix-cache-affinity-filter", "latency-scorer", "approx-prefix-cache-producer", "max-score-picker"]
    ),
    st.dictionaries(
        st.sampled_from(["affinityThreshold", "ttftWeight", "blockSize", "autoTune", "maxNumOfEndpoints", "x"]),
        JUNK,
        max_size=3,
    ),
)
def test_any_parameters_raise_nothing_but_config_errors(kind: str, parameters: dict[str, object]) -> None:
    load_all(CONFIG_HEAD + yaml.safe_dump({"plugins": [{"type": kind, "parameters": parameters}]}))
