"""Parameters of the precise prefix cache, as the reference nests them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from llmd_sched.config import duration_s, quantity
from llmd_sched.prefix.blocks import Algorithm, BlockKeys

DEFAULT_BLOCK_TOKENS = 16
DEFAULT_SELECTOR = "llm-d.ai/inference-serving=true"
ENGINES = ("vllm", "sglang")
BYTES_PER_KEY = 320
"""What a block key, a holder or two and the engine's name for it take, measured at a million."""


class _Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"): ...


class TokenProcessor(_Parameters, frozen=True):
    block_size_tokens: int = DEFAULT_BLOCK_TOKENS
    block_size: int | None = None
    """Deprecated name of ``blockSizeTokens``."""
    hash_seed: str = ""
    hash_algorithm: str = Algorithm.CBOR_FNV.value

    @property
    def keys(self) -> BlockKeys:
        tokens = self.block_size_tokens
        if self.block_size is not None and tokens == DEFAULT_BLOCK_TOKENS:
            tokens = self.block_size
        return BlockKeys(Algorithm(self.hash_algorithm), self.hash_seed, tokens)


class InMemory(_Parameters, frozen=True):
    size: int = 100_000_000
    """Block keys."""
    pod_cache_size: int = 10
    """Accepted and not used: here any number of endpoints may hold a block."""


class CostAwareMemory(_Parameters, frozen=True):
    size: str | int = "2GiB"
    """Bytes."""

    @property
    def keys(self) -> int:
        return quantity(str(self.size).removesuffix("B")) // BYTES_PER_KEY


class KvBlockIndex(_Parameters, frozen=True):
    in_memory_config: InMemory | None = None
    cost_aware_memory_config: CostAwareMemory | None = None
    redis_config: Any = None
    enable_metrics: bool = False
    metrics_logging_interval: str | int | None = None

    @property
    def size(self) -> int:
        """Block keys it may hold."""
        if self.cost_aware_memory_config is not None:
            return self.cost_aware_memory_config.keys
        return (self.in_memory_config or InMemory()).size


class Backend(_Parameters, frozen=True):
    name: str
    weight: float = 1.0


class Indexer(_Parameters, frozen=True):
    kv_block_index_config: KvBlockIndex = KvBlockIndex()
    kv_cache_backend_configs: tuple[Backend, ...] = (Backend(name="gpu"), Backend(name="cpu", weight=0.8))
    tokenizers_pool_config: Any = None

    @property
    def weights(self) -> Mapping[str, float]:
        return {backend.name.lower(): backend.weight for backend in self.kv_cache_backend_configs}


class PodDiscovery(_Parameters, frozen=True):
    pod_label_selector: str = DEFAULT_SELECTOR
    pod_namespace: str = ""
    socket_port: int = 5557
    replay_socket_port: int | None = None

    @property
    def labels(self) -> dict[str, str]:
        """Raises ValueError."""
        pairs = [part.partition("=") for part in self.pod_label_selector.split(",") if part.strip()]
        if not all(key.strip() and sep and "!" not in key and " " not in key.strip() for key, sep, _ in pairs):
            raise ValueError(f"podLabelSelector {self.pod_label_selector!r}: accepted is key=value[,key=value...]")
        return {key.strip(): value.lstrip("=").strip() for key, _, value in pairs}


class KvEvents(_Parameters, frozen=True):
    zmq_endpoint: str = ""
    """Where to listen for engines that connect to us, such as ``tcp://*:5557``."""
    topic_filter: str = "kv@"
    concurrency: int = 4
    """Accepted and not used: one event loop applies all batches."""
    engine_type: str = "vllm"
    """Accepted; both publish the same."""
    discover_pods: bool = True
    """Connect to every endpoint of the pool."""
    pod_discovery_config: PodDiscovery = PodDiscovery()


def check(tokens: TokenProcessor, indexer: Indexer, events: KvEvents, speculative_ttl: str) -> None:
    """Raises ValueError saying what is wrong and what is accepted."""
    index = indexer.kv_block_index_config
    if index.redis_config is not None:
        raise ValueError("redisConfig is not supported; accepted are inMemoryConfig and costAwareMemoryConfig")
    if index.in_memory_config is not None and index.cost_aware_memory_config is not None:
        raise ValueError("kvBlockIndexConfig takes one of inMemoryConfig and costAwareMemoryConfig")
    if indexer.tokenizers_pool_config is not None:
        raise ValueError("tokenizersPoolConfig is not supported; declare a token-producer, which makes the token ids")
    if tokens.hash_algorithm not in list(Algorithm):
        raise ValueError(f"hashAlgorithm {tokens.hash_algorithm!r}: accepted are {', '.join(Algorithm)}")
    if tokens.keys.block_tokens <= 0:
        raise ValueError("blockSizeTokens must be positive")
    if index.size <= 0:
        raise ValueError("size of the block index must hold at least one key")
    if not all(math.isfinite(b.weight) and b.weight >= 0 and b.name for b in indexer.kv_cache_backend_configs):
        raise ValueError("kvCacheBackendConfigs: each needs a name and a weight of 0 or more")
    if duration_s(speculative_ttl) <= 0:
        raise ValueError("speculativeTTL must be positive")
    _check_events(events)


def _check_events(events: KvEvents) -> None:
    pods = events.pod_discovery_config
    if not events.discover_pods and not events.zmq_endpoint:
        raise ValueError("kvEventsConfig: without discoverPods a zmqEndpoint is needed, or no events arrive")
    if events.zmq_endpoint and "://" not in events.zmq_endpoint:
        raise ValueError(f"zmqEndpoint {events.zmq_endpoint!r}: accepted is an address such as tcp://*:5557")
    if events.engine_type not in ENGINES:
        raise ValueError(f"engineType {events.engine_type!r}: accepted are {', '.join(ENGINES)}")
    if events.concurrency <= 0:
        raise ValueError("concurrency must be positive")
    for name, port in (("socketPort", pods.socket_port), ("replaySocketPort", pods.replay_socket_port)):
        if port is not None and not 0 < port < 1 << 16:
            raise ValueError(f"{name} must be from 1 to 65535")
    _ = pods.labels  # raises
