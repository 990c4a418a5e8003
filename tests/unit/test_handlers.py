"""Which profiles run for a request, what travels in headers, and who is charged for how long."""

from __future__ import annotations

import pytest

from llmd_sched.catalog import resolve
from llmd_sched.config import load
from llmd_sched.errors import ConfigError, NoneLeft
from llmd_sched.headers import DATA_PARALLEL, ENCODERS, PREFILLER
from llmd_sched.router import Router
from llmd_sched.types import Decision, End, Endpoint, Outcome, Request
from tests.builders import (
    COLUMNS,
    CONFIG_HEAD,
    INFLIGHT,
    asking,
    endpoint,
    pool_of,
    prompt,
    request,
    router_of,
    streamed,
)

BLOCK_TOKENS = 64

FILTERS = """\
- {type: prefill-filter}
- {type: decode-filter}
- {type: encode-filter}
- {type: active-request-scorer}
- {type: max-score-picker, parameters: {maxNumOfEndpoints: PICKS}}
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}, {pluginRef: active-request-scorer}]}
- {name: decode, plugins: [{pluginRef: decode-filter}, {pluginRef: active-request-scorer}]}
- {name: encode, plugins: [{pluginRef: encode-filter}, {pluginRef: active-request-scorer}]}
"""

ALWAYS = "- {type: always-disagg-pd-decider}\n"
MULTIMODAL = "- {type: always-disagg-multimodal-decider}\n"
BY_PREFIX = "- {type: prefix-based-pd-decider, parameters: {nonCachedTokens: 100}}\n"

P, D, E, PD = "prefill", "decode", "encode", "prefill-decode"


def members(*roles: str) -> list[Endpoint]:
    """One endpoint each, ``e0`` first; an empty role is no label."""
    return [endpoint(i, labels={"llm-d.ai/role": role} if role else {}) for i, role in enumerate(roles)]


def staged(parameters: str, deciders: str, *roles: str, picks: int = 1, kind: str = "disagg-profile-handler") -> Router:
    text = f"plugins:\n- {{type: {kind}, parameters: {parameters}}}\n{deciders}" + FILTERS
    return router_of(text.replace("PICKS", str(picks)), pool_of(members(*roles)))


def always(*roles: str, picks: int = 1) -> Router:
    return staged("{deciders: {prefill: always-disagg-pd-decider}}", ALWAYS, *roles, picks=picks)


def chosen(router: Router, asked: Request | None = None, now_s: float = 0.0) -> Decision:
    return router.choose(asked or asking(prompt(2)), None, now_s)


def stages(decision: Decision) -> dict[str, list[str]]:
    return {stage.profile: [e.name for e in stage.picked] for stage in decision.stages}


def load_of(router: Router) -> tuple[list[float], list[float]]:
    """Requests and prompt tokens in flight per endpoint."""
    (live,) = [p for p in router.producers if p.name == INFLIGHT]
    columns = live.produce(request(), router.pool.candidates(None, 0.0), 0.0)
    return columns[COLUMNS["inflight_requests"]].tolist(), columns[COLUMNS["inflight_tokens"]].tolist()


def test_prefill_is_named_in_a_header_and_decode_is_the_destination() -> None:
    decision = chosen(always(D, P))
    assert decision.destination == "10.0.0.1:8000"
    assert decision.headers == {PREFILLER: "10.0.0.2:8000"}
    assert (decision.picked[0].name, stages(decision)) == ("e0", {P: ["e1"]})
    assert decision.stages[0].position == 1


def test_without_deciders_there_is_decode_only() -> None:
    decision = chosen(staged("{}", "", D, P, E))
    assert (decision.picked[0].name, decision.stages, decision.headers) == ("e0", (), {})


def test_a_stage_nobody_can_do_is_left_to_decode() -> None:
    decision = chosen(always(D, D))
    assert (decision.stages, decision.headers) == ((), {})


def test_without_an_endpoint_to_decode_the_request_is_refused_and_nobody_charged() -> None:
    router = always(P, P)
    with pytest.raises(NoneLeft):
        chosen(router)
    assert load_of(router) == ([0, 0], [0, 0])
    assert not router.open


def test_one_endpoint_may_do_both() -> None:
    router = always(PD)
    decision = chosen(router)
    assert (decision.picked[0].name, stages(decision)) == ("e0", {P: ["e0"]})
    assert load_of(router)[0] == [1]
    router.first_token(decision.ticket, 0.1)
    assert load_of(router) == ([1], [0])
    router.finish(decision.ticket, streamed(), 0.2)
    assert load_of(router) == ([0], [0])


