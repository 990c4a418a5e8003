"""``llmd-sched serve | up | sim-engine | predict-server | envoy-config | check-config``: the command line.

A mistake of the user's ends in one line on standard error and exit status 1 (2 for the command line itself).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llmd_sched import __version__
from llmd_sched import config as configs
from llmd_sched.errors import ConfigError, SchedError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="llmd-sched", description="An endpoint picker for LLM inference behind Envoy."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_arguments, run) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        add_arguments(sub)
        sub.set_defaults(run=run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except (SchedError, OSError) as error:
        print(f"llmd-sched {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _boolean(text: str) -> bool:
    """As Go reads it."""
    if text.lower() not in ("true", "t", "1", "false", "f", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ("true", "t", "1")


def _switch(p: argparse.ArgumentParser, flag: str, default: bool, text: str) -> None:
    """``--flag``, ``--flag=true``, ``--flag=false``."""
    told = f"{text} ({'true' if default else 'false'})"
    p.add_argument(flag, type=_boolean, default=default, nargs="?", const=True, metavar="BOOL", help=told)


def _port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return int(text)


def _bytes(text: str) -> int:
    """A quantity of Kubernetes', with or without a B at its end, that gRPC can count to."""
    try:
        size = configs.quantity(text.removesuffix("B"))
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    if not 1 <= size < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 1 and 2147483647 bytes")
    return size


def _gone(text: str) -> str:
    raise argparse.ArgumentTypeError("no longer a flag: name metrics in engineConfigs of a core-metrics-extractor")


