"""``python -m batchgw.demo``: a small batch by OpenAI's own client, as any user of the API would submit it.

Tells what it did in a few lines; exit status 1, and one line that says why, when an answer is missing, failed or
doubled.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from batchgw.records import TERMINAL

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import Batch

CHAT: Final = "/v1/chat/completions"
MAX_TOKENS = 24
LOOK_S = 0.5
LIMIT_S = 300.0
"""How long the batch may take."""

SHOWN = 5
"""Lines that an error names."""


class DemoError(Exception):
    """What is wrong with the batch or its output."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="batchgw.demo", description="A small batch, by OpenAI's own client.")
    parser.add_argument("--base-url", required=True, metavar="URL", help="of the batch API, with or without /v1")
    parser.add_argument("--model", required=True, metavar="NAME")
    parser.add_argument("--lines", type=int, default=200, metavar="N", help="requests of the batch (%(default)s)")
    args = parser.parse_args(argv)
    try:
        from openai import OpenAI, OpenAIError
    except ModuleNotFoundError as missing:
        print(f"demo batch: {missing}; pip install 'llmd-sched[local]'", file=sys.stderr)
        return 1
    base_url = f"{args.base_url.rstrip('/').removesuffix('/v1')}/v1"
    try:
        with OpenAI(base_url=base_url, api_key="no-key-needed") as client:
            run(client, args.model, args.lines)
    except (DemoError, OpenAIError) as error:
        print(f"demo batch: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 1
    return 0


def run(client: OpenAI, model: str, lines: int) -> None:
    """Raises DemoError, openai.OpenAIError."""
    asked = requests(model, lines)
    data = "".join(json.dumps(line) + "\n" for line in asked).encode()
    began_s = time.monotonic()
    file = client.files.create(file=("demo.jsonl", data), purpose="batch")
    print(f"{file.id}: {lines:,} chat requests, {file.bytes:,} bytes", flush=True)
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    batch = ended(client, batch)
    took_s = time.monotonic() - began_s
    answers = checked(client.files.content(batch.output_file_id).content if batch.output_file_id else b"", lines)
    print(f"{batch.id}: {batch.status} {took_s:.1f} s after the upload began; {lines:,} lines, each answered once")
    if usage := batch.usage:
        print(f"{usage.input_tokens:,} prompt tokens, {usage.output_tokens:,} generated")
    question, answer = asked[0]["body"]["messages"][-1]["content"], answers["c0"]["choices"][0]["message"]["content"]
    print(f"c0: {question!r} -> {answer[:60].strip()!r}...")


def requests(model: str, lines: int) -> list[dict[str, Any]]:
    """Lines ``c0 c1 ...`` of an input file."""
    said = [f"What is special about the number {i}?" for i in range(lines)]
    bodies = [
        {"model": model, "max_tokens": MAX_TOKENS, "messages": [{"role": "user", "content": text}]} for text in said
    ]
    return [{"custom_id": f"c{i}", "method": "POST", "url": CHAT, "body": body} for i, body in enumerate(bodies)]


def ended(client: OpenAI, batch: Batch) -> Batch:
    """The batch once it is completed. Raises DemoError when it ends otherwise or takes longer than LIMIT_S."""
    deadline_s = time.monotonic() + LIMIT_S
    while batch.status not in TERMINAL:
        if time.monotonic() > deadline_s:
            raise DemoError(f"{batch.id} is {batch.status} after {LIMIT_S:g} s: {batch.request_counts}")
        time.sleep(LOOK_S)
        batch = client.batches.retrieve(batch.id)
    if batch.status != "completed":
        errors = batch.errors.data if batch.errors and batch.errors.data else []
        raise DemoError(f"{batch.id} {batch.status}" + "".join(f": {error.message}" for error in errors[:1]))
    return batch


def checked(output: bytes, lines: int) -> dict[str, Any]:
    """The replies in an output file, by custom id. Raises DemoError unless ``c0`` up to ``lines`` are each answered
    once, with status 200."""
    found = [json.loads(line) for line in output.splitlines()]
    counts = Counter(line["custom_id"] for line in found)
    wanted = {f"c{i}": None for i in range(lines)}
    faults = {
        "not answered": [id for id in wanted if id not in counts],
        "answered more than once": [id for id, count in counts.items() if count > 1],
        "never asked": [id for id in counts if id not in wanted],
        "not answered with 200": [line["custom_id"] for line in found if line["response"]["status_code"] != 200],
    }
    for fault, ids in faults.items():
        if ids:
            more = ", ..." if len(ids) > SHOWN else ""
            raise DemoError(f"{len(ids)} of {lines} lines {fault}: {', '.join(ids[:SHOWN])}{more}")
    return {line["custom_id"]: line["response"]["body"] for line in found}


if __name__ == "__main__":
    sys.exit(main())
