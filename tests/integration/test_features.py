"""What plugins make of a request, by a whole scheduler over gRPC: sessions, stages, objectives, model
rewrites, and whose word counts."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from llmd_sched.sched.tokens import sign
from tests.envoy_stream import until
from tests.integration.conftest import Running, health, running
from tests.messages import (
    BODY,
    DUPLEX,
    LEAN,
    RAW,
    Message,
    Reply,
    answered,
    asked,
    destination,
    metadata_of,
    refused,
    removed_by,
    request_body,
    request_headers,
    response_body,
    response_headers,
    routing_reply,
    set_by,
    stream_headers,
    streamed,
    with_attributes,
)

both = pytest.mark.parametrize("mode", [LEAN, DUPLEX])

EXPERIMENTAL = {"allow_experimental_plugins": True}
TIMES = 8
"""Of four endpoints, that so many requests land on one by chance happens once in 16,000 runs."""


async def served_by(served: Running, *messages: Message) -> tuple[str, dict[str, str]]:
    """A whole duplex request: where it went, and the headers set on its reply."""
    stream = served.stream()
    routed = await stream.ask(*(messages or asked()), count=2)
    replies = await stream.ask(*answered(), count=2)
    assert await stream.to_the_end() == []
    return destination(routed), set_by(replies[0])


async def landed(served: Running, **headers: str) -> set[str]:
    return {(await served_by(served, *asked(**headers)))[0] for _ in range(TIMES)}


# --- sessions ---------------------------------------------------------------------------------------------------------

PICKERS = {"filter": "random-picker", "scorer": "max-score-picker"}
kinds_of_affinity = pytest.mark.parametrize("kind", PICKERS)


def affinity(kind: str, **parameters: Any) -> str:
    """The configuration of one, and of the plugins that tell sessions apart."""
    plugins = [
        {"type": f"session-affinity-{kind}", "parameters": parameters},
        {"type": "agent-identity"},
        {"type": PICKERS[kind]},
    ]
    ranked = [{"pluginRef": f"session-affinity-{kind}"}, {"pluginRef": PICKERS[kind]}]
    return f"plugins: {json.dumps(plugins)}\nschedulingProfiles: [{{name: default, plugins: {json.dumps(ranked)}}}]\n"


@kinds_of_affinity
async def test_the_token_of_a_reply_brings_the_session_back(tmp_path: Path, kind: str) -> None:
    async with running(tmp_path, affinity(kind), pods=4, **EXPERIMENTAL) as served:
        there, told = await served_by(served)
        token = told["x-session-token"]
        assert base64.b64decode(token).decode() == f"default/pod-{served.pods.index(there)}"
        assert await landed(served, x_session_token=token) == {there}
        await served.idle()


async def test_on_the_lean_path_the_token_travels_as_metadata_and_comes_back_as_an_attribute(tmp_path: Path) -> None:
    """Which Envoy's Lua filter sets on the reply."""
    async with running(tmp_path, affinity("filter"), pods=4, **EXPERIMENTAL) as served:
        first = await served.exchange(*asked(LEAN))
        there, token = destination(first), metadata_of(first[-1])["llmd"]["reply_headers"]["x-session-token"]
        for _ in range(TIMES):
            # Without headers, as Envoy sends a body of known length.
            body = with_attributes(
                request_body(RAW, end=True),
                {"request.path": "/v1/completions", "request.headers['x-session-token']": token},
            )
            body.protocol_config.request_body_mode = request_headers(LEAN).protocol_config.request_body_mode
            assert destination(await served.exchange(body)) == there


async def test_a_header_of_another_name_carries_the_token(tmp_path: Path) -> None:
    config = affinity("filter", encodedEndpointHeaderConfig={"header": "X-Sticky"})
    async with running(tmp_path, config, pods=4, **EXPERIMENTAL) as served:
        there, told = await served_by(served)
        assert "x-session-token" not in told
        assert await landed(served, x_sticky=told["x-sticky"]) == {there}


