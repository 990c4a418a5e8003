"""Every metric of the reference, once: type, labels, buckets, and the deprecated twin that is still served beside it.

A name stands without its prefix, ``llm_d_epp_``. What is ours alone follows in a table of its own; the predictor's
own names are in ``predict.gauges``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Literal, NamedTuple

PREFIX = "llm_d_epp_"
OTHER = "other"
"""Instead of a label value beyond what is told apart."""

TTFT_S = (0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 1.25, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 45, 60, 120)
LATENCY_S = (*TTFT_S, 180, 240, 300, 360, 480, 600, 900, 1200, 1800, 2700, 3600)
TPOT_S = (0.0005, 0.00205, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 2)
LONG_TPOT_S = (*TPOT_S[:-1], 1.5, 2, 3, 4.5, 6, 12, 18, 24, 30, 36, 48, 60, 90, 120, 180, 270, 360)
NTPOT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
ITL_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2)
PREDICTION_S = (0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
SHORT_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
REQUEST_PROCESSING_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
RESPONSE_PROCESSING_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
QUEUE_S = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
STREAM_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600)
DEFAULT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""What Go's client uses when it is told nothing."""
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32778, 65536, 131072, 262144, 524288, 1048576)
SIZE_BYTES = tuple(2**i for i in range(6, 31))
HIT_BYTES = (0, *(2**i for i in range(4, 17)))
RATIO = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)

Kind = Literal["counter", "gauge", "histogram"]

_RENAMED = {"pod_name": "endpoint_name", "model_server_pod": "model_server_endpoint"}
"""A twin's label -> what it is called today."""


class Row(NamedTuple):
    """One metric."""

    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


class Twin(NamedTuple):
    """A metric's deprecated name; a star stands for the new one. Its labels are the same unless given."""

    name: str
    labels: tuple[str, ...] | None = None
    merge: Callable[[float, float], float] = operator.add
    """Makes one gauge of two that differ only in labels which the twin does not have; all else is added."""

    def kept(self, labels: tuple[str, ...]) -> tuple[int, ...]:
        """Positions of the twin's labels among the labels of the metric."""
        if self.labels is None:
            return tuple(range(len(labels)))
        return tuple(labels.index(_RENAMED.get(label, label)) for label in self.labels)


def _counter(text: str, labels: tuple[str, ...] = ()) -> Row:
    return Row("counter", text, labels)


def _gauge(text: str, labels: tuple[str, ...] = ()) -> Row:
    return Row("gauge", text, labels)


