"""What is read from live objects when Prometheus asks. It runs in the metrics server's thread, so it only reads, and
copies a collection before it walks along it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from llmd_sched import __version__
from llmd_sched.pool.inflight import InFlightLoad
from llmd_sched.pool.pool import Pool
from llmd_sched.pool.scrape import Scraper
from llmd_sched.prefix.approx import ApproxPrefixCache
from llmd_sched.prefix.subscriber import Subscribers
from llmd_sched.router import Router
from llmd_sched.telemetry import Gauge, Telemetry, pool_gauges, pulled


def pool(name: str, live: Pool, now_s: float) -> Iterator[Gauge]:
    yield from pool_gauges(name, live.columns(now_s), live.fresh(now_s), live.endpoints)
    yield from pulled("info", [(("", __version__), 1.0)])


def requests(router: Router, telemetry: Telemetry) -> Iterator[Gauge]:
    open_ = list(router.open.values())
    yield from telemetry.running(decision.request for decision in open_)
    yield from pulled("open_requests", [((), float(len(open_)))])
    yield from pulled("lost_requests_total", [((), float(router.lost))])
    errors = [((name,), float(count)) for name, count in list(router.producer_errors.items())]
    yield from pulled("producer_errors_total", errors)
    for producer in router.producers:
        if isinstance(producer, InFlightLoad):
            yield from _in_flight(producer, telemetry)
        elif isinstance(producer, ApproxPrefixCache):
            size = float(sum(map(len, list(producer.held.values()))))
            yield from pulled("prefix_indexer_size", [((producer.name, "approx-prefix-cache-producer"), size)])


def _in_flight(producer: InFlightLoad, telemetry: Telemetry) -> Iterator[Gauge]:
    counts: Counter[tuple[str, ...]] = Counter()
    tokens: defaultdict[tuple[str, ...], float] = defaultdict(float)
    for charge in producer.charges():
        endpoint, request = charge.endpoint, charge.request
        _, _, fairness_id, priority = telemetry.labels("", "", request.fairness_id, request.priority)
        labels = (endpoint.name, endpoint.namespace, producer.name, fairness_id, priority)
        counts[labels] += 1
        tokens[labels] += charge.charged_tokens
    yield from pulled("inflight_requests", [(labels, float(count)) for labels, count in counts.items()])
    yield from pulled("inflight_tokens", [(labels, float(count)) for labels, count in tokens.items()])


def scraping(scraper: Scraper) -> Iterator[Gauge]:
    yield from pulled("scrape_errors_total", [((), float(scraper.errors))])
    yield from pulled("datalayer_poll_errors_total", [(("metrics-data-source",), float(scraper.errors))])


def kv_events(subscribers: Subscribers) -> Iterator[Gauge]:
    cache = subscribers.cache
    for name, count in (
        ("index_admissions_total", cache.index.admissions),
        ("index_evictions_total", cache.index.evictions),
        ("index_lookup_requests_total", cache.lookups),
        ("index_lookup_hits_total", cache.hit_blocks),
        ("index_max_pod_hit_count_total", cache.hit_blocks),
        ("events_dedup_removed_hashes_suppressed_total", cache.index.suppressed),
        ("events_dedup_removed_hashes_forwarded_total", cache.index.forwarded),
        ("events_active_subscribers", subscribers.active),
        ("events_pool_capacity", subscribers.capacity),
    ):
        yield from pulled(f"kv_cache_{name}", [((), float(count))])
    skipped = cache.feed.counts
    for name, counter in (("stores", skipped.stores_skipped), ("removals", skipped.removals_skipped)):
        told = [(labels, float(count)) for labels, count in list(counter.items())]
        yield from pulled(f"kv_cache_events_{name}_skipped_total", told)
    for name, by_pod in (("reconnections", subscribers.reconnections), ("messages_received", subscribers.messages)):
        metric = "subscriber_reconnections" if name == "reconnections" else name
        told_of = [((pod,), float(count)) for pod, count in list(by_pod.items())]
        yield from pulled(f"kv_cache_events_{metric}_total", told_of)
    errors = [(labels, float(count)) for labels, count in list(subscribers.errors.items())]
    yield from pulled("kv_cache_events_zmq_errors_total", errors)
