"""The command line: exit statuses, and errors that say where."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from llmd_sched import __version__
from llmd_sched.__main__ import main
from llmd_sched.config import DEFAULT_CONFIG
from llmd_sched.stack import free_ports

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 30.0


def write(folder: Path, text: str) -> str:
    file = folder / "config.yaml"
    file.write_text(text)
    return str(file)


# --- check-config -----------------------------------------------------------------------------------------------------


def test_check_config_prints_the_configuration_with_its_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-config", write(tmp_path, DEFAULT_CONFIG)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    document = yaml.safe_load(printed.out)
    assert document["kind"] == "EndpointPickerConfig"
    types = [plugin["type"] for plugin in document["plugins"]]
    assert {"queue-scorer", "approx-prefix-cache-producer", "max-score-picker", "openai-parser"} <= set(types)


def test_what_check_config_prints_is_a_configuration_that_means_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in (DEFAULT_CONFIG, (ROOT / "llmd_sched" / "local.yaml").read_text()):
        assert main(["check-config", write(tmp_path, text)]) == 0
        first = capsys.readouterr().out
        assert main(["check-config", write(tmp_path, first)]) == 0
        assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(first)


@pytest.mark.parametrize(
    ("text", "path", "said"),
    [
        (
            HEAD + "plugins: [{type: queue-scorre}]\n",
            "$.plugins[0].type",
            "unknown plugin type 'queue-scorre'; known: ",
        ),
        (
            HEAD + "plugins: [{type: queue-scorer, parameters: {x: 1}}]\n",
            "$.plugins[0].parameters",
            "unknown field `x`",
        ),
        (
            HEAD + "plugins: [{type: max-score-picker, parameters: {maxNumOfEndpoints: no}}]\n",
            "$.plugins[0].parameters.maxNumOfEndpoints",
            "Expected `int`",
        ),
        (
            HEAD + "schedulingProfiles: [{name: a, plugins: [{pluginRef: nobody}]}]\n",
            "$.schedulingProfiles[0].plugins[0].pluginRef",
            "undefined plugin 'nobody'",
        ),
        (HEAD + "featureGates: [flyingCars]\n", "$.featureGates[0]", "unknown feature gate 'flyingCars'; known: "),
        (HEAD + "flowControl: {ttl: 5s}\n", "$.flowControl", "unknown field `ttl`"),
        (HEAD.replace("EndpointPickerConfig", "Deployment"), "$.kind", "unknown kind 'Deployment'"),
        (HEAD + "plugins: [}\n", "$", "not valid YAML"),
        ("- a\n- b\n", "$", "expected a mapping"),
        ("", "$", "expected a mapping"),
    ],
)
def test_a_mistake_in_a_configuration_is_told_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, path: str, said: str
) -> None:
    file = write(tmp_path, text)
    assert main(["check-config", file]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"{file}: {path}: ")
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "missing.yaml")
    assert main(["check-config", missing]) == 1
    assert capsys.readouterr().err == f"{missing}: cannot read the file: No such file or directory\n"
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert main(["check-config", str(tmp_path / "bytes.yaml")]) == 1
    assert "not UTF-8 text" in capsys.readouterr().err


# --- envoy-config -----------------------------------------------------------------------------------------------------


def envoy_config(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["envoy-config", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def addresses(document: dict) -> list[tuple[str, int]]:
    """Listener, then scheduler."""
    resources = document["static_resources"]
    scheduler = resources["clusters"][1]["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    pairs = [resources["listeners"][0]["address"], scheduler["address"]]
    return [(a["socket_address"]["address"], a["socket_address"]["port_value"]) for a in pairs]


def test_envoy_config_prints_the_lean_path_with_tls_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    document = envoy_config(capsys)
    assert addresses(document) == [("0.0.0.0", 8081), ("127.0.0.1", 9002)]
    assert "transport_socket" in document["static_resources"]["clusters"][1]
    assert '"request_body_mode": "BUFFERED"' in json.dumps(document)
    assert document["admin"]["address"]["socket_address"]["port_value"] == 19000


def test_envoy_config_takes_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    document = envoy_config(
        capsys, "--path", "duplex", "--listen", "[::]:80", "--scheduler", "[fd00::7]:9002", "--plain", "--fail-open",
        "--admin-port", "0", "--max-request-body-bytes", "1000",
    )  # fmt: skip
    assert addresses(document) == [("::", 80), ("fd00::7", 9002)]
    assert "transport_socket" not in document["static_resources"]["clusters"][1]
    assert '"failure_mode_allow": true' in json.dumps(document)
    assert "admin" not in document


@pytest.mark.parametrize("flag", ["--listen", "--scheduler"])
@pytest.mark.parametrize("value", ["localhost", "localhost:", "localhost:http", ":9002", "localhost:99999", "h:\u00b2"])
def test_an_address_must_be_host_and_port(capsys: pytest.CaptureFixture[str], flag: str, value: str) -> None:
    assert main(["envoy-config", flag, value]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"llmd-sched envoy-config: {flag}: {value!r} is not HOST:PORT\n"


# --- the command line itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["serve", "--no-such-flag"],
        ["serve", "--config-file", "a", "--config-text", "b"],
        ["serve", "--drain-timeout", "soon"],
        ["serve", "--secure-serving=perhaps"],
        ["envoy-config", "--path", "sideways"],
        ["check-config"],
    ],
)
def test_a_mistake_in_the_command_line_exits_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: llmd-sched" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == __version__


# --- serve ------------------------------------------------------------------------------------------------------------


class Serve:
    """``llmd-sched serve`` with one endpoint nobody listens at."""

    def __init__(self, folder: Path, *arguments: str, **ports: int) -> None:
        grpc, health, metrics, engine = free_ports(4)
        self.ports = {"grpc-port": grpc, "grpc-health-port": health, "metrics-port": metrics, **ports}
        endpoints = folder / "endpoints.yaml"
        endpoints.write_text(f"endpoints: [{{name: e, address: 127.0.0.1, port: {engine}}}]\n")
        flags = [f"--{name}={port}" for name, port in self.ports.items()]
        if "--endpoints-file" not in arguments:
            flags += ["--endpoints-file", str(endpoints)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmd_sched", "serve", "--host", "127.0.0.1", *flags, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self) -> tuple[int, str]:
        """Status and output, once it has ended by itself."""
        try:
            text, _ = self.process.communicate(timeout=PATIENCE_S)
            return self.process.returncode, text
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.communicate()

    def metrics(self) -> str:
        """The metrics page, once it is there."""
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, self.end()
            try:
                url = f"http://127.0.0.1:{self.ports['metrics-port']}/metrics"
                with urllib.request.urlopen(url, timeout=2) as reply:
                    return reply.read().decode()
            except OSError:
                time.sleep(0.05)
        self.process.kill()
        raise AssertionError(self.end())


@pytest.mark.parametrize("flag", ["grpc-port", "grpc-health-port", "metrics-port"])
def test_a_port_in_use_is_named_in_one_line(tmp_path: Path, flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, text = Serve(tmp_path, **{flag: port}).end()
    assert status == 1
    (line,) = [line for line in text.splitlines() if line.startswith("llmd-sched serve: ")]
    assert str(port) in line
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config-text", HEAD + "plugins: [{type: nonsense}]"], "$.plugins[0].type: unknown plugin type 'nonsense'"),
        (["--config-file", "no/such/file.yaml"], "no/such/file.yaml: cannot read the file: No such file"),
        (["--endpoints-file", "no/such/endpoints.yaml"], "no/such/endpoints.yaml"),
        (["--endpoints-file", ""], "$.dataLayer.discovery: no endpoints"),
        (["--cert-path", "no/such/folder"], "no/such/folder/tls.key: --cert-path needs tls.key and tls.crt"),
        (["--outcome-log", "no/such/folder/log"], "cannot write the outcome log: No such file or directory"),
    ],
)
def test_serve_refuses_to_start_with_one_line_that_says_why(tmp_path: Path, arguments: list[str], said: str) -> None:
    status, text = Serve(tmp_path, *arguments).end()
    assert status == 1
    (line,) = [line for line in text.splitlines() if line.startswith("llmd-sched serve: ")]
    assert said in line
    assert "Traceback" not in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_stops_cleanly_when_told(tmp_path: Path, number: signal.Signals) -> None:
    serve = Serve(tmp_path)
    page = serve.metrics()
    assert "llm_d_epp_open_requests 0.0" in page
    os.kill(serve.process.pid, number)
    status, text = serve.end()
    assert status == 0, text
    assert "Traceback" not in text
