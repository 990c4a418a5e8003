"""The reference's metrics, written down from its documentation and not from our code.

A line is: name without ``llm_d_epp_``, type, labels, buckets, twin, the twin's labels. ``-`` is none, ``=`` the same as
the metric's, and a star in a twin stands for the name.
"""

from __future__ import annotations

from typing import NamedTuple

M = "model_name,target_model_name"
MFP = f"{M},fairness_id,priority"

LAT = ".005 .025 .05 .1 .2 .4 .6 .8 1 1.25 1.5 2 3 4 5 6 8 10 15 20 30 45 60 120"
TPOT = ".0005 .00205 .005 .01 .02 .04 .06 .08 .1 .125 .15 .2 .3 .4 .5 .6 .8 1"
BUCKETS = {
    "TTFT": LAT,
    "LAT": LAT + " 180 240 300 360 480 600 900 1200 1800 2700 3600",
    "TOK": "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384 32778 65536 131072 262144 524288 1048576",
    "TOK15": "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384 32778 65536",
    "TOK12": "1 8 16 32 64 128 256 512 1024 2048 4096 8192",
    "SHORT": ".0001 .0002 .0005 .001 .002 .005 .01 .02 .05 .1",
    "SIZE": " ".join(str(64 << i) for i in range(25)),
    "TPOT": TPOT + " 2",
    "TPOT_LONG": TPOT + " 1.5 2 3 4.5 6 12 18 24 30 36 48 60 90 120 180 270 360",
    "NTPOT": ".001 .002 .005 .01 .02 .05 .1 .2 .5 1 2 5 10",
    "ITL": ".001 .005 .01 .02 .04 .06 .08 .1 .15 .2 .3 .5 .75 1 2",
    "REQUEST": ".0005 .001 .002 .005 .01 .015 .025 .04 .06 .1 .25 .5 1 2.5 5 10",
    "RESPONSE": ".0001 .00025 .0005 .001 .0025 .005 .01 .025 .05 .1 .25 .5 1 2.5 5",
    "RATIO": "0 .1 .2 .3 .4 .5 .6 .7 .8 .9 1",
    "HIT_BYTES": "0 16 32 64 128 256 512 1024 2048 4096 8192 16384 32768 65536",
    "STREAM": ".001 .005 .01 .05 .1 .5 1 5 10 30 60 120 300 600",
    "DEFAULT": ".005 .01 .025 .05 .1 .25 .5 1 2.5 5 10",
    "QUEUE": ".0001 .0005 .001 .005 .01 .025 .05 .1 .25 .5 1 2.5 5 10 30 60",
    "PREDICT": ".0001 .0005 .001 .002 .005 .01 .02 .05 .1 .2 .5 1 2 5",
}

