"""The contenders of ``benchmarks.bench_batch``: who says how much batch there may be."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from batchgw.pace import Assumed, Headroom, PoolHeadroom
from benchmarks.batch_sim import Law, Server
from benchmarks.batch_traffic import Scenario, prior
from llmd_sched.headroom.board import HeadroomBoard
from llmd_sched.headroom.law import HeadroomSettings
from llmd_sched.sim.engine import Policy
from llmd_sched.sim.kvcache import BLOCK_TOKENS

NOTHING = Assumed(
    arrivals_per_s=0, prompt_tokens_per_s=0, running=0, context_tokens=0, step_ms=0,
    base_ms=0, prefill_token_ms=0, sequence_ms=0, context_token_ms=0,
)  # fmt: skip
UNLIMITED = 1_000_000_000


class Cap:
    """A number of lines per engine, the same in all weathers."""

    router_limit = math.inf
    refuse_limit = math.inf
    plain = False

    def __init__(self, lines: float, *, policy: Policy = Policy.FCFS, plain: bool = False) -> None:
        self.lines = lines
        self.policy = policy
        self.plain = plain
        self.version = 0

    def arrived(self, ticket: str, endpoint: str, prompt_tokens: int, now_s: float, *, batch: bool) -> bool:
        return False

    def first_token(self, ticket: str, now_s: float) -> None: ...

    def finished(self, ticket: str, now_s: float, output_tokens: int | None) -> None: ...

    def refused(self, endpoint: str, now_s: float) -> None: ...

    def carriers(self) -> tuple[str, ...]:
        return ()

    def allowed(self, server: Server, now_s: float) -> float:
        return self.lines

    def look(self, servers: list[Server], now_s: float) -> PoolHeadroom:
        self.version += 1
        endpoints = tuple(
            Headroom(
                endpoint=server.name,
                mode="idle",
                n_star=int(self.allowed(server, now_s)),
                prefill_tokens=UNLIMITED,
                prefill_tokens_per_s=None,
                step_budget_ms=None,
                batch_running=server.batch,
                assumed=NOTHING,
            )
            for server in servers
        )
        return PoolHeadroom(version=self.version, mode="idle", carriers=(), endpoints=endpoints)


class Aimd(Cap):
    """batchgw's window per engine: one more per completion, half upon a refusal. 30 at first, 60 at most."""

    def __init__(self, *, router_limit: float = math.inf, refuse_limit: float = math.inf) -> None:
        super().__init__(30)
        self.router_limit = router_limit
        self.refuse_limit = refuse_limit
        self._calm_s = 0.0

    def finished(self, ticket: str, now_s: float, output_tokens: int | None) -> None:
        if ticket.startswith("b"):
            self.lines = min(self.lines + 1 / self.lines, 60)

    def refused(self, endpoint: str, now_s: float) -> None:
        if now_s >= self._calm_s:
            self.lines = max(self.lines / 2, 1)
            self._calm_s = now_s + 2.0

    def allowed(self, server: Server, now_s: float) -> float:
        return self.lines if now_s >= self._calm_s else 0


class Scraped(Cap):
    """llm-d-async's endpoint-scrape gate: clamp(1 - running / 100 - 0.05) of 64 workers, read every 5 s."""

    def __init__(self) -> None:
        super().__init__(64)
        self._read: dict[str, tuple[float, float]] = {}

    def allowed(self, server: Server, now_s: float) -> float:
        at_s, budget = self._read.get(server.name, (-math.inf, 0.0))
        if now_s - at_s >= 5.0:
            budget = min(max(1 - server.engine.running / 100 - 0.05, 0.0), 1.0)
            self._read[server.name] = now_s, budget
        return self.lines * budget


class Ours(Cap):
    """The scheduler's own ``HeadroomBoard``, told of engines as they are, or with b0 and (b2, k) off by a factor."""

    def __init__(self, scenario: Scenario, settings: HeadroomSettings, *, base: float = 1.0, load: float = 1.0) -> None:
        super().__init__(0, policy=Policy.PRIORITY)
        self.board = HeadroomBoard(settings)
        kv_tokens = scenario.preset.kv_blocks * BLOCK_TOKENS
        known = prior(scenario.preset).scaled(base, load), kv_tokens
        self.board.endpoints_changed({f"engine-{n}": known for n in range(scenario.engines)})
        self._carriers: tuple[str, ...] = ()

    def arrived(self, ticket: str, endpoint: str, prompt_tokens: int, now_s: float, *, batch: bool) -> bool:
        before = self.board.mode
        self.board.arrived(ticket, endpoint, prompt_tokens, now_s, batch=batch)
        return self.board.mode != before

    def first_token(self, ticket: str, now_s: float) -> None:
        self.board.first_token(ticket, now_s)

    def finished(self, ticket: str, now_s: float, output_tokens: int | None) -> None:
        self.board.finished(ticket, now_s, output_tokens)

    def carriers(self) -> tuple[str, ...]:
        return self._carriers

    def look(self, servers: list[Server], now_s: float) -> PoolHeadroom:
        news = self.board.look(now_s)
        self._carriers = news.carriers
        return msgspec.json.decode(msgspec.json.encode(news), type=PoolHeadroom)


def laws(scenario: Scenario, itl_ms: float | None = None) -> dict[str, Callable[[], Law]]:
    """Every contender by its name; ``itl_ms`` is the operator's bound."""
    return {
        "S0": lambda: Cap(0),
        "S1": lambda: Cap(200, plain=True),
        "S1-priority": lambda: Cap(200, policy=Policy.PRIORITY),
        "S2": lambda: Cap(100),
        "S3": lambda: Aimd(refuse_limit=50),
        "S4": lambda: Aimd(router_limit=50),
        "S5": Scraped,
        "S6": lambda: Cap(20),
        "fixed-5": lambda: Cap(5),
        "protect": lambda: Ours(scenario, HeadroomSettings(itl_ms=itl_ms)),
        "protect-learned": lambda: Ours(scenario, HeadroomSettings()),
        "harvest": lambda: Ours(scenario, HeadroomSettings(mode="harvest", itl_ms=itl_ms)),
        "harvest-wrong": lambda: Ours(scenario, HeadroomSettings(mode="harvest", itl_ms=itl_ms), base=1.3, load=0.7),
    }