@pytest.mark.parametrize(("media", "encoded"), [(0, False), (2, True)])
def test_images_are_encoded_elsewhere(media: int, encoded: bool) -> None:
    router = staged("{deciders: {encode: always-disagg-multimodal-decider}}", MULTIMODAL, D, E, E, picks=2)
    decision = chosen(router, asking(prompt(2), media=media))
    assert (ENCODERS in decision.headers) is encoded
    assert set(decision.headers.get(ENCODERS, "").split(",")) == (
        {"10.0.0.2:8000", "10.0.0.3:8000"} if encoded else {""}
    )


def test_encode_prefill_and_decode_can_be_three_endpoints() -> None:
    parameters = "{deciders: {prefill: always-disagg-pd-decider, encode: always-disagg-multimodal-decider}}"
    router = staged(parameters, ALWAYS + MULTIMODAL, E, P, D)
    decision = chosen(router, asking(prompt(2), media=1))
    assert decision.destination == "10.0.0.3:8000"
    assert decision.headers == {PREFILLER: "10.0.0.2:8000", ENCODERS: "10.0.0.1:8000"}
    assert load_of(router)[0] == [1, 1, 1]
    router.finish(decision.ticket, streamed(), 1.0)
    assert load_of(router) == ([0, 0, 0], [0, 0, 0])


def test_several_decode_endpoints_are_all_in_the_destination_and_one_prefills() -> None:
    decision = chosen(always(D, D, P, P, picks=2))
    assert set(decision.destination.split(",")) == {"10.0.0.1:8000", "10.0.0.2:8000"}
    assert decision.headers[PREFILLER] == decision.stages[0].picked[0].hostport
    assert len(decision.stages[0].picked) == 2


def test_prefill_first_runs_prefill_for_every_request() -> None:
    router = staged("{stageOrder: prefill-first}", "", D, P)
    decision = chosen(router)
    assert (decision.picked[0].name, stages(decision)) == ("e0", {P: ["e1"]})
    assert stages(chosen(staged("{stageOrder: prefill-first}", "", D))) == {}


def test_profiles_can_have_other_names() -> None:
    text = (
        "plugins:\n"
        "- type: disagg-profile-handler\n"
        "  parameters: {profiles: {decode: back, prefill: front}, deciders: {prefill: always-disagg-pd-decider}}\n"
        "- {type: always-disagg-pd-decider}\n- {type: prefill-filter}\n- {type: decode-filter}\n"
        "schedulingProfiles:\n"
        "- {name: front, plugins: [{pluginRef: prefill-filter}]}\n"
        "- {name: back, plugins: [{pluginRef: decode-filter}]}\n"
    )
    decision = chosen(router_of(text, pool_of(members(P, D))))
    assert (decision.picked[0].name, stages(decision)) == ("e1", {"front": ["e0"]})
    assert decision.headers == {PREFILLER: "10.0.0.1:8000"}


def test_a_prompt_the_decode_endpoint_has_is_not_prefilled_elsewhere() -> None:
    router = staged("{deciders: {prefill: prefix-based-pd-decider}}", BY_PREFIX, D, P)
    text = prompt(4)
    first = chosen(router, asking(text))
    assert stages(first) == {P: ["e1"]}
    assert stages(chosen(router, asking(prompt(1)))) == {}  # 64 tokens are too few to bother


def test_both_endpoints_are_charged_and_prefill_is_released_at_the_first_token() -> None:
    router = always(D, P)
    tokens = 2 * BLOCK_TOKENS
    first, second = (chosen(router, asking(prompt(2, seed=i))) for i in range(2))
    assert load_of(router) == ([2, 2], [2 * tokens, 2 * tokens])
    router.first_token(first.ticket, 0.1)
    assert load_of(router) == ([2, 1], [tokens, tokens])
    router.first_token(first.ticket, 0.2)
    assert load_of(router) == ([2, 1], [tokens, tokens])
    router.finish(first.ticket, streamed(), 0.3)
    assert load_of(router) == ([1, 1], [tokens, tokens])
    router.finish(second.ticket, Outcome(end=End.ABORTED), 0.4)
    assert load_of(router) == ([0, 0], [0, 0])


@pytest.mark.parametrize("end", list(End))
@pytest.mark.parametrize("first_token", [True, False])
def test_every_end_releases_both_endpoints_once(end: End, first_token: bool) -> None:
    router = always(D, P)
    decision = chosen(router)
    if first_token:
        router.first_token(decision.ticket, 0.1)
    for _ in range(2):
        router.finish(decision.ticket, Outcome(end=end), 0.2)
    assert load_of(router) == ([0, 0], [0, 0])
    assert not any(router.producer_errors.values())