TABLE = """
request_total                    C  MFP             -     inference_objective_*                M,priority
request_error_total              C  MFP,error_code  -     inference_objective_*                M,error_code
request_duration_seconds         H  MFP             LAT   inference_objective_*                M
request_size_bytes               H  MFP             SIZE  inference_objective_request_sizes    M
response_size_bytes              H  MFP             TOK15 inference_objective_response_sizes   M
request_input_tokens             H  MFP             TOK   inference_objective_input_tokens     M
request_output_tokens            H  MFP             TOK12 inference_objective_output_tokens    M
request_cached_tokens            H  MFP             TOK   inference_objective_prompt_cached_tokens M
request_running                  G  MFP             -     inference_objective_running_requests model_name
request_ntpot_seconds            H  MFP             NTPOT inference_objective_normalized_time_per_output_token_seconds M
request_ttft_seconds             H  MFP,streaming   TTFT  -  -
request_streaming_tpot_seconds   H  MFP             TPOT  -  -
request_streaming_itl_seconds    H  MFP             ITL   -  -
average_kv_cache_utilization     G  name            -     inference_pool_*           =
average_queue_size               G  name            -     inference_pool_*           =
average_running_requests         G  name            -     inference_pool_*           =
std_dev_kv_cache_utilization     G  name            -     -  -
std_dev_queue_size               G  name            -     -  -
std_dev_running_requests         G  name            -     -  -
ready_endpoints                  G  name            -     inference_pool_ready_pods  =
per_endpoint_queue_size G name,model_server_endpoint - inference_pool_per_pod_queue_size name,model_server_pod
scheduler_e2e_duration_seconds   H  -               SHORT inference_extension_*      =
scheduler_attempts_total C ATTEMPT - inference_extension_* status,target_model_name,pod_name,namespace,port
plugin_duration_seconds H extension_point,plugin_type,plugin_name SHORT inference_extension_* =
plugin_data_scope_violations_total C extension_point,plugin_type,plugin_name,access - - -
request_processing_duration_seconds   H  -          REQUEST   -  -
response_processing_duration_seconds  H  -          RESPONSE  -  -
info                             G  commit,build_ref  -       inference_extension_*  =
model_rewrite_decisions_total C model_rewrite_name,model_name,target_model - inference_extension_* =
datalayer_poll_errors_total      C  source_type     -     llm_d_inference_scheduler_*  =
datalayer_extract_errors_total   C  source_type,extractor_type - llm_d_inference_scheduler_* =
prefix_indexer_size              G  plugin_name,plugin_type  -          inference_extension_*  -
prefix_indexer_hit_ratio         H  plugin_name,plugin_type  RATIO      inference_extension_*  -
prefix_indexer_hit_bytes         H  plugin_name,plugin_type  HIT_BYTES  inference_extension_*  -
inflight_requests                G  INFLIGHT        -     -  -
inflight_tokens                  G  INFLIGHT        -     -  -
encoder_cache_queries_total      C  plugin_type,plugin_name,modality      -      -  -
encoder_cache_hits_total         C  plugin_type,plugin_name,pod,modality  -      -  -
encoder_cache_hit_ratio          H  plugin_type,plugin_name               RATIO  -  -
program_aware_jains_fairness_index         G  -           -  -  -
program_aware_avg_wait_time_milliseconds   G  program_id  -  -  -
program_aware_attained_service_tokens      G  program_id  -  -  -
disagg_decision_total  C  plugin_name,plugin_type,model_name,decision_type - SCHEDULER model_name,decision_type
pd_decision_total      C  plugin_name,plugin_type,model_name,decision_type - SCHEDULER model_name,decision_type
disaggregatedset_strict_header_no_match_total  C  plugin_type,plugin_name,selector       -  -  -
disaggregatedset_revision_gating_share         G  plugin_type,plugin_name,mode,revision  -  -  -
extproc_streams_inflight         G  -               -       -  -
extproc_stream_duration_seconds  H  -               STREAM  -  -
extproc_streams_total            C  code            -       -  -
kv_cache_index_admissions_total         C  -  -        kvcache_index_admissions_total         =
kv_cache_index_evictions_total          C  -  -        kvcache_index_evictions_total          =
kv_cache_index_lookup_requests_total    C  -  -        kvcache_index_lookup_requests_total    =
kv_cache_index_lookup_hits_total        C  -  -        kvcache_index_lookup_hits_total        =
kv_cache_index_max_pod_hit_count_total  C  -  -        kvcache_index_max_pod_hit_count_total  =
kv_cache_index_lookup_latency_seconds   H  -  DEFAULT  kvcache_index_lookup_latency_seconds   =
kv_cache_events_dedup_removed_hashes_suppressed_total C - - kvcache_kvevents_dedup_removed_hashes_suppressed_total =
kv_cache_events_dedup_removed_hashes_forwarded_total C - - kvcache_kvevents_dedup_removed_hashes_forwarded_total =
kv_cache_events_stores_skipped_total            C  cache_kind,reason         -  -  -
kv_cache_events_removals_skipped_total          C  cache_kind,reason         -  -  -
kv_cache_events_active_subscribers              G  -                         -  -  -
kv_cache_events_pool_queue_depth                G  -                         -  -  -
kv_cache_events_pool_capacity                   G  -                         -  -  -
kv_cache_events_subscriber_reconnections_total  C  pod_identifier            -  -  -
kv_cache_events_messages_received_total         C  pod_identifier            -  -  -
kv_cache_events_zmq_errors_total                C  pod_identifier,operation  -  -  -
flow_control_request_queue_duration_seconds  H  QUEUED  QUEUE  inference_extension_*  =
flow_control_dispatch_cycle_duration_seconds   H  -                             SHORT  inference_extension_*  =
flow_control_request_enqueue_duration_seconds  H  fairness_id,priority,outcome  SHORT  inference_extension_*  =
flow_control_queue_size   G  fairness_id,priority,inference_pool,M  -  inference_extension_*  =
flow_control_queue_bytes  G  fairness_id,priority,inference_pool,M  -  inference_extension_*  =
flow_control_pool_saturation                       G  inference_pool,stage     -  inference_extension_*  inference_pool
flow_control_stale_endpoints                       G  detector                 -  -  -
flow_control_capacity_utilization_requests         G  priority,inference_pool  -  -  -
flow_control_capacity_utilization_bytes            G  priority,inference_pool  -  -  -
flow_control_global_capacity_utilization_requests  G  inference_pool           -  -  -
flow_control_global_capacity_utilization_bytes     G  inference_pool           -  -  -
flow_control_requests_total             C  outcome,priority,inference_pool  -  -  -
flow_control_revocations_issued_total   C  priority,inference_pool          -  -  -
flow_control_revocations_total          C  outcome,inference_pool           -  -  -
flow_control_reclaim_target             G  inference_pool                   -  -  -
flow_control_pending_reclaim            G  inference_pool                   -  -  -
flow_control_revocation_confirmation_seconds  H  inference_pool  DEFAULT  -  -
request_predicted_ttft_seconds            H  PREDICTED       LAT        inference_objective_*  M
request_ttft_prediction_duration_seconds  H  PREDICTED       PREDICT    inference_objective_*  M
request_predicted_tpot_seconds            H  PREDICTED       TPOT_LONG  inference_objective_*  M
request_tpot_prediction_duration_seconds  H  PREDICTED       PREDICT    inference_objective_*  M
request_slo_violation_total               C  PREDICTED,type  -          inference_objective_*  M,type
inference_request_metric                  G  PREDICTED,type  -          inference_objective_*  M,type
"""

