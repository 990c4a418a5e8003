"""The ``dataLayer`` block: where endpoints come from, and what is read of them."""

from __future__ import annotations

from collections.abc import Mapping

from llmd_sched.catalog import table
from llmd_sched.catalog.declare import Declared, add, check_ref
from llmd_sched.config import DataSource, EndpointPickerConfig, PluginRef, duration_s
from llmd_sched.errors import ConfigError
from llmd_sched.plugin import Plugin
from llmd_sched.pool import sources
from llmd_sched.prefix.precise import PrecisePrefixCacheProducer

METRICS_SOURCE, METRICS_EXTRACTOR = "metrics-data-source", "core-metrics-extractor"


def discovery(config: EndpointPickerConfig, plugins: dict[str, Declared]) -> str | None:
    ref = config.data_layer.discovery
    if ref is None:
        return None
    path = "$.dataLayer.discovery.pluginRef"
    check_ref(ref.plugin_ref, Plugin, plugins, path)
    if plugins[ref.plugin_ref].type not in table.DISCOVERY:
        raise ConfigError(f"{ref.plugin_ref!r} is no discovery; accepted types: {', '.join(table.DISCOVERY)}", path)
    return ref.plugin_ref


def data_sources(config: EndpointPickerConfig, plugins: dict[str, Declared]) -> tuple[DataSource, ...]:
    """Those given; metrics are read besides, unless they are among them or injectDefaults is false."""
    layer, path = config.data_layer, "$.dataLayer"
    for i, given in enumerate(layer.sources):
        where = f"{path}.sources[{i}]"
        check_ref(given.plugin_ref, sources.DataSource, plugins, f"{where}.pluginRef")
        for k, extractor in enumerate(given.extractors):
            kinds = (sources.Extractor, PrecisePrefixCacheProducer)
            check_ref(extractor.plugin_ref, kinds, plugins, f"{where}.extractors[{k}].pluginRef")
    if layer.peer_discovery is not None:
        raise ConfigError("no plugin can stand here; remove it", f"{path}.peerDiscovery")
    if layer.cross_replica_syncer_plugin_ref is not None:
        raise ConfigError("no plugin can stand here; remove it", f"{path}.crossReplicaSyncerPluginRef")
    try:
        duration_s(layer.cross_replica_sync_interval)
    except ValueError as e:
        raise ConfigError(str(e), f"{path}.crossReplicaSyncInterval") from None
    reads_metrics = any(isinstance(plugins[s.plugin_ref].plugin, sources.MetricsDataSource) for s in layer.sources)
    if reads_metrics or not layer.inject_defaults:
        return layer.sources
    read_by = _first_of(sources.MetricsDataSource, plugins) or METRICS_SOURCE
    understood_by = _first_of(sources.CoreMetricsExtractor, plugins) or METRICS_EXTRACTOR
    for name in (read_by, understood_by):
        add(plugins, name)
    added = DataSource(plugin_ref=read_by, extractors=(PluginRef(plugin_ref=understood_by),))
    return (*layer.sources, added)


def _first_of(kind: type[Plugin], plugins: Mapping[str, Declared]) -> str | None:
    return next((name for name, d in plugins.items() if isinstance(d.plugin, kind)), None)
