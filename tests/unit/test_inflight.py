"""What is charged is given back, to the last token, whatever happens in between."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.pool import inflight
from llmd_sched.pool.inflight import InFlightLoad, InFlightLoadProducer
from llmd_sched.types import Candidates, End, Endpoint, Outcome, Prediction, Request
from tests.builders import COLUMNS, INFLIGHT, decision, endpoint, endpoints, fuzzed, request, streamed

NAMES = ("inflight_requests", "inflight_tokens", "inflight_prefill_tokens", "resident_tokens")


class Bench:
    """An opened producer with its endpoints, driven by hand."""

    def __init__(self, members: list[Endpoint] | None = None, **parameters: object) -> None:
        self.live: InFlightLoad = InFlightLoadProducer(**parameters).open(INFLIGHT)
        self.members = endpoints(2) if members is None else members
        self.live.endpoints_changed(self.members)
        self.prefix: dict[str, list[float]] = {}

    def change(self, members: list[Endpoint]) -> None:
        self.members = members
        self.live.endpoints_changed(members)

    def view(self, asked: Request) -> Candidates:
        columns = {COLUMNS[k]: np.array(v, dtype=float) for k, v in self.prefix.items()}
        plain = Candidates(self.members, columns)
        return plain.with_columns(self.live.produce(asked, plain, 0.0))

    def send(self, ticket: str, position: int = 0, tokens: int = 100, **fields: object) -> None:
        asked = request(input_tokens=tokens, **fields)
        self.live.chosen(decision(ticket, asked, self.members[position]), self.view(asked), position, 0.0)

    def load(self, position: int = 0) -> tuple[float, ...]:
        """Requests, charged tokens, tokens before their first token, resident tokens."""
        view = self.view(request())
        return tuple(float(view.column(COLUMNS[name])[position]) for name in NAMES)

    def uncached(self, tokens: int) -> list[float]:
        return self.view(request(input_tokens=tokens)).column(COLUMNS["uncached_tokens"]).tolist()


def test_a_request_is_charged_where_it_was_sent() -> None:
    bench = Bench()
    bench.send("a", position=1, tokens=100)
    assert bench.load(0) == (0, 0, 0, 0)
    assert bench.load(1) == (1, 100, 100, 0)


def test_the_first_token_frees_the_prompt_and_the_end_the_request() -> None:
    bench = Bench()
    bench.send("a", tokens=100)
    bench.live.first_token("a", 1.0)
    assert bench.load() == (1, 0, 0, 100)
    bench.live.first_token("a", 1.1)
    assert bench.load() == (1, 0, 0, 100)
    bench.live.finished("a", streamed(), 2.0)
    assert bench.load() == (0, 0, 0, 0)


def test_what_a_request_has_generated_grows_as_its_prediction_had_it() -> None:
    live = InFlightLoadProducer().open(INFLIGHT)
    members = endpoints(2)
    live.endpoints_changed(members)
    plain = Candidates(members, {})

    def resident(now_s: float) -> list[float]:
        return live.produce(request(), plain, now_s)[f"resident_tokens/{INFLIGHT}"].tolist()

    for ticket, tpot_ms in (("a", 20.0), ("b", 10.0)):
        asked = request(input_tokens=100)
        view = plain.with_columns(live.produce(asked, plain, 0.0))
        predicted = Prediction(row=(), ttft_ms=1.0, tpot_ms=tpot_ms, model_version=1)
        live.chosen(decision(ticket, asked, members[0], predicted), view, 0, 0.0)
    live.first_token("a", 10.0)
    assert resident(11.0) == pytest.approx([150.0, 0.0])
    live.first_token("b", 12.0)
    assert resident(13.0) == pytest.approx([100.0 + 150.0 + 100.0 + 100.0, 0.0])
    live.finished("a", streamed(), 14.0)
    assert resident(14.0) == pytest.approx([100.0 + 200.0, 0.0])
    live.finished("b", streamed(), 15.0)
    assert resident(1e6) == [0.0, 0.0]


def test_the_wait_for_the_prompts_ahead_shrinks_as_time_passes_and_ends_with_them() -> None:
    live = InFlightLoadProducer().open(INFLIGHT)
    members = endpoints(1)
    live.endpoints_changed(members)
    plain = Candidates(members, {})

    def wait_ms(now_s: float) -> float:
        return float(live.produce(request(), plain, now_s)[f"admission_wait_ms/{INFLIGHT}"][0])

    def send(ticket: str, at_s: float, ttft_ms: float | None) -> None:
        asked = request(input_tokens=100)
        view = plain.with_columns(live.produce(asked, plain, at_s))
        said = None if ttft_ms is None else Prediction(row=(), ttft_ms=ttft_ms, tpot_ms=4.0, model_version=1)
        live.chosen(decision(ticket, asked, members[0], said), view, 0, at_s)

    assert wait_ms(0.0) == 0.0
    send("a", 10.0, 500.0)
    send("b", 10.1, 100.0)  # done before the first
    assert wait_ms(10.1) == pytest.approx(400.0)
    assert wait_ms(10.6) == 0.0  # overdue
    send("c", 10.6, 200.0)
    for ticket in "ab":
        live.first_token(ticket, 10.7)
    assert wait_ms(10.7) == pytest.approx(100.0)
    live.first_token("c", 10.7)
    assert wait_ms(10.7) == 2.0  # earlier than predicted: nothing is ahead but half a step of those in decode
    for ticket in "abc":
        live.finished(ticket, streamed(), 11.0)
    assert wait_ms(11.0) == 0.0
    send("d", 20.0, None)
    assert wait_ms(20.0) == 0.0


@pytest.mark.parametrize("end", list(End))
def test_every_kind_of_end_gives_everything_back(end: End) -> None:
    bench = Bench()
    bench.send("a", tokens=100)
    bench.live.finished("a", Outcome(end=end), 1.0)
    assert bench.load() == (0, 0, 0, 0)


def test_an_end_told_twice_or_of_a_stranger_changes_nothing() -> None:
    bench = Bench()
    bench.send("a")
    bench.send("b")
    for ticket in ("a", "a", "stranger"):
        bench.live.finished(ticket, streamed(), 1.0)
    bench.live.first_token("stranger", 1.0)
    assert bench.load() == (1, 100, 100, 0)


@pytest.mark.parametrize(
    ("match", "total", "tokens", "uncached"),
    [
        (0, 2, 128, 128),
        (1, 2, 128, 64),
        (2, 2, 128, 0),
        (3, 2, 128, 0),  # never negative
        (0, 2, 100, 100),  # the started block counts only what is in it
        (1, 2, 100, 64),
        (0, 2, 500, 500),  # beyond what the index looked at
        (2, 2, 500, 372),
        (0, 0, 50, 50),
        (0, 0, 0, 0),
    ],
)
def test_uncached_tokens_are_what_the_index_does_not_know(
    match: float, total: float, tokens: int, uncached: float
) -> None:
    bench = Bench(endpoints(1))
    bench.prefix = {"match": [match], "total": [total], "block": [64]}
    assert bench.uncached(tokens) == [uncached]


def test_without_an_index_the_whole_prompt_is_uncached() -> None:
    assert Bench().uncached(77) == [77, 77]


def test_only_what_is_uncached_is_charged_but_all_of_it_is_resident() -> None:
    bench = Bench(endpoints(1))
    bench.prefix = {"match": [1], "total": [2], "block": [64]}
    bench.send("a", tokens=128)
    assert bench.load() == (1, 64, 64, 0)
    bench.live.first_token("a", 1.0)
    assert bench.load() == (1, 0, 0, 128)


@pytest.mark.parametrize(
    ("parameters", "client_limit", "charged"),
    [
        ({}, None, 250),
        ({"output_ratio": 0.0}, None, 100),
        ({"output_ratio": 0.234}, None, 123),
        ({}, 30, 130),
        ({}, 900, 250),
        ({"max_estimated_output_tokens": 20}, None, 120),
        ({"max_estimated_output_tokens": 20}, 5, 105),
        ({"max_estimated_output_tokens": 0}, None, 100),
        ({}, 0, 100),
        ({}, -1_000_000, 100),  # what a client says never lowers the load of others
    ],
)
def test_the_output_estimate_is_capped_by_client_and_configuration(
    parameters: dict[str, object], client_limit: int | None, charged: float
) -> None:
    bench = Bench(add_estimated_output_tokens=True, **parameters)
    bench.send("a", tokens=100, max_output_tokens=client_limit)
    assert bench.load()[:3] == (1, charged, 100)


def test_with_the_output_estimate_the_charge_stays_to_the_end() -> None:
    bench = Bench(add_estimated_output_tokens=True)
    bench.send("a", tokens=100)
    bench.live.first_token("a", 1.0)
    assert bench.load() == (1, 250, 0, 100)
    bench.live.finished("a", streamed(), 2.0)
    assert bench.load() == (0, 0, 0, 0)


def test_an_endpoint_that_returns_starts_from_zero_and_stays_there() -> None:
    bench = Bench()
    bench.send("a")
    bench.change([bench.members[1]])
    bench.change(endpoints(2))
    assert bench.load() == (0, 0, 0, 0)
    bench.live.finished("a", streamed(), 1.0)
    assert bench.load() == (0, 0, 0, 0)


def test_an_endpoint_that_stays_keeps_its_load() -> None:
    bench = Bench()
    bench.send("a", position=1)
    bench.change([bench.members[1], endpoint(9)])
    assert bench.load(0) == (1, 100, 100, 0)


def test_open_requests_are_bounded_and_the_oldest_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflight, "MAX_OPEN", 3)
    bench = Bench()
    for i in range(5):
        bench.send(str(i), tokens=10 + i)
    assert bench.load() == (3, 12 + 13 + 14, 12 + 13 + 14, 0)


STEP = st.tuples(st.sampled_from(["send", "first", "end", "leave", "join"]), st.integers(0, 7))


@fuzzed
@given(st.lists(STEP, max_size=60), st.booleans())
def test_no_counter_goes_negative_and_all_return_to_zero(steps: list[tuple[str, int]], estimate: bool) -> None:
    everyone = endpoints(3)
    bench = Bench(list(everyone), add_estimated_output_tokens=estimate)
    sent: list[str] = []
    for verb, n in steps:
        if verb == "send" and bench.members:
            sent.append(f"t{len(sent)}")
            bench.send(sent[-1], position=n % len(bench.members), tokens=n * 33)
        elif verb == "first" and sent:
            bench.live.first_token(sent[n % len(sent)], 0.0)
        elif verb == "end" and sent:
            bench.live.finished(sent[n % len(sent)], streamed(), 0.0)
        elif verb == "leave":
            bench.change([e for e in bench.members if e != everyone[n % 3]])
        elif verb == "join" and everyone[n % 3] not in bench.members:
            bench.change([*bench.members, everyone[n % 3]])
        assert all(value >= 0 for i in range(len(bench.members)) for value in bench.load(i))
    for ticket in sent:
        bench.live.finished(ticket, streamed(), 0.0)
    assert all(bench.load(i) == (0, 0, 0, 0) for i in range(len(bench.members)))


@pytest.mark.parametrize(
    "parameters", [{"output_ratio": -0.1}, {"output_ratio": float("nan")}, {"max_estimated_output_tokens": -1}]
)
def test_parameters_are_checked(parameters: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be 0 or more"):
        InFlightLoadProducer(**parameters).check()
