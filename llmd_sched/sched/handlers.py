"""Profile handlers: which profiles run for a request, and what their picks mean.

A handler is given all profiles and returns a ``Choice``: the primary profile's pick, which becomes the destination,
and those of the stages beside it (prefill, encode), which travel as headers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar

import msgspec

from llmd_sched.errors import NoneLeft
from llmd_sched.headers import DATA_PARALLEL, ENCODERS, PREFILLER
from llmd_sched.plugin import Plugin
from llmd_sched.sched.deciders import Decider
from llmd_sched.sched.pipeline import Picked, Profile
from llmd_sched.types import Candidates, Endpoint, Request


@dataclass(frozen=True, slots=True)
class Choice:
    """``beside``: what further profiles picked. ``destination``: empty = the endpoints picked, in order."""

    profile: str
    picked: Picked
    beside: Mapping[str, Picked] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    destination: str = ""


@dataclass(frozen=True, slots=True)
class Scheduling:
    """Profiles, the handler that runs them, and the deciders it may ask."""

    profiles: Mapping[str, Profile]
    handler: Handler
    deciders: Mapping[str, Decider] = field(default_factory=dict)

    def run(self, request: Request, candidates: Candidates, rng: Random) -> Choice:
        """Raises NoneLeft when the primary profile's filters leave nothing."""
        return self.handler.run(self, request, candidates, rng)


class Handler(Plugin, frozen=True):
    """Base of the handlers."""

    own_headers: ClassVar[tuple[str, ...]] = ()
    """Request headers it sets; nobody else's are passed on."""

    def needs(self) -> dict[str, str]:
        """Field -> name of the profile that must exist."""
        return {}

    def asks(self) -> dict[str, str]:
        """Field -> name of the decider plugin that must exist."""
        return {}

    def check_profiles(self, names: Collection[str]) -> None:
        """Raises ValueError when it cannot run with these profiles."""

    def run(self, plan: Scheduling, request: Request, candidates: Candidates, rng: Random) -> Choice:
        raise NotImplementedError


class SingleProfileHandler(Handler, frozen=True):
    """Runs the only profile once."""

    def check_profiles(self, names: Collection[str]) -> None:
        if len(names) > 1:
            raise ValueError(f"{len(names)} profiles, but single-profile-handler runs one")

    def run(self, plan: Scheduling, request: Request, candidates: Candidates, rng: Random) -> Choice:
        (profile,) = plan.profiles.values()
        return Choice(profile.name, profile.run(request, candidates, rng))


STAGE_ORDERS = ("decode-first", "prefill-first")


