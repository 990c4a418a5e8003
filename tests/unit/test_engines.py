"""What each engine's page says, how a metric is named, and what a configuration adds."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmd_sched.catalog import resolve
from llmd_sched.config import load
from llmd_sched.errors import ConfigError
from llmd_sched.plugin import Plugin
from llmd_sched.pool.engines import DEFAULT_ENGINE, ENGINE_LABEL, ENGINES, LEGACY_ENGINE_LABEL, Series, engine_name
from llmd_sched.pool.pool import Load
from llmd_sched.pool.scrape import FACTS_EVERY_S, PageReader
from llmd_sched.pool.sources import CoreMetricsExtractor, MetricsDataSource, Reading, reading
from tests.builders import CONFIG_HEAD

VLLM = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 6.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="2048"} 1.0
"""

SGLANG = """\
# HELP sglang:num_running_reqs Requests in the batch.
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m",tp_rank="0"} 3.0
sglang:num_running_reqs_offline_batch{model_name="m",tp_rank="0"} 100.0
sglang:token_usage{model_name="m",tp_rank="0"} 0.25
sglang:num_queue_reqs{model_name="m",tp_rank="0"} 6.0
sglang:cache_config_info{num_pages="2048",page_size="16"} 1.0
"""

TRTLLM_SERVE = """\
# TYPE trtllm_num_requests_waiting gauge
trtllm_num_requests_waiting{engine_type="trt",model_name="m"} 6.0
trtllm_num_requests_running{engine_type="trt",model_name="m"} 3.0
trtllm_kv_cache_utilization{engine_type="trt",model_name="m"} 0.25
trtllm_kv_cache_tokens_per_block 16
trtllm_kv_cache_max_blocks 2048
"""

TRITON_TRTLLM = """\
# TYPE nv_trt_llm_request_metrics gauge
nv_trt_llm_request_metrics{model="m",request_type="context",version="1"} 50
nv_trt_llm_request_metrics{model="m",request_type="waiting",version="1"} 6
nv_trt_llm_request_metrics{model="m",request_type="scheduled",version="1"} 3
nv_trt_llm_request_metrics{model="m",request_type="max",version="1"} 512
# TYPE nv_trt_llm_kv_cache_block_metrics gauge
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="m",version="1"} 0.25
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="m",version="1"} 16
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="m",version="1"} 512
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="m",version="1"} 2048
"""

TRITON = """\
# TYPE nv_inference_exec_count counter
nv_inference_exec_count{model="m",version="1"} 3
nv_inference_pending_request_count{model="m",version="1"} 6
"""

PAGES = {
    "vllm": VLLM,
    "sglang": SGLANG,
    "trtllm-serve": TRTLLM_SERVE,
    "triton-tensorrt-llm": TRITON_TRTLLM,
    "triton": TRITON,
}
ALL = Load(waiting=6.0, running=3.0, kv_usage=0.25, block_tokens=16.0, cache_blocks=2048.0)


def read(engine: str, page: str) -> Load:
    return PageReader(ENGINES[engine]).read(page.encode(), 0.0)


def test_every_engine_has_a_page_here() -> None:
    assert PAGES.keys() == ENGINES.keys()


@pytest.mark.parametrize("engine", [e for e in PAGES if e != "triton"])
def test_every_fact_of_an_engines_page_is_read(engine: str) -> None:
    assert read(engine, PAGES[engine]) == ALL


def test_plain_triton_tells_of_requests_only() -> None:
    assert read("triton", TRITON) == Load(waiting=6.0, running=3.0)


@pytest.mark.parametrize("engine", PAGES)
def test_the_order_of_families_on_a_page_does_not_matter(engine: str) -> None:
    lines = PAGES[engine].splitlines()
    by_family = sorted((line for line in lines if line[0] != "#"), key=lambda line: line.split("{")[0], reverse=True)
    assert read(engine, "\n".join(by_family)) == read(engine, PAGES[engine])


@pytest.mark.parametrize("engine", PAGES)
@pytest.mark.parametrize("other", PAGES)
def test_another_engines_page_says_nothing(engine: str, other: str) -> None:
    if engine != other:
        assert read(engine, PAGES[other]) == Load()


@pytest.mark.parametrize("engine", PAGES)
def test_a_page_without_the_metrics_says_nothing(engine: str) -> None:
    assert read(engine, "process_cpu_seconds_total 7.0\n") == Load()


