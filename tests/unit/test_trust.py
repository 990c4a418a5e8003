"""Who may set headers that steer the scheduler."""

from __future__ import annotations

import pytest

from llmd_sched import headers
from llmd_sched.errors import ConfigError
from llmd_sched.extproc.trust import SYSTEM, TrustedSources, strip


@pytest.mark.parametrize(
    ("peer", "trusted"),
    [
        ("10.1.2.3", True),
        ("10.1.2.3:4711", True),
        ("11.0.0.1", False),
        ("::ffff:10.1.2.3", True),
        ("[::ffff:10.1.2.3]:4711", True),
        ("fd00::1", True),
        ("[fd00::1]:80", True),
        ("[fd00::1]", True),
        ("fe80::1", False),
        ("", False),
        ("/run/envoy.sock", False),
        ("10.1.2.3:80:90", False),
        ("10.1.2", False),
        ("localhost", False),
        ("[", False),
    ],
)
def test_a_peer_is_trusted_by_the_network_it_is_in(peer: str, trusted: bool) -> None:
    sources = TrustedSources(["10.0.0.0/8", "fd00::/8"])
    assert sources.trusts(peer) is trusted
    assert TrustedSources(["any"]).trusts(peer)
    assert not TrustedSources([]).trusts(peer)


@pytest.mark.parametrize("source", ["10.0.0.1/8", "example.org", "", "10.0.0.0/33", "all"])
def test_what_is_no_network_is_refused_with_what_is_accepted(source: str) -> None:
    with pytest.raises(
        ConfigError, match=r"--trusted-header-source: .*accepted are 'any' and networks as 10\.0\.0\.0/8"
    ):
        TrustedSources(["10.0.0.0/8", source])


def test_more_networks_than_the_limit_are_refused() -> None:
    with pytest.raises(ConfigError, match="257 networks"):
        TrustedSources([f"10.0.{i}.0/24" for i in range(256)] + ["11.0.0.0/8"])


def test_stripping_takes_the_names_given_and_says_which_were_there() -> None:
    kept, removed = strip({"a": "1", "x-slo-ttft-ms": "5", "b": "2", "mine": "3"}, SYSTEM | {"mine", "absent"})
    assert kept == {"a": "1", "b": "2"}
    assert removed == ["x-slo-ttft-ms", "mine"]


def test_every_name_of_a_steering_header_is_stripped_its_aliases_too() -> None:
    steering = (headers.FAIRNESS_ID, headers.OBJECTIVE, headers.MODEL_REWRITE, headers.TTFT_SLO_MS, headers.TPOT_SLO_MS)
    sent = {name: "v" for names in steering for name in names} | {headers.DESTINATION: "10.0.0.1:80"}
    assert strip(sent) == ({}, list(sent))


def test_nothing_that_a_request_needs_is_stripped() -> None:
    needed = dict.fromkeys(
        (*headers.PATHS, headers.REQUEST_ID, headers.CONTENT_TYPE, "authorization", "traceparent"), "v"
    )
    assert strip(needed) == (needed, [])
