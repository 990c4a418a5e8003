"""What a configuration says of reading metrics: where a page is, and which engine's page says what.

Where nothing is said, ``/metrics`` of each endpoint is read as the table of ``engines.py`` has it. An extractor's
engines stand beside that table's, and before one of the same name.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping

import msgspec

from llmd_sched.config import duration_s
from llmd_sched.errors import ConfigError
from llmd_sched.plugin import Plugin
from llmd_sched.pool.engines import DEFAULT_ENGINE, ENGINE_LABEL, ENGINES, Engine, InfoLabel, Series, engine_name

PATH = "/metrics"
RESERVED_ENGINE = "default"
MAX_ENGINES = 100
MAX_CUSTOM_METRICS = 100
"""Of one engine: each is looked for on every page."""


class DataSource(Plugin, frozen=True):
    """Base of what may stand under ``dataLayer.sources``."""


class Extractor(Plugin, frozen=True):
    """Base of what may stand under the ``extractors`` of a source."""


class HttpSource(DataSource, frozen=True):
    """Base of the sources that ask the endpoints themselves, with the parameters they share."""

    scheme: str = "http"
    path: str = PATH
    port: int = 0
    insecure_skip_verify: bool | None = None
    ca_cert_path: str = ""
    client_cert_path: str = ""
    client_key_path: str = ""
    interval: str = ""

    def check(self) -> None:
        if self.scheme not in ("http", "https"):
            raise ValueError(f"scheme {self.scheme!r}: accepted are http and https")
        if not self.path.startswith("/") or not self.path.isascii() or not self.path.isprintable() or " " in self.path:
            raise ValueError(f"path {self.path!r}: expected one such as {PATH}, without spaces")
        if not 0 <= self.port <= 65535:
            raise ValueError("port must be from 1 to 65535, or 0 for the endpoint's own")
        if bool(self.client_cert_path) != bool(self.client_key_path):
            raise ValueError("clientCertPath and clientKeyPath go together")
        if self.scheme == "http" and (self.ca_cert_path or self.client_cert_path):
            raise ValueError("caCertPath, clientCertPath and clientKeyPath need scheme https")
        if self.interval and self.interval_s <= 0:
            raise ValueError("interval must be more than 0")

    @property
    def interval_s(self) -> float:
        try:
            return duration_s(self.interval)
        except ValueError as e:
            raise ValueError(f"interval: {e}") from None

    @property
    def verifies(self) -> bool:
        """As asked; when nobody says, a CA is there to be used."""
        return bool(self.ca_cert_path) if self.insecure_skip_verify is None else not self.insecure_skip_verify


class MetricsDataSource(HttpSource, frozen=True):
    """Where each endpoint's metrics page is: ``scheme`` http or https, ``path``, ``port`` (0 = the endpoint's own).

    With https: ``insecureSkipVerify`` (true unless ``caCertPath`` is given), ``caCertPath`` (PEM), ``clientCertPath``
    and ``clientKeyPath`` (PEM, both). ``interval`` between reads of an endpoint with traffic, such as 200ms; without
    it that of the command line.
    """


class CustomMetric(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """One number of a page, which becomes the endpoint's attribute ``attributeKey``. Of several series that meet the
    conditions the first counts."""

    attribute_key: str
    metric_spec: str


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """What an engine's page says, each as ``name`` or ``name{label=value,...}``; empty = it does not.

    Block size and count are either labels of the info line ``cacheInfoSpec``, or values of their own.
    """

    name: str
    queued_requests_spec: str = ""
    running_requests_spec: str = ""
    kv_usage_spec: str = ""
    lora_spec: str = ""
    cache_info_spec: str = ""
    cache_block_size_label_name: str = "block_size"
    cache_num_blocks_label_name: str = "num_gpu_blocks"
    cache_block_size_spec: str = ""
    cache_num_blocks_spec: str = ""
    custom_metrics: tuple[CustomMetric, ...] = ()

    def check(self) -> None:
        """Raises ValueError with what is accepted."""
        if not self.name or self.name == RESERVED_ENGINE:
            raise ValueError(
                f"name {self.name!r} of an engine: accepted is any but {RESERVED_ENGINE!r} and none at all"
            )
        keys = [metric.attribute_key for metric in self.custom_metrics]
        if len(keys) > MAX_CUSTOM_METRICS:
            raise ValueError(f"{len(keys)} customMetrics of engine {self.name}; at most {MAX_CUSTOM_METRICS}")
        if len(set(keys)) < len(keys):
            raise ValueError(f"customMetrics of engine {self.name}: an attributeKey is given twice")
        if not all(keys) or any("/" in key for key in keys):
            raise ValueError(f"customMetrics of engine {self.name}: attributeKey must be a name without '/'")
        try:
            self.engine("")
        except ValueError as e:
            raise ValueError(f"engine {self.name}: {e}") from None

    def engine(self, extractor: str) -> Engine:
        """As the scraper reads it; attributes are of this ``extractor``."""
        return Engine(
            waiting=_series(self.queued_requests_spec),
            running=_series(self.running_requests_spec),
            kv_usage=_series(self.kv_usage_spec),
            block_tokens=self._fact(self.cache_block_size_spec, self.cache_block_size_label_name, "block_size"),
            cache_blocks=self._fact(self.cache_num_blocks_spec, self.cache_num_blocks_label_name, "num_gpu_blocks"),
            lora=_series(self.lora_spec),
            custom=tuple((f"{m.attribute_key}/{extractor}", Series(m.metric_spec)) for m in self.custom_metrics),
        )

    def _fact(self, spec: str, label: str, default: str) -> InfoLabel | Series | None:
        if spec:
            return Series(spec)
        return InfoLabel(self.cache_info_spec, label or default) if self.cache_info_spec else None


def _series(spec: str) -> Series | None:
    return Series(spec) if spec else None


class CoreMetricsExtractor(Extractor, frozen=True):
    """What is read of a page: waiting and running requests, KV cache use, LoRA adapters, block size and count.

    The engine is the value of an endpoint's label ``engineLabelKey``, ``defaultEngine`` without it. ``engineConfigs``
    adds engines, or replaces known ones by their name: ``queuedRequestsSpec`` and so on name the metric, and
    ``customMetrics`` further numbers as attributes for endpoint-attribute-scorer and -filter.
    """

    engine_label_key: str = ENGINE_LABEL
    default_engine: str = DEFAULT_ENGINE
    engine_configs: tuple[EngineConfig, ...] = ()

    def check(self) -> None:
        names = [config.name for config in self.engine_configs]
        if len(names) > MAX_ENGINES:
            raise ValueError(f"{len(names)} engineConfigs; at most {MAX_ENGINES} are accepted")
        if len(set(names)) < len(names):
            raise ValueError("engineConfigs: an engine's name is given twice")
        for config in self.engine_configs:
            config.check()
        known = [*ENGINES, *(name for name in names if name not in ENGINES)]
        if self.default_engine and self.default_engine not in known:
            raise ValueError(f"defaultEngine {self.default_engine!r} is unknown; known are {', '.join(known)}")


class ModelsDataSource(HttpSource, frozen=True):
    """Accepted, and nothing is read: which models an endpoint serves is not asked for by any plugin here.

    Parameters as of metrics-data-source, ``path`` /v1/models.
    """

    path: str = "/v1/models"


class ModelsDataExtractor(Extractor, frozen=True):
    """Accepted, and without work here: see models-data-source."""


class EndpointNotificationSource(DataSource, frozen=True):
    """Accepted, and without work here: whoever follows the endpoints is told of them by discovery itself."""


class K8sNotificationSource(DataSource, frozen=True):
    """Accepted, and without work here: ``group``, ``version`` and ``kind`` name objects that no plugin asks for."""

    group: str = ""
    version: str = ""
    kind: str = ""


SOURCES: dict[str, type[DataSource]] = {
    "metrics-data-source": MetricsDataSource,
    "models-data-source": ModelsDataSource,
    "endpoint-notification-source": EndpointNotificationSource,
    "k8s-notification-source": K8sNotificationSource,
}
EXTRACTORS: dict[str, type[Extractor]] = {
    "core-metrics-extractor": CoreMetricsExtractor,
    "models-data-extractor": ModelsDataExtractor,
}


class Reading(msgspec.Struct, frozen=True):
    """How the scraper reads. ``port`` 0 = the endpoint's own; ``interval_s`` None = nothing is said of it."""

    path: str = PATH
    port: int = 0
    tls: ssl.SSLContext | None = None
    interval_s: float | None = None
    engines: Mapping[str, Engine] = ENGINES
    engine_label: str = ENGINE_LABEL
    default_engine: str = DEFAULT_ENGINE

    def engine_name(self, labels: Mapping[str, str]) -> str:
        """What an endpoint's labels say, known or not."""
        return engine_name(labels, self.engine_label, self.default_engine)

    def url(self, host: str, port: int) -> str:
        """Of an endpoint's page, for whoever reads a log; ``port`` is the endpoint's own."""
        authority = f"[{host}]" if ":" in host else host
        return f"{'https' if self.tls else 'http'}://{authority}:{self.port or port}{self.path}"