def test_several_ranks_are_summed_and_their_usage_averaged() -> None:
    page = "".join(
        f'sglang:num_running_reqs{{dp_rank="{i}"}} {i}\n' for i in range(1, 4)
    ) + 'sglang:token_usage{dp_rank="1"} 0.2\nsglang:token_usage{dp_rank="2"} 0.4\n'  # fmt: skip
    load = read("sglang", page)
    assert load.running == 6.0
    assert load.kv_usage == pytest.approx(0.3)


def test_only_series_that_meet_the_condition_are_summed() -> None:
    page = TRITON_TRTLLM + TRITON_TRTLLM.replace('model="m"', 'model="n"')
    blocks = [line for line in page.splitlines() if line.startswith("nv_trt_llm_kv")]
    requests = [line for line in page.splitlines() if line.startswith("nv_trt_llm_request")]
    load = read("triton-tensorrt-llm", "\n".join(requests + blocks))
    assert (load.waiting, load.running, load.kv_usage) == (12.0, 6.0, 0.25)
    assert (load.block_tokens, load.cache_blocks) == (16.0, 2048.0)


def test_gauges_that_are_facts_are_looked_up_now_and_then_only() -> None:
    reader = PageReader(ENGINES["trtllm-serve"])
    page = TRTLLM_SERVE.encode()
    assert reader.read(page, 0.0) == ALL
    assert reader.read(page, FACTS_EVERY_S - 1).cache_blocks is None
    assert reader.read(page.replace(b"2048", b"4096"), FACTS_EVERY_S).cache_blocks == 4096.0


@pytest.mark.parametrize("value", ["NaN", "+Inf", "soon"])
def test_a_gauge_without_a_number_is_no_fact(value: str) -> None:
    assert read("trtllm-serve", TRTLLM_SERVE.replace("2048", value)).cache_blocks is None


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("up", b"up"),
        (" up ", b"up"),
        ("a:b_c{}", b"a:b_c"),
        ("m{x=y}", b"m"),
        ('m{x="y", z = w}', b"m"),
        ("m{path=/v1/a-b}", b"m"),
    ],
)
def test_a_metric_is_a_name_with_or_without_conditions(spec: str, name: bytes) -> None:
    assert Series(spec).name == name


@pytest.mark.parametrize("spec", ["", "{x=y}", "1up", "m{x}", "m{x=y", "m{x=y}z", "m{x=y,}", "m{=y}", "a b"])
def test_what_is_no_metric_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="expected name or name"):
        Series(spec)


@pytest.mark.parametrize(
    ("spec", "labels", "wanted"),
    [
        ("m", b"", True),
        ("m", b'{x="y"}', True),
        ("m{x=y}", b"", False),
        ("m{x=y}", b'{x="y"}', True),
        ("m{x=y}", b'{a="b",x="y",}', True),
        ("m{x=y}", b'{a="b", x="y"}', True),
        ("m{x=y}", b'{x="yy"}', False),
        ("m{x=y}", b'{xx="y"}', False),
        ("m{x=y}", b'{a_x="y"}', False),
        ("m{x=y}", rb'{a="{x=\"y\""}', False),
        ("m{x=y.z}", b'{x="yaz"}', False),
        ("m{x=y,a=b}", b'{a="b",x="y"}', True),
        ("m{x=y,a=b}", b'{a="c",x="y"}', False),
    ],
)
def test_a_condition_asks_for_one_label_and_its_whole_value(spec: str, labels: bytes, wanted: bool) -> None:
    assert Series(spec).wants(labels) is wanted


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        ({}, DEFAULT_ENGINE),
        ({ENGINE_LABEL: ""}, DEFAULT_ENGINE),
        ({ENGINE_LABEL: "sglang"}, "sglang"),
        ({LEGACY_ENGINE_LABEL: "triton"}, "triton"),
        ({LEGACY_ENGINE_LABEL: "triton", ENGINE_LABEL: "sglang"}, "sglang"),
        ({ENGINE_LABEL: "mystery"}, "mystery"),
    ],
)
def test_an_endpoints_engine_is_a_label_of_it(labels: dict[str, str], name: str) -> None:
    assert engine_name(labels) == name


def test_a_label_of_ones_own_has_no_legacy_name() -> None:
    labels = {"engine": "mine", LEGACY_ENGINE_LABEL: "triton"}
    assert engine_name(labels, "engine", "sglang") == "mine"
    assert engine_name({LEGACY_ENGINE_LABEL: "triton"}, "engine", "sglang") == "sglang"
    assert engine_name({LEGACY_ENGINE_LABEL: "triton"}, default="sglang") == "triton"