def test_requests_spread_over_the_endpoints_of_each_stage() -> None:
    router = always(D, D, P, P, P)
    decisions = [chosen(router, asking(prompt(2, seed=i))) for i in range(6)]
    assert sorted(d.picked[0].name for d in decisions) == ["e0"] * 3 + ["e1"] * 3
    assert sorted(d.stages[0].picked[0].name for d in decisions) == ["e2"] * 2 + ["e3"] * 2 + ["e4"] * 2
    assert load_of(router)[0] == [3, 3, 2, 2, 2]


def test_a_prefill_endpoint_that_leaves_takes_no_charge_with_it() -> None:
    router = always(D, P)
    decision = chosen(router)
    router.pool.apply(members(D))
    router.first_token(decision.ticket, 0.1)
    router.finish(decision.ticket, streamed(), 0.2)
    router.pool.apply(members(D, P))
    assert load_of(router) == ([0, 0], [0, 0])
    assert not any(router.producer_errors.values())


def test_whoever_asks_is_told_of_every_endpoint_of_a_decision() -> None:
    router = always(D, P)
    told: list[str] = []
    router.on_chosen = lambda one: told.append(one.name)
    chosen(router)
    assert told == ["e0", "e1"]


def test_the_index_remembers_who_computed_the_prompt() -> None:
    """The prefill endpoint has the blocks as well as the decode endpoint."""
    text = (
        "plugins:\n- {type: disagg-profile-handler, parameters: {deciders: {prefill: always-disagg-pd-decider}}}\n"
        "- {type: always-disagg-pd-decider}\n- {type: prefill-filter}\n- {type: decode-filter}\n"
        "- {type: prefix-cache-scorer}\n"
        "schedulingProfiles:\n"
        "- {name: prefill, plugins: [{pluginRef: prefill-filter}, {pluginRef: prefix-cache-scorer}]}\n"
        "- {name: decode, plugins: [{pluginRef: decode-filter}, {pluginRef: prefix-cache-scorer}]}\n"
    )
    router = router_of(text, pool_of(members(D, D, D, P, P, P)))
    first = chosen(router)
    again = [chosen(router) for _ in range(20)]
    assert {d.picked[0].name for d in again} == {first.picked[0].name}
    assert {d.stages[0].picked[0].name for d in again} == {first.stages[0].picked[0].name}


def legacy(parameters: str, *roles: str, deciders: str = "") -> Router:
    return staged(parameters, deciders, *roles, kind="pd-profile-handler")


def test_the_older_handler_prefills_elsewhere_unless_a_decider_says_no() -> None:
    assert chosen(legacy("{}", D, P)).headers == {PREFILLER: "10.0.0.2:8000"}
    asked = asking(prompt(1))
    decided = "{deciderPluginName: prefix-based-pd-decider}"
    assert chosen(legacy(decided, D, P, deciders=BY_PREFIX), asked).headers == {}
    assert chosen(legacy(decided, D, P, deciders=BY_PREFIX), asking(prompt(2))).headers == {PREFILLER: "10.0.0.2:8000"}


def test_the_older_handler_sends_to_a_primary_port_and_names_the_rank() -> None:
    decision = chosen(legacy("{primaryPort: 9000}", D, P))
    assert decision.destination == "10.0.0.1:9000"
    assert decision.headers == {PREFILLER: "10.0.0.2:8000", DATA_PARALLEL: "10.0.0.1:8000"}
    assert decision.picked[0].hostport == "10.0.0.1:8000"


RANKS = [endpoint(i, address="10.0.0.1", port=8000 + i) for i in range(3)]


def ranked(picks: int = 1, members: list[Endpoint] | None = None, port: int = 8000) -> Router:
    text = (
        f"plugins: [{{type: data-parallel-profile-handler, parameters: {{primaryPort: {port}}}}}, "
        f"{{type: active-request-scorer}}, {{type: max-score-picker, parameters: {{maxNumOfEndpoints: {picks}}}}}]"
    )
    return router_of(text, pool_of(RANKS if members is None else members))


def test_ranks_are_reached_through_one_port_and_named_in_a_header() -> None:
    router = ranked()
    decisions = [chosen(router) for _ in range(3)]
    assert {d.destination for d in decisions} == {"10.0.0.1:8000"}
    assert sorted(d.headers[DATA_PARALLEL] for d in decisions) == ["10.0.0.1:8000", "10.0.0.1:8001", "10.0.0.1:8002"]
    assert load_of(router)[0] == [1, 1, 1]  # each rank is charged for itself


def test_fallbacks_behind_the_same_port_are_one_destination() -> None:
    assert chosen(ranked(picks=3)).destination == "10.0.0.1:8000"
    spread = [endpoint(i, address=f"10.0.0.{i}", port=8005) for i in (1, 2)]
    assert set(chosen(ranked(picks=2, members=spread)).destination.split(",")) == {"10.0.0.1:8000", "10.0.0.2:8000"}