def _seconds(text: str) -> float:
    try:
        return configs.duration_s(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _read_config(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as e:
        raise ConfigError(f"cannot read the file: {e.strerror}", path) from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"not UTF-8 text: {e}", path) from None


def _serve_arguments(p: argparse.ArgumentParser) -> None:
    source = p.add_mutually_exclusive_group()
    source.add_argument("--config-file", help="an EndpointPickerConfig; without one, the built-in default")
    source.add_argument("--config-text", help="the same as text")
    _switch(p, "--allow-experimental-plugins", False, "accept plugin types that are Alpha")
    _kubernetes_arguments(p)
    p.add_argument("--endpoints-file", default="", help="model servers, instead of the config's discovery")
    p.add_argument("--host", default="0.0.0.0", help="address of all three ports (%(default)s)")
    p.add_argument("--grpc-port", type=_port, default=9002, help="ext_proc, access logs, health (%(default)s)")
    p.add_argument("--grpc-health-port", type=_port, default=9003, help="gRPC health (%(default)s)")
    p.add_argument("--metrics-port", type=_port, default=9090, help="Prometheus (%(default)s)")
    _tls_arguments(p)
    p.add_argument("--drain-timeout", type=_seconds, default=30.0, metavar="DURATION", help="after SIGTERM (30s)")
    p.add_argument("--refresh-metrics-interval", type=_seconds, default=0.05, metavar="DURATION",
                   help="between two reads of one endpoint's metrics, at least 50ms (50ms)")  # fmt: skip
    p.add_argument("--metrics-staleness-threshold", type=_seconds, default=2.0, metavar="DURATION",
                   help="older metrics count as unknown (2s)")  # fmt: skip
    _switch(p, "--disable-endpoint-subset-filter", False, "ignore the proxy's subset hint")
    _switch(p, "--emit-endpoint-scores", False, "add all scores to the dynamic metadata")
    p.add_argument("--max-request-body-bytes", type=_bytes, default=8 << 20, metavar="SIZE",
                   help="a longer body is answered with 413 (8Mi)")  # fmt: skip
    p.add_argument("--grpc-max-recv-msg-size", type=_bytes, default=None, metavar="SIZE",
                   help="a longer ext_proc message ends its stream (1Mi more than the longest body)")  # fmt: skip
    p.add_argument("--grpc-max-send-msg-size", type=_bytes, default=None, metavar="SIZE", help="(unlimited)")
    _switch(p, "--tracing", True, "OpenTelemetry, where OTEL_EXPORTER_OTLP_ENDPOINT is set")
    _switch(p, "--enable-grpc-stream-metrics", False, "count ext_proc streams")
    p.add_argument("--outcome-log", default="", metavar="FILE",
                   help="append one JSON line per finished request: predicted and measured")  # fmt: skip
    p.add_argument("--predictor-state-dir", default="", metavar="DIR",
                   help="keep learned models and their samples here, so that a restart is warm")  # fmt: skip
    p.add_argument("--seed", type=int, default=None, help="make random choices repeatable")
    _log_arguments(p)
    _idle_arguments(p)


def _log_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("-v", "--v", type=int, default=2, dest="verbosity", help="3 and more: debug (%(default)s)")
    p.add_argument("--zap-log-level", default="", metavar="LEVEL",
                   help="debug, info, error, panic, or a number as of -v, over which it wins")  # fmt: skip
    p.add_argument("--zap-encoder", choices=("console", "json"), default="console", help="of logs (%(default)s)")


def _idle_arguments(p: argparse.ArgumentParser) -> None:
    """Flags of the reference that change nothing here, and some that it refuses itself."""
    _switch(p, "--health-checking", False, "no effect: the ext_proc port always answers health checks too")
    p.add_argument("--refresh-prometheus-metrics-interval", type=_seconds, default=5.0, metavar="DURATION",
                   help="no effect: gauges are read when Prometheus asks")  # fmt: skip
    _switch(p, "--enable-pprof", True, "no effect: there is no pprof; py-spy profiles a running process")
    _switch(p, "--zap-devel", True, "no effect")
    for flag in ("--zap-stacktrace-level", "--zap-time-encoding"):
        p.add_argument(flag, default="", metavar="TEXT", help="no effect")
    for name in (
        "total-queued-requests",
        "total-running-requests",
        "kv-cache-usage-percentage",
        "lora-info",
        "cache-info",
    ):
        p.add_argument(f"--{name}-metric", type=_gone, default=None, help=argparse.SUPPRESS)


def _tls_arguments(p: argparse.ArgumentParser) -> None:
    _switch(p, "--secure-serving", True, "TLS on the ext_proc port, self-signed without --cert-path")
    p.add_argument("--cert-path", default="", help="folder with tls.crt and tls.key")
    _switch(p, "--enable-cert-reload", False, "use a renewed certificate without a restart")
    p.add_argument("--tls-min-version", default="", metavar="VERSION", help="VersionTLS12 or VersionTLS13")
    p.add_argument("--tls-cipher-suites", default="", metavar="LIST", help="IANA names, comma separated")
    p.add_argument("--metrics-cert-dir", default="", metavar="DIR", help="TLS on the metrics port: tls.crt, tls.key")
    p.add_argument("--metrics-client-ca-file", default="", metavar="FILE", help="... and clients must be signed by it")
    _switch(p, "--metrics-endpoint-auth", True, "in Kubernetes, ask the API server who may read metrics")
    p.add_argument("--metrics-token-file", default="", metavar="FILE", help="bearer tokens that may, one a line")
    p.add_argument("--trusted-header-source", action="append", default=[], metavar="CIDR",
                   help="clients whose priority, SLO and routing headers count; repeatable (any)")  # fmt: skip


def _kubernetes_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--pool-name", default="",
                   help="the InferencePool; with endpoints from a file or DNS, the label of its metrics")  # fmt: skip
    p.add_argument("--pool-namespace", default="", help="of the pool ($NAMESPACE, else the pod's)")
    p.add_argument("--pool-group", default="inference.networking.k8s.io", help="API group of the pool (%(default)s)")
    p.add_argument("--endpoint-selector", default="", metavar="LABELS", help="pods without an InferencePool: a=b,c=d")
    p.add_argument("--endpoint-target-ports", type=_ports, default=(), metavar="PORTS", help="... 1 to 8, with commas")
    _switch(p, "--ha-enable-leader-election", False, "of several replicas one serves")


