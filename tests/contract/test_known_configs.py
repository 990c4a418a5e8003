# ruff: noqa: E501 (one mutation a line)
"""The configurations people run with the reference load here too, and what is broken in them is refused with its place.

Each mutation is one edit of a configuration that works: the text to replace, what with, and where the complaint points.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import yaml

from llmd_sched.__main__ import main
from llmd_sched.catalog import build_parsers, build_router, resolve
from llmd_sched.config import load
from tests.builders import INFLIGHT, LATENCY, PREFIX, as_builtins, asking, endpoint, pool_of, prompt, streamed

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}
PRECISE = "precise-prefix-cache-producer"

PRODUCERS = {
    "flow-control": {PREFIX, INFLIGHT},
    "optimized-baseline": {PREFIX, INFLIGHT},
    "optimized-baseline-decode-bound": {PREFIX, INFLIGHT},
    "optimized-baseline-v0": {PREFIX, "no-hit-lru-scorer"},
    "payload-agnostic": {INFLIGHT, "session-affinity-scorer"},
    "pd-disaggregation": {PREFIX, INFLIGHT},
    "precise-prefix-cache": {PRECISE},
    "predicted-latency-chart": {PREFIX, INFLIGHT, LATENCY},
    "predicted-latency-slo": {PREFIX, INFLIGHT, LATENCY},
    "probabilistic-admitter": {PREFIX},
    "tiered-prefix-cache": {PREFIX, "cpu-prefix-cache-producer"},
    "wide-ep": {PREFIX, INFLIGHT},
    "wide-ep-dp-aware": {PREFIX},
}
"""Plugins with state, those added by default among them."""

every_config = pytest.mark.parametrize("name", CONFIGS)


@every_config
def test_a_known_configuration_has_the_plugins_it_needs(name: str) -> None:
    resolved = resolve(load(CONFIGS[name].read_text()), allow_experimental=True)
    assert set(resolved.producers) == PRODUCERS[name]
    assert resolved.detector in resolved.plugins


@every_config
def test_a_known_configuration_routes_requests(name: str) -> None:
    resolved = resolve(load(CONFIGS[name].read_text()), allow_experimental=True)
    roles = ("prefill", "decode", "decode")
    members = [endpoint(i, labels={"llm-d.ai/role": role}) for i, role in enumerate(roles)]
    router = build_router(resolved, pool_of(members), Random(0))
    for i in range(20):
        decision = router.choose(asking(prompt(2, seed=i % 3), ttft_slo_ms=500.0), None, i / 100)
        router.finish(decision.ticket, streamed(), i / 100 + 0.005)
    assert not router.open
    assert not any(router.producer_errors.values()), router.last_producer_error
    assert build_parsers(resolved).parse("/v1/completions", b'{"model":"m","prompt":"x"}') is not None


@every_config
def test_a_known_configuration_resolves_the_same_from_its_own_document(name: str) -> None:
    resolved = resolve(load(CONFIGS[name].read_text()), allow_experimental=True)
    document = yaml.safe_dump(as_builtins(resolved.as_document()))
    assert resolve(load(document), allow_experimental=True) == resolved


@every_config
def test_check_config_accepts_a_known_configuration(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", "--allow-experimental-plugins", str(CONFIGS[name])]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["kind"] == "EndpointPickerConfig"


FLOW, BASE, PD, SLO = "flow-control", "optimized-baseline", "pd-disaggregation", "predicted-latency-slo"
OLD, TIERED, KV, DP = "optimized-baseline-v0", "tiered-prefix-cache", "precise-prefix-cache", "wide-ep-dp-aware"
ADMIT, RAW = "probabilistic-admitter", "payload-agnostic"

MUTATIONS = [
    # the document
    (BASE, "apiVersion: llm-d.ai/v1alpha1", "apiVersion: llm-d.ai/v2", "$.apiVersion"),
    (BASE, "apiVersion: llm-d.ai/v1alpha1\n", "", "$: "),
    (BASE, "kind: EndpointPickerConfig", "kind: EndpointPicker", "$.kind"),
    (BASE, "kind: EndpointPickerConfig\n", "", "$: "),
    (BASE, "schedulingProfiles:", "schedulingProfile:", "$: "),
    (BASE, "schedulingProfiles:\n- name: default", "schedulingProfiles:\n  name: default", "$.schedulingProfiles"),
    (BASE, "apiVersion", "featureGates: {flowControl: true}\napiVersion", "$.featureGates"),
    (BASE, "- name: default", "- name: default\n  weight: 1", "$.schedulingProfiles[0]"),
    (BASE, "- type: token-load-scorer", "- type: token-load-scorer\n- [", "$: not valid YAML"),
    (BASE, "schedulingProfiles:", "plugins: []\nschedulingProfiles:", "$: not valid YAML"),
    (FLOW, "- flowControl", "- flowControll", "$.featureGates[0]"),
    (FLOW, "- flowControl", "- flowControl=yes", "$.featureGates[0]"),
    # plugins
    (BASE, "- type: token-load-scorer", "- type: token-load-scorr", "$.plugins[1].type"),
    (BASE, "- type: token-load-scorer", "- name: token-load-scorer", "$.plugins[1]"),
    (BASE, "- type: token-load-scorer", "- type: token-load-scorer\n- type: token-load-scorer", "$.plugins[2].type"),
    (BASE, "- type: max-score-picker", "- type: max-score-picker\n  name: token-load-scorer", "$.plugins[2].name"),
    (BASE, "- type: max-score-picker", "- type: max-score-picker\n  parameters: {maxNumOfEndpoints: 0}", "$.plugins[2]"),
    (BASE, "peakPrefillThroughput: 20480", "peakPrefillThroughput: fast", "$.plugins[0].parameters.peakPrefill"),
    (BASE, "peakPrefillThroughput: 20480", "peakPrefillThroughput: 0", "$.plugins[0].parameters"),
    (BASE, "peakPrefillThroughput: 20480", "peakPrefillThroughput: .inf", "$.plugins[0].parameters.peakPrefill"),
    (BASE, "peakPrefillThroughput: 20480", "affinityThreshold: 1.5", "$.plugins[0].parameters"),
    (BASE, "peakPrefillThroughput: 20480", "explorationProbability: -0.1", "$.plugins[0].parameters"),
    (BASE, "peakPrefillThroughput: 20480", "maxTTFTPenaltyMs: -1", "$.plugins[0].parameters"),
    (BASE, "peakPrefillThroughput: 20480", "ttftSource: guess", "$.plugins[0].parameters"),
    (BASE, "peakPrefillThroughput: 20480", "peakThroughput: 20480", "$.plugins[0].parameters"),
    (BASE, "- type: token-load-scorer", "- type: token-load-scorer\n  params: {}", "$.plugins[1]"),
    (OLD, "- type: queue-scorer", "- type: queue-scorer\n  parameters: {threshold: 1}", "$.plugins[1].parameters"),
    (OLD, "- type: no-hit-lru-scorer", "- type: no-hit-lru-scorer\n  parameters: {lruSize: few}", "$.plugins[4].parameters.lruSize"),
    (RAW, "- type: session-affinity-scorer", "- type: session-affinity-scorer\n  parameters: {strategy: cookie}", "$.plugins[2].parameters"),
    (TIERED, "lruCapacityPerServer: 41000", "lruCapacityPerServer: 0", "$.plugins[3].parameters"),
    (TIERED, "blockSizeTokens: 64", "blockSizeTokens: 0", "$.plugins[3].parameters"),
    (TIERED, "autoTune: false", "autoTune: 3", "$.plugins[3].parameters.autoTune"),
    (TIERED, "InfoProducerName: cpu-prefix-cache-producer", "InfoProducerName: gpu", "reads PrefixCacheMatchInfo"),
    (TIERED, "InfoProducerName: cpu-prefix-cache-producer", "InfoProducerName: queue-scorer", "does not make it"),
    (ADMIT, "power: 5", "power: -5", "$.plugins[4].parameters"),
    (ADMIT, "kvCacheUtilThreshold: 0.8", "kvCacheUtilThreshold: 0", "$.plugins[4].parameters"),
    (ADMIT, "queueDepthThreshold: 999999999", "queueDepthThreshold: 0", "$.plugins[5].parameters"),
    (SLO, "streamingMode: true", "streamingMode: true\n    sloBufferFactor: 0", "$.plugins[0].parameters"),
    (SLO, "streamingMode: true", "contextTTL: five minutes", "$.plugins[0].parameters"),
    (SLO, "- type: latency-scorer", "- type: latency-scorer\n  parameters: {ttftWeight: -1}", "$.plugins[4].parameters"),
    # profiles
    (BASE, "- name: default", "- name: ''", "$.schedulingProfiles[0].name"),
    (BASE, "- name: default\n", "- plugins: []\n- name: default\n", "$.schedulingProfiles[0]"),
    (BASE, "pluginRef: token-load-scorer", "pluginRef: token-load", "$.schedulingProfiles[0].plugins[1].pluginRef"),
    (BASE, "- pluginRef: token-load-scorer", "- weight: 1", "$.schedulingProfiles[0].plugins[1]"),
    (BASE, "- pluginRef: max-score-picker", "- {pluginRef: max-score-picker, weight: 1}", "$.schedulingProfiles[0].plugins[2]"),
    (OLD, "weight: 3", "weight: much", "$.schedulingProfiles[0].plugins[2].weight"),
    (OLD, "weight: 3", "weight: .nan", "$.schedulingProfiles[0].plugins[2].weight"),
    (BASE, "- type: max-score-picker", "- type: max-score-picker\n- type: random-picker\nschedulingProfiles:\n- name: d\n  plugins:\n  - pluginRef: max-score-picker\n  - pluginRef: random-picker\nunused:", "$: "),
    (PD, "- name: decode", "- name: prefill", "$.schedulingProfiles[1].name"),
    (PD, "- type: disagg-profile-handler", "- type: single-profile-handler\n- type: disagg-profile-handler", "$.plugins"),
    (PD, "- type: disagg-profile-handler\n  parameters:\n    deciders:\n      prefill: always-disagg-pd-decider\n", "", "$.plugins"),
    (PD, "prefill: always-disagg-pd-decider", "prefill: never", "$.plugins[1].parameters.deciders.prefill"),
    (PD, "prefill: always-disagg-pd-decider", "prefill: queue-scorer", "$.plugins[1].parameters.deciders.prefill"),
    (PD, "prefill: always-disagg-pd-decider", "decode: always-disagg-pd-decider", "$.plugins[1].parameters.deciders"),
    (PD, "    deciders:", "    profiles: {prefill: p}\n    deciders:", "$.plugins[1].parameters.profiles.prefill"),
    (PD, "    deciders:", "    stageOrder: encode-first\n    deciders:", "$.plugins[1].parameters"),
    (PD, "    deciders:", "    stageOrder: prefill-first\n    deciders:", "$.plugins[1].parameters"),
    (DP, "nonCachedTokens: 16", "nonCachedTokens: -1", "$.plugins[0].parameters"),
    (DP, "primaryPort: 8000", "primaryPort: 80000", "$.plugins[1].parameters"),
    (DP, "deciderPluginName: prefix-based-pd-decider", "deciderPluginName: x", "$.plugins[1].parameters.deciderPluginName"),
    # parsers, data layer
    (RAW, "- pluginRef: passthrough-parser", "- pluginRef: pass-parser", "$.requestHandler.parsers[0].pluginRef"),
    (RAW, "- pluginRef: passthrough-parser", "- pluginRef: max-score-picker", "$.requestHandler.parsers[0].pluginRef"),
    (RAW, "requestHandler:\n  parsers:", "requestHandler:\n  parser:", "$.requestHandler"),
    (BASE, "plugins:\n- type: p", "parser: {pluginRef: nobody}\nplugins:\n- type: p", "$.parser.pluginRef"),
    (BASE, "plugins:\n- type: p", "dataLayer: {discovery: {pluginRef: dns}}\nplugins:\n- type: p", "$.dataLayer.discovery"),
    (KV, "  - pluginRef: endpoint-notification-source", "  - pluginRef: endpoint-source", "$.dataLayer.sources[0].pluginRef"),
    (KV, "    - pluginRef: precise-prefix-cache-producer", "    - pluginRef: precise", "$.dataLayer.sources[0].extractors[0]"),
    (KV, "  - pluginRef: endpoint-notification-source", "  - pluginRef: queue-scorer", "$.dataLayer.sources[0].pluginRef"),
    (KV, "blockSizeTokens: 64", "blockSizeTokens: 0", "$.plugins[2].parameters"),
    (KV, "socketPort: 5557", "socketPort: 99999", "$.plugins[2].parameters"),
    (KV, "      url: http://localhost:8000", "      uri: http://localhost:8000", "$.plugins[0].parameters.vllm"),
    # flow control
    (FLOW, "maxBytes: 10Gi", "maxBytes: 10GB", "$.flowControl.maxBytes"),
    (FLOW, "maxRequests: 1k", "maxRequests: -1", "$.flowControl.maxRequests"),
    (FLOW, "defaultRequestTTL: 60s", "defaultRequestTTL: 60", "$.flowControl.defaultRequestTTL"),
    (FLOW, "defaultRequestTTL: 60s", "defaultRequestTTL: a minute", "$.flowControl.defaultRequestTTL"),
    (FLOW, "defaultRequestTTL: 60s", "noEndpointRequestTTL: soon", "$.flowControl.noEndpointRequestTTL"),
    (FLOW, "defaultRequestTTL: 60s", "ttl: 60s", "$.flowControl"),
    (FLOW, "    pluginRef: concurrency-detector", "    pluginRef: detector", "$.flowControl.saturationDetector.pluginRef"),
    (FLOW, "    pluginRef: concurrency-detector", "    pluginRef: queue-scorer", "$.flowControl.saturationDetector.pluginRef"),
    (FLOW, "{priority: 0,", "{priority: 100,", "$.flowControl.priorityBands[1].priority"),
    (FLOW, "{priority: 0,", "{priority: low,", "$.flowControl.priorityBands[1].priority"),
    (FLOW, "{priority: 0, ", "{", "$.flowControl.priorityBands[1].priority"),
    (FLOW, 'maxRequests: "200"', "maxRequests: some", "$.flowControl.priorityBands[1].maxRequests"),
    (FLOW, "0, maxRequests: \"50\", fairnessPolicyRef: round-robin-fairness-policy", "0, fairnessPolicyRef: fair", "$.flowControl.priorityBands[2].fairnessPolicyRef"),
    (FLOW, "0, maxRequests: \"50\", fairnessPolicyRef: round-robin-fairness-policy", "0, fairnessPolicyRef: queue-scorer", "$.flowControl.priorityBands[2].fairnessPolicyRef"),
    (FLOW, "0, maxRequests: \"50\"", "0, orderingPolicyRef: lifo, maxBytes: 1", "$: not valid YAML"),
    (FLOW, "  saturationDetector:", "  usageLimitPolicyPluginRef: none\n  saturationDetector:", "$.flowControl.usageLimitPolicyPluginRef"),
    (FLOW, "  saturationDetector:", "  enableEviction: perhaps\n  saturationDetector:", "$.flowControl.enableEviction"),
    (FLOW, "maxConcurrency: 132", "maxConcurrency: 0", "$.plugins[6].parameters"),
    (FLOW, "concurrencyMode: requests", "concurrencyMode: bytes", "$.plugins[6].parameters"),
    (FLOW, "headroom: 0", "headroom: -1", "$.plugins[6].parameters"),
]  # fmt: skip


def test_there_are_enough_mutations() -> None:
    assert len(MUTATIONS) >= 60
    assert len({(name, old, new) for name, old, new, _ in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize(("name", "old", "new", "told"), MUTATIONS)
def test_check_config_refuses_what_is_broken_and_says_where(
    name: str, old: str, new: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = CONFIGS[name].read_text()
    assert old in text
    broken = tmp_path / "broken.yaml"
    broken.write_text(text.replace(old, new, 1))
    assert main(["check-config", "--allow-experimental-plugins", str(broken)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"{broken}: $")
    assert told in error


def test_experimental_plugins_need_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", str(CONFIGS[RAW])]) == 1
    assert "$.plugins[2].type: session-affinity-scorer is experimental (Alpha)" in capsys.readouterr().err


def test_a_deprecated_plugin_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", str(CONFIGS[DP])]) == 0
    assert "warning: $.plugins[1].type: pd-profile-handler is deprecated" in capsys.readouterr().err
