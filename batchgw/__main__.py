"""``batchgw serve | api | worker | gc | submit | status | check-config | add-key | revoke-key``.

A mistake of the user's ends in one line on standard error: exit status 2 for the command line and the configuration,
1 for anything that came up later.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from batchgw.errors import ConfigError, GatewayError

BASE_URL = "http://127.0.0.1:8000"
STARTING = ("-h", "--help", "--version")
"""Flags of the program; any other at the front belongs to ``serve``."""


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or (given[0].startswith("-") and given[0] not in STARTING):
        given.insert(0, "serve")
    args = _parser().parse_args(given)
    try:
        return int(args.run(args) or 0)
    except ConfigError as error:
        source = f"{args.config}: " if getattr(args, "config", "") and error.path.startswith("$") else ""
        print(f"batchgw {args.command}: {source}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        print(f"batchgw {args.command}: {error}; pip install 'llmd-sched[batch]'", file=sys.stderr)
        return 1
    except Exception as error:
        if not isinstance(error, (GatewayError, OSError, *_expected())):
            raise
        first = str(error).partition("\n")[0]  # drivers go on about it
        print(f"batchgw {args.command}: {first}", file=sys.stderr)
        return 1


def _expected() -> tuple[type[Exception], ...]:
    """Loaded by now, whichever command ran."""
    from batchgw.blobs import BlobError
    from batchgw.store.base import StoreError
    from batchgw.terminal import ApiError

    return BlobError, StoreError, ApiError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="batchgw", description="The OpenAI batch gateway in front of a router or engine; `serve` is the default."
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_arguments, run) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        add_arguments(sub)
        sub.set_defaults(run=run)
    return parser


def _version() -> str:
    try:
        return version("llmd-sched")
    except PackageNotFoundError:
        return "0"


# Settings


def _settings_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--config", default="", metavar="FILE", help="YAML; everything has a default (none)")
    p.add_argument("--data", default=None, metavar="DIR", help="database and files (batchgw-data)")


def _running_arguments(p: argparse.ArgumentParser) -> None:
    _settings_arguments(p)
    p.add_argument("--listen", type=_address, default=None, metavar="HOST:PORT", help="the API (127.0.0.1:8000)")
    p.add_argument("--ops", type=_address, default=None, metavar="HOST:PORT",
                   help="health, readiness, metrics (127.0.0.1:8001; worker: 8002)")  # fmt: skip
    p.add_argument("--gateway", default=None, metavar="URL", help="where lines go (http://127.0.0.1:8081)")


def _address(text: str) -> str:
    from batchgw.config import address

    try:
        address(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    return text


def _settings(args: argparse.Namespace) -> Any:
    from batchgw.config import load

    ops = "worker_ops" if args.command == "worker" else "ops"
    flags = {"data": "data", "listen": "listen", "ops": ops, "gateway": "gateway"}
    given: Mapping[str, Any] = {name: getattr(args, flag, None) for flag, name in flags.items()}
    overrides = {name: value for name, value in given.items() if value is not None}
    return load(_read(args.config) if args.config else "", os.environ, overrides)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as e:
        raise ConfigError(f"cannot read the file: {e.strerror}", path) from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"not UTF-8 text: {e}", path) from None


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """On uvloop where there is one; of several things that went wrong at once, the first."""
    loop: Any = None
    with contextlib.suppress(ImportError):
        from uvloop import new_event_loop as loop
    try:
        with asyncio.Runner(loop_factory=loop) as runner:
            return runner.run(work)
    except* Exception as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


def _serve(args: argparse.Namespace) -> int:
    from batchgw.app import serve

    settings = _settings(args)
    logging.basicConfig(level=settings.log.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("alembic", "uvicorn"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    try:
        _run(serve(settings, args.command, lambda where: print(f"batchgw {args.command}: {where}", flush=True)))
    except asyncio.CancelledError:
        print(f"batchgw {args.command}: stopped at once; what ran will run again", file=sys.stderr)
        return 1
    return 0


def _gc_arguments(p: argparse.ArgumentParser) -> None:
    _settings_arguments(p)
    p.add_argument("--orphans", action="store_true",
                   help="also what killed uploads left; not where gateways of two databases share a store")  # fmt: skip


def _gc(args: argparse.Namespace) -> int:
    from batchgw.app import collect

    counts = _run(collect(_settings(args), args.orphans))
    print(", ".join(f"{count} {text}" for text, count in counts.items()))
    return 0


def _check_config_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("config", metavar="FILE")


def _check_config(args: argparse.Namespace) -> int:
    from batchgw.config import described

    _settings(args)
    print(described(_read(args.config)), end="")
    return 0


def _add_key_arguments(p: argparse.ArgumentParser) -> None:
    _settings_arguments(p)
    p.add_argument("tenant", metavar="TENANT")
    p.add_argument("--name", default="", help="for people to tell keys apart")


def _add_key(args: argparse.Namespace) -> int:
    from batchgw.app import add_key

    settings = _settings(args)
    print(_run(add_key(settings, args.tenant, args.name)))
    if not settings.api.api_keys_required:
        print("batchgw add-key: keys are asked for only where api.apiKeysRequired is true", file=sys.stderr)
    return 0


def _revoke_key_arguments(p: argparse.ArgumentParser) -> None:
    _settings_arguments(p)
    p.add_argument("key", metavar="KEY", help="the key, or the SHA-256 of it")


def _revoke_key(args: argparse.Namespace) -> int:
    from batchgw.app import revoke_key

    if not _run(revoke_key(_settings(args), args.key)):
        print("batchgw revoke-key: no such key, or it was revoked before", file=sys.stderr)
        return 1
    return 0


# Clients


def _client_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--base-url", default=BASE_URL, metavar="URL", help="of the API (%(default)s)")
    p.add_argument("--api-key-file", default="", metavar="FILE", help="holds the API key")
    p.add_argument("--header", action="append", type=_header, default=[], metavar="'NAME: VALUE'",
                   help="sent along, a tenant's for instance; repeatable")  # fmt: skip
    p.add_argument("--wait", action="store_true", help="until the batch is over, with its progress")
    p.add_argument("--output", type=Path, default=None, metavar="FILE",
                   help="write the output there, and refused lines beside it as FILE.errors.jsonl")  # fmt: skip


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not 'NAME: VALUE'")
    return name.strip(), value.strip()


def _submit_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("file", type=Path, metavar="FILE", help="JSONL as OpenAI's Batch API takes it")
    p.add_argument("--endpoint", default="", metavar="PATH", help="of all lines (that of the first)")
    p.add_argument("--window", default="24h", metavar="DURATION", help="completion window (%(default)s)")
    _client_arguments(p)


def _submit(args: argparse.Namespace) -> int:
    from batchgw.terminal import submit

    if args.output and not args.wait:
        raise ConfigError("there is no output before the batch is over: add --wait", "--output")
    return _as_client(
        args, lambda api: submit(api, args.file, args.endpoint, args.window, wait=args.wait, output=args.output)
    )


def _status_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("batch", nargs="?", default="", metavar="BATCH_ID", help="(the newest 20)")
    _client_arguments(p)


def _status(args: argparse.Namespace) -> int:
    from batchgw.terminal import status

    return _as_client(args, lambda api: status(api, args.batch, wait=args.wait, output=args.output))


def _as_client(args: argparse.Namespace, work: Callable[[Any], Coroutine[Any, Any, int]]) -> int:
    from batchgw.terminal import Api, read_key

    headers = dict(args.header)
    if args.api_key_file:
        headers["authorization"] = f"Bearer {read_key(args.api_key_file)}"

    async def run() -> int:
        async with Api(args.base_url, headers) as api:
            return await work(api)

    return int(_run(run()))


COMMANDS: dict[
    str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]
] = {
    "serve": ("API and worker in one process (the default).", _running_arguments, _serve),
    "api": ("The API alone; any number over one store.", _running_arguments, _serve),
    "worker": ("A worker alone; any number over one store.", _running_arguments, _serve),
    "gc": ("End what is past its deadline, remove what is past its time, once.", _gc_arguments, _gc),
    "submit": ("Upload a file and start a batch over it.", _submit_arguments, _submit),
    "status": ("A batch, or the newest ones.", _status_arguments, _status),
    "check-config": ("Print a configuration with its defaults, or what is wrong with it.",
                     _check_config_arguments, _check_config),
    "add-key": ("Make an API key of a tenant and print it.", _add_key_arguments, _add_key),
    "revoke-key": ("Revoke an API key.", _revoke_key_arguments, _revoke_key),
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
