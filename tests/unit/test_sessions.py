"""A session stays where it began, by a token of the client's or by a table of ours."""

from __future__ import annotations

import base64
from pathlib import Path

import msgspec
import pytest

from llmd_sched.catalog import resolve
from llmd_sched.config import convert, load
from llmd_sched.errors import ConfigError
from llmd_sched.plugin import Attribute
from llmd_sched.pool.pool import UNREACHABLE_AFTER_FAILURES
from llmd_sched.router import Router
from llmd_sched.sched import sessions
from llmd_sched.sched.identities import MAX_ID_CHARACTERS
from llmd_sched.sched.sessions import BoundAffinity, SessionAffinityFilter, SessionAffinityScorer
from llmd_sched.sched.tokens import sign
from llmd_sched.types import Decision, Request
from tests.builders import CONFIG_HEAD, candidates, decision, endpoint, endpoints, pool_of, request, router_of

SECRET = "a secret that is long enough"
BY_ID = "{strategy: session_id}"


def plain(key: str) -> str:
    return base64.b64encode(key.encode()).decode()


def router(parameters: str = "{}", kind: str = "filter", count: int = 4) -> Router:
    text = (
        f"plugins: [{{type: session-affinity-{kind}, name: mine, parameters: {parameters}}}, {{type: random-picker}}]"
    )
    return router_of(text if kind == "filter" else text.replace("random", "max-score"), pool_of(endpoints(count)))


def choose(one: Router, now_s: float = 0.0, identities: dict[str, str] | None = None, **headers: str) -> Decision:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return one.choose(request(headers=named, identities=identities or {}), None, now_s)


def landed(one: Router, times: int = 20, **headers: str) -> set[str]:
    return {choose(one, **headers).picked[0].name for _ in range(times)}


@pytest.mark.parametrize("kind", ["filter", "scorer"])
def test_a_token_comes_with_every_reply_and_brings_the_session_back(kind: str) -> None:
    one = router(kind=kind)
    first = choose(one)
    token = first.reply_headers["x-session-token"]
    assert token == plain(first.picked[0].key)
    assert landed(one, x_session_token=token) == {first.picked[0].name}
    assert choose(one, x_session_token=token).reply_headers == {"x-session-token": token}


@pytest.mark.parametrize(
    "token", ["", "default/e1", "!!!", plain("nonsense"), plain("default/gone"), plain("other/e1"), "x" * 5000, "é"]
)
@pytest.mark.parametrize("kind", ["filter", "scorer"])
def test_a_token_of_no_candidate_leaves_everybody(kind: str, token: str) -> None:
    assert landed(router(kind=kind), times=60, x_session_token=token) == {"e0", "e1", "e2", "e3"}


def test_the_header_can_be_another_in_any_case() -> None:
    one = router("{encodedEndpointHeaderConfig: {header: X-Sticky}}")
    assert landed(one, x_sticky=plain("default/e2")) == {"e2"}
    assert list(choose(one).reply_headers) == ["x-sticky"]


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secrets"
    path.write_text(f"{SECRET}\nthe one from last month\n")
    return path


def test_with_a_secret_only_signed_tokens_count(secret_file: Path) -> None:
    one = router(f"{{encodedEndpointHeaderConfig: {{secretFile: {secret_file}}}}}")
    first = choose(one)
    token = first.reply_headers["x-session-token"]
    assert token == sign(first.picked[0].key, SECRET.encode())
    assert landed(one, x_session_token=token) == {first.picked[0].name}
    assert landed(one, x_session_token=sign("default/e2", b"the one from last month")) == {"e2"}
    assert len(landed(one, times=60, x_session_token=sign("default/e2", b"a secret of somebody else"))) == 4
    assert len(landed(one, times=60, x_session_token=plain("default/e2"))) == 4