def test_the_primary_port_keeps_an_ipv6_address_whole() -> None:
    decision = chosen(ranked(members=[endpoint(0, address="fd00::1", port=8003)], port=9000))
    assert (decision.destination, decision.headers[DATA_PARALLEL]) == ("[fd00::1]:9000", "[fd00::1]:8003")


BY_HEADER = """\
plugins:
- {type: header-profile-handler, parameters: PARAMETERS}
- {type: prefill-filter}
- {type: decode-filter}
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}]}
- {name: decode, plugins: [{pluginRef: decode-filter}]}
"""


def by_header(parameters: str = "{}") -> Router:
    return router_of(BY_HEADER.replace("PARAMETERS", parameters), pool_of(members(P, D)))


@pytest.mark.parametrize(
    ("parameters", "headers", "picked"),
    [
        ("{}", {}, "e1"),
        ("{}", {"epp-profile": "decode"}, "e1"),
        ("{}", {"epp-profile": "prefill"}, "e0"),
        ("{}", {"epp-profile": ""}, "e1"),
        ("{defaultProfile: prefill}", {}, "e0"),
        ("{headerName: X-Phase}", {"x-phase": "prefill", "epp-profile": "decode"}, "e0"),
    ],
)
def test_a_header_names_the_profile(parameters: str, headers: dict[str, str], picked: str) -> None:
    assert chosen(by_header(parameters), request(headers=headers)).picked[0].name == picked


def test_a_profile_nobody_knows_is_refused_with_those_that_are() -> None:
    router = by_header()
    with pytest.raises(NoneLeft, match="no profile 'warp'; known: prefill, decode"):
        chosen(router, request(headers={"epp-profile": "warp"}))
    assert router.scheduling.handler.headers() == ("epp-profile",)


TWO = "\nschedulingProfiles: [{name: decode}, {name: other}]"
ONE = "\nschedulingProfiles: [{name: decode}]"


@pytest.mark.parametrize(
    ("plugins", "profiles", "path", "says"),
    [
        (
            "{type: disagg-profile-handler, parameters: {stageOrder: both}}",
            ONE,
            "parameters",
            "decode-first, prefill-f",
        ),
        (
            "{type: disagg-profile-handler, parameters: {stageOrder: prefill-first, deciders: {prefill: d}}}",
            TWO,
            "parameters",
            "has no say",
        ),
        (
            "{type: disagg-profile-handler, parameters: {stageOrder: prefill-first}}",
            TWO,
            "parameters.profiles.prefill",
            "undefined profile 'prefill'; declared: decode, other",
        ),
        (
            "{type: disagg-profile-handler, parameters: {deciders: {prefill: d}}}, "
            "{type: always-disagg-pd-decider, name: d}",
            TWO,
            "parameters.profiles.prefill",
            "undefined profile 'prefill'",
        ),
        (
            "{type: disagg-profile-handler, parameters: {deciders: {encode: d}, profiles: {encode: other}}}",
            TWO,
            "parameters.deciders.encode",
            "undefined plugin 'd'",
        ),
        (
            "{type: disagg-profile-handler, parameters: {deciders: {encode: q}, profiles: {encode: other}}}, "
            "{type: queue-scorer, name: q}",
            TWO,
            "parameters.deciders.encode",
            "plugin 'q' is a queue-scorer, which cannot stand here",
        ),
        ("{type: disagg-profile-handler, parameters: {profiles: {decoding: x}}}", ONE, "parameters", "unknown field"),
        ("{type: pd-profile-handler}", TWO, "parameters.prefillProfile", "undefined profile 'prefill'"),
        ("{type: pd-profile-handler, parameters: {primaryPort: -1}}", TWO, "parameters", "primaryPort must be"),
        ("{type: data-parallel-profile-handler, parameters: {primaryPort: 0}}", ONE, "parameters", "1 to 65535"),
        ("{type: header-profile-handler, parameters: {headerName: ''}}", ONE, "parameters", "must not be empty"),
        (
            "{type: header-profile-handler, parameters: {defaultProfile: x}}",
            ONE,
            "parameters.defaultProfile",
            "undefined profile 'x'",
        ),
    ],
)
def test_a_configuration_error_says_where_and_what_is_accepted(
    plugins: str, profiles: str, path: str, says: str
) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(load(CONFIG_HEAD + f"plugins: [{plugins}]{profiles}"), allow_experimental=True)
    assert says in str(error.value)
    assert f"$.plugins[0].{path}" in error.value.path


def test_a_handler_of_one_profile_refuses_two() -> None:
    for kind in ("single-profile-handler", "data-parallel-profile-handler"):
        with pytest.raises(ConfigError, match=f"2 profiles, but {kind} runs one"):
            resolve(load(CONFIG_HEAD + f"plugins: [{{type: {kind}}}]{TWO}"))
