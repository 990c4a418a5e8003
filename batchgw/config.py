"""Settings: one YAML file with camel-case keys, or none at all. Every complaint says where and what is accepted.

Within texts ``${NAME}`` stands for that variable of the environment, which is where secrets come from; nothing else is
read there.
"""

from __future__ import annotations

import importlib.util
import math
import re
import ssl
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec
import yaml

from batchgw.api.settings import ApiSettings
from batchgw.blobs import BlobOptions, Blobs
from batchgw.client.gateway import Gateway
from batchgw.errors import ConfigError
from batchgw.gates import gate
from batchgw.gates.base import POLL_S, Tools
from batchgw.tracing import TracingSettings
from batchgw.worker.finalize import FinalizerSettings
from batchgw.worker.headroom_pacer import STALE_AFTER_S
from batchgw.worker.leases import HEARTBEAT_S, LEASE_S
from batchgw.worker.redis_source import RedisSettings
from batchgw.worker.upkeep import UpkeepSettings
from batchgw.worker.webhooks import Webhook
from batchgw.worker.worker import WorkerSettings

T = TypeVar("T")

MAX_CONFIG_BYTES = 1 << 20
MAX_DEPTH = 20
STORES = ("postgresql://", "postgres://", "sqlite:///")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Address(NamedTuple):
    host: str
    port: int


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Base: unknown fields are refused."""


class Tls(_Strict, frozen=True):
    """Of the API: PEM files."""

    cert_file: str
    key_file: str


class LeaseSettings(_Strict, frozen=True):
    """Work of a worker that died is another's after ``lease_s``; heartbeats renew it."""

    lease_s: float = LEASE_S
    heartbeat_s: float = HEARTBEAT_S

    def check(self) -> None:
        if not 0 < self.heartbeat_s <= self.lease_s / 2:
            raise ValueError("heartbeatS must be above 0 and at most half of leaseS")


class Headroom(_Strict, frozen=True):
    """As many lines as the scheduler says that interactive requests do not feel (protect or harvest is its setting).

    ``url`` is that of the scheduler's metrics port, ``by_model`` those of models it does not serve, ``token`` what the
    port asks for. ``most`` lines run at once whatever it says; unheard for ``stale_after_s``, nothing new starts.
    """

    url: str
    by_model: dict[str, str] = {}
    token: str = ""
    most: int = 5000
    stale_after_s: float = STALE_AFTER_S

    def check(self) -> None:
        for url in (self.url, *self.by_model.values()):
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"urls must begin with http:// or https://, not {url!r}")
        if self.most < 1 or self.stale_after_s <= 0:
            raise ValueError("most must be at least 1, staleAfterS above 0")


class Pace(_Strict, frozen=True):
    """Who says how many lines run: a gate by its name (``{type: aimd}`` without a word), or the scheduler's headroom.

    Beside a gate ``per_model`` and ``total`` lines run at most in one process; it reads its source every ``poll_s``.
    """

    gate: dict[str, Any] | None = None
    headroom: Headroom | None = None
    per_model: int = 10
    total: int = 100
    prometheus_url: str = ""
    redis_url: str = ""
    poll_s: float = POLL_S

    @property
    def gate_or_default(self) -> dict[str, Any]:
        return self.gate or {"type": "aimd"}

    @property
    def tools(self) -> Tools:
        return Tools(prometheus_url=self.prometheus_url, redis_url=self.redis_url, poll_s=self.poll_s)

    def check(self) -> None:
        if self.per_model < 1 or self.total < 1 or self.poll_s <= 0:
            raise ValueError("perModel and total must be at least 1, pollS above 0")
        if self.gate and self.headroom:
            raise ValueError("either gate or headroom, not both")


