"""When a stage is done on another endpoint than decode."""

from __future__ import annotations

import pytest

from llmd_sched.catalog import resolve
from llmd_sched.config import load
from llmd_sched.errors import ConfigError
from llmd_sched.sched.deciders import AlwaysDisaggMultimodalDecider, AlwaysDisaggPdDecider, PrefixBasedPdDecider
from tests.builders import CONFIG_HEAD, PREFIX, candidates, request


def elsewhere(
    tokens: int, cached_blocks: float, *, non_cached: int = 0, prompt: int = 0, block_tokens: float = 64.0
) -> bool:
    decider = PrefixBasedPdDecider(non_cached_tokens=non_cached, prompt_tokens=prompt)
    decider.check()
    view = candidates(match=[99.0, cached_blocks], total=[99.0, 99.0], block=[block_tokens, block_tokens])
    return decider.disaggregates(request(input_tokens=tokens), view, 1)


@pytest.mark.parametrize(
    ("tokens", "cached_blocks", "non_cached", "prompt", "expected"),
    [
        (1000, 0, 0, 0, False),  # 0 switches it off
        (1000, 0, 0, 500, False),
        (1000, 0, 512, 0, True),
        (512, 0, 512, 0, True),
        (511, 0, 512, 0, False),
        (1000, 7, 512, 0, True),  # 1000 - 448 = 552
        (1000, 8, 512, 0, False),  # 1000 - 512 = 488
        (960, 7, 512, 0, True),  # exactly as many as it takes
        (1000, 0, 512, 1001, False),
        (1000, 0, 512, 1000, True),
        (1000, 0, 1, 0, True),
        (1000, 16, 1, 0, False),
        (0, 0, 1, 0, False),
    ],
)
def test_prefill_is_elsewhere_when_the_decode_endpoint_lacks_enough_of_a_prompt_that_is_long_enough(
    tokens: int, cached_blocks: float, non_cached: int, prompt: int, expected: bool
) -> None:
    assert elsewhere(tokens, cached_blocks, non_cached=non_cached, prompt=prompt) is expected


def test_a_block_counts_as_many_tokens_as_the_index_says() -> None:
    assert elsewhere(1000, 4, non_cached=512, block_tokens=64.0)
    assert not elsewhere(1000, 4, non_cached=512, block_tokens=128.0)


def test_without_an_index_nothing_is_cached() -> None:
    assert PrefixBasedPdDecider(non_cached_tokens=100).disaggregates(request(input_tokens=100), candidates(2), 1)


def test_what_is_cached_counts_and_not_what_it_is_weighed_by_its_tier() -> None:
    """A precise index shows both."""
    view = candidates(match=[4.0], total=[10.0], block=[64.0]).with_columns(
        candidates(**{f"prefix_cached_blocks/{PREFIX}": [8.0]}).columns
    )
    assert not PrefixBasedPdDecider(non_cached_tokens=512).disaggregates(request(input_tokens=1000), view, 0)


def test_it_reads_the_index_that_is_named() -> None:
    decider = PrefixBasedPdDecider(non_cached_tokens=512, prefix_match_info_producer_name="precise")
    view = candidates(**{"prefix_match_blocks/precise": [8.0], "prefix_block_tokens/precise": [64.0]})
    assert not decider.disaggregates(request(input_tokens=1000), view, 0)
    assert decider.disaggregates(request(input_tokens=1000), candidates(match=[8.0], block=[64.0]), 0)


@pytest.mark.parametrize("parameters", ["{nonCachedTokens: -1}", "{promptTokens: -1}"])
def test_thresholds_below_zero_are_refused(parameters: str) -> None:
    text = f"plugins: [{{type: prefix-based-pd-decider, parameters: {parameters}}}]"
    with pytest.raises(ConfigError, match="must be 0 or more"):
        resolve(load(CONFIG_HEAD + text))


def test_always_is_always() -> None:
    assert AlwaysDisaggPdDecider().disaggregates(request(), candidates(1), 0)


@pytest.mark.parametrize(("media", "expected"), [(0, False), (1, True), (7, True)])
def test_a_prompt_with_any_image_video_or_sound_is_encoded_elsewhere(media: int, expected: bool) -> None:
    assert AlwaysDisaggMultimodalDecider().disaggregates(request(media=media), candidates(1), 0) is expected
