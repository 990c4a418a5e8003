"""The alert rules and the dashboards of scheduler and batch gateway: well formed, and of metrics that we export."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmd_sched.predict.gauges import producer_gauges
from llmd_sched.predict.producer import PredictedLatencyProducer
from llmd_sched.predict.trainer import TrainerProcess
from llmd_sched.telemetry.names import MEASURED, METRICS, OURS, PREFIX, Row, row_of, twin_of
from tests.batch_metrics import labels_by_name

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "observability"
ALERTS = FOLDER / "alerts.yaml", FOLDER / "batch-alerts.yaml"
DASHBOARDS = "dashboard.json", "batch-dashboard.json"

RULES = [rule for file in ALERTS for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]
PANELS: dict[str, list[dict[str, Any]]] = {
    name: json.loads((FOLDER / name).read_text())["panels"] for name in DASHBOARDS
}
CHARTS = {name: [panel for panel in panels if panel["type"] != "row"] for name, panels in PANELS.items()}
EXPRESSIONS = {rule["alert"]: rule["expr"] for rule in RULES} | {
    f"{name} {panel['title']} {target['refId']}": target["expr"]
    for name, charts in CHARTS.items()
    for panel in charts
    for target in panel["targets"]
}

NOT_OURS = {"process_cpu_seconds_total"}
WORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "and", "or", "unless", "bool", "offset"}
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def served(name: str, row: Row) -> set[str]:
    """The names on the page."""
    return {name + suffix for suffix in ("_bucket", "_sum", "_count")} if row.kind == "histogram" else {name}


def exported() -> set[str]:
    found = set(NOT_OURS)
    for name in (*METRICS, *OURS):
        found |= served(PREFIX + name, row_of(name))
        twin = twin_of(name)
        found |= served(twin.name, row_of(name)) if twin else set()
    for name, row in MEASURED.items():
        found |= served(name, row)
    producer = PredictedLatencyProducer().open("p")
    return found | {name for name, *_ in producer_gauges(producer, TrainerProcess(producer.model), 1.0)}


BATCH = labels_by_name()
"""Of the batch gateway."""

EXPORTED = exported() | set(BATCH)


def metrics_of(expression: str) -> set[str]:
    """Names in an expression that are neither functions nor labels."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", expression)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    names = re.findall(r"[A-Za-z_:][\w:]*(?!\w)(?!\s*\()", bare)
    return {name for name in names if name not in WORDS}


def labels_of(expression: str) -> set[tuple[str, str]]:
    """(metric, label) of every label matcher."""
    found = re.findall(r"([\w:]+)\{([^}]*)\}", expression)
    return {(name, label) for name, matchers in found for label in re.findall(r"(\w+)\s*[=!]", matchers)}


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_every_expression_is_of_metrics_we_export(where: str) -> None:
    names = metrics_of(EXPRESSIONS[where])
    assert names
    assert names <= EXPORTED


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_every_label_asked_for_is_one_the_metric_has(where: str) -> None:
    for name, label in labels_of(EXPRESSIONS[where]):
        short = re.sub(r"_(bucket|sum|count)$", "", name.removeprefix(PREFIX))
        if name in BATCH:
            assert label in BATCH[name] | {"job"}, f"{name} has no label {label}"
        elif label != "job" and short in METRICS:
            assert label in METRICS[short].labels, f"{name} has no label {label}"


def test_a_name_we_do_not_export_would_be_found() -> None:
    expression = (
        'sum by (le, job) (rate(llm_d_epp_request_totale{a="b"}[5m])) / on (x) group_left () up > 0.5 or abs(x:y)'
    )
    assert metrics_of(expression) == {"llm_d_epp_request_totale", "up", "x:y"}
    assert "llm_d_epp_request_totale" not in EXPORTED


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_an_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"].endswith(".")
    assert len(rule["annotations"]["description"].split()) > 5


def test_names_of_alerts_and_panels_are_unique() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for panels in PANELS.values():
        assert len({panel["id"] for panel in panels}) == len(panels)
        assert len({panel["title"] for panel in panels}) == len(panels)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_do_not_overlap(name: str) -> None:
    cells: set[tuple[int, int]] = set()
    for panel in PANELS[name]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        mine = {(grid["x"] + i, grid["y"] + j) for i in range(grid["w"]) for j in range(grid["h"])}
        assert not cells & mine, panel["title"]
        cells |= mine