async def test_a_forged_token_pins_nothing_and_a_signed_one_does(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret that is long enough\n")
    config = affinity("filter", encodedEndpointHeaderConfig={"secretFile": str(secret)})
    async with running(tmp_path, config, pods=4, **EXPERIMENTAL) as served:
        there, told = await served_by(served)
        assert await landed(served, x_session_token=told["x-session-token"]) == {there}
        for forged in (
            base64.b64encode(b"default/pod-1").decode(),
            sign("default/pod-1", b"another secret of that length"),
            told["x-session-token"][:-2] + "AA",
        ):
            assert len(await landed(served, x_session_token=forged)) > 1


BY_ID = {"strategy": "session_id"}
EITHER = {
    **BY_ID,
    "sessionIdConfig": {"sources": [{"header": "x-session-id"}, {"attribute": "agent-identity"}]},
}


@kinds_of_affinity
async def test_an_identifier_of_the_clients_own_pins_by_header(tmp_path: Path, kind: str) -> None:
    async with running(tmp_path, affinity(kind, **BY_ID), pods=4, **EXPERIMENTAL) as served:
        landings = [await landed(served, x_session_id=f"s-{i}") for i in range(TIMES)]
        assert all(len(one) == 1 for one in landings)
        assert len(set.union(*landings)) > 1, "different sessions are not all pinned to one endpoint"
        assert "x-session-token" not in (await served_by(served))[1]


async def test_an_agents_session_pins_where_no_header_says_otherwise(tmp_path: Path) -> None:
    async with running(tmp_path, affinity("filter", **EITHER), pods=4, **EXPERIMENTAL) as served:
        (by_agent,) = await landed(served, x_claude_code_session_id="agent")
        pinned = {f"s-{i}": await landed(served, x_session_id=f"s-{i}") for i in range(TIMES)}
        elsewhere = next(session for session, there in pinned.items() if there != {by_agent})
        (by_header,) = await landed(served, x_session_id=elsewhere)
        assert await landed(served, x_session_id=elsewhere, x_claude_code_session_id="agent") == {by_header}
        assert await landed(served, x_claude_code_session_id="agent") == {by_agent}
        assert served.sample("request_total", fairness_id="agent") > 0, "it names the flow as well"


# --- disaggregation ---------------------------------------------------------------------------------------------------

DISAGGREGATED = """
plugins:
- {type: prefix-based-pd-decider, parameters: {nonCachedTokens: 64}}
- {type: always-disagg-multimodal-decider}
- type: disagg-profile-handler
  parameters: {deciders: {prefill: prefix-based-pd-decider, encode: always-disagg-multimodal-decider}}
- {type: prefill-filter}
- {type: decode-filter}
- {type: encode-filter}
- {type: max-score-picker}
- {type: session-affinity-scorer, name: decode-session, parameters: {profileName: decode}}
- type: session-affinity-scorer
  name: prefill-session
  parameters: {profileName: prefill, encodedEndpointHeaderConfig: {header: x-prefill-token}}
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}, {pluginRef: prefill-session}, {pluginRef: max-score-picker}]}
- {name: decode, plugins: [{pluginRef: decode-filter}, {pluginRef: decode-session}, {pluginRef: max-score-picker}]}
- {name: encode, plugins: [{pluginRef: encode-filter}, {pluginRef: max-score-picker}]}
"""
ROLES = [{"llm-d.ai/role": role} for role in ("decode",) * 3 + ("prefill",) * 3 + ("encode",)]
LONG = json.dumps({**BODY, "prompt": "word" * 200}).encode()
SEEN = json.dumps(
    {
        "model": "m",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "word" * 200},
                    {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}},
                ],
            }
        ],
    }
).encode()
OWN = {"x_prefiller_host_port": "10.9.9.9:1", "x_encoder_hosts_ports": "10.9.9.9:2"}


@both
async def test_stages_done_elsewhere_are_named_in_headers_that_no_client_can_set(tmp_path: Path, mode: str) -> None:
    async with running(tmp_path, DISAGGREGATED, pods=ROLES, **EXPERIMENTAL) as served:
        decodes, prefills, encodes = served.pods[:3], served.pods[3:6], served.pods[6:]
        replies = await served.exchange(*asked(mode, LONG, **OWN))
        assert destination(replies) in decodes
        told = routing_reply(replies)
        assert set_by(told)["x-prefiller-host-port"] in prefills
        assert removed_by(told) == ["x-encoder-hosts-ports"]
        with_image = routing_reply(await served.exchange(*asked(mode, SEEN, path="/v1/chat/completions", **OWN)))
        assert set_by(with_image)["x-encoder-hosts-ports"] in encodes
        assert served.sample("disagg_decision_total", decision_type="prefill-decode") == 1
        assert served.sample("disagg_decision_total", decision_type="encode-prefill-decode") == 1


@both
async def test_what_the_decider_keeps_together_stays_on_one_endpoint(tmp_path: Path, mode: str) -> None:
    async with running(tmp_path, DISAGGREGATED, pods=ROLES, **EXPERIMENTAL) as served:
        replies = await served.exchange(*asked(mode, **OWN))
        told = routing_reply(replies)
        assert destination(replies) in served.pods[:3]
        assert not {"x-prefiller-host-port", "x-encoder-hosts-ports"} & set(set_by(told))
        assert set(removed_by(told)) == {"x-prefiller-host-port", "x-encoder-hosts-ports"}
        assert served.sample("disagg_decision_total", decision_type="decode-only") == 1


