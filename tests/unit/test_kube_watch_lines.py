"""Cutting a watch into lines, and how long to wait after failures."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.kube.watch import MAX_BACKOFF_S, Lines, Lost, Source, backoff_s
from tests.builders import fuzzed


@fuzzed
@given(st.lists(st.binary(min_size=1, max_size=9).filter(lambda b: b.strip() and b"\n" not in b)), st.randoms())
def test_lines_come_whole_however_the_stream_is_cut(lines: list[bytes], rng: Random) -> None:
    stream, cut, made = b"".join(line + b"\n" for line in lines), Lines(), []
    while stream:
        size = rng.randint(1, 7)
        made += cut.feed(stream[:size])
        stream = stream[size:]
    assert made == lines


def test_an_unfinished_line_is_none_and_blank_ones_are_skipped() -> None:
    lines = Lines()
    assert lines.feed(b"{}\n\n \n{") == [b"{}"]
    assert lines.feed(b"") == []
    assert lines.feed(b"}\n") == [b"{}"]


def test_a_line_beyond_the_limit_loses_the_watch() -> None:
    lines = Lines(10)
    assert lines.feed(b"x" * 10) == []
    with pytest.raises(Lost, match="more than 10 bytes"):
        lines.feed(b"x")


def test_the_wait_doubles_up_to_a_bound_and_is_spread() -> None:
    rng = Random(0)
    for failures in range(1, 2000):
        most = min(0.5 * 2.0 ** min(failures - 1, 20), MAX_BACKOFF_S)
        assert most / 2 <= backoff_s(failures, rng) <= most
    assert len({backoff_s(3, rng) for _ in range(50)}) == 50


@pytest.mark.parametrize(
    ("source", "path"),
    [
        (Source("v1", "pods", "n"), "/api/v1/namespaces/n/pods"),
        (Source("llm-d.ai/v1alpha2", "x", "n"), "/apis/llm-d.ai/v1alpha2/namespaces/n/x"),
    ],
)
def test_core_kinds_and_others_have_different_roots(source: Source, path: str) -> None:
    assert source.path == path
