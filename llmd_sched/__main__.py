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
        sub = commands.add_parser(name, help=text, description=text)
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
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() == "true"


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
    p.add_argument("--allow-experimental-plugins", action="store_true", help="accept plugin types that are Alpha")
    _kubernetes_arguments(p)
    p.add_argument("--endpoints-file", default="", help="model servers, instead of the config's discovery")
    p.add_argument("--host", default="0.0.0.0", help="address of all three ports (%(default)s)")
    p.add_argument("--grpc-port", type=int, default=9002, help="ext_proc and access logs (%(default)s)")
    p.add_argument("--grpc-health-port", type=int, default=9003, help="gRPC health (%(default)s)")
    p.add_argument("--metrics-port", type=int, default=9090, help="Prometheus (%(default)s)")
    _tls_arguments(p)
    p.add_argument("--drain-timeout", type=_seconds, default=30.0, metavar="DURATION", help="after SIGTERM (30s)")
    p.add_argument("--refresh-metrics-interval", type=_seconds, default=0.05, metavar="DURATION",
                   help="between two reads of one endpoint's metrics, at least 50ms (50ms)")  # fmt: skip
    p.add_argument("--metrics-staleness-threshold", type=_seconds, default=2.0, metavar="DURATION",
                   help="older metrics count as unknown (2s)")  # fmt: skip
    p.add_argument("--disable-endpoint-subset-filter", action="store_true", help="ignore the proxy's subset hint")
    p.add_argument("--emit-endpoint-scores", action="store_true", help="add all scores to the dynamic metadata")
    p.add_argument("--max-request-body-bytes", type=int, default=8 << 20, metavar="N",
                   help="a longer body is answered with 413 (%(default)s)")  # fmt: skip
    p.add_argument("--tracing", type=_boolean, default=True, nargs="?", const=True, metavar="BOOL",
                   help="OpenTelemetry, where OTEL_EXPORTER_OTLP_ENDPOINT is set (true)")  # fmt: skip
    p.add_argument("--enable-grpc-stream-metrics", action="store_true", help="count ext_proc streams")
    p.add_argument("--outcome-log", default="", metavar="FILE",
                   help="append one JSON line per finished request: predicted and measured")  # fmt: skip
    p.add_argument("--predictor-state-dir", default="", metavar="DIR",
                   help="keep learned models and their samples here, so that a restart is warm")  # fmt: skip
    p.add_argument("--seed", type=int, default=None, help="make random choices repeatable")
    p.add_argument("-v", "--v", type=int, default=2, dest="verbosity", help="3 and more: debug (%(default)s)")


def _tls_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--secure-serving", type=_boolean, default=True, nargs="?", const=True, metavar="BOOL",
                   help="TLS on the ext_proc port, self-signed without --cert-path (true)")  # fmt: skip
    p.add_argument("--cert-path", default="", help="folder with tls.crt and tls.key")
    p.add_argument("--enable-cert-reload", action="store_true", help="use a renewed certificate without a restart")
    p.add_argument("--tls-min-version", default="", metavar="VERSION", help="VersionTLS12 or VersionTLS13")
    p.add_argument("--tls-cipher-suites", default="", metavar="LIST", help="IANA names, comma separated")
    p.add_argument("--metrics-cert-dir", default="", metavar="DIR", help="TLS on the metrics port: tls.crt, tls.key")
    p.add_argument("--metrics-client-ca-file", default="", metavar="FILE", help="... and clients must be signed by it")
    p.add_argument("--metrics-endpoint-auth", type=_boolean, default=True, nargs="?", const=True, metavar="BOOL",
                   help="in Kubernetes, ask the API server who may read metrics (true)")  # fmt: skip
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
    p.add_argument("--ha-enable-leader-election", action="store_true", help="of several replicas one serves")


def _ports(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of ports such as 8000,8001") from None


def _serve(args: argparse.Namespace) -> int:
    import os

    import uvloop

    from llmd_sched.extproc.tls import read_policy

    policy = read_policy(args.tls_min_version, args.tls_cipher_suites)
    policy.announce(os.environ)  # before gRPC is imported, which reads it only then

    from llmd_sched.app import ServeSettings, serve
    from llmd_sched.extproc.server import ServerSettings
    from llmd_sched.telemetry import set_up_logging

    set_up_logging(args.verbosity)
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
    p.add_argument("--tell-peer", action="store_true", help="for a scheduler with --trusted-header-source")
    p.add_argument("--admin-port", type=int, default=19000, help="0: no admin interface (%(default)s)")
    p.add_argument("--max-request-body-bytes", type=int, default=8 << 20, metavar="N", help="as the scheduler's")


def _host_port(text: str, flag: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ConfigError(f"{text!r} is not HOST:PORT", flag)
    return host.strip("[]"), int(port)


def _headers_of(config_file: str) -> tuple[tuple[str, ...], bool]:
    """Request headers a configuration's plugins read, and whether any of them sets some."""
    if not config_file:
        return (), False
    from llmd_sched.catalog import resolve
    from llmd_sched.plugin import Plugin
    from llmd_sched.sched.handlers import Handler

    resolved = resolve(configs.load(_read_config(config_file)), allow_experimental=True)
    read = {name for plugin in resolved.kind(Plugin).values() for name in plugin.headers()}
    return tuple(sorted(read)), any(handler.own_headers for handler in resolved.kind(Handler).values())


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
        send_headers=sends,
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
