"""``llmd-sched serve``: its flags as the reference writes them, what it refuses, its logs, and a whole process in
Kubernetes."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from llmd_sched import app, logs
from llmd_sched.__main__ import COMMANDS, main
from llmd_sched.app import ServeSettings
from llmd_sched.stack import free_ports
from tests.envoy_stream import PATIENCE_S, Stream, exchange
from tests.integration.conftest import health, running
from tests.integration.kube_api import NAMESPACE, PODS, POOLS, KubeApi, pod_object, pool_object
from tests.messages import asked, destination, request_headers

FLAGS = [
    "grpc-port", "grpc-health-port", "metrics-port", "pool-name", "pool-namespace", "pool-group",
    "endpoint-selector", "endpoint-target-ports", "config-file", "config-text", "allow-experimental-plugins",
    "secure-serving", "cert-path", "enable-cert-reload", "tls-min-version", "tls-cipher-suites", "health-checking",
    "ha-enable-leader-election", "drain-timeout", "grpc-max-recv-msg-size", "grpc-max-send-msg-size",
    "refresh-metrics-interval", "refresh-prometheus-metrics-interval", "metrics-staleness-threshold",
    "metrics-endpoint-auth", "metrics-cert-dir", "metrics-client-ca-file", "enable-pprof",
    "enable-grpc-stream-metrics", "tracing", "disable-endpoint-subset-filter", "emit-endpoint-scores", "v",
    "zap-encoder", "zap-log-level", "zap-devel", "zap-stacktrace-level", "zap-time-encoding",
]  # fmt: skip
"""The reference's."""

GONE = [
    "total-queued-requests-metric",
    "total-running-requests-metric",
    "kv-cache-usage-percentage-metric",
    "lora-info-metric",
    "cache-info-metric",
]

SWITCHES = {
    "allow-experimental-plugins": False,
    "secure-serving": True,
    "enable-cert-reload": False,
    "health-checking": False,
    "ha-enable-leader-election": False,
    "metrics-endpoint-auth": True,
    "enable-pprof": True,
    "enable-grpc-stream-metrics": False,
    "tracing": True,
    "disable-endpoint-subset-filter": False,
    "emit-endpoint-scores": False,
    "zap-devel": True,
}
MARKER = "the patient's name is Rosalind"


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[ServeSettings]:
    """Of every ``serve`` that would have run."""
    made: list[ServeSettings] = []

    async def noted(one: ServeSettings) -> None:
        made.append(one)

    monkeypatch.setattr(app, "serve", noted)
    monkeypatch.setattr(logs, "set_up", lambda *_: None)
    return made