SHORT = {
    "MFP": MFP,
    "M": M,
    "ATTEMPT": "status,target_model_name,endpoint_name,namespace,port",
    "INFLIGHT": "endpoint_name,namespace,producer_name,fairness_id,priority",
    "QUEUED": f"fairness_id,priority,outcome,inference_pool,{M}",
    "PREDICTED": f"{M},plugin_name,plugin_type",
}

KINDS = {"C": "counter", "G": "gauge", "H": "histogram"}

OURS = {
    "open_requests": "gauge",
    "lost_requests_total": "counter",
    "scrape_errors_total": "counter",
    "flow_control_errors_total": "counter",
    "producer_errors_total": "counter",
    "ignored_header_total": "counter",
}
"""What the reference does not have. Names that begin with ``predictor_`` are ours as well."""


class Expected(NamedTuple):
    name: str
    kind: str
    labels: frozenset[str]
    buckets: tuple[float, ...]
    twin: str
    twin_labels: frozenset[str]


def _labels(text: str) -> tuple[str, ...]:
    parts = [] if text == "-" else text.split(",")
    return tuple(label for part in parts for label in SHORT.get(part, part).split(","))


def _row(line: str) -> Expected:
    name, kind, labels, buckets, twin, twin_labels = line.split()
    twin = {"-": "", "SCHEDULER": "llm_d_inference_scheduler_*"}.get(twin, twin).replace("*", name)
    return Expected(
        name=name,
        kind=KINDS[kind],
        labels=frozenset(_labels(labels)),
        buckets=() if buckets == "-" else tuple(map(float, BUCKETS[buckets].split())),
        twin=twin,
        twin_labels=frozenset(_labels(labels if twin_labels == "=" else twin_labels)),
    )


EXPECTED = tuple(_row(line) for line in TABLE.strip().splitlines())
