"""How fast the batch gateway takes files in, hands lines out and recovers, on SQLite and PostgreSQL.

``python -m benchmarks.bench_batch_speed --json OUT`` (some minutes; ``--quick`` 20 s, with less of everything). Bars:
a file of 50,000 lines and 100 MB within 10 s; 1 ms of CPU a line in the worker's process; with 1,000,000 lines waiting
in 200 batches 99 % of the claims within 20 ms on PostgreSQL and no growth of memory; 30 s from a kill until another
worker goes on. Latencies are only as good as the machine is idle: ``load_ratio`` is the mean of its run queue over its
cores, before anything was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec

from batchgw.worker.leases import HEARTBEAT_S, LEASE_S
from benchmarks.batch_processes import postgres, run
from benchmarks.batch_speed_api import upload
from benchmarks.batch_speed_queue import queue
from benchmarks.batch_speed_work import dispatch, recovery
from benchmarks.results import table, write_json

PARTS = ("upload", "dispatch", "queue", "recovery")
STORES = ("sqlite", "postgresql")


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured. ``claims`` are those of all claimers, ``rate`` is of each."""

    upload_lines: int = 50_000
    upload_bytes: int = 100_000_000
    dispatch_lines: int = 5_000
    tokens: int = 8
    batches: int = 200
    lines: int = 5_000
    claimers: int = 4
    claims: int = 1_200
    rate_per_s: float = 5.0
    lease_s: float = LEASE_S
    heartbeat_s: float = HEARTBEAT_S


QUICK = Sizes(
    upload_lines=5_000, upload_bytes=10_000_000, dispatch_lines=500, batches=20, lines=1_000, claimers=2, claims=40,
    lease_s=1.0, heartbeat_s=0.25,
)  # fmt: skip


def measured(part: str, store: str, sizes: Sizes, seed: int) -> dict[str, float]:
    """Figures of one part over a new store."""
    with tempfile.TemporaryDirectory() as name, _database(store, Path(name)) as url:
        return run(_part(part, url, Path(name), sizes, seed))


def _part(part: str, url: str, folder: Path, sizes: Sizes, seed: int) -> Coroutine[Any, Any, dict[str, float]]:
    match part:
        case "upload":
            return upload(url, folder, sizes.upload_lines, sizes.upload_bytes, seed)
        case "dispatch":
            return dispatch(url, folder, sizes.dispatch_lines, sizes.tokens)
        case "queue":
            return queue(url, sizes.batches, sizes.lines, sizes.claimers, sizes.claims, sizes.rate_per_s)
        case _:
            return recovery(url, folder, sizes.lease_s, sizes.heartbeat_s)


@contextlib.contextmanager
def _database(store: str, folder: Path) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        yield f"sqlite:///{folder}/batch.db" if store == "sqlite" else stack.enter_context(postgres())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--stores", nargs="+", choices=STORES, default=STORES)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.CRITICAL)
    sizes = QUICK if args.quick else Sizes()
    figures = {"load_ratio": os.getloadavg()[0] / (os.cpu_count() or 1)}
    for part in args.parts:
        for store in args.stores:
            began_s = time.monotonic()
            made = measured(part, store, sizes, args.seed)
            figures |= {f"{store}_{part}_{name}": value for name, value in made.items()}
            print(f"{part} on {store}: {time.monotonic() - began_s:.1f} s")
    table(figures)
    if args.json:
        config = {"parts": list(args.parts), "stores": list(args.stores), **msgspec.to_builtins(sizes)}
        write_json(args.json, config, args.seed, figures)


if __name__ == "__main__":
    main()