def test_plain_tokens_count_beside_signed_ones_while_that_is_configured(secret_file: Path) -> None:
    one = router(f"{{encodedEndpointHeaderConfig: {{secretFile: {secret_file}, acceptUnsigned: true}}}}")
    assert landed(one, x_session_token=plain("default/e2")) == {"e2"}
    assert "." in choose(one, x_session_token=plain("default/e2")).reply_headers["x-session-token"]


def test_without_a_secret_a_signed_token_means_nothing() -> None:
    assert len(landed(router(), times=60, x_session_token=sign("default/e2", SECRET.encode()))) == 4


@pytest.mark.parametrize(
    ("text", "says"), [(None, "No such file"), ("", "0 session secrets"), ("short", "shorter than")]
)
def test_secrets_that_cannot_be_used_are_an_error_at_start(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "secrets"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        router(f"{{encodedEndpointHeaderConfig: {{secretFile: {path}}}}}")
    assert error.value.path == str(path)


PD = """\
plugins:
- {type: disagg-profile-handler, parameters: {deciders: {prefill: DECIDER}}}
- {type: DECIDER, parameters: PARAMETERS}
- {type: prefill-filter}
- {type: decode-filter}
- {type: random-picker}
- {type: session-affinity-filter, name: decode-affinity, parameters: {strategy: STRATEGY}}
- type: session-affinity-filter
  name: prefill-affinity
  parameters:
    strategy: STRATEGY
    profileName: prefill
    encodedEndpointHeaderConfig: {header: x-session-token-prefill}
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}, {pluginRef: prefill-affinity}, {pluginRef: random-picker}]}
- {name: decode, plugins: [{pluginRef: decode-filter}, {pluginRef: decode-affinity}, {pluginRef: random-picker}]}
"""


def disaggregated(strategy: str = "encoded_endpoint_header", decider: str = "always-disagg-pd-decider") -> Router:
    roles = ["prefill", "prefill", "prefill", "decode", "decode", "decode"]
    members = [endpoint(i, labels={"llm-d.ai/role": role}) for i, role in enumerate(roles)]
    text = PD.replace("STRATEGY", strategy).replace("DECIDER", decider).replace("PARAMETERS", "{}")
    return router_of(text, pool_of(members))


def pair(made: Decision) -> tuple[str, str]:
    return made.picked[0].key, made.stages[0].picked[0].key


def test_prefill_and_decode_have_tokens_of_their_own() -> None:
    one = disaggregated()
    first = choose(one)
    decode, prefill = pair(first)
    assert first.reply_headers == {"x-session-token": plain(decode), "x-session-token-prefill": plain(prefill)}
    again = {pair(one.choose(request(headers=first.reply_headers), None, 0.0)) for _ in range(30)}
    assert again == {(decode, prefill)}


def test_a_stage_that_did_not_run_gets_no_token() -> None:
    made = choose(disaggregated(decider="prefix-based-pd-decider"))
    assert made.stages == ()
    assert list(made.reply_headers) == ["x-session-token"]


def test_prefill_and_decode_are_bound_each_for_itself() -> None:
    one = disaggregated("session_id")
    first = pair(choose(one, x_session_id="s"))
    assert {pair(choose(one, x_session_id="s")) for _ in range(30)} == {first}
    assert len({pair(choose(one, x_session_id=f"s{i}")) for i in range(60)}) > 4


def test_the_primary_profile_can_be_meant_by_its_name() -> None:
    one = router("{strategy: session_id, profileName: default}")
    first = choose(one, x_session_id="s").picked[0].name
    assert landed(one, x_session_id="s") == {first}
    assert choose(router("{profileName: default}")).reply_headers
    assert choose(router("{profileName: another}")).reply_headers == {}


@pytest.mark.parametrize("kind", ["filter", "scorer"])
def test_a_session_is_bound_by_its_first_request(kind: str) -> None:
    one = router(BY_ID, kind)
    first = choose(one, x_session_id="s")
    assert first.reply_headers == {}
    assert landed(one, x_session_id="s") == {first.picked[0].name}
    assert landed(one, times=60) == {"e0", "e1", "e2", "e3"}


def test_sources_are_tried_in_their_order_and_the_first_that_is_there_counts() -> None:
    sources = "[{header: X-Chat}, {attribute: SessionID, producer: cookie}, {attribute: agent-identity}]"
    one = router_of(
        "plugins:\n"
        "- {type: session-id-producer, name: cookie, parameters: {cookieName: chat}}\n"
        "- {type: agent-identity}\n"
        "- {type: random-picker}\n"
        "- type: session-affinity-filter\n"
        f"  parameters: {{strategy: session_id, sessionIdConfig: {{sources: {sources}}}}}",
        pool_of(endpoints(8)),
    )
    (live,) = [p for p in one.producers if isinstance(p, BoundAffinity)]
    for headers, identities, bound in [
        ({"x-chat": "a"}, {"cookie": "b", "agent-identity": "c"}, 1),
        ({"x-chat": "a"}, {}, 1),
        ({"x-chat": "  "}, {"cookie": "b", "agent-identity": "c"}, 2),
        ({}, {"agent-identity": "c"}, 3),
        ({}, {"agent-identity": " c "}, 3),
        ({}, {}, 3),
    ]:
        one.choose(request(headers=headers, identities=identities), None, 0.0)
        assert len(live) == bound


def opened(parameters: str = BY_ID, count: int = 4) -> BoundAffinity:
    live = convert(msgspec.yaml.decode(parameters.encode()), SessionAffinityFilter).open("mine")
    assert isinstance(live, BoundAffinity)
    live.endpoints_changed(endpoints(count))
    return live


def asking_in(session: str) -> Request:
    return request(headers={"x-session-id": session})


def served(live: BoundAffinity, session: str, at: int, among: int = 4, now_s: float = 0.0) -> None:
    """One request of a session: looked at, then sent to an endpoint."""
    asked, view = asking_in(session), candidates(among)
    live.produce(asked, view, now_s)
    live.score(asked, view)
    live.reply_headers(asked, view, {"default": at})
    live.chosen(decision("t", asked, view.endpoints[at]), view, at, now_s)


def test_a_binding_moves_only_when_its_endpoint_is_no_candidate() -> None:
    live = opened()
    served(live, "s", at=3)
    served(live, "s", at=1)
    assert live.bound(asking_in("s")) == "default/e3"  # other scorers weighed more, but it was there
    served(live, "s", at=1, among=2)
    assert live.bound(asking_in("s")) == "default/e1"


def test_a_request_that_did_not_look_moves_nothing() -> None:
    live, view = opened(), candidates(2)
    served(live, "s", at=0)
    asked = asking_in("s")
    live.reply_headers(asked, view, {"default": 1})
    live.chosen(decision("t", asked, view.endpoints[1]), view, 1, 0.0)
    assert live.bound(asked) == "default/e0"


def test_a_session_whose_endpoint_cannot_be_reached_goes_on_elsewhere_and_stays_there() -> None:
    one = router(BY_ID)
    first = choose(one, x_session_id="s").picked[0]
    for _ in range(UNREACHABLE_AFTER_FAILURES):
        one.pool.record_failure(first)
    second = choose(one, x_session_id="s").picked[0]
    assert second != first
    one.pool.apply(endpoints(4))
    assert landed(one, x_session_id="s") == {second.name}


def test_sessions_unused_for_long_are_forgotten_at_the_next_sweep() -> None:
    live = opened("{strategy: session_id, sessionIdConfig: {evictionTtlSeconds: 100, evictionSweepSeconds: 10}}")
    served(live, "old", at=0, now_s=0.0)
    served(live, "young", at=1, now_s=60.0)
    served(live, "old", at=0, now_s=70.0)
    live.produce(request(), candidates(4), 165.0)
    assert [live.bound(asking_in(s)) for s in ("old", "young")] == ["default/e0", ""]
    live.produce(request(), candidates(4), 174.0)
    assert len(live) == 1  # it is over, but a sweep was less than 10 s ago
    live.produce(request(), candidates(4), 176.0)
    assert len(live) == 0


def test_a_sweep_goes_on_with_the_next_request_when_many_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "SWEPT_AT_ONCE", 3)
    live = opened()
    for i in range(8):
        served(live, f"s{i}", at=0)
    left = []
    for _ in range(4):
        live.produce(request(), candidates(4), 1000.0)
        left.append(len(live))
    assert left == [5, 2, 0, 0]