def test_every_alert_on_prediction_has_its_panel() -> None:
    charts = CHARTS["dashboard.json"]
    shown = set().union(*(metrics_of(target["expr"]) for panel in charts for target in panel["targets"]))
    for rule in RULES:
        if rule["alert"] in ("EppPredictorDrift", "EppPredictorError", "EppPredictorCoverage", "EppTrainerDown"):
            assert metrics_of(rule["expr"]) <= shown, rule["alert"]


# --- with promtool ----------------------------------------------------------------------------------------------------


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", *ALERTS)


@needs_promtool
def test_promtool_accepts_every_query_of_the_dashboard(tmp_path: Path) -> None:
    queries = [target["expr"] for charts in CHARTS.values() for panel in charts for target in panel["targets"]]
    rules = [
        {"record": f"panel:query{i}", "expr": query.replace("$__rate_interval", "5m")}
        for i, query in enumerate(queries)
    ]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", path)


MFP = 'model_name="m",target_model_name="m",fairness_id="f",priority="0"'
B = 'job="b",instance="i"'
P, T = 'plugin_name="p"', 'plugin_name="p",target="ttft"'
FIRING = [
    ("EppAbsent", {"up": "1x20"}),
    ("EppNoReadyEndpoints", {'llm_d_epp_ready_endpoints{name="pool"}': "0x20"}),
    (
        "EppStaleEndpoints",
        {
            'llm_d_epp_ready_endpoints{name="pool"}': "1x20",
            'llm_d_epp_per_endpoint_queue_size{name="pool",model_server_endpoint="a"}': "1x20",
            'llm_d_epp_per_endpoint_queue_size{name="pool",model_server_endpoint="b"}': "1x20",
        },
    ),
    (
        "EppRejectedRequests",
        {
            f"llm_d_epp_request_total{{{MFP}}}": "0+60x20",
            f'llm_d_epp_request_error_total{{{MFP},error_code="ResourceExhausted"}}': "0+6x20",
        },
    ),
    (
        "EppModelServerErrors",
        {
            f"llm_d_epp_request_total{{{MFP}}}": "0+60x20",
            f'llm_d_epp_request_error_total{{{MFP},error_code="upstream-failed"}}': "0+6x20",
        },
    ),
    ("EppQueueSaturated", {'llm_d_epp_flow_control_pool_saturation{inference_pool="p",stage="effective"}': "1.2x20"}),
    ("EppLostRequests", {"llm_d_epp_lost_requests_total": "0x9 3x10"}),
    ("EppProducerErrors", {'llm_d_epp_producer_errors_total{producer_name="p"}': "0x15 1x4"}),
    (
        "EppSlowDecisions",
        {
            'llm_d_epp_scheduler_e2e_duration_seconds_bucket{le="0.02"}': "0+90x20",
            'llm_d_epp_scheduler_e2e_duration_seconds_bucket{le="0.05"}': "0+100x20",
            'llm_d_epp_scheduler_e2e_duration_seconds_bucket{le="+Inf"}': "0+100x20",
        },
    ),
    ("EppTrainerDown", {f"llm_d_epp_predictor_trainer_up{{{P}}}": "0x20"}),
    ("EppPredictorDrift", {f"llm_d_epp_predictor_drift_events_total{{{P}}}": "0+1x20"}),
    (
        "EppPredictorError",
        {
            f"llm_d_epp_predictor_live_error_ratio{{{T}}}": "0.6x20",
            f"llm_d_epp_predictor_held_out_error_ratio{{{T}}}": "0.2x20",
        },
    ),
    ("EppPredictorCoverage", {f'llm_d_epp_predictor_live_coverage_ratio{{{T},quantile="0.9"}}': "0.7x20"}),
    ("BatchGatewayWorkersAbsent", {"up": "1x20"}),
    ("BatchGatewayNoProgress", {f'batchgw_queue_depth_lines{{{B},model="m",state="queued"}}': "9x20"}),
    ("BatchGatewayDeadlineAtRisk", {f'batchgw_batches_at_risk{{{B},model="m"}}': "1x20"}),
    (
        "BatchGatewayWorkerGone",
        {f'batch_startup_recovery_total{{{B},status="in_progress",action="resumed"}}': "0x9 2x9"},
    ),
    (
        "BatchGatewayPaceHeld",
        {
            f'batchgw_queue_depth_lines{{{B},model="m",state="queued"}}': "9x20",
            f'batchgw_pace_held{{{B},source="s",reason="unheard"}}': "1x20",
        },
    ),
    (
        "BatchGatewayLineFailures",
        {
            f'model_request_execution_duration_seconds_count{{{B},model="m"}}': "0+60x20",
            f'request_errors_by_model_total{{{B},model="m"}}': "0+10x20",
        },
    ),
    ("BatchGatewayStorageUnavailable", {f'batchgw_store_errors_total{{{B},verb="v",kind="unavailable"}}': "0+2x20"}),
    ("BatchGatewayWebhooksFailing", {f'batchgw_webhook_deliveries_total{{{B},outcome="failed"}}': "0+2x20"}),
]