def _histogram(text: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Row:
    return Row("histogram", text, labels, buckets)


M = ("model_name", "target_model_name")
MFP = (*M, "fairness_id", "priority")
_P = ("name",)
_POOL = ("inference_pool",)
_BAND = ("priority", *_POOL)
_PLUGIN = ("plugin_name", "plugin_type")
_TYPED = ("plugin_type", "plugin_name")
_POINT = ("extension_point", *_TYPED)
_PREDICTED = (*M, *_PLUGIN)
_REWRITE = ("model_rewrite_name", "model_name", "target_model")
_SPLIT = (*_PLUGIN, "model_name", "decision_type")
_QUEUE = ("fairness_id", "priority", "inference_pool", *M)
_QUEUED = ("fairness_id", "priority", "outcome", "inference_pool", *M)
_INFLIGHT = ("endpoint_name", "namespace", "producer_name", "fairness_id", "priority")
_ATTEMPT = ("status", "target_model_name", "endpoint_name", "namespace", "port")
_OLD_ATTEMPT = ("status", "target_model_name", "pod_name", "namespace", "port")
_POD = ("pod_identifier",)
_REVISION = (*_TYPED, "mode", "revision")

METRICS: dict[str, Row] = {
    # Requests.
    "request_total": _counter("Requests received.", MFP),
    "request_error_total": _counter("Requests that ended in an error.", (*MFP, "error_code")),
    "request_duration_seconds": _histogram("Request to end of reply.", MFP, LATENCY_S),
    "request_size_bytes": _histogram("Request body.", MFP, SIZE_BYTES),
    "response_size_bytes": _histogram("Response body.", MFP, TOKENS[:15]),
    "request_input_tokens": _histogram("Prompt tokens.", MFP, TOKENS),
    "request_output_tokens": _histogram("Output tokens.", MFP, TOKENS[:12]),
    "request_cached_tokens": _histogram("Prompt tokens from the cache.", MFP, TOKENS),
    "request_running": _gauge("Requests sent upstream and not finished.", MFP),
    "request_ntpot_seconds": _histogram("Request to end of reply, per output token.", MFP, NTPOT_S),
    "request_ttft_seconds": _histogram("Sent upstream to first token.", (*MFP, "streaming"), TTFT_S),
    "request_streaming_tpot_seconds": _histogram("Time per output token.", MFP, TPOT_S),
    "request_streaming_itl_seconds": _histogram("Between two tokens of a stream.", MFP, ITL_S),
    "request_processing_duration_seconds": _histogram(
        "Received to body handled, queue included.", (), REQUEST_PROCESSING_S
    ),
    "response_processing_duration_seconds": _histogram("Spent on a reply's chunks.", (), RESPONSE_PROCESSING_S),
    # The pool.
    "average_kv_cache_utilization": _gauge("Mean KV cache use of fresh endpoints, 0..1.", _P),
    "average_queue_size": _gauge("Mean requests waiting at fresh endpoints.", _P),
    "average_running_requests": _gauge("Mean requests running at fresh endpoints.", _P),
    "std_dev_kv_cache_utilization": _gauge("Spread of the KV cache use of fresh endpoints.", _P),
    "std_dev_queue_size": _gauge("Spread of the requests waiting at fresh endpoints.", _P),
    "std_dev_running_requests": _gauge("Spread of the requests running at fresh endpoints.", _P),
    "ready_endpoints": _gauge("Endpoints read in time.", _P),
    "per_endpoint_queue_size": _gauge("Requests waiting.", ("name", "model_server_endpoint")),
    # The scheduler and its plugins.
    "scheduler_e2e_duration_seconds": _histogram("Time to decide.", (), SHORT_S),
    "scheduler_attempts_total": _counter("Scheduling attempts.", _ATTEMPT),
    "plugin_duration_seconds": _histogram("Time in a plugin.", _POINT, SHORT_S),
    "plugin_data_scope_violations_total": _counter("Data a plugin used undeclared.", (*_POINT, "access")),
    "info": _gauge("Build.", ("commit", "build_ref")),
    "model_rewrite_decisions_total": _counter("Model names rewritten.", _REWRITE),
    "datalayer_poll_errors_total": _counter("Pages not read.", ("source_type",)),
    "datalayer_extract_errors_total": _counter("Pages not understood.", ("source_type", "extractor_type")),
    "prefix_indexer_size": _gauge("Entries of the prefix index.", _PLUGIN),
    "prefix_indexer_hit_ratio": _histogram("Share of a prompt found in the index.", _PLUGIN, RATIO),
    "prefix_indexer_hit_bytes": _histogram("Bytes of a prompt found in the index.", _PLUGIN, HIT_BYTES),
    "inflight_requests": _gauge("Requests in flight to an endpoint.", _INFLIGHT),
    "inflight_tokens": _gauge("Tokens in flight to an endpoint.", _INFLIGHT),
    "encoder_cache_queries_total": _counter("Media items looked up.", (*_TYPED, "modality")),
    "encoder_cache_hits_total": _counter("Media items found, by endpoint.", (*_TYPED, "pod", "modality")),
    "encoder_cache_hit_ratio": _histogram("Share of a request's media items an endpoint holds.", _TYPED, RATIO),
    "disagg_decision_total": _counter("Requests by the stages they were split into.", _SPLIT),
    "pd_decision_total": _counter("[Deprecated: Use llm_d_epp_disagg_decision_total] By stages.", _SPLIT),
    "disaggregatedset_strict_header_no_match_total": _counter("Revisions nothing serves.", (*_TYPED, "selector")),
    "disaggregatedset_revision_gating_share": _gauge("Share of the traffic a revision is given.", _REVISION),
    # ext_proc streams, behind a flag.
    "extproc_streams_inflight": _gauge("Streams open."),
    "extproc_stream_duration_seconds": _histogram("Life of a stream.", (), STREAM_S),
    "extproc_streams_total": _counter("Streams ended.", ("code",)),
    # The index of KV events, behind a parameter.
    "kv_cache_index_admissions_total": _counter("Blocks taken in."),
    "kv_cache_index_evictions_total": _counter("Blocks dropped."),
    "kv_cache_index_lookup_requests_total": _counter("Lookups."),
    "kv_cache_index_lookup_hits_total": _counter("Leading blocks that the best endpoint holds."),
    "kv_cache_index_max_pod_hit_count_total": _counter("Longest chain of leading blocks of one endpoint."),
    "kv_cache_index_lookup_latency_seconds": _histogram("Time of a lookup.", (), DEFAULT_S),
    "kv_cache_events_dedup_removed_hashes_suppressed_total": _counter(
        "Removals held back: another rank has the block."
    ),
    "kv_cache_events_dedup_removed_hashes_forwarded_total": _counter("Removals passed on."),
    "kv_cache_events_stores_skipped_total": _counter("Blocks reported and not indexed.", ("cache_kind", "reason")),
    "kv_cache_events_removals_skipped_total": _counter("Removals reported and not applied.", ("cache_kind", "reason")),
    "kv_cache_events_active_subscribers": _gauge("Engines listened to."),
    "kv_cache_events_pool_queue_depth": _gauge("Messages not yet applied."),
    "kv_cache_events_pool_capacity": _gauge("Messages that may wait."),
    "kv_cache_events_subscriber_reconnections_total": _counter("Times a connection was opened again.", _POD),
    "kv_cache_events_messages_received_total": _counter("Messages received.", _POD),
    "kv_cache_events_zmq_errors_total": _counter("Errors of the socket.", ("pod_identifier", "operation")),
    # Flow control.
    "flow_control_request_queue_duration_seconds": _histogram("Time queued.", _QUEUED, QUEUE_S),
    "flow_control_dispatch_cycle_duration_seconds": _histogram("Time of one look at the queues.", (), SHORT_S),
    "flow_control_request_enqueue_duration_seconds": _histogram("Time to queue a request.", _QUEUED[:3], SHORT_S),
    "flow_control_queue_size": _gauge("Requests queued.", _QUEUE),
    "flow_control_queue_bytes": _gauge("Bytes of requests queued.", _QUEUE),
    "flow_control_pool_saturation": _gauge("Saturation of the pool; 1 stops the dispatch.", (*_POOL, "stage")),
    "flow_control_stale_endpoints": _gauge("Endpoints whose metrics are missing or stale.", ("detector",)),
    "flow_control_capacity_utilization_requests": _gauge("Share of a band's requests in use, 0..1.", _BAND),
    "flow_control_capacity_utilization_bytes": _gauge("Share of a band's bytes in use, 0..1.", _BAND),
    "flow_control_global_capacity_utilization_requests": _gauge("Share of all requests in use, 0..1.", _POOL),
    "flow_control_global_capacity_utilization_bytes": _gauge("Share of all bytes in use, 0..1.", _POOL),
    "flow_control_requests_total": _counter("Requests by what became of them.", ("outcome", "priority", *_POOL)),
    "flow_control_revocations_issued_total": _counter("Requests in flight called back.", _BAND),
    "flow_control_revocations_total": _counter("Requests in flight called back, by outcome.", ("outcome", *_POOL)),
    "flow_control_reclaim_target": _gauge("Saturation last to be reclaimed.", _POOL),
    "flow_control_pending_reclaim": _gauge("Saturation called back and not confirmed.", _POOL),
    "flow_control_revocation_confirmation_seconds": _histogram("Called back to ended.", _POOL, DEFAULT_S),
    "program_aware_jains_fairness_index": _gauge("Fairness between programs, 0..1."),
    "program_aware_avg_wait_time_milliseconds": _gauge("Mean time queued.", ("program_id",)),
    "program_aware_attained_service_tokens": _gauge("Service received, decayed.", ("program_id",)),
    # Predictions.
    "request_predicted_ttft_seconds": _histogram("Predicted TTFT.", _PREDICTED, LATENCY_S),
    "request_ttft_prediction_duration_seconds": _histogram("Time to predict.", _PREDICTED, PREDICTION_S),
    "request_predicted_tpot_seconds": _histogram("Predicted TPOT.", _PREDICTED, LONG_TPOT_S),
    "request_tpot_prediction_duration_seconds": _histogram("Time to predict.", _PREDICTED, PREDICTION_S),
    "request_slo_violation_total": _counter("Replies later than their SLO.", (*_PREDICTED, "type")),
    "inference_request_metric": _gauge("Latest value of each kind.", (*_PREDICTED, "type")),
}

_DEDUP = "kvcache_kvevents_dedup_removed_hashes_"

TWINS: dict[str, Twin] = {
    "request_total": Twin("inference_objective_*", (*M, "priority")),
    "request_error_total": Twin("inference_objective_*", (*M, "error_code")),
    "request_duration_seconds": Twin("inference_objective_*", M),
    "request_size_bytes": Twin("inference_objective_request_sizes", M),
    "response_size_bytes": Twin("inference_objective_response_sizes", M),
    "request_input_tokens": Twin("inference_objective_input_tokens", M),
    "request_output_tokens": Twin("inference_objective_output_tokens", M),
    "request_cached_tokens": Twin("inference_objective_prompt_cached_tokens", M),
    "request_running": Twin("inference_objective_running_requests", ("model_name",)),
    "request_ntpot_seconds": Twin("inference_objective_normalized_time_per_output_token_seconds", M),
    "average_kv_cache_utilization": Twin("inference_pool_*"),
    "average_queue_size": Twin("inference_pool_*"),
    "average_running_requests": Twin("inference_pool_*"),
    "ready_endpoints": Twin("inference_pool_ready_pods"),
    "per_endpoint_queue_size": Twin("inference_pool_per_pod_queue_size", ("name", "model_server_pod")),
    "scheduler_e2e_duration_seconds": Twin("inference_extension_*"),
    "scheduler_attempts_total": Twin("inference_extension_*", _OLD_ATTEMPT),
    "plugin_duration_seconds": Twin("inference_extension_*"),
    "info": Twin("inference_extension_*"),
    "model_rewrite_decisions_total": Twin("inference_extension_*"),
    "datalayer_poll_errors_total": Twin("llm_d_inference_scheduler_*"),
    "datalayer_extract_errors_total": Twin("llm_d_inference_scheduler_*"),
    "prefix_indexer_size": Twin("inference_extension_*", ()),
    "prefix_indexer_hit_ratio": Twin("inference_extension_*", ()),
    "prefix_indexer_hit_bytes": Twin("inference_extension_*", ()),
    "disagg_decision_total": Twin("llm_d_inference_scheduler_*", ("model_name", "decision_type")),
    "pd_decision_total": Twin("llm_d_inference_scheduler_*", ("model_name", "decision_type")),
    "kv_cache_index_admissions_total": Twin("kvcache_index_admissions_total"),
    "kv_cache_index_evictions_total": Twin("kvcache_index_evictions_total"),
    "kv_cache_index_lookup_requests_total": Twin("kvcache_index_lookup_requests_total"),
    "kv_cache_index_lookup_hits_total": Twin("kvcache_index_lookup_hits_total"),
    "kv_cache_index_max_pod_hit_count_total": Twin("kvcache_index_max_pod_hit_count_total"),
    "kv_cache_index_lookup_latency_seconds": Twin("kvcache_index_lookup_latency_seconds"),
    "kv_cache_events_dedup_removed_hashes_suppressed_total": Twin(_DEDUP + "suppressed_total"),
    "kv_cache_events_dedup_removed_hashes_forwarded_total": Twin(_DEDUP + "forwarded_total"),
    "flow_control_request_queue_duration_seconds": Twin("inference_extension_*"),
    "flow_control_dispatch_cycle_duration_seconds": Twin("inference_extension_*"),
    "flow_control_request_enqueue_duration_seconds": Twin("inference_extension_*"),
    "flow_control_queue_size": Twin("inference_extension_*"),
    "flow_control_queue_bytes": Twin("inference_extension_*"),
    "flow_control_pool_saturation": Twin("inference_extension_*", _POOL, max),
    "request_predicted_ttft_seconds": Twin("inference_objective_*", M),
    "request_ttft_prediction_duration_seconds": Twin("inference_objective_*", M),
    "request_predicted_tpot_seconds": Twin("inference_objective_*", M),
    "request_tpot_prediction_duration_seconds": Twin("inference_objective_*", M),
    "request_slo_violation_total": Twin("inference_objective_*", (*M, "type")),
    "inference_request_metric": Twin("inference_objective_*", (*M, "type"), lambda _, later: later),
}

OURS: dict[str, Row] = {
    "open_requests": _gauge("Routed and not finished."),
    "lost_requests_total": _counter("Ends never reported."),
    "scrape_errors_total": _counter("Metric pages not read."),
    "flow_control_errors_total": _counter("Dispatch decisions that failed: a bug."),
    "producer_errors_total": _counter("Producers that failed.", ("producer_name",)),
    "ignored_header_total": _counter("Headers whose value was unusable.", ("header",)),
}

MEASURED: dict[str, Row] = {
    "inference_objective_request_ttft_seconds": _histogram(
        "[Deprecated: Use llm_d_epp_request_ttft_seconds] Of predicted requests.", M, LATENCY_S
    ),
    "inference_objective_request_tpot_seconds": _histogram(
        "[Deprecated: Use llm_d_epp_request_streaming_tpot_seconds] Of predicted requests.", M, LONG_TPOT_S
    ),
}
"""Full names, deprecated, and no twins: they differ from their successors in buckets and in what is observed."""


def row_of(name: str) -> Row:
    """Raises KeyError for a name that is in no table."""
    return METRICS[name] if name in METRICS else OURS[name]


def help_of(name: str, *, twin: bool = False) -> str:
    """The help text of a metric, or of its twin."""
    text = row_of(name).text
    return f"[ALPHA] [Deprecated: Use {PREFIX}{name}] {text}" if twin else f"[ALPHA] {text}"


def twin_of(name: str) -> Twin | None:
    """With its whole name and its labels."""
    twin = TWINS.get(name)
    if twin is None:
        return None
    return twin._replace(
        name=twin.name.replace("*", name), labels=row_of(name).labels if twin.labels is None else twin.labels
    )