class StageProfiles(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names of the profiles of each stage."""

    decode: str = "decode"
    prefill: str = "prefill"
    encode: str = "encode"


class StageDeciders(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names of the plugins that decide whether a stage is done elsewhere; empty = it never is."""

    prefill: str = ""
    encode: str = ""


class DisaggProfileHandler(Handler, frozen=True):
    """Prefill, and encoding of images and sound, on other endpoints than decode, where a decider says so.

    ``stageOrder`` decode-first runs decode, then encode and prefill as the ``deciders`` of each say; prefill-first
    runs prefill always, before decode. ``profiles`` names the profile of each stage. The decode endpoint is the
    destination; the others travel in ``x-prefiller-host-port`` and ``x-encoder-hosts-ports``. A stage whose profile
    finds no endpoint is left to the decode endpoint.
    """

    own_headers = (PREFILLER, ENCODERS)

    stage_order: str = STAGE_ORDERS[0]
    profiles: StageProfiles = StageProfiles()
    deciders: StageDeciders = StageDeciders()

    def check(self) -> None:
        if self.stage_order not in STAGE_ORDERS:
            raise ValueError(f"stageOrder {self.stage_order!r}: accepted are {', '.join(STAGE_ORDERS)}")
        if self._prefill_first and self.deciders.prefill:
            raise ValueError("deciders.prefill has no say when stageOrder is prefill-first; remove one of them")

    @property
    def _prefill_first(self) -> bool:
        return self.stage_order == "prefill-first"

    def needs(self) -> dict[str, str]:
        needed = {"profiles.decode": self.profiles.decode}
        if self._prefill_first or self.deciders.prefill:
            needed["profiles.prefill"] = self.profiles.prefill
        if self.deciders.encode:
            needed["profiles.encode"] = self.profiles.encode
        return needed

    def asks(self) -> dict[str, str]:
        named = {"deciders.prefill": self.deciders.prefill, "deciders.encode": self.deciders.encode}
        return {where: name for where, name in named.items() if name}

    def run(self, plan: Scheduling, request: Request, candidates: Candidates, rng: Random) -> Choice:
        beside: dict[str, Picked] = {}
        names, deciders = self.profiles, self.deciders
        if self._prefill_first:
            _run_stage(names.prefill, beside, plan, request, candidates, rng)
        decode = plan.profiles[names.decode].run(request, candidates, rng)
        position = int(decode.order[0])
        for stage, decider in ((names.encode, deciders.encode), (names.prefill, deciders.prefill)):
            if decider and plan.deciders[decider].disaggregates(request, candidates, position):
                _run_stage(stage, beside, plan, request, candidates, rng)
        return Choice(names.decode, decode, beside, self._headers(candidates, beside))

    def _headers(self, candidates: Candidates, beside: Mapping[str, Picked]) -> dict[str, str]:
        headers = {}
        if self.profiles.prefill in beside:
            headers[PREFILLER] = hostports(candidates, beside[self.profiles.prefill])[0]
        if self.profiles.encode in beside:
            headers[ENCODERS] = ",".join(hostports(candidates, beside[self.profiles.encode]))
        return headers


def _run_stage(
    name: str, beside: dict[str, Picked], plan: Scheduling, request: Request, candidates: Candidates, rng: Random
) -> None:
    """Adds what the profile picks; nothing when it finds no endpoint."""
    with suppress(NoneLeft):
        beside[name] = plan.profiles[name].run(request, candidates, rng)


def hostports(candidates: Candidates, picked: Picked) -> list[str]:
    return [candidates.endpoints[i].hostport for i in picked.order.tolist()]


class PdProfileHandler(Handler, frozen=True):
    """Prefill on another endpoint than decode. Deprecated by the reference: ``disagg-profile-handler`` says the same.

    ``deciderPluginName`` decides; without one, prefill is always elsewhere. With ``primaryPort`` the request goes to
    that port of the decode endpoint's address, and the endpoint in ``x-data-parallel-host-port``. The remaining
    parameters are accepted and unused.
    """

    own_headers = (PREFILLER, DATA_PARALLEL)

    decode_profile: str = "decode"
    prefill_profile: str = "prefill"
    decider_plugin_name: str = ""
    primary_port: int = 0
    threshold: int = 0
    hash_block_size: int = 0
    prefix_plugin_type: str = ""
    prefix_plugin_name: str = ""

    def check(self) -> None:
        if not 0 <= self.primary_port <= 65535:
            raise ValueError("primaryPort must be from 1 to 65535, or 0 for none")

    def needs(self) -> dict[str, str]:
        return {"decodeProfile": self.decode_profile, "prefillProfile": self.prefill_profile}

    def asks(self) -> dict[str, str]:
        return {"deciderPluginName": self.decider_plugin_name} if self.decider_plugin_name else {}

    def run(self, plan: Scheduling, request: Request, candidates: Candidates, rng: Random) -> Choice:
        decode = plan.profiles[self.decode_profile].run(request, candidates, rng)
        position, destination = int(decode.order[0]), ""
        beside: dict[str, Picked] = {}
        decider = plan.deciders.get(self.decider_plugin_name)
        if decider is None or decider.disaggregates(request, candidates, position):
            _run_stage(self.prefill_profile, beside, plan, request, candidates, rng)
        prefill = beside.get(self.prefill_profile)
        headers = {PREFILLER: hostports(candidates, prefill)[0]} if prefill else {}
        if self.primary_port:
            destination, header = by_primary_port([candidates.endpoints[position]], self.primary_port)
            headers |= header
        return Choice(self.decode_profile, decode, beside, headers, destination)


class DataParallelProfileHandler(Handler, frozen=True):
    """Ranks behind one port: the request goes to ``primaryPort``, the rank in ``x-data-parallel-host-port``.

    Deprecated by the reference.
    """

    own_headers = (DATA_PARALLEL,)

    primary_port: int = 8000

    def check(self) -> None:
        if not 1 <= self.primary_port <= 65535:
            raise ValueError("primaryPort must be from 1 to 65535")

    def check_profiles(self, names: Collection[str]) -> None:
        if len(names) > 1:
            raise ValueError(f"{len(names)} profiles, but data-parallel-profile-handler runs one")

    def run(self, plan: Scheduling, request: Request, candidates: Candidates, rng: Random) -> Choice:
        (profile,) = plan.profiles.values()
        picked = profile.run(request, candidates, rng)
        endpoints = [candidates.endpoints[i] for i in picked.order.tolist()]
        destination, headers = by_primary_port(endpoints, self.primary_port)
        return Choice(profile.name, picked, headers=headers, destination=destination)


def by_primary_port(endpoints: list[Endpoint], port: int) -> tuple[str, dict[str, str]]:
    """The destination at ``port`` of each address, and the header naming the first one's own port."""
    primary = [msgspec.structs.replace(e, port=port).hostport for e in endpoints]
    return ",".join(dict.fromkeys(primary)), {DATA_PARALLEL: endpoints[0].hostport}


class HeaderProfileHandler(Handler, frozen=True):
    """Runs the profile the request names in the header ``headerName``, else ``defaultProfile``; unknown ones are
    refused with 429."""

    header_name: str = "EPP-Profile"
    default_profile: str = "decode"

    def check(self) -> None:
        if not self.header_name:
            raise ValueError("headerName must not be empty")

    def needs(self) -> dict[str, str]:
        return {"defaultProfile": self.default_profile}

    def headers(self) -> tuple[str, ...]:
        return (self.header_name.lower(),)

    def run(self, plan: Scheduling, request: Request, candidates: Candidates, rng: Random) -> Choice:
        name = request.headers.get(self.header_name.lower()) or self.default_profile
        profile = plan.profiles.get(name)
        if profile is None:
            raise NoneLeft(f"no profile {name!r}; known: {', '.join(plan.profiles)}")
        return Choice(name, profile.run(request, candidates, rng))


class NoHandler(Plugin, frozen=True):
    """Does nothing: the disaggregation headers are set by the profile handler. Deprecated by the reference."""

    prefill_profile: str = "prefill"
    encode_profile: str = "encode"


HANDLERS: dict[str, type[Handler]] = {
    "single-profile-handler": SingleProfileHandler,
    "disagg-profile-handler": DisaggProfileHandler,
    "pd-profile-handler": PdProfileHandler,
    "data-parallel-profile-handler": DataParallelProfileHandler,
    "header-profile-handler": HeaderProfileHandler,
}