HEALTHY = {
    'llm_d_epp_info{commit="",build_ref="1"}': "1x20",
    'llm_d_epp_ready_endpoints{name="pool"}': "1x20",
    'llm_d_epp_per_endpoint_queue_size{name="pool",model_server_endpoint="a"}': "9x20",
    f"llm_d_epp_request_total{{{MFP}}}": "0+60x20",
    f'llm_d_epp_request_error_total{{{MFP},error_code="ResourceExhausted"}}': "0+1x20",
    f'llm_d_epp_request_error_total{{{MFP},error_code="aborted"}}': "0+30x20",
    'llm_d_epp_flow_control_pool_saturation{inference_pool="p",stage="effective"}': "0.9x20",
    "llm_d_epp_lost_requests_total": "3x20",
    'llm_d_epp_producer_errors_total{producer_name="p"}': "1x20",
    f"llm_d_epp_predictor_trainer_up{{{P}}}": "1x20",
    f"llm_d_epp_predictor_drift_events_total{{{P}}}": "7x20",
    f"llm_d_epp_predictor_live_error_ratio{{{T}}}": "0.6x20",
    f"llm_d_epp_predictor_held_out_error_ratio{{{T}}}": "0.5x20",
    f'llm_d_epp_predictor_live_coverage_ratio{{{T},quantile="0.9"}}': "0.93x20",
    f'llm_d_epp_predictor_live_coverage_ratio{{{T},quantile="0.5"}}': "0.55x20",
    f"total_workers{{{B}}}": "1x20",
    f'batchgw_queue_depth_lines{{{B},model="m",state="queued"}}': "9x20",
    f'model_request_execution_duration_seconds_count{{{B},model="m"}}': "0+60x20",
    f'request_errors_by_model_total{{{B},model="m"}}': "0+1x20",
    f'batchgw_batches_at_risk{{{B},model="m"}}': "0x20",
    f'batchgw_pace_held{{{B},source="s",reason="unheard"}}': "0x9 1x2 0x9",
    f'batch_startup_recovery_total{{{B},status="in_progress",action="resumed"}}': "4x20",
    f'batchgw_webhook_deliveries_total{{{B},outcome="failed"}}': "7x20",
}


def after_18_minutes(series: dict[str, str], query: str, value: int, folder: Path) -> None:
    """Runs the rules over a minute-by-minute history and compares a query's one value."""
    asked = {"expr": query, "eval_time": "18m", "exp_samples": [{"labels": "{}", "value": value}]}
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    test = {"interval": "1m", "input_series": inputs, "promql_expr_test": [asked]}
    path = folder / "test.yaml"
    path.write_text(
        yaml.safe_dump({"rule_files": [str(file) for file in ALERTS], "evaluation_interval": "1m", "tests": [test]})
    )
    promtool("test", "rules", path)


@needs_promtool
@pytest.mark.parametrize(("alert", "series"), FIRING, ids=[alert for alert, _ in FIRING])
def test_an_alert_fires_when_it_should(alert: str, series: dict[str, str], tmp_path: Path) -> None:
    after_18_minutes(series, f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)', 1, tmp_path)


@needs_promtool
def test_no_alert_fires_when_all_is_well(tmp_path: Path) -> None:
    after_18_minutes(HEALTHY, 'count(ALERTS{alertstate="firing"}) or vector(0)', 0, tmp_path)