async def test_prefill_and_decode_have_tokens_of_their_own(tmp_path: Path) -> None:
    """The second prompt of a session differs, or nothing would be left to prefill."""
    async with running(tmp_path, DISAGGREGATED, pods=ROLES, **EXPERIMENTAL) as served:
        stream = served.stream()
        routed = await stream.ask(*asked(data=LONG), count=2)
        replies = await stream.ask(*answered(), count=2)
        decode, prefill = destination(routed), set_by(routed[0])["x-prefiller-host-port"]
        tokens = set_by(replies[0])
        pods = [base64.b64decode(tokens[name]).decode() for name in ("x-session-token", "x-prefill-token")]
        assert pods == [f"default/pod-{served.pods.index(one)}" for one in (decode, prefill)]
        back = {"x_session_token": tokens["x-session-token"], "x_prefill_token": tokens["x-prefill-token"]}
        for i in range(TIMES):
            data = json.dumps({**BODY, "prompt": f"{i:04}" * 200}).encode()
            routed = await served.exchange(*asked(data=data, **back))
            assert (destination(routed), set_by(routed[0])["x-prefiller-host-port"]) == (decode, prefill)


async def test_without_prefill_only_decode_has_a_token(tmp_path: Path) -> None:
    async with running(tmp_path, DISAGGREGATED, pods=ROLES, **EXPERIMENTAL) as served:
        there, told = await served_by(served)
        assert set(told) == {"x-went-into-resp-headers", "x-session-token"}
        assert await landed(served, x_session_token=told["x-session-token"]) == {there}


async def test_headers_cannot_be_set_on_requests_whose_headers_did_not_come(tmp_path: Path) -> None:
    async with running(tmp_path, DISAGGREGATED, pods=ROLES, **EXPERIMENTAL) as served:
        body = with_attributes(request_body(LONG, end=True), {"request.path": "/v1/completions"})
        body.protocol_config.request_body_mode = request_headers(LEAN).protocol_config.request_body_mode
        status, text, _ = refused(await served.exchange(body))
        assert (status, "configure request_header_mode SEND" in text) == (500, True)


# --- objectives and model rewrites ------------------------------------------------------------------------------------

OBJECTS = """
plugins:
- type: static-objectives
  parameters:
    objectives: {vip: 7, batch: -1}
    rewrites: [{model: food, targets: {food-v2-tuned: 1}}]
- {type: concurrency-detector, parameters: {maxConcurrency: 1}}
- {type: active-request-scorer}
- {type: max-score-picker}
schedulingProfiles: [{name: default, plugins: [{pluginRef: active-request-scorer}]}]
flowControl: {saturationDetector: {pluginRef: concurrency-detector}}
"""
FOOD = json.dumps({**BODY, "model": "food"}).encode()
TUNED = FOOD.replace(b'"food"', b'"food-v2-tuned"')
objective = pytest.mark.parametrize("name", ["x_llm_d_inference_objective", "x_gateway_inference_objective"])


@both
async def test_a_rule_rewrites_the_model_and_is_counted(tmp_path: Path, mode: str) -> None:
    async with running(tmp_path, OBJECTS) as served:
        # The rule wins over the client's header.
        replies = await served.exchange(*asked(mode, FOOD, x_llm_d_model_name_rewrite="other"))
        sent = replies[-1].request_body.response.body_mutation
        assert (sent.body if mode == LEAN else sent.streamed_response.body) == TUNED
        assert set_by(routing_reply(replies))["content-length"] == str(len(TUNED))
        labels = {"model_rewrite_name": "food", "model_name": "food", "target_model": "food-v2-tuned"}
        assert served.sample("model_rewrite_decisions_total", **labels) == 1
        assert served.sample("request_total", model_name="food", target_model_name="food-v2-tuned") == 1


@pytest.mark.parametrize("head", [response_headers(), stream_headers()], ids=["whole", "streamed"])
@pytest.mark.parametrize("space", [b"", b" "])
async def test_the_reply_has_the_name_the_client_asked_for_wherever_it_is_cut(
    tmp_path: Path, head: Message, space: bytes
) -> None:
    text = b'{"id":"1","model":' + space + b'"food-v2-tuned","choices":[]}'
    async with running(tmp_path, OBJECTS) as served:
        for cut in range(1, len(text)):
            stream = served.stream()
            await stream.ask(*asked(data=FOOD), count=2)
            cuts = (response_body(text[:cut]), response_body(text[cut:], end=True))
            replies = await stream.ask(head, *cuts, count=3)
            assert streamed(replies, "response_body") == (text.replace(b"food-v2-tuned", b"food"), [False, True])
        await served.idle()