def given(settings: list[ServeSettings], *arguments: str) -> ServeSettings:
    assert main(["serve", *arguments]) == 0
    return settings.pop()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What argparse says."""
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# --- flags ------------------------------------------------------------------------------------------------------------


def test_the_help_lists_every_flag_of_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    listed = set(re.findall(r"--([a-z0-9-]+)", capsys.readouterr().out))
    assert set(FLAGS) - listed == set()
    assert set(GONE) & listed == set()


@pytest.mark.parametrize(("flag", "default"), SWITCHES.items())
def test_a_switch_is_written_as_in_go(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str, default: bool
) -> None:
    seen: list[bool] = []

    def run(args: argparse.Namespace) -> int:
        seen.append(getattr(args, flag.replace("-", "_")))
        return 0

    monkeypatch.setitem(COMMANDS, "serve", (*COMMANDS["serve"][:2], run))
    for written in ((), (f"--{flag}",), (f"--{flag}=true",), (f"--{flag}=false",), (f"--{flag}=T",), (f"--{flag}=0",)):
        main(["serve", *written])
    assert seen == [default, True, True, False, True, False]
    assert refusal(capsys, f"--{flag}=yes") == (
        f"llmd-sched serve: error: argument --{flag}: 'yes' is not true or false"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ha-enable-leader-election=true"], {"leader_election": True}),
        (["--ha-enable-leader-election", "--ha-enable-leader-election=false"], {"leader_election": False}),
        (["--enable-cert-reload"], {"cert_reload": True}),
        (["--allow-experimental-plugins=true"], {"allow_experimental_plugins": True}),
        (["--metrics-endpoint-auth=false"], {"metrics_endpoint_auth": False}),
        (["--secure-serving=false"], {"secure_serving": False}),
        (["--tracing=false"], {"tracing": False}),
        (["--endpoint-target-ports=8000,8001"], {"endpoint_target_ports": (8000, 8001)}),
        (["--drain-timeout=1m30s"], {"drain_timeout_s": 90.0}),
        (["--refresh-metrics-interval", "1s"], {"scrape_interval_s": 1.0}),
        (["--metrics-staleness-threshold=500ms"], {"metrics_stale_after_s": 0.5}),
        (["--grpc-max-recv-msg-size=16Mi"], {"grpc_max_receive_bytes": 16 << 20}),
        (["--grpc-max-recv-msg-size=16MiB", "--grpc-max-send-msg-size=4MB"],
         {"grpc_max_receive_bytes": 16 << 20, "grpc_max_send_bytes": 4_000_000}),
        (["--pool-name=p", "--pool-namespace=n", "--pool-group=g"],
         {"pool_name": "p", "pool_namespace": "n", "pool_group": "g"}),
        (["--health-checking", "--enable-pprof=true", "--refresh-prometheus-metrics-interval=5s", "--v=3",
          "--zap-encoder=json", "--zap-log-level=debug", "--zap-devel=false", "--zap-time-encoding=rfc3339",
          "--zap-stacktrace-level=panic"], {"grpc_port": 9002, "health_port": 9003, "metrics_port": 9090}),
    ],
)  # fmt: skip
def test_flags_say_what_is_served(
    settings: list[ServeSettings], arguments: list[str], expected: dict[str, Any]
) -> None:
    made = given(settings, *arguments)
    assert {name: getattr(made, name) for name in expected} == expected


def test_the_flags_of_the_ext_proc_port_reach_it(settings: list[ServeSettings]) -> None:
    made = given(
        settings, "--disable-endpoint-subset-filter=true", "--emit-endpoint-scores=true",
        "--enable-grpc-stream-metrics=true", "--max-request-body-bytes=1Mi",
    ).server  # fmt: skip
    assert (made.honour_subset, made.emit_scores, made.stream_metrics) == (False, True, True)
    assert made.max_body_bytes == 1 << 20
    made = given(settings).server
    assert (made.honour_subset, made.emit_scores, made.stream_metrics) == (True, False, False)


@pytest.mark.parametrize("name", GONE)
def test_a_flag_that_is_gone_says_what_came_instead(capsys: pytest.CaptureFixture[str], name: str) -> None:
    said = refusal(capsys, f"--{name}=vllm:some_metric")
    assert said.startswith(f"llmd-sched serve: error: argument --{name}: ")
    assert "core-metrics-extractor" in said


@pytest.mark.parametrize("arguments", ["--no-such-flag=1", "--pool=p", "--ha-enable=true", "-vv"])
def test_a_flag_nobody_knows_is_refused_even_if_it_starts_like_another(
    capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    assert re.search("error: (unrecognized arguments|argument -v/--v: invalid int)", refusal(capsys, arguments))


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("grpc-port", "http", "is not a port from 1 to 65535"),
        ("grpc-health-port", "0", "is not a port from 1 to 65535"),
        ("metrics-port", "65536", "is not a port from 1 to 65535"),
        ("endpoint-target-ports", "8000,", "is not a list of ports such as 8000,8001"),
        ("endpoint-target-ports", "0", "is not a list of ports such as 8000,8001"),
        ("grpc-max-recv-msg-size", "big", "is not a quantity such as 1000, 1k, 500M or 10Gi, 0 or more"),
        ("grpc-max-recv-msg-size", "0", "is not between 1 and 2147483647 bytes"),
        ("grpc-max-send-msg-size", "4Gi", "is not between 1 and 2147483647 bytes"),
        ("max-request-body-bytes", "-1", "is not a quantity such as 1000, 1k, 500M or 10Gi, 0 or more"),
        ("drain-timeout", "30", "is not a duration such as 500ms, 30s, 5m or 1h30m"),
    ],
)
def test_a_bad_value_names_its_flag_and_what_is_accepted(
    capsys: pytest.CaptureFixture[str], flag: str, value: str, said: str
) -> None:
    assert refusal(capsys, f"--{flag}={value}") == f"llmd-sched serve: error: argument --{flag}: {value!r} {said}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pool-name=a", "--endpoint-selector=b=c"], "--pool-name: give either --pool-name or --endpoint-s"),
        ([], "$.dataLayer.discovery: no endpoints: "),
        (["--pool-name=a"], "KUBERNETES_SERVICE_HOST: not set, so this is no pod of a cluster"),
        (["--endpoints-file=e.yaml", "--ha-enable-leader-election"], "--ha-enable-leader-election: needs Kubernetes"),
        (["--zap-log-level=loud"], "--zap-log-level: 'loud' is none of debug, info, error, panic, nor "),
        (["--tls-min-version=VersionTLS10"], "--tls-min-version: 'VersionTLS10' cannot be served"),
        (["--config-file=no/such.yaml"], "no/such.yaml: cannot read the file: No such file or directory"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    for name in ("LLMD_KUBE_API", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    assert main(["serve", *arguments]) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("llmd-sched serve: ")]
    assert line.startswith(f"llmd-sched serve: {said}")


@pytest.mark.parametrize("url", ["https://127.0.0.1:8001", "127.0.0.1:8001", "http://127.0.0.1", "http://u@h:1"])
def test_an_api_server_named_by_hand_must_be_a_plain_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    monkeypatch.setenv("LLMD_KUBE_API", url)
    assert main(["serve", "--pool-name=p"]) == 1
    assert f"LLMD_KUBE_API: {url!r} is not http://HOST:PORT" in capsys.readouterr().err


async def test_a_message_longer_than_the_flag_allows_ends_its_stream(tmp_path: Path) -> None:
    async with running(tmp_path, grpc_max_receive_bytes=1000) as served:
        assert destination(await served.exchange(*asked())) == served.pods[0]
        with pytest.raises(aio.AioRpcError) as ended:
            await served.exchange(*asked(data=b'{"model": "m", "prompt": "%s"}' % (b"x" * 1000)))
        assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# --- logs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zap", "verbosity", "level"),
    [
        ("", 2, logging.INFO), ("", 0, logging.INFO), ("", -3, logging.INFO), ("", 3, logging.DEBUG),
        ("", 5, logging.DEBUG), ("info", 5, logging.INFO), ("debug", 2, logging.DEBUG), ("error", 5, logging.ERROR),
        ("panic", 5, logging.CRITICAL), ("2", 5, logging.INFO), ("4", 2, logging.DEBUG),
    ],
)  # fmt: skip
def test_the_log_level_is_zaps_where_given_else_the_verbosity(zap: str, verbosity: int, level: int) -> None:
    assert logs.level(zap, verbosity) == level


def test_a_json_line_has_the_keys_of_the_reference() -> None:
    record = logging.LogRecord("a.b", logging.WARNING, "f.py", 1, 'said "%s"\nand more', ("x",), None)
    record.created = 1_700_000_000.25
    line = logs.JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line) == {
        "level": "warn", "ts": "2023-11-14T22:13:20.250Z", "logger": "a.b", "msg": 'said "x"\nand more',
    }  # fmt: skip
    try:
        raise ValueError("no")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert "ValueError: no" in json.loads(logs.JsonLines().format(record))["stacktrace"]


# --- a whole process --------------------------------------------------------------------------------------------------


class Serve:
    """``llmd-sched serve`` in Kubernetes, as a process."""

    def __init__(self, process: asyncio.subprocess.Process, ports: list[int]) -> None:
        self.process = process
        self.grpc_port, self.health_port, self.metrics_port = ports

    async def until(self, wanted: str) -> None:
        while self.process.returncode is None:
            try:
                if await health(self.health_port) == wanted:
                    return
            except aio.AioRpcError:
                pass
            await asyncio.sleep(0.05)
        raise AssertionError(await self.output())

    async def output(self) -> str:
        """Everything it said, once it has ended."""
        assert self.process.stdout is not None
        told = (await self.process.stdout.read()).decode()
        await self.process.wait()
        return told


@asynccontextmanager
async def serving(api: KubeApi, *arguments: str) -> AsyncIterator[Serve]:
    ports = free_ports(3)
    names = ("grpc-port", "grpc-health-port", "metrics-port")
    flags = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "llmd_sched", "serve", "--host=127.0.0.1", "--pool-name=pool", "--secure-serving=false",
        *flags, *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "LLMD_KUBE_API": f"http://127.0.0.1:{api.port}", "NAMESPACE": NAMESPACE},
    )  # fmt: skip
    try:
        async with asyncio.timeout(6 * PATIENCE_S):
            yield Serve(process, ports)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@asynccontextmanager
async def pool() -> AsyncIterator[KubeApi]:
    api = KubeApi()
    await api.start()
    try:
        await api.put(POOLS, pool_object())
        await api.put(PODS, pod_object("a", "127.0.0.2"))
        yield api
    finally:
        await api.stop()


async def test_a_process_serves_a_pool_and_its_log_holds_nothing_of_the_requests() -> None:
    flags = ("-v=5", "--zap-encoder=json", "--drain-timeout=0s", "--enable-grpc-stream-metrics")
    async with pool() as api, serving(api, *flags) as serve:
        await serve.until("SERVING")
        data = json.dumps({"model": "m", "prompt": MARKER, "user": MARKER}).encode()
        broken = b'{"model": "m", "prompt": "' + MARKER.encode()
        async with aio.insecure_channel(f"127.0.0.1:{serve.grpc_port}") as channel:
            assert destination(await exchange(channel, *asked(data=data, x_secret=MARKER))) == "127.0.0.2:8000"
            await exchange(channel, *asked(data=broken))
        serve.process.send_signal(signal.SIGTERM)
        told = await serve.output()
        assert serve.process.returncode == 0, told
    lines = [json.loads(line) for line in told.splitlines()]
    assert {"debug", "info"} <= {line["level"] for line in lines}
    assert any(line["msg"].startswith("serving with ") for line in lines)
    assert "Rosalind" not in told


async def test_a_second_signal_ends_the_draining() -> None:
    async with pool() as api, serving(api, "--drain-timeout=1h", "--ha-enable-leader-election=true") as serve:
        await serve.until("SERVING")
        async with aio.insecure_channel(f"127.0.0.1:{serve.grpc_port}") as channel:
            stream = Stream(channel)
            await stream.ask(*asked(), count=2)
            serve.process.send_signal(signal.SIGTERM)
            await serve.until("NOT_SERVING")
            assert destination(await exchange(channel, request_headers(end=True, path="/v1/models")))
            serve.process.send_signal(signal.SIGTERM)
            told = await serve.output()
        assert serve.process.returncode == 0, told
        assert "Traceback" not in told


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--metrics-token-file", "--metrics-token-file: no/such/place: cannot read the token file: No such file"),
        ("--metrics-cert-dir", "no/such/place/tls.key: --metrics-cert-dir needs tls.key and tls.crt: No such file"),
        ("--metrics-client-ca-file", "--metrics-cert-dir: TLS here needs a folder with tls.key and tls.crt"),
        ("--cert-path", "no/such/place/tls.key: --cert-path needs tls.key and tls.crt: No such file"),
    ],
)
async def test_a_file_that_cannot_be_read_is_named(flag: str, said: str) -> None:
    async with pool() as api, serving(api, "--secure-serving", f"{flag}=no/such/place") as serve:
        told = await serve.output()
        assert serve.process.returncode == 1, told
    (line,) = [x for x in told.splitlines() if x.startswith("llmd-sched serve: ")]
    assert line.startswith(f"llmd-sched serve: {said}")
    assert "Traceback" not in told
