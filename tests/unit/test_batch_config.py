"""One file, read strictly: every complaint says where and what is accepted. No file is a configuration too."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import msgspec
import pytest
import yaml

from batchgw.__main__ import COMMANDS, main
from batchgw.app.parts import pacer_of
from batchgw.client.gateway import Gateway
from batchgw.config import MAX_CONFIG_BYTES, Settings, address, described, load
from batchgw.errors import ConfigError
from batchgw.worker.headroom_pacer import HeadroomPacer
from batchgw.worker.pacer import GatePacer

ROOT = Path(__file__).resolve().parents[2]
SECRET = "whsec_" + base64.b64encode(bytes(32)).decode()
ENVIRON = {
    "POSTGRES_PASSWORD": "p",
    "S3_ACCESS_KEY_ID": "a",
    "S3_SECRET_ACCESS_KEY": "s",
    "HEADER_KEY": base64.b64encode(bytes(32)).decode(),
    "WEBHOOK_SECRET": SECRET,
}
TOP = ", ".join(Settings.__struct_encode_fields__)


@pytest.mark.parametrize(
    ("text", "path", "said"),
    [
        ("lisen: x", "$", f"Object contains unknown field `lisen`; accepted: {TOP}"),
        ("- a", "$", "expected a mapping such as 'gateway: http://host:port', got list"),
        ("listen: {", "$", "not valid YAML: expected the node content, but found '<stream end>' (line 1, column 10)"),
        ("data: a\ndata: b", "$", "not valid YAML: key 'data' is given twice (line 1, column 1)"),
        ("data: 2001-13-45", "$", "not valid YAML: ValueError: month must be in 1..12"),
        (f"log: {'x' * MAX_CONFIG_BYTES}", "$", f"the file is longer than {MAX_CONFIG_BYTES} characters"),
        ("webhooks: &a {b: *a}", "$", "nested more than 20 deep"),
        ("pace: {gate: &a {type: composite, gates: [*a]}}", "$", "nested more than 20 deep"),
        ("leases: {leaseS: .inf}", "$.leases.leaseS", "must be a finite number, not inf"),
        ('data: "\\ud800"', "$.data", "not usable text"),
        ("1: a", "$", "Expected `str`"),
        ("log: loud", "$.log", "Invalid enum value 'loud'"),
        ("listen: 8000", "$.listen", "Expected `str`, got `int`"),
        ("listen: ':8000'", "$.listen", "':8000' is not HOST:PORT such as 127.0.0.1:8000"),
        ("workerOps: host:70000", "$.workerOps", "'host:70000' is not HOST:PORT"),
        ("tls: {certFile: a}", "$.tls", "missing required field `keyFile`; accepted: certFile, keyFile"),
        ("store: mysql://x", "$.store", "accepted are postgresql://user:password@host/database and sqlite:///a/file"),
        ("storeConnections: 1", "$.storeConnections", "must be at least 2, not 1"),
        ("blobs: ftp://a/b", "$.blobs", "accepted: a folder, file:///a/folder, s3://bucket/prefix"),
        ("blobOptions: {path_style: true}", "$.blobOptions", "unknown field `path_style`; accepted: endpoint, region"),
        ("data: ''", "$.data", "must name a folder, unless store and blobs name places of their own"),
        ("gateway: engine:8000", "$.gateway", "url must begin with http:// or https://, not 'engine:8000'"),
        ("gateway: {url: 'http://a', priorty: 1}", "$.gateway", "unknown field `priorty`; accepted: url, apiKey"),
        ("gateway: {url: 'https://a', caFile: /none}", "$.gateway", "its certificates cannot be used: [Errno 2]"),
        ("gateways: {m: {}}", "$.gateways.m", "missing required field `url`; accepted: url, apiKey"),
        ("gateways: {m: {url: 'http://a', maxRetries: -1}}", "$.gateways.m", "maxRetries must be within 0..100"),
        ("api: {quotas: {lines: 1}}", "$.api.quotas", "unknown field `lines`; accepted: openBatches, queuedLines"),
        ("api: {quotas: {openBatches: -1}}", "$.api", "open_batches must be 0 (no limit) or more"),
        ("api: {passThroughHeaders: [Authorization]}", "$.api", "stored only encrypted: set headerKeys"),
        ("api: {headerKeys: [short]}", "$.api", "a header key must be the base64 of 32 random bytes"),
        ("api: {trustTenantHeader: cidrs}", "$.api", "trustTenantHeader cidrs needs trustedCidrs"),
        ("pace: {gate: {type: constnt}}", "$.pace.gate.type", "unknown gate 'constnt'; known are aimd, composite,"),
        ("pace: {gate: {type: aimd, mx: 2}}", "$.pace.gate", "gate aimd: Object contains unknown field `mx`"),
        (
            "pace: {gate: {type: composite, gates: [{type: aimd}, {type: x}]}}",
            "$.pace.gate.gates[1].type",
            "unknown gate 'x'",
        ),
        ("pace: {gate: {type: prometheus-query, query: up}}", "$.pace.gate", "or as prometheusUrl of all gates"),
        ("pace: {perModel: 0}", "$.pace", "perModel and total must be at least 1, pollS above 0"),
        ("pace: {gate: {type: aimd}, headroom: {url: 'http://a'}}", "$.pace", "either gate or headroom, not both"),
        ("pace: {headroom: {url: a}}", "$.pace.headroom", "urls must begin with http:// or https://, not 'a'"),
        ("pace: {headroom: {url: 'http://a', byModel: {m: b}}}", "$.pace.headroom", "not 'b'"),
        ("worker: {stopS: -1}", "$.worker", "stopS not negative"),
        ("leases: {leaseS: 5, heartbeatS: 4}", "$.leases", "heartbeatS must be above 0 and at most half of leaseS"),
        ("upkeep: {lookS: 0}", "$.upkeep", "lookS, collectS and keepBatchesS must be above 0"),
        ("upkeep: {webhooks: [a]}", "$.upkeep.webhooks", "webhooks stand under $.webhooks"),
        ("results: {outputExpiresS: 0}", "$.results", "outputExpiresS must be above 0, not 0"),
        ("results: {routing: both}", "$.results.routing", "Invalid enum value 'both'"),
        (f"webhooks: {{a: {{url: x, secret: {SECRET}}}}}", "$.webhooks.a", "must begin with https:// or http://"),
        ("webhooks: {a: {url: 'http://x', secret: tiny}}", "$.webhooks.a", "a webhook secret must be whsec_ and"),
        ("webhooks: {a: {url: 'http://x'}}", "$.webhooks.a", "missing required field `secret`; accepted: url, secret"),
        ("redisSource: {url: ''}", "$.redisSource", "url must be given"),
        ("blobOptions: {region: 'a${NOT_SET}'}", "$.blobOptions.region", "the environment has no variable NOT_SET"),
        ("api: {headerKeys: ['${NOT_SET}']}", "$.api.headerKeys[0]", "the environment has no variable NOT_SET"),
    ],
)
def test_a_complaint_says_where_and_what_is_accepted(text: str, path: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(text, {})
    assert refused.value.path == path
    assert said in str(refused.value)


def test_no_file_is_a_configuration() -> None:
    settings = load("", {})
    assert settings == Settings()
    assert (settings.store_url, settings.blobs_url) == (
        f"sqlite:///{Path('batchgw-data').absolute()}/batch.db",
        f"{Path('batchgw-data').absolute()}/blobs",
    )
    assert settings.default_gateway == Gateway(url="http://127.0.0.1:8081")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("batchgw*.yaml")), ids=lambda path: path.name)
def test_a_shipped_configuration_is_one_and_is_described_as_what_it_means(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    assert load(described(text), ENVIRON) == load(text, ENVIRON)


def test_variables_of_the_environment_stand_in_texts_and_are_not_shown() -> None:
    text = "gateway: {url: 'http://${HOST}:${PORT}', apiKey: '${KEY}'}\nblobs: s3://$b/${not a name}"
    settings = load(text, {"HOST": "h", "PORT": "1", "KEY": "${HOST}"})
    assert settings.default_gateway == Gateway(url="http://h:1", api_key="${HOST}")
    assert settings.blobs == "s3://$b/${not a name}"
    assert yaml.safe_load(described(text))["gateway"]["apiKey"] == "${KEY}"


def test_flags_win_over_the_file_and_leave_the_rest_of_it() -> None:
    text = "gateway: {url: 'http://a', maxRetries: 7}\ndata: x\nlisten: a:1"
    settings = load(text, {}, {"gateway": "http://b", "data": "y", "listen": "b:2"})
    assert settings.default_gateway == Gateway(url="http://b", max_retries=7)
    assert (settings.data, settings.listen, settings.ops) == ("y", "b:2", "127.0.0.1:8001")


def test_store_and_blobs_name_other_places_than_the_data_folder() -> None:
    settings = load("store: postgresql://h/d\nblobs: memory://\ndata: ''", {})
    assert (settings.store_url, settings.blobs_url) == ("postgresql://h/d", "memory://")


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("0.0.0.0:0", "0.0.0.0", 0), ("[::1]:80", "::1", 80), ("localhost:65535", "localhost", 65535)],
)
def test_an_address_is_a_host_and_a_port(text: str, host: str, port: int) -> None:
    assert address(text) == (host, port)


async def test_the_pace_is_a_gate_or_the_schedulers_headroom() -> None:
    assert isinstance(pacer_of(load("", {}).pace, "w"), GatePacer)
    pacer = pacer_of(load("pace: {headroom: {url: 'http://a', byModel: {m: 'http://b'}}}", {}).pace, "w")
    assert isinstance(pacer, HeadroomPacer)
    assert (pacer._url_of("m"), pacer._url_of("other")) == ("http://b", "http://a")


def test_check_config_prints_every_default_or_names_file_and_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("pace: {gate: {type: constant}}")
    assert main(["check-config", str(file)]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == json.loads(msgspec.json.encode(load(file.read_text(), {})))
    file.write_text("pace: {gte: 1}")
    assert main(["check-config", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"batchgw check-config: {file}: $.pace: Object contains unknown field")
    assert main(["check-config", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err == (
        f"batchgw check-config: {tmp_path}/none.yaml: cannot read the file: No such file or directory\n"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["serve", "--listen", "8000"], "argument --listen: '8000' is not HOST:PORT such as 127.0.0.1:8000"),
        (["--listne", "a:1"], "unrecognized arguments: --listne a:1"),
        (["submit"], "the following arguments are required: FILE"),
        (["submit", "f", "--header", "x"], "argument --header: 'x' is not 'NAME: VALUE'"),
        (["start"], "invalid choice: 'start'"),
    ],
)
def test_a_wrong_command_line_ends_with_what_is_accepted(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_without_a_command_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    text, add_arguments, _ = COMMANDS["serve"]
    monkeypatch.setitem(COMMANDS, "serve", (text, add_arguments, lambda args: ran.append(args.data) or 0))
    assert (main([]), main(["--data", "d"])) == (0, 0)
    assert ran == [None, "d"]