def test_more_sessions_than_are_kept_forget_the_one_unused_for_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 3)
    live = opened()
    for session in ("a", "b", "c", "a", "d"):
        served(live, session, at=0)
    assert [bool(live.bound(asking_in(s))) for s in "abcd"] == [True, False, True, True]


def test_an_identifier_is_cut_so_that_no_client_fills_our_memory() -> None:
    live = opened()
    served(live, "x" * MAX_ID_CHARACTERS + "y", at=2)
    assert live.bound(asking_in("x" * MAX_ID_CHARACTERS + "z")) == "default/e2"


@pytest.mark.parametrize("kind", [SessionAffinityFilter, SessionAffinityScorer])
def test_the_headers_it_needs_are_those_of_its_strategy(kind: type) -> None:
    assert kind().headers() == ("x-session-token",)
    assert kind(strategy="session_id").headers() == ("x-session-id",)
    by_both = convert(
        {"strategy": "session_id", "sessionIdConfig": {"sources": [{"header": "X-A"}, {"attribute": "SessionID"}]}},
        kind,
    )
    assert by_both.headers() == ("x-a",)
    assert [(r.attribute, r.producer) for r in by_both.reads()] == [(Attribute.SESSION_ID, "session-id-producer")]


SOURCES = "{strategy: session_id, sessionIdConfig: {sources: [%s]}}"


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ("{strategy: cookie}", "accepted are encoded_endpoint_header and session_id"),
        ("{encodedEndpointHeaderConfig: {header: ''}}", "header must not be empty"),
        ("{encodedEndpointHeaderConfig: {acceptUnsigned: true}}", "without secretFile"),
        ("{encodedEndpointHeaderConfig: {name: x}}", "unknown field `name`; accepted: header, secretFile"),
        (SOURCES % "{}", "exactly one of header and attribute"),
        (SOURCES % "{header: a, attribute: SessionID}", "exactly one of header and attribute"),
        (SOURCES % "{attribute: User}", "accepted are SessionID and agent-identity"),
        (SOURCES % "{attribute: SessionID, producer: nobody}", "reads SessionID from 'nobody', which is not declared"),
        (SOURCES % "{attribute: agent-identity}", "reads SessionID from 'agent-identity', which is not declared"),
        (SOURCES % "{attribute: SessionID}", "session-id-producer"),
        ("{strategy: session_id, sessionIdConfig: {evictionTtlSeconds: 0}}", "evictionTtlSeconds"),
        ("{strategy: session_id, sessionIdConfig: {evictionSweepSeconds: -1}}", "evictionSweepSeconds"),
    ],
)
def test_a_configuration_error_says_what_is_accepted(parameters: str, says: str) -> None:
    text = f"plugins: [{{type: session-affinity-filter, parameters: {parameters}}}]"
    with pytest.raises(ConfigError) as error:
        resolve(load(CONFIG_HEAD + text), allow_experimental=True)
    assert says in str(error.value)


@pytest.mark.parametrize("kind", ["filter", "scorer"])
def test_both_are_experimental(kind: str) -> None:
    with pytest.raises(ConfigError, match="experimental"):
        resolve(load(CONFIG_HEAD + f"plugins: [{{type: session-affinity-{kind}}}]"))
