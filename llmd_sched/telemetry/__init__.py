"""All Prometheus names. Names, labels and buckets are the reference's where it has them.

Code that decides never counts: the driver observes each request once it is decided and once it has ended, and
collectors pull the rest from live objects when they are scraped.

    names        every metric, one row each
    instruments  counters, gauges and histograms
    pulled       what is read at a scrape
    book         both, and the page
    requests     what the driver observes; predictions: of the predictor
"""

from __future__ import annotations

from llmd_sched.telemetry.book import CONTENT_TYPE
from llmd_sched.telemetry.names import LATENCY_S, LONG_TPOT_S, PREDICTION_S
from llmd_sched.telemetry.pulled import Gauge, Pulled, Values, pool_gauges, pulled
from llmd_sched.telemetry.requests import MAX_LABEL_SETS, MAX_LABEL_VALUES, Series, Telemetry, Timing

__all__ = [
    "CONTENT_TYPE",
    "LATENCY_S",
    "LONG_TPOT_S",
    "MAX_LABEL_SETS",
    "MAX_LABEL_VALUES",
    "PREDICTION_S",
    "Gauge",
    "Pulled",
    "Series",
    "Telemetry",
    "Timing",
    "Values",
    "pool_gauges",
    "pulled",
]