def reading(plugins: Mapping[str, Plugin]) -> Reading:
    """What these plugins, by name, say together. Raises ConfigError when two of a kind do, or a file is unusable."""
    sources = {name: p for name, p in plugins.items() if isinstance(p, MetricsDataSource)}
    extractors = {name: p for name, p in plugins.items() if isinstance(p, CoreMetricsExtractor)}
    for kind, found in (("metrics-data-source", sources), ("core-metrics-extractor", extractors)):
        if len(found) > 1:
            raise ConfigError(
                f"{', '.join(found)} are each a {kind}; one page is read per endpoint, by one", "$.plugins"
            )
    source = next(iter(sources.values()), MetricsDataSource())
    name, extractor = next(iter(extractors.items()), ("core-metrics-extractor", CoreMetricsExtractor()))
    return Reading(
        path=source.path,
        port=source.port,
        tls=_tls(source) if source.scheme == "https" else None,
        interval_s=source.interval_s if source.interval else None,
        engines={**ENGINES, **{config.name: config.engine(name) for config in extractor.engine_configs}},
        engine_label=extractor.engine_label_key or ENGINE_LABEL,
        default_engine=extractor.default_engine or DEFAULT_ENGINE,
    )


def _tls(source: HttpSource) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=source.ca_cert_path or None)
        if source.client_cert_path:
            context.load_cert_chain(source.client_cert_path, source.client_key_path)
    except OSError as e:  # of which SSLError is one
        files = ", ".join(filter(None, (source.ca_cert_path, source.client_cert_path, source.client_key_path)))
        raise ConfigError(f"cannot use the certificates for reading metrics: {e}", files) from None
    if not source.verifies:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
