"""The command line of ``serve``."""

from __future__ import annotations

import msgspec

from llmd_sched import config as configs
from llmd_sched.extproc.server import ServerSettings
from llmd_sched.extproc.tls import TlsPolicy

MIN_SCRAPE_INTERVAL_S = 0.05
MAX_GRPC_BYTES = (1 << 31) - 1
"""gRPC counts the bytes of a message with 32 bits."""


class ServeSettings(msgspec.Struct, frozen=True, kw_only=True):
    config_text: str = configs.DEFAULT_CONFIG
    allow_experimental_plugins: bool = False
    host: str = "0.0.0.0"
    grpc_port: int = 9002
    health_port: int = 9003
    metrics_port: int = 9090
    drain_timeout_s: float = 30.0

    secure_serving: bool = True
    cert_path: str = ""
    cert_reload: bool = False
    tls: TlsPolicy = TlsPolicy()
    metrics_cert_dir: str = ""
    metrics_client_ca_file: str = ""
    metrics_endpoint_auth: bool = True
    """In Kubernetes, ask the API server who may read metrics."""
    metrics_token_file: str = ""
    """Bearer tokens that may read metrics, one a line; wins over the API server."""
    trusted_header_sources: tuple[str, ...] = ("any",)

    scrape_interval_s: float = MIN_SCRAPE_INTERVAL_S
    metrics_stale_after_s: float = 2.0

    endpoints_file: str = ""
    """Used instead of ``dataLayer.discovery``."""
    pool_name: str = ""
    """An InferencePool; with endpoints from elsewhere just the label of the pool's metrics."""
    pool_namespace: str = ""
    pool_group: str = "inference.networking.k8s.io"
    endpoint_selector: str = ""
    endpoint_target_ports: tuple[int, ...] = ()
    leader_election: bool = False

    tracing: bool = True
    """Where the standard OTEL_ variables name an endpoint to export to."""
    outcome_log: str = ""
    predictor_state_dir: str = ""
    """Where the predictors' models and windows outlive the process; empty = nowhere."""
    seed: int | None = None
    server: ServerSettings = ServerSettings()
    grpc_max_receive_bytes: int | None = None
    """Of one message to the ext_proc port; None = what a body of ``server.max_body_bytes`` needs."""
    grpc_max_send_bytes: int | None = None

    @property
    def grpc_options(self) -> dict[str, int]:
        """Of the ext_proc port."""
        options = dict(self.server.grpc_options)
        most = options["grpc.max_receive_message_length"]
        options["grpc.max_receive_message_length"] = min(self.grpc_max_receive_bytes or most, MAX_GRPC_BYTES)
        if self.grpc_max_send_bytes is not None:
            options["grpc.max_send_message_length"] = self.grpc_max_send_bytes
        return options