def declared(*plugins: str) -> dict[str, Plugin]:
    text = CONFIG_HEAD + f"plugins: [{', '.join(plugins)}]"
    return {name: one.plugin for name, one in resolve(load(text), allow_experimental=True).plugins.items()}


def extracting(parameters: str, name: str = "core-metrics-extractor") -> Reading:
    return reading(declared(f"{{type: core-metrics-extractor, name: {name}, parameters: {parameters}}}"))


def test_without_any_source_or_extractor_metrics_are_read_as_ever() -> None:
    assert reading({}) == reading(declared()) == Reading(engines=dict(ENGINES))
    assert Reading().engine_name({}) == DEFAULT_ENGINE
    assert Reading().url("10.0.0.1", 8000) == "http://10.0.0.1:8000/metrics"


OWN = """{
  engineLabelKey: engine, defaultEngine: mine,
  engineConfigs: [{
    name: mine, queuedRequestsSpec: "queue{tier=gold}", runningRequestsSpec: active, kvUsageSpec: used,
    cacheInfoSpec: cache_info, cacheBlockSizeLabelName: page, cacheNumBlocksSpec: pages,
    customMetrics: [{attributeKey: depth.gold, metricSpec: "depth{tier=gold}"}, {attributeKey: heat, metricSpec: heat}]
  }]
}"""
OWN_PAGE = """\
queue{tier="gold"} 6
queue{tier="tin"} 60
active 3
used 0.25
cache_info{block_size="99",page="16"} 1
pages 2048
depth{tier="tin"} 7
depth{tier="gold"} 8
depth{tier="gold",shard="2"} 9
"""


def test_an_engine_of_the_configuration_is_read_as_it_says() -> None:
    how = extracting(OWN, "mine-too")
    assert [how.engine_name(labels) for labels in ({}, {"engine": "vllm"}, {ENGINE_LABEL: "vllm"})] == [
        "mine",
        "vllm",
        "mine",
    ]
    load = PageReader(how.engines["mine"]).read(OWN_PAGE.encode(), 0.0)
    assert load == Load(6.0, 3.0, 0.25, 16.0, 2048.0, custom={"depth.gold/mine-too": 8.0})
    assert how.engines["vllm"] is ENGINES["vllm"]


def test_an_engine_of_a_known_name_replaces_it_and_says_no_more_than_is_written() -> None:
    how = extracting("{engineConfigs: [{name: vllm, queuedRequestsSpec: 'vllm:num_requests_waiting'}]}")
    assert PageReader(how.engines["vllm"]).read(VLLM.encode(), 0.0) == Load(waiting=6.0)
    assert how.engines.keys() == ENGINES.keys()


def test_an_engine_can_have_nothing_but_custom_metrics() -> None:
    how = extracting("{engineConfigs: [{name: bare, customMetrics: [{attributeKey: a, metricSpec: x}]}]}")
    assert PageReader(how.engines["bare"]).read(b"x 5\n", 0.0) == Load(custom={"a/core-metrics-extractor": 5.0})
    assert PageReader(how.engines["bare"]).read(b"y 5\n", 0.0) == Load(custom={})


