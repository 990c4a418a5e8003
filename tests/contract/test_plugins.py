"""What every plugin of the table must do; a new one is found by its row."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from random import Random
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
import yaml

from llmd_sched.catalog import TYPES, resolve, table
from llmd_sched.catalog.table import PRODUCERS
from llmd_sched.config import convert, load
from llmd_sched.errors import ConfigError
from llmd_sched.parsers.registry import PARSERS
from llmd_sched.plugin import (
    DEFAULT_PRODUCER,
    Admitter,
    Attribute,
    Filter,
    Parser,
    Picker,
    Plugin,
    Producer,
    ProducerPlugin,
    Reporter,
    Scorer,
    Stateful,
)
from llmd_sched.sched.admitters import ADMITTERS
from llmd_sched.sched.filters import FILTERS
from llmd_sched.sched.identities import IDENTITIES
from llmd_sched.sched.pickers import PICKERS
from llmd_sched.sched.reporters import REPORTERS
from llmd_sched.sched.scorers import SCORERS
from llmd_sched.types import Adapters, Candidates, End, Outcome
from tests.builders import CONFIG_HEAD, asking, candidates, decision, endpoints, full_candidates, prompt, streamed

LEAST: dict[str, dict[str, Any]] = {
    "file-discovery": {"path": "endpoints.yaml"},
    "dns-discovery": {"host": "engines", "port": 8000},
    "session-id-producer": {"headerName": "x-session-id"},
    "by-label": {"label": "llm-d.ai/role", "validValues": ["decode"]},
    "utilization-filter": {"conditions": [{"metric": "active-requests", "maxValue": 300.0}]},
    "endpoint-attribute-scorer": {"attributeKey": "pressure", "algorithm": {"type": "linear_lower_is_better"}},
    "endpoint-attribute-filter": {
        "attribute": "pressure",
        "algorithm": {"type": "threshold", "threshold": {"operator": "LessThan", "value": 2.0}},
    },
    "request-attribute-reporter": {"attributes": [{"key": {"name": "cost"}, "expression": "usage.total_tokens"}]},
    "priority-holdback-policy": {"minCeiling": 0.5},
}
"""Parameters of plugins that need some."""

NEEDS_STAGES = {"disagg-profile-handler", "pd-profile-handler", "header-profile-handler"}
"""Handlers that run several profiles."""

NEEDS_TELLING = {"by-label", "prefill-filter", "encode-filter", "header-based-testing-filter"}
"""Filters that drop endpoints which no label and no request header speaks for."""
MAY_LEAVE_NOBODY = {
    *NEEDS_TELLING,
    "decode-filter",
    "utilization-filter",
    "endpoint-attribute-filter",
    "concurrency-detector",
}

LISTS_MATTER = {"no-hit-lru-scorer"}
"""Scorers that tell endpoints alike apart by their place in the list."""

TOLD = {"x-session-token": b64encode(b"default/e1").decode(), "test-epp-endpoint-selection": "10.0.0.2, 10.0.0.4:8000"}
REQUEST = asking(prompt(3), ttft_slo_ms=500.0, headers=TOLD)
ROLES = ("decode", "prefill", "encode", "both", "unheard-of")
RANGES = ("0-100", "100-1000", "0-8192", "many")
SIZES = (1, 2, 7, 200)

every_type = pytest.mark.parametrize("name", TYPES)
every_scorer = pytest.mark.parametrize("name", [n for n, kind in TYPES.items() if issubclass(kind, Scorer)])
every_filter = pytest.mark.parametrize("name", [n for n, kind in TYPES.items() if issubclass(kind, Filter)])
every_picker = pytest.mark.parametrize("name", [n for n, kind in TYPES.items() if issubclass(kind, Picker)])
every_size = pytest.mark.parametrize("size", SIZES)


def made(name: str, **parameters: object) -> Plugin:
    plugin = convert({**LEAST.get(name, {}), **parameters}, TYPES[name])
    plugin.check()
    return plugin


def alive(name: str) -> Any:
    """What filters or scores: the plugin, or what it opens."""
    plugin = made(name)
    if not isinstance(plugin, Stateful):
        return plugin
    live = plugin.open("mine")
    live.endpoints_changed(endpoints(max(SIZES) + 3))
    return live


def views(size: int) -> list[Candidates]:
    """Random values, all the same value, nothing produced, labels and adapters, and part of a larger set in view."""
    larger = full_candidates(size + 3, seed=5)
    part = np.ones(size + 3, dtype=bool)
    part[[0, 1, -1]] = False
    flat = {name: np.full(size, 1.0) for name in larger.columns}
    return [
        full_candidates(size, seed=size),
        Candidates(endpoints(size), flat),
        Candidates(endpoints(size), {name: values * 0.0 for name, values in flat.items()}),
        candidates(size),
        told_apart(full_candidates(size, seed=size)),
        told_apart(larger).keep(part),
    ]


def told_apart(view: Candidates) -> Candidates:
    """The same with labels, adapters and a custom metric, a different mixture each."""
    made = []
    for i, one in enumerate(view.endpoints):
        labels = {"llm-d.ai/role": ROLES[i % 5], "llm-d.ai/context-length-range": RANGES[i % 4]}
        made.append(msgspec.structs.replace(one, labels=dict(list(labels.items())[i % 3 :])))
    names = [frozenset({"m"}), frozenset({"poet", "coder"}), frozenset()]
    adapters = [Adapters(names[i % 3], names[i // 3 % 3], i % 4) for i in range(len(made))]
    pressure = np.array([np.nan if i % 3 == 2 else i % 4 for i in range(len(made))], dtype=np.float64)
    columns = {**view.columns, "pressure/core-metrics-extractor": pressure}
    return Candidates(made, columns, view.index, adapters)


def shuffled(view: Candidates, order: np.ndarray) -> Candidates:
    """The rows of a compact view in another order."""
    return Candidates(view.endpoints, view.columns, order, view.adapters).compact()


def unchanged(view: Candidates, act: Callable[[], object]) -> None:
    before = {name: values.copy() for name, values in view.columns.items()}
    index = view.index.copy()
    act()
    assert before.keys() == view.columns.keys()
    assert all(np.array_equal(before[name], view.columns[name], equal_nan=True) for name in before)
    assert np.array_equal(index, view.index)


@every_type
def test_a_plugin_has_a_manual(name: str) -> None:
    kind = TYPES[name]
    assert kind.__doc__ is not None
    assert "Struct" not in kind.__doc__
    assert kind.__doc__ is not Plugin.__doc__
    assert len(kind.__doc__.split()) >= 4


@every_type
def test_a_plugin_is_made_from_its_least_parameters_and_survives_yaml(name: str) -> None:
    plugin = made(name)
    text = yaml.safe_dump(msgspec.to_builtins(plugin))
    assert convert(yaml.safe_load(text), TYPES[name]) == plugin


@every_type
def test_a_plugin_is_frozen(name: str) -> None:
    plugin = made(name)
    for field in plugin.__struct_fields__:
        with pytest.raises(AttributeError):
            setattr(plugin, field, None)
    assert plugin == made(name)


@every_type
def test_parameters_are_written_in_camel_case(name: str) -> None:
    for field in msgspec.structs.fields(TYPES[name]):
        assert "_" not in field.encode_name
        assert field.encode_name[0].islower()


@every_type
def test_an_unknown_parameter_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        convert({**LEAST.get(name, {}), "warp": 1}, TYPES[name], "$.plugins[0].parameters")
    known = TYPES[name].__struct_encode_fields__
    assert error.value.path == "$.plugins[0].parameters"
    assert "unknown field `warp`; " in str(error.value)
    assert str(error.value).endswith(f"accepted: {', '.join(known)}" if known else "this takes no parameters")


def number_fields() -> list[tuple[str, str]]:
    fields = [(n, f) for n, kind in TYPES.items() for f in msgspec.structs.fields(kind)]
    return [(n, f.encode_name) for n, f in fields if f.type is float or float in get_args(f.type)]


@pytest.mark.parametrize(("name", "field"), number_fields())
def test_a_parameter_that_is_no_number_is_refused(name: str, field: str) -> None:
    parameters = yaml.safe_dump({field: float("nan")}, default_flow_style=True).strip()
    with pytest.raises(ConfigError):
        resolve(load(CONFIG_HEAD + f"plugins: [{{type: {name}, parameters: {parameters}}}]"), allow_experimental=True)


@every_type
def test_needs_name_their_producers(name: str) -> None:
    for need in made(name).reads():
        assert isinstance(need.attribute, Attribute)
        assert need.producer == DEFAULT_PRODUCER[need.attribute]
        assert {**PRODUCERS, **IDENTITIES}[need.producer].provides is need.attribute


@every_type
def test_a_need_follows_the_name_that_is_configured(name: str) -> None:
    unsupported = {"encoderCacheMatchInfoProducerName"}
    fields = {f for f in TYPES[name].__struct_encode_fields__ if f.lower().endswith("producername")} - unsupported
    extra = {"ttftSource": "latencyPredictor"} if "ttftSource" in TYPES[name].__struct_encode_fields__ else {}
    plugins = [made(name, **dict.fromkeys(fields, "mine")), made(name, **dict.fromkeys(fields, "mine"), **extra)]
    for plugin in plugins:
        assert all(need.producer == "mine" for need in plugin.reads())
    for field in fields:
        assert any("mine" in [r.producer for r in made(name, **{field: "mine"}, **e).reads()] for e in ({}, extra))


def is_family(rows: dict[Any, Any]) -> bool:
    return all(isinstance(kind, type) and issubclass(kind, Plugin) for kind in rows.values())


def test_the_table_is_the_sum_of_the_families() -> None:
    families = [f for f in vars(table).values() if isinstance(f, dict) and f is not TYPES and is_family(f)]
    assert len(families) >= 18
    assert len(TYPES) == sum(map(len, families))
    assert all(TYPES[name] is kind for family in families for name, kind in family.items())
    bases = (Parser, ProducerPlugin, Filter, Scorer, Picker)
    for family, base in zip((PARSERS, PRODUCERS, FILTERS, SCORERS, PICKERS), bases, strict=True):
        assert all(issubclass(kind, base) for kind in family.values())


@every_type
def test_a_type_resolves_alone(name: str) -> None:
    parameters = yaml.safe_dump(LEAST.get(name, {}), default_flow_style=True).strip()
    profiles = "\nschedulingProfiles: [{name: decode}, {name: prefill}]" if name in NEEDS_STAGES else ""
    one = resolve(
        load(CONFIG_HEAD + f"plugins: [{{type: {name}, parameters: {parameters}}}]" + profiles), allow_experimental=True
    )
    assert name in one.plugins


@every_scorer
@every_size
def test_a_scorer_gives_one_finite_score_to_each(name: str, size: int) -> None:
    scorer = alive(name)
    for view in views(size):
        scores = scorer.score(REQUEST, view)
        assert (scores.shape, scores.dtype) == ((size,), np.float64)
        assert np.isfinite(scores).all()


@every_scorer
def test_a_scorer_is_pure(name: str) -> None:
    scorer = alive(name)
    for view in views(7):
        first = scorer.score(REQUEST, view).copy()
        unchanged(view, lambda view=view: scorer.score(REQUEST, view))
        assert np.array_equal(first, scorer.score(REQUEST, view))


@pytest.mark.parametrize("name", [n for n, kind in TYPES.items() if issubclass(kind, Scorer) and n not in LISTS_MATTER])
def test_a_scorer_does_not_care_for_the_order_of_candidates(name: str) -> None:
    scorer = alive(name)
    for view in (v.compact() for v in views(9)):
        order = np.array(Random(2).sample(range(9), 9))
        assert scorer.score(REQUEST, shuffled(view, order)) == pytest.approx(scorer.score(REQUEST, view)[order])


@every_scorer
def test_a_scorer_sees_a_view_as_a_set_of_its_own(name: str) -> None:
    scorer = alive(name)
    view = views(7)[-1]
    assert scorer.score(REQUEST, view) == pytest.approx(scorer.score(REQUEST, view.compact()))


@every_filter
@every_size
def test_a_filter_gives_one_mark_to_each_and_drops_all_only_if_that_is_what_it_is_for(name: str, size: int) -> None:
    one = alive(name)
    for view in views(size):
        for seed in range(5):
            kept = one.keep(REQUEST, view, Random(seed))
            assert (kept.shape, kept.dtype) == ((size,), np.bool_)
            assert kept.any() or name in MAY_LEAVE_NOBODY


@every_filter
def test_a_filter_is_pure(name: str) -> None:
    one = alive(name)
    for view in views(7):
        first = one.keep(REQUEST, view, Random(3)).copy()
        unchanged(view, lambda view=view: one.keep(REQUEST, view, Random(3)))
        assert np.array_equal(first, one.keep(REQUEST, view, Random(3)))


@every_filter
def test_a_filter_does_not_care_for_the_order_of_candidates(name: str) -> None:
    one = alive(name)
    for view in (v.compact() for v in views(9)):
        order = np.array(Random(2).sample(range(9), 9))
        assert np.array_equal(
            one.keep(REQUEST, shuffled(view, order), Random(1)), one.keep(REQUEST, view, Random(1))[order]
        )


@every_filter
def test_a_filter_sees_a_view_as_a_set_of_its_own(name: str) -> None:
    one = alive(name)
    view = views(7)[-1]
    assert np.array_equal(one.keep(REQUEST, view, Random(1)), one.keep(REQUEST, view.compact(), Random(1)))


@every_filter
def test_a_filter_keeps_everybody_when_nothing_was_produced(name: str) -> None:
    one = alive(name)
    kept = one.keep(asking(prompt(3)), candidates(5), Random(0))
    assert not kept.any() if name in NEEDS_TELLING else kept.all()


@pytest.mark.parametrize("name", ADMITTERS)
@every_size
def test_an_admitter_says_why_it_refuses_and_refuses_nobody_who_may_not_be_shed(name: str, size: int) -> None:
    admitter = made(name)
    assert isinstance(admitter, Admitter)
    shed = asking(prompt(3), ttft_slo_ms=500.0, priority=-1)
    for view in views(size):
        said = admitter.refusal(shed, view, Random(0))
        unchanged(view, lambda view=view: admitter.refusal(shed, view, Random(0)))
        assert isinstance(said, str)
        assert said == admitter.refusal(shed, view, Random(0))
        assert admitter.refusal(REQUEST, view, Random(0)) == ""


@pytest.mark.parametrize("name", REPORTERS)
def test_a_reporter_tells_one_whole_number_or_nothing(name: str) -> None:
    reporter = made(name)
    assert isinstance(reporter, Reporter)
    told = reporter.report(streamed(prompt_tokens=7, cached_tokens=3))
    assert told is not None
    assert [type(part) for part in told] == [str, str, int]
    assert reporter.report(Outcome(end=End.ABORTED)) is None


@every_picker
@every_size
def test_a_picker_orders_all_candidates_whatever_their_scores(name: str, size: int) -> None:
    picker = made(name)
    assert isinstance(picker, Picker)
    for scores in (np.zeros(size), np.linspace(-1, 3, size), np.full(size, 1e-300), np.full(size, 1e300)):
        before = scores.copy()
        order = picker.order(scores, Random(4))
        assert np.issubdtype(order.dtype, np.integer)
        assert sorted(order.tolist()) == list(range(size))
        assert np.array_equal(order, picker.order(scores, Random(4)))
        assert np.array_equal(before, scores)


def test_every_attribute_has_a_default_producer_that_makes_it() -> None:
    makers = [*PRODUCERS.values(), *IDENTITIES.values()]
    assert {kind.provides for kind in makers} == set(Attribute) == set(DEFAULT_PRODUCER)


@pytest.mark.parametrize("name", PRODUCERS)
@every_size
def test_a_producer_makes_aligned_finite_columns_under_its_own_name(name: str, size: int) -> None:
    live = opened(name, size)
    view = full_candidates(size, seed=size)
    columns: dict[str, Any] = {}
    unchanged(view, lambda: columns.update(live.produce(REQUEST, view, 0.0)))
    assert columns
    for column, values in columns.items():
        assert column.endswith("/mine")
        assert values.shape == (size,)
        assert np.isfinite(values).all()


@pytest.mark.parametrize("name", PRODUCERS)
def test_a_producer_counts_nothing_of_a_request_that_has_ended(name: str) -> None:
    live = opened(name, 3)
    plain = full_candidates(3)
    first = live.produce(REQUEST, plain, 0.0)
    view = plain.with_columns(first)
    decided = decision("t", REQUEST, view.endpoints[1], live.predicted(view, 1))
    live.chosen(decided, view, 1, 0.0)
    live.first_token("t", 0.1)
    live.finished("t", streamed(), 0.2)
    live.finished("t", streamed(), 0.3)
    again = live.produce(REQUEST, plain, 0.4)
    for column in first:
        if column.startswith(("inflight", "resident")):
            assert np.array_equal(first[column], again[column])


@pytest.mark.parametrize("name", PRODUCERS)
def test_an_opened_producer_knows_its_name(name: str) -> None:
    live = opened(name, 1)
    assert isinstance(live, Producer)
    assert live.name == "mine"


def opened(name: str, size: int) -> Producer:
    plugin = made(name)
    assert isinstance(plugin, ProducerPlugin)
    live = plugin.open("mine")
    live.endpoints_changed(endpoints(size))
    return live
