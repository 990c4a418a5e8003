"""Images that were seen before go where they were seen."""

from __future__ import annotations

import msgspec
import pytest

from llmd_sched.sched.embeddings import MmEmbeddingsCache, MmEmbeddingsCacheProducer, MmEmbeddingsCacheScorer
from llmd_sched.types import Candidates, Stage
from tests.builders import candidates, decision, endpoint, endpoints, pool_of, request, router_of

MATCHED, ITEMS = "encoder_matched_items/mine", "encoder_items/mine"


def opened(size_mib: int = 4096) -> MmEmbeddingsCache:
    live = MmEmbeddingsCacheProducer(cache_size_in_mb_per_server=size_mib).open("mine")
    live.endpoints_changed(endpoints(4))
    return live


def seen(live: MmEmbeddingsCache, position: int, *hashes: int, encoder: int | None = None) -> None:
    view = candidates(4)
    made = decision("t", request(media_hashes=hashes), view.endpoints[position])
    if encoder is not None:
        made = msgspec.structs.replace(made, stages=(Stage("encode", (view.endpoints[encoder],), encoder),))
    live.chosen(made, view, position, 0.0)


def matched(live: MmEmbeddingsCache, *hashes: int) -> tuple[list[float], list[float]]:
    columns = live.produce(request(media_hashes=hashes), candidates(4), 0.0)
    return columns[MATCHED].tolist(), columns[ITEMS].tolist()


def test_what_an_endpoint_was_sent_it_has() -> None:
    live = opened()
    seen(live, 1, 11, 12)
    seen(live, 2, 12, 13)
    assert matched(live, 11, 12) == ([0, 2, 1, 0], [2, 2, 2, 2])
    assert matched(live, 99) == ([0, 0, 0, 0], [1, 1, 1, 1])
    assert matched(live) == ([0, 0, 0, 0], [0, 0, 0, 0])


def test_an_item_given_twice_counts_once() -> None:
    live = opened()
    seen(live, 1, 11, 11)
    assert matched(live, 11, 11, 12) == ([0, 1, 0, 0], [2, 2, 2, 2])


def test_where_encoding_is_a_stage_of_its_own_that_endpoint_has_it() -> None:
    live = opened()
    seen(live, 1, 11, encoder=3)
    assert matched(live, 11)[0] == [0, 0, 0, 1]


@pytest.mark.parametrize(("mib", "items"), [(4, 2), (5, 2), (2048, 1024), (0, 2048), (-1, 2048), (1, 1)])
def test_an_item_takes_two_mebibytes(mib: int, items: int) -> None:
    assert MmEmbeddingsCacheProducer(cache_size_in_mb_per_server=mib).capacity_items == items


def test_the_least_recently_used_go_first() -> None:
    live = opened(size_mib=6)
    for item in (1, 2, 3, 1, 4):
        seen(live, 0, item)
    assert [matched(live, item)[0][0] for item in (1, 2, 3, 4)] == [1, 0, 1, 1]


def test_a_request_with_more_items_than_fit_leaves_the_last() -> None:
    live = opened(size_mib=4)
    seen(live, 0, 1, 2, 3)
    assert [matched(live, item)[0][0] for item in (1, 2, 3)] == [0, 1, 1]


def test_an_endpoint_at_another_address_has_nothing() -> None:
    live = opened()
    seen(live, 0, 1)
    live.endpoints_changed([endpoint(0, address="10.9.9.9")])
    view = Candidates([endpoint(0, address="10.9.9.9")], {})
    assert live.produce(request(media_hashes=(1,)), view, 0.0)[MATCHED].tolist() == [0.0]


@pytest.mark.parametrize(
    ("columns", "scores"),
    [
        ({MATCHED: [0, 1, 2], ITEMS: [2, 2, 2]}, [0.0, 0.5, 1.0]),
        ({MATCHED: [0, 0, 0], ITEMS: [0, 0, 0]}, [0.0, 0.0, 0.0]),
        ({"waiting": [0, 0, 0]}, [0.0, 0.0, 0.0]),
    ],
)
def test_the_score_is_the_share_that_is_there(columns: dict[str, list[float]], scores: list[float]) -> None:
    scorer = MmEmbeddingsCacheScorer(producer_name="mine")
    assert scorer.score(request(), candidates(**columns)).tolist() == scores


def test_a_router_sends_an_image_where_it_was_before() -> None:
    router = router_of("plugins: [{type: mm-embeddings-cache-scorer}]", pool_of(endpoints(5)))
    first = router.choose(request(media_hashes=(7,)), None, 0.0).picked[0].name
    assert {router.choose(request(media_hashes=(7, 8)), None, 0.0).picked[0].name for _ in range(20)} == {first}