class Settings(_Strict, frozen=True):
    """``data``: the folder of the database and the files where ``store`` and ``blobs`` name no others."""

    listen: str = "127.0.0.1:8000"
    ops: str = "127.0.0.1:8001"
    """Health, readiness and metrics of ``serve`` and ``api``; ``worker_ops`` those of ``worker``."""
    worker_ops: str = "127.0.0.1:8002"
    tls: Tls | None = None
    data: str = "batchgw-data"
    store: str = ""
    store_connections: int = 10
    blobs: str = ""
    blob_options: BlobOptions = BlobOptions()
    gateway: str | Gateway = "http://127.0.0.1:8081"
    """Where lines go: the address of Envoy, of any other router, or of one engine."""
    gateways: dict[str, Gateway] = {}
    """Of single models, by name."""
    api: ApiSettings = ApiSettings()
    pace: Pace = Pace()
    worker: WorkerSettings = WorkerSettings()
    leases: LeaseSettings = LeaseSettings()
    upkeep: UpkeepSettings = UpkeepSettings()
    results: FinalizerSettings = FinalizerSettings()
    webhooks: dict[str, Webhook] = {}
    """By name; each is told of the end of every batch."""
    redis_source: RedisSettings | None = None
    tracing: TracingSettings | None = None
    log: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def store_url(self) -> str:
        return self.store or f"sqlite:///{Path(self.data).absolute() / 'batch.db'}"

    @property
    def blobs_url(self) -> str:
        return self.blobs or str(Path(self.data).absolute() / "blobs")

    @property
    def default_gateway(self) -> Gateway:
        return Gateway(url=self.gateway) if isinstance(self.gateway, str) else self.gateway

    def make_folder(self) -> None:
        """The one of the database that needs no server. Raises OSError."""
        if not self.store:
            Path(self.data).mkdir(parents=True, exist_ok=True)

    def check(self) -> None:
        """Raises ConfigError for what cannot be, whatever runs."""
        for name in ("listen", "ops", "worker_ops"):
            _checked(f"$.{_encoded(name)}", partial(address, getattr(self, name)))
        self._check_storage()
        self._check_gateways()
        for name in ("api", "pace", "worker", "leases", "upkeep", "results"):
            _checked(f"$.{name}", getattr(self, name).check)
        if self.pace.headroom is not None:
            _checked("$.pace.headroom", self.pace.headroom.check)
        gate(self.pace.gate_or_default, self.pace.tools, "$.pace.gate")
        for name, hook in self.webhooks.items():
            _checked(f"$.webhooks.{name}", hook.check)
        for name in ("upkeep", "results"):
            if getattr(self, name).webhooks:
                raise ConfigError("webhooks stand under $.webhooks, and all of them are told", f"$.{name}.webhooks")
        if self.tracing is not None:
            _checked("$.tracing", self.tracing.check)
        if self.redis_source is not None:
            _checked("$.redisSource", self.redis_source.check)
            if importlib.util.find_spec("redis") is None:
                raise ConfigError("needs the package redis: install the extra redis", "$.redisSource")

    def _check_storage(self) -> None:
        if self.store and not self.store.startswith(STORES):
            raise ConfigError("accepted are postgresql://user:password@host/database and sqlite:///a/file", "$.store")
        if self.store_connections < 2:
            raise ConfigError(f"must be at least 2, not {self.store_connections}", "$.storeConnections")
        if "://" in self.blobs and not self.blobs.startswith("file:"):
            _checked("$.blobs", lambda: Blobs.open(self.blobs, self.blob_options))
        if not self.data and not (self.store and self.blobs):
            raise ConfigError("must name a folder, unless store and blobs name places of their own", "$.data")

    def _check_gateways(self) -> None:
        named = {f"$.gateways.{model}": one for model, one in self.gateways.items()}
        for path, one in {"$.gateway": self.default_gateway, **named}.items():
            _checked(path, one.check)
            try:
                one.tls()
            except (OSError, ssl.SSLError) as e:
                raise ConfigError(f"its certificates cannot be used: {e}", path) from None