@objective
async def test_an_objective_gives_a_request_its_priority(tmp_path: Path, name: str) -> None:
    async with running(tmp_path, OBJECTS) as served:
        await served_by(served, *asked(**{name: "vip"}))
        assert served.sample("request_total", priority="7") == 1
        assert served.sample("request_duration_seconds_count", priority="7") == 1


async def test_only_a_sheddable_request_is_refused_by_a_full_pool(tmp_path: Path) -> None:
    async with running(tmp_path, OBJECTS) as served:
        batch = {"x_llm_d_inference_objective": "batch"}
        await served_by(served, *asked(**batch))
        stream = served.stream()
        await stream.ask(*asked(), count=2)
        status, text, told = refused(await served.exchange(*asked(**batch)))
        assert status == 429
        assert text == "inference error: ResourceExhausted - system saturated, sheddable request dropped"
        assert told["x-llm-d-request-dropped-reason"] == "rejected-saturated"
        assert served.sample("request_error_total", priority="-1", error_code="ResourceExhausted") == 1
        await served_by(served)
        await stream.ask(*answered(), count=2)
        await until(lambda: not served.scheduler.router.open)
        await served_by(served, *asked(**batch))
        await served.idle()


# --- whose word counts ------------------------------------------------------------------------------------------------

STEERING = {
    "x_llm_d_inference_objective": "vip",
    "x_llm_d_model_name_rewrite": "other",
    "x_llm_d_slo_ttft_ms": "5",
    "x_slo_tpot_ms": "5",
    "x_gateway_inference_fairness_id": "mine",
    "x_prefiller_host_port": "10.9.9.9:1",
}
TRUSTED_ONLY = {"trusted_header_sources": ("10.0.0.0/8",)}


async def ask_from(served: Running, mode: str, peer: str) -> list[Reply]:
    """As Envoy tells of the client, with the first message."""
    first, body = asked(mode, **STEERING)
    return await served.exchange(with_attributes(first, {"source.address": peer} if peer else {}), body)


@both
@pytest.mark.parametrize("peer", ["192.168.1.9:5555", "[2001:db8::1]:5555", "", "/var/run/socket"])
async def test_a_strangers_steering_is_ignored_and_goes_no_further(tmp_path: Path, mode: str, peer: str) -> None:
    async with running(tmp_path, OBJECTS, **TRUSTED_ONLY) as served:
        told = routing_reply(await ask_from(served, mode, peer))
        assert set(removed_by(told)) == {name.replace("_", "-") for name in STEERING}
        assert "content-length" not in set_by(told) or set_by(told)["content-length"] == str(len(RAW))
        labels = {"priority": "0", "fairness_id": "default-flow", "target_model_name": "m"}
        assert served.sample("request_total", **labels) == 1


@both
@pytest.mark.parametrize("peer", ["10.1.2.3:5555", "[::ffff:10.1.2.3]:5555"])
async def test_a_trusted_peer_steers(tmp_path: Path, mode: str, peer: str) -> None:
    async with running(tmp_path, OBJECTS, **TRUSTED_ONLY) as served:
        assert removed_by(routing_reply(await ask_from(served, mode, peer))) == []
        labels = {"priority": "7", "fairness_id": "mine", "target_model_name": "other"}
        assert served.sample("request_total", **labels) == 1


@pytest.mark.parametrize(("peer", "slos"), [("10.1.2.3:5555", (5.0, 5.0)), ("192.168.1.9:5555", (None, None))])
async def test_only_a_trusted_peers_deadlines_count(
    tmp_path: Path, peer: str, slos: tuple[float | None, float | None]
) -> None:
    async with running(tmp_path, OBJECTS, **TRUSTED_ONLY) as served:
        await ask_from(served, LEAN, peer)
        (open_,) = served.scheduler.router.open.values()
        assert (open_.request.ttft_slo_ms, open_.request.tpot_slo_ms) == slos


# --- health -----------------------------------------------------------------------------------------------------------


async def test_a_file_without_endpoints_was_looked_at_all_the_same(tmp_path: Path) -> None:
    """So it is ready, and refuses. Draining, and pools that are not there yet, are tested where Kubernetes is."""
    async with running(tmp_path, pods=0) as served:
        assert await health(served.health_port) == "SERVING"
        assert refused(await served.exchange(*asked()))[0] == 503
