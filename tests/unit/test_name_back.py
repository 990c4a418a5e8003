"""The model name in replies of the duplex path, put back whatever the cut of the chunks."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.extproc.reply import NameBack

TEXT = b'data: {"model":"%s","x":1}\n\ndata: {"model": "%s"}\n\ndata: {"model":"target-2","t":"\\"model\\":\\"'
REPLY = TEXT % (b"target", b"target")
BACK = TEXT % (b"asked-for", b"asked-for")


@given(cuts=st.lists(st.integers(0, len(REPLY)), max_size=12))
def test_the_name_is_put_back_wherever_the_chunks_are_cut(cuts: list[int]) -> None:
    pieces = [REPLY[a:b] for a, b in pairwise([0, *sorted(cuts), len(REPLY)])]
    names = NameBack("target", "asked-for")
    assert b"".join(names.feed(p, end=i == len(pieces) - 1) for i, p in enumerate(pieces)) == BACK


def test_no_more_is_held_back_than_may_become_a_match() -> None:
    names = NameBack("target", "asked-for")
    assert names.feed(b'{"model":"tar', end=False) == b"{"
    assert names.feed(b"rot", end=False) == b'"model":"tarrot'
    assert names.feed(b'{"mod', end=True) == b'{"mod'