def load(text: str, environ: Mapping[str, str], overrides: Mapping[str, str] | None = None) -> Settings:
    """Checked settings; ``overrides`` (``listen``, ``ops``, ``gateway``, ``data``) win. Raises ConfigError."""
    settings = convert(expand(_document(text), environ))
    changes: dict[str, Any] = dict(overrides or {})
    if "gateway" in changes and isinstance(settings.gateway, Gateway):
        changes["gateway"] = msgspec.structs.replace(settings.gateway, url=changes["gateway"])
    settings = msgspec.structs.replace(settings, **changes)
    settings.check()
    return settings


def described(text: str) -> str:
    """The same settings as YAML with every default, variables of the environment still by their names."""
    settings = convert(_document(text))
    return yaml.safe_dump(msgspec.json.decode(msgspec.json.encode(settings)), sort_keys=False)


def _document(text: str) -> Any:
    """An empty file is one without settings."""
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"the file is longer than {MAX_CONFIG_BYTES} characters")
    try:
        document = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"not valid YAML: {getattr(e, 'problem', None) or e}{where}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise ConfigError(f"not valid YAML: {type(e).__name__}: {e}") from None  # its own constructors raise these
    return {} if document is None else document


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def expand(value: Any, environ: Mapping[str, str], path: str = "$", depth: int = 0) -> Any:
    """``value`` with all ``${NAME}`` in its texts replaced. Raises ConfigError for a name that is not set, and for what
    YAML can write but nobody can mean."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"nested more than {MAX_DEPTH} deep", "$")
    if isinstance(value, dict):
        return {key: expand(one, environ, f"{path}.{key}", depth + 1) for key, one in value.items()}
    if isinstance(value, list):
        return [expand(one, environ, f"{path}[{i}]", depth + 1) for i, one in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"must be a finite number, not {value}", path)
    return _text(value, environ, path) if isinstance(value, str) else value


def _text(value: str, environ: Mapping[str, str], path: str) -> str:
    if not value.isascii() and any("\ud800" <= one <= "\udfff" for one in value):
        raise ConfigError("not usable text: it has half a surrogate pair", path)
    for name in _VARIABLE.findall(value):
        if name not in environ:
            raise ConfigError(f"the environment has no variable {name}", path)
    return _VARIABLE.sub(lambda found: environ[found[1]], value)


def convert(document: Any) -> Settings:
    """Raises ConfigError with the path and, for an unknown field, what is accepted."""
    if not isinstance(document, dict):
        raise ConfigError(f"expected a mapping such as 'gateway: http://host:port', got {type(document).__name__}")
    for name, kind in (("gateways", Gateway), ("webhooks", Webhook)):
        named = document.get(name)
        for key, one in named.items() if isinstance(named, dict) else ():
            _convert(one, kind, f"$.{name}.{key}")  # here, for the path to have the name
    return _convert(document, Settings)


def _convert(value: Any, kind: type[T], path: str = "$") -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as e:
        message, _, at = str(e).partition(" - at `$")
        at = at.rstrip("`")
        raise ConfigError(message + _accepted(message, kind, at), path + at) from None


def _accepted(message: str, kind: Any, at: str) -> str:
    """For an unknown or a missing field: the fields of the struct it belongs to."""
    if "field" not in message:
        return ""
    for name in re.findall(r"\.(\w+)", at):
        annotation = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}[name]
        inner = (annotation, *getattr(annotation, "__args__", ()))
        kind = next(one for one in inner if isinstance(one, type) and issubclass(one, msgspec.Struct))
    return f"; accepted: {', '.join(kind.__struct_encode_fields__)}"


def address(text: str) -> Address:
    """``HOST:PORT``, port 0 being any that is free. Raises ValueError."""
    host, _, port = text.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT such as 127.0.0.1:8000")
    return Address(host.removeprefix("[").removesuffix("]"), int(port))


def _encoded(name: str) -> str:
    return next(field.encode_name for field in msgspec.structs.fields(Settings) if field.name == name)


def _checked(path: str, check: Callable[[], object]) -> None:
    try:
        check()
    except ValueError as e:
        raise ConfigError(str(e), path) from None
