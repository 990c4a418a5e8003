"""The command line of ``predict-server``. llm-d's environment variables are the defaults of its flags."""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import os
import signal
from collections.abc import Callable
from typing import Any, NamedTuple


class _Option(NamedTuple):
    flag: str
    variable: str
    """Used when the flag is not given; empty = none."""
    default: str
    metavar: str
    parse: Callable[[str], Any]
    """ValueError, whose message says what is accepted."""
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``llmd-sched predict-server``; reads the environment now."""
    for option in _OPTIONS:
        source = f"${option.variable}, else " if option.variable else ""
        parser.add_argument(
            option.flag,
            default=os.environ.get(option.variable) or option.default,
            metavar=option.metavar,
            type=_typed(option),
            help=f"{option.text} ({source}{option.default or 'none'})",
        )
    parser.add_argument("-v", "--v", type=int, default=2, dest="verbosity", help="3 and more: debug (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; 0 after a clean stop."""
    import uvloop

    from llmd_sched import logs
    from llmd_sched.predict_server.service import Settings

    logs.set_up(logs.level("", args.verbosity))
    settings = Settings(
        host=args.host,
        port=args.port,
        objective=args.objective,
        quantile=args.quantile,
        interval_s=args.retraining_interval,
        min_samples=args.min_samples,
        preset=args.preset,
        state_dir=args.predictor_state_dir,
    )
    uvloop.run(_serve_until_signal(settings))
    return 0


async def _serve_until_signal(settings: Any) -> None:
    from llmd_sched.predict_server.http import PredictServer

    server, stop = PredictServer(settings), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.start()
    gc.collect()
    gc.freeze()  # what is here now stays; the collector need not walk it again in the middle of a request
    await stop.wait()
    await server.stop()


def _typed(option: _Option) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return option.parse(text)
        except ValueError as e:
            source = f" (set by the flag or ${option.variable})" if option.variable else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {e}{source}") from None

    return parse


def _number(text: str, accepted: str, least: float, most: float = math.inf) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(accepted) from None
    if not least <= value <= most or math.isinf(value):
        raise ValueError(accepted)
    return value


def _whole(text: str, accepted: str, least: int, most: float = math.inf) -> int:
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise ValueError(accepted)
    return int(text)


def _port(text: str) -> int:
    return _whole(text, "a port from 0 (any free one) to 65535", 0, 65_535)


def _objective(text: str) -> str:
    if text not in ("mean", "quantile"):
        raise ValueError("mean or quantile")
    return text


def _quantile(text: str) -> float:
    from llmd_sched.types import QUANTILES

    accepted = f"a quantile that is kept: {' or '.join(map(str, QUANTILES))}"
    value = _number(text, accepted, 0.0, 1.0)
    if value not in QUANTILES:
        raise ValueError(accepted)
    return value


def _interval_s(text: str) -> float:
    return _number(text, "a number of seconds, at least 0.1", 0.1)


def _min_samples(text: str) -> int:
    return _whole(text, "a whole number of samples, at least 1", 1)


def _preset(text: str) -> str:
    from llmd_sched.predict.base import COLD_START

    if text not in COLD_START:
        raise ValueError(f"a preset: {', '.join(sorted(COLD_START))}")
    return text


_OPTIONS = (
    _Option("--host", "PREDICT_HOST", "0.0.0.0", "ADDRESS", str, "address to listen on"),
    _Option("--port", "PREDICT_PORT", "8000", "N", _port, "0: any free one"),
    _Option("--objective", "LATENCY_OBJECTIVE_TYPE", "quantile", "mean|quantile", _objective, "what is predicted"),
    _Option("--quantile", "LATENCY_QUANTILE_ALPHA", "0.9", "0.5|0.9", _quantile, "of the quantile objective"),
    _Option("--retraining-interval", "LATENCY_RETRAINING_INTERVAL_SEC", "1", "SECONDS", _interval_s,
            "between two fits at least"),
    _Option("--min-samples", "LATENCY_MIN_SAMPLES_FOR_RETRAIN_FRESH", "50", "N", _min_samples,
            "measured latencies before the first fit"),
    _Option("--preset", "", "default", "NAME", _preset, "coefficients to start from"),
    _Option("--predictor-state-dir", "", "", "DIR", str,
            "keep what was learned here, so that a restart is ready at once"),
)  # fmt: skip
