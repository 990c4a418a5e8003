"""What each engine's page says, and how a metric is named."""

from __future__ import annotations

import pytest

from llmd_sched.pool.engines import DEFAULT_ENGINE, ENGINE_LABEL, ENGINES, LEGACY_ENGINE_LABEL, Series, engine_name
from llmd_sched.pool.pool import Load
from llmd_sched.pool.scrape import FACTS_EVERY_S, PageReader

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
