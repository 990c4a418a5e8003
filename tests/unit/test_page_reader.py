"""The few lines that matter, found in a page of 50 KB, wherever they stand; and how often they are looked for."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.pool.engines import ENGINES, Series
from llmd_sched.pool.pool import Load
from llmd_sched.pool.scrape import FACTS_EVERY_S, TOUCHED_FOR_S, Pace, PageReader
from tests.builders import fuzzed, vllm_page

PLAIN = Load(waiting=6.0, running=3.0, kv_usage=0.25, block_tokens=128.0, cache_blocks=1024.0)


def read(page: bytes) -> Load:
    return PageReader().read(page, 0.0)


def gauges(load: Load) -> tuple[float | None, float | None, float | None]:
    return load.waiting, load.running, load.kv_usage


def test_the_page_of_the_tests_has_the_size_and_order_of_a_real_one() -> None:
    page = vllm_page()
    assert 35_000 < len(page) < 60_000
    assert page.index(b"\nvllm:num_requests_waiting{") < page.index(b"\nvllm:num_requests_waiting_by_reason{")
    assert page.index(b"\nvllm:cache_config_info{") > 30_000


def test_every_fact_of_a_page_is_read() -> None:
    assert read(vllm_page()) == PLAIN


def test_a_longer_name_is_not_taken_for_the_family() -> None:
    page = b'vllm:num_requests_waiting_by_reason{reason="capacity"} 1000.0\nvllm:num_requests_waiting{engine="0"} 2.0\n'
    assert read(page).waiting == 2.0
    assert read(page.split(b"\n")[0] + b"\n").waiting is None


def test_several_engines_are_summed_and_their_usage_averaged() -> None:
    page = vllm_page(waiting=("1.0", "2.0", "4.0"), running=("8.0", "16.0", "0.0"), kv_usage=("0.1", "0.2", "0.6"))
    load = read(page)
    assert (load.waiting, load.running) == (7.0, 24.0)
    assert load.kv_usage == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b"vllm:num_requests_waiting 6", 6.0),
        (b'vllm:num_requests_waiting{engine="0"} 6', 6.0),
        (b'vllm:num_requests_waiting{engine="0"} 6e0', 6.0),
        (b'vllm:num_requests_waiting{model_name="a b } c"} 6.0', 6.0),
        (b'vllm:num_requests_waiting{engine="0"} NaN', None),
        (b'vllm:num_requests_waiting{engine="0"} +Inf', None),
        (b'vllm:num_requests_waiting{engine="0"} soon', None),
        (b'vllm:num_requests_waiting{engine="0"} ', None),
        (b"# HELP vllm:num_requests_waiting 6", None),
        (b"vllm:num_requests_waiting", None),
        (b"not_vllm:num_requests_waiting 6", None),
        (b"", None),
    ],
)
@pytest.mark.parametrize("before", [b"", b"x 1\n"])
@pytest.mark.parametrize("after", [b"", b"\n", b"\ny 2\n"])
def test_a_line_is_read_first_last_and_in_between(
    before: bytes, line: bytes, after: bytes, value: float | None
) -> None:
    assert read(before + line + after).waiting == value


def test_a_timestamp_behind_a_value_is_not_taken_for_the_value() -> None:
    assert read(b'vllm:num_requests_waiting{engine="0"} 6.0 1795391307726\n').waiting == 6.0


def test_an_engine_without_a_number_is_left_out_of_the_sum() -> None:
    assert read(vllm_page(waiting=("NaN", "2.0", "3.0"), kv_usage=("NaN", "0.5"))).waiting == 5.0
    assert read(vllm_page(kv_usage=("NaN", "0.5"))).kv_usage == 0.5


@pytest.mark.parametrize(("value", "shown"), [("1.2", 1.0), ("-0.1", 0.0), ("1.0", 1.0), ("0.0", 0.0)])
def test_usage_stays_a_share(value: str, shown: float) -> None:
    assert read(vllm_page(kv_usage=(value,))).kv_usage == shown


@pytest.mark.parametrize(
    ("missing", "expected"),
    [("waiting", (None, 3.0, 0.25)), ("running", (6.0, None, 0.25)), ("kv_usage", (6.0, 3.0, None))],
)
def test_a_missing_family_is_unknown_and_not_zero(missing: str, expected: tuple[float | None, ...]) -> None:
    assert gauges(read(vllm_page(**{missing: ()}))) == expected


@pytest.mark.parametrize("page", [b"", b"\n", b"404: not found", b"<html>" * 9000])
def test_a_page_of_something_else_says_nothing(page: bytes) -> None:
    assert read(page) == Load()


@pytest.mark.parametrize(
    ("blocks", "facts"),
    [("1024", (128.0, 1024.0)), ("None", (128.0, None)), ("0", (128.0, 0.0)), ("lots", (128.0, None))],
)
def test_cache_facts_are_told_from_labels_with_similar_names(
    blocks: str, facts: tuple[float | None, float | None]
) -> None:
    load = read(vllm_page(blocks=blocks))
    assert (load.block_tokens, load.cache_blocks) == facts


def test_facts_are_looked_up_now_and_then_only() -> None:
    reader = PageReader()
    assert reader.read(vllm_page(), 0.0) == PLAIN
    later = reader.read(vllm_page(blocks="2048"), FACTS_EVERY_S - 1)
    assert (later.block_tokens, later.cache_blocks) == (None, None)
    assert reader.read(vllm_page(blocks="2048"), FACTS_EVERY_S).cache_blocks == 2048.0


def test_facts_not_yet_on_the_page_are_looked_for_again() -> None:
    reader = PageReader()
    reader.read(b"vllm:num_requests_waiting 1\n", 0.0)
    assert reader.read(vllm_page(), 0.1).cache_blocks == 1024.0


SHAPES = [
    {},
    {"before": 300},
    {"before": 0, "between": 0},
    {"between": 200},
    {"before": 61},
    {"before": 59},
    {"before": 10, "between": 90, "after": 5},
    {"after": 900},
    {"before": 200, "after": 0},
]


def test_values_are_found_however_the_page_changes_between_reads() -> None:
    reader = PageReader()
    for now_s, shape in enumerate(SHAPES + SHAPES[::-1] + [{}]):
        value = str(float(now_s))
        page = vllm_page(waiting=(value, "1.0"), running=(value,), kv_usage=("0.5", "0.25"), **shape)
        assert gauges(reader.read(page, float(now_s))) == (now_s + 1.0, now_s, 0.375), shape


def test_a_family_that_disappears_and_returns_is_followed() -> None:
    reader = PageReader()
    assert [reader.read(vllm_page(waiting=w), 0.0).waiting for w in (("2.0",), (), ("5.0",))] == [2.0, None, 5.0]


def test_all_engines_are_summed_when_the_page_has_shrunk_before_them() -> None:
    engines = ("1.0",) * 40
    reader = PageReader()
    for before in range(60, 0, -1):
        load = reader.read(vllm_page(waiting=engines, running=engines, before=before), 0.0)
        assert (load.waiting, load.running) == (40.0, 40.0), before
    far = PageReader()
    far.read(vllm_page(waiting=engines, running=engines, before=60), 0.0)
    load = far.read(vllm_page(waiting=engines, running=engines, before=30), 0.0)
    assert (load.waiting, load.running) == (40.0, 40.0)


@fuzzed
@given(st.lists(st.tuples(st.integers(0, 80), st.integers(0, 40), st.integers(1, 12)), min_size=2, max_size=5))
def test_a_reader_with_a_memory_reads_what_one_without_reads(shapes: list[tuple[int, int, int]]) -> None:
    reader = PageReader()
    for before, between, engines in shapes:
        page = vllm_page(
            waiting=("1.0",) * engines, kv_usage=("0.5",) * engines, before=before, between=between, after=3
        )
        assert gauges(reader.read(page, 0.0)) == gauges(read(page)) == (engines, 3.0, 0.5)


@fuzzed
@given(
    st.lists(
        st.sampled_from([b"vllm:num_requests_waiting", b"{", b'a="', b"}", b" ", b"\n", b"7", b"#", b"\xff"]),
        max_size=30,
    )
)
def test_any_page_is_read_without_an_error(pieces: list[bytes]) -> None:
    waiting = read(b"".join(pieces)).waiting
    assert waiting is None or waiting == waiting


def with_custom(*specs: str) -> PageReader:
    custom = tuple((f"{i}/x", Series(spec)) for i, spec in enumerate(specs))
    return PageReader(msgspec.structs.replace(ENGINES["vllm"], custom=custom))


def test_custom_metrics_are_read_beside_the_usual_ones() -> None:
    page = vllm_page() + b'depth{tier="tin"} 1\ndepth{tier="gold"} 2\nheat 3.5\n'
    load = with_custom("depth{tier=gold}", "heat", "cold").read(page, 0.0)
    assert load.custom == {"0/x": 2.0, "1/x": 3.5}
    assert gauges(load) == gauges(PLAIN)


@pytest.mark.parametrize("value", ["NaN", "+Inf", "soon", ""])
def test_a_custom_metric_without_a_number_is_not_there(value: str) -> None:
    assert with_custom("heat").read(f"heat {value}\n".encode(), 0.0).custom == {}


def test_the_first_series_of_a_custom_metric_counts_wherever_the_page_has_it() -> None:
    reader = with_custom("depth")
    for now_s, shape in enumerate(SHAPES):
        page = vllm_page(**shape)
        lines = f'depth{{rank="0"}} {now_s}\ndepth{{rank="1"}} 1000\n'.encode()
        for text in (lines + page, page + lines):
            assert reader.read(text, 0.0).custom == {"0/x": float(now_s)}, shape


def lora(running: str, at: str, waiting: str = "") -> bytes:
    labels = f'max_lora="4",running_lora_adapters="{running}",waiting_lora_adapters="{waiting}"'
    return f"vllm:lora_requests_info{{{labels}}} {at}\n".encode()


def test_the_newest_series_says_which_adapters_are_loaded() -> None:
    page = vllm_page() + lora("old", "1.7e9") + lora("poet,coder", "1.8e9", "queued") + lora("older", "1.6e9")
    assert read(page).adapters == {"poet", "coder"}


def test_equally_new_series_are_engines_of_one_server() -> None:
    assert read(lora("a", "1.8e9") + lora("b, c", "1.8e9")).adapters == {"a", "b", "c"}


def test_a_server_without_adapters_is_not_searched_for_them_on_every_page() -> None:
    reader = PageReader()
    assert reader.read(vllm_page(), 0.0).adapters is None
    assert reader.read(vllm_page() + lora("a", "1.8e9"), 1.0).adapters is None
    assert reader.read(vllm_page() + lora("a", "1.8e9"), FACTS_EVERY_S).adapters == {"a"}
    assert reader.read(vllm_page() + lora("", "1.9e9"), FACTS_EVERY_S + 1.0).adapters == frozenset()


def test_waiting_adapters_and_the_most_there_can_be_are_of_the_newest_series_too() -> None:
    load = read(vllm_page() + lora("old", "1.7e9", "gone") + lora("poet", "1.8e9", "coder, sage"))
    assert (load.adapters, load.waiting_adapters, load.max_adapters) == ({"poet"}, {"coder", "sage"}, 4.0)


def test_engines_of_one_server_have_as_many_slots_as_the_largest() -> None:
    page = lora("a", "1.8e9", "x") + lora("b", "1.8e9", "y").replace(b'max_lora="4"', b'max_lora="6"')
    load = read(page)
    assert (load.waiting_adapters, load.max_adapters) == ({"x", "y"}, 6.0)


@pytest.mark.parametrize("most", ["", "None", "-1", "many"])
def test_a_limit_that_is_no_number_is_unknown(most: str) -> None:
    assert read(lora("a", "1.8e9").replace(b'max_lora="4"', f'max_lora="{most}"'.encode())).max_adapters is None


def test_a_server_without_adapters_says_nothing_of_waiting_ones() -> None:
    load = read(vllm_page())
    assert (load.waiting_adapters, load.max_adapters) == (None, None)


INTERVAL_S, IDLE_S = 0.05, 1.0


def pauses(pace: Pace, traffic: list[bool]) -> list[float]:
    """The pause after each of these reads, every one made when it is due."""
    now_s, seen = 100.0, []
    for there_is in traffic:
        pace.after_read(there_is, now_s)
        seen.append(pace.pause_s)
        now_s += pace.pause_s
    return seen


def test_an_endpoint_with_traffic_is_read_at_the_interval() -> None:
    assert pauses(Pace(INTERVAL_S, IDLE_S), [True] * 5) == [INTERVAL_S] * 5


def test_an_idle_endpoint_is_left_alone_twice_as_long_each_time_up_to_the_limit() -> None:
    expected = [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert pauses(Pace(INTERVAL_S, IDLE_S), [False] * 6) == pytest.approx(expected)


def test_traffic_ends_the_back_off_at_once() -> None:
    assert pauses(Pace(INTERVAL_S, IDLE_S), [False, False, True, False]) == pytest.approx([0.1, 0.2, 0.05, 0.1])


def test_a_chosen_endpoint_is_read_at_the_interval_until_its_request_had_time_to_show() -> None:
    pace = Pace(INTERVAL_S, IDLE_S)
    pauses(pace, [False] * 6)
    pace.touched()
    reads_while_touched = round(TOUCHED_FOR_S / INTERVAL_S)
    seen = pauses(pace, [False] * (reads_while_touched + 3))
    assert seen[: reads_while_touched - 1] == [INTERVAL_S] * (reads_while_touched - 1)
    assert seen[-1] > INTERVAL_S


def test_a_refusing_endpoint_is_left_alone_even_when_it_is_chosen() -> None:
    pace = Pace(INTERVAL_S, IDLE_S)
    for _ in range(6):
        pace.touched()
        pace.after_refusal()
    assert pace.pause_s == IDLE_S
    pace.after_read(True, 0.0)
    assert pace.pause_s == INTERVAL_S


def test_an_interval_longer_than_the_idle_one_stays() -> None:
    pace = Pace(5.0, IDLE_S)
    assert pauses(pace, [False, True, False]) == [5.0, 5.0, 5.0]
    assert not pace.backed_off