def _ports(text: str) -> tuple[int, ...]:
    try:
        return tuple(_port(part.strip()) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of ports such as 8000,8001") from None


def _serve(args: argparse.Namespace) -> int:
    import os

    import uvloop

    from llmd_sched.extproc.tls import read_policy

    policy = read_policy(args.tls_min_version, args.tls_cipher_suites)
    policy.announce(os.environ)  # before gRPC is imported, which reads it only then

    from llmd_sched import logs
    from llmd_sched.app import ServeSettings, serve
    from llmd_sched.extproc.server import ServerSettings

    logs.set_up(logs.level(args.zap_log_level, args.verbosity), args.zap_encoder)
    text = args.config_text or configs.DEFAULT_CONFIG
    settings = ServeSettings(
        config_text=_read_config(args.config_file) if args.config_file else text,
        host=args.host,
        grpc_port=args.grpc_port,
        health_port=args.grpc_health_port,
        metrics_port=args.metrics_port,
        secure_serving=args.secure_serving,
        cert_path=args.cert_path,
        cert_reload=args.enable_cert_reload,
        tls=policy,
        metrics_cert_dir=args.metrics_cert_dir,
        metrics_client_ca_file=args.metrics_client_ca_file,
        metrics_endpoint_auth=args.metrics_endpoint_auth,
        metrics_token_file=args.metrics_token_file,
        trusted_header_sources=tuple(args.trusted_header_source) or ("any",),
        drain_timeout_s=args.drain_timeout,
        scrape_interval_s=args.refresh_metrics_interval,
        metrics_stale_after_s=args.metrics_staleness_threshold,
        allow_experimental_plugins=args.allow_experimental_plugins,
        endpoints_file=args.endpoints_file,
        tracing=args.tracing,
        outcome_log=args.outcome_log,
        predictor_state_dir=args.predictor_state_dir,
        pool_name=args.pool_name,
        pool_namespace=args.pool_namespace,
        pool_group=args.pool_group,
        endpoint_selector=args.endpoint_selector,
        endpoint_target_ports=args.endpoint_target_ports,
        leader_election=args.ha_enable_leader_election,
        seed=args.seed,
        server=ServerSettings(
            max_body_bytes=args.max_request_body_bytes,
            honour_subset=not args.disable_endpoint_subset_filter,
            emit_scores=args.emit_endpoint_scores,
            stream_metrics=args.enable_grpc_stream_metrics,
        ),
        grpc_max_receive_bytes=args.grpc_max_recv_msg_size,
        grpc_max_send_bytes=args.grpc_max_send_msg_size,
    )
    uvloop.run(serve(settings))
    return 0


def _check_config_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("file", help="an EndpointPickerConfig")
    p.add_argument("--allow-experimental-plugins", action="store_true", help="accept plugin types that are Alpha")


def _check_config(args: argparse.Namespace) -> int:
    import yaml

    from llmd_sched.catalog import resolve

    try:
        config = configs.load(_read_config(args.file))
        resolved = resolve(config, allow_experimental=args.allow_experimental_plugins)
    except ConfigError as e:
        print(f"{args.file}: {e}" if e.path != args.file else str(e), file=sys.stderr)
        return 1
    for warning in resolved.warnings:
        print(f"{args.file}: warning: {warning}", file=sys.stderr)
    print(yaml.safe_dump(resolved.as_document(), sort_keys=False, default_flow_style=False), end="")
    return 0


def _envoy_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--path", choices=("lean", "duplex"), default="lean", help="data path (%(default)s)")
    p.add_argument("--listen", default="0.0.0.0:8081", metavar="HOST:PORT", help="for clients (%(default)s)")
    p.add_argument("--scheduler", default="127.0.0.1:9002", metavar="HOST:PORT", help="ext_proc (%(default)s)")
    p.add_argument("--plain", action="store_true", help="no TLS to the scheduler (--secure-serving=false)")
    p.add_argument("--fail-open", action="store_true", help="let requests pass when the scheduler is away")
    p.add_argument("--fallback", action="append", default=[], metavar="HOST:PORT",
                   help="with --fail-open: a model server to use then; may be given several times")  # fmt: skip
    p.add_argument("--config-file", default="", metavar="FILE",
                   help="the scheduler's configuration: its plugins may read or set further headers")  # fmt: skip
    p.add_argument("--send-headers", action="store_true",
                   help="lean path: always send request headers, as InferenceModelRewrites need it")  # fmt: skip
    p.add_argument("--tell-peer", action="store_true", help="for a scheduler with --trusted-header-source")
    p.add_argument("--admin-port", type=int, default=19000, help="0: no admin interface (%(default)s)")
    p.add_argument("--max-request-body-bytes", type=int, default=8 << 20, metavar="N", help="as the scheduler's")


def _host_port(text: str, flag: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ConfigError(f"{text!r} is not HOST:PORT", flag)
    return host.strip("[]"), int(port)


def _headers_of(config_file: str) -> tuple[tuple[str, ...], bool]:
    """Request headers a configuration's plugins read, and whether the scheduler sets some, content-length included."""
    if not config_file:
        return (), False
    from llmd_sched.catalog import resolve
    from llmd_sched.plugin import Plugin
    from llmd_sched.sched.handlers import Handler
    from llmd_sched.sched.objects import StaticObjects

    resolved = resolve(configs.load(_read_config(config_file)), allow_experimental=True)
    read = {name for plugin in resolved.kind(Plugin).values() for name in plugin.headers()}
    sets = any(handler.own_headers for handler in resolved.kind(Handler).values())
    rewrites = any(objects.rewrites for objects in resolved.kind(StaticObjects).values())
    return tuple(sorted(read)), sets or rewrites


def _envoy_config(args: argparse.Namespace) -> int:
    from llmd_sched.extproc.envoy import EnvoySettings, render

    host, port = _host_port(args.listen, "--listen")
    scheduler_host, scheduler_port = _host_port(args.scheduler, "--scheduler")
    if args.fallback and not args.fail_open:
        raise ConfigError("means nothing without --fail-open", "--fallback")
    read, sends = _headers_of(args.config_file)
    settings = EnvoySettings(
        path=args.path,
        read_headers=read,
        send_headers=sends or args.send_headers,
        tell_peer=args.tell_peer,
        listen_host=host,
        listen_port=port,
        scheduler_host=scheduler_host,
        scheduler_port=scheduler_port,
        fallback=tuple(_host_port(text, "--fallback") for text in args.fallback),
        scheduler_tls=not args.plain,
        fail_open=args.fail_open,
        admin_port=args.admin_port,
        max_body_bytes=args.max_request_body_bytes,
    )
    print(render(settings), end="")
    return 0


def _engine_arguments(p: argparse.ArgumentParser) -> None:
    from llmd_sched.sim.server import add_arguments

    add_arguments(p)


def _engine(args: argparse.Namespace) -> int:
    from llmd_sched.sim.server import run

    return run(args)


def _predict_server_arguments(p: argparse.ArgumentParser) -> None:
    from llmd_sched.predict_server.cli import add_arguments

    add_arguments(p)


def _predict_server(args: argparse.Namespace) -> int:
    from llmd_sched.predict_server.cli import run

    return run(args)


def _up_arguments(p: argparse.ArgumentParser) -> None:
    from llmd_sched.local import add_arguments

    add_arguments(p)


def _up(args: argparse.Namespace) -> int:
    from llmd_sched.local import run

    return run(args)


COMMANDS: dict[
    str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]
] = {
    "serve": ("Run the endpoint picker.", _serve_arguments, _serve),
    "up": ("Engines, scheduler and a real Envoy on this machine, a workload, a report.", _up_arguments, _up),
    "sim-engine": ("One simulated vLLM server over HTTP.", _engine_arguments, _engine),
    "predict-server": (
        "llm-d's latency trainer and predictor sidecars in one.", _predict_server_arguments, _predict_server
    ),
    "envoy-config": ("Print the Envoy configuration of a data path.", _envoy_arguments, _envoy_config),
    "check-config": (
        "Print a configuration with its defaults, or what is wrong with it.", _check_config_arguments, _check_config
    ),
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