def test_block_size_and_count_are_labels_of_the_usual_names_unless_others_are_given() -> None:
    how = extracting("{engineConfigs: [{name: mine, cacheInfoSpec: 'vllm:cache_config_info'}]}")
    assert PageReader(how.engines["mine"]).read(VLLM.encode(), 0.0) == Load(block_tokens=16.0, cache_blocks=2048.0)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ("{defaultEngine: mystery}", "defaultEngine 'mystery' is unknown; known are vllm, sglang, trtllm-serve"),
        ("{engineConfigs: [{name: ''}]}", "name '' of an engine"),
        ("{engineConfigs: [{name: default}]}", "name 'default' of an engine"),
        ("{engineConfigs: [{name: a}, {name: a}]}", "an engine's name is given twice"),
        ("{engineConfigs: [{name: a, kvUsageSpec: 'm{x}'}]}", "engine a: metric 'm{x}': expected name or name"),
        ("{engineConfigs: [{name: a, queueSpec: m}]}", "unknown field `queueSpec`; accepted: name, queuedRequestsSpec"),
        ("{engineConfigs: [{name: a, customMetrics: [{attributeKey: k}]}]}", "missing required field `metricSpec`"),
        ("{engineConfigs: [{name: a, customMetrics: [{attributeKey: k, metricSpec: ''}]}]}", "metric ''"),
        ("{engineConfigs: [{name: a, customMetrics: [{attributeKey: k/x, metricSpec: m}]}]}", "a name without '/'"),
        (
            "{engineConfigs: [{name: a, customMetrics: "
            "[{attributeKey: k, metricSpec: m}, {attributeKey: k, metricSpec: n}]}]}",
            "an attributeKey is given twice",
        ),
    ],
)
def test_an_extractor_says_what_it_does_not_accept(parameters: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        extracting(parameters)
    assert says in str(error.value)


def sourcing(parameters: str) -> Reading:
    return reading(declared(f"{{type: metrics-data-source, parameters: {parameters}}}"))


def test_a_source_says_where_the_page_is_and_how_often_it_is_read() -> None:
    how = sourcing("{path: /stats/prometheus, port: 9400, interval: 200ms}")
    assert (how.path, how.port, how.interval_s, how.tls) == ("/stats/prometheus", 9400, 0.2, None)
    assert how.url("fd00::1", 8000) == "http://[fd00::1]:9400/stats/prometheus"


@pytest.mark.parametrize(
    ("parameters", "verifies"),
    [
        ({}, False),
        ({"ca_cert_path": "ca.crt"}, True),
        ({"insecure_skip_verify": True, "ca_cert_path": "ca.crt"}, False),
        ({"insecure_skip_verify": False}, True),
    ],
)
def test_a_certificate_is_verified_when_that_is_asked_for_or_an_authority_is_given(
    parameters: dict[str, str | bool], verifies: bool
) -> None:
    assert MetricsDataSource(scheme="https", **parameters).verifies is verifies  # type: ignore[arg-type]


def test_https_is_spoken_with_the_systems_authorities_or_without_looking() -> None:
    lax, strict = sourcing("{scheme: https}"), sourcing("{scheme: https, insecureSkipVerify: false}")
    assert lax.tls is not None
    assert strict.tls is not None
    assert (lax.tls.check_hostname, strict.tls.check_hostname) == (False, True)
    assert lax.url("10.0.0.1", 8000) == "https://10.0.0.1:8000/metrics"


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ("{scheme: ftp}", "accepted are http and https"),
        ("{path: metrics}", "expected one such as /metrics"),
        ('{path: "/a b"}', "expected one such as /metrics"),
        ('{path: "/a\\r\\nHost: b"}', "expected one such as /metrics"),
        ("{port: 65536}", "port must be from 1 to 65535"),
        ("{interval: soon}", "interval: 'soon' is not a duration"),
        ("{interval: 0s}", "interval must be more than 0"),
        ("{scheme: https, clientCertPath: a}", "go together"),
        ("{caCertPath: a}", "need scheme https"),
        ("{families: [a]}", "unknown field `families`"),
    ],
)
def test_a_source_says_what_it_does_not_accept(parameters: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        sourcing(parameters)
    assert says in str(error.value)
    assert error.value.path.startswith("$.plugins[0].parameters")


def test_certificates_that_cannot_be_used_are_an_error_at_start(tmp_path: Path) -> None:
    missing, broken = tmp_path / "missing.crt", tmp_path / "broken.crt"
    broken.write_text("no certificate")
    for path in (missing, broken):
        with pytest.raises(ConfigError, match="cannot use the certificates") as error:
            sourcing(f"{{scheme: https, caCertPath: {path}}}")
        assert error.value.path == str(path)


@pytest.mark.parametrize("kind", ["metrics-data-source", "core-metrics-extractor"])
def test_two_of_a_kind_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"a, b are each a {kind}"):
        reading(declared(f"{{type: {kind}, name: a}}", f"{{type: {kind}, name: b}}"))


def test_sources_nobody_here_needs_are_accepted() -> None:
    plugins = declared(
        "{type: models-data-source, parameters: {path: /v1/models, interval: 5s}}",
        "{type: models-data-extractor}",
        "{type: endpoint-notification-source}",
        "{type: k8s-notification-source, parameters: {group: apps, version: v1, kind: Deployment}}",
    )
    assert reading(plugins) == reading({})


def test_every_extractor_knows_the_engines_of_the_table() -> None:
    for engine in ENGINES:
        CoreMetricsExtractor(default_engine=engine).check()
