"""What reading a request body costs, and rewriting its model.

    python -m benchmarks.bench_parse [--bytes 1000000] [--rounds 40] [--json OUT]

A body of about a megabyte in each format, read as the scheduler does: parsed, its prompt hashed for the prefix index,
and once more with another model written into it. CPU time of this process; a figure is the least of all rounds, which
are interleaved, because whatever else the machine does only ever adds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from random import Random

from benchmarks.results import table, write_json
from llmd_sched.parsers import tokens
from llmd_sched.parsers.registry import PARSERS, ParserRegistry
from llmd_sched.parsers.rewrite import with_model
from llmd_sched.prefix.hashing import block_hashes

SEED = 7
VOCABULARY = 151_936
BLOCK_TOKENS, MAX_BLOCKS = 64, 2048  # as the approximate prefix index is by default
SPACED, COMPACT = (", ", ": "), (",", ":")

Body = tuple[str, bytes]
"""A path and what is posted to it."""


def bodies(size_bytes: int, random: Random) -> dict[str, Body]:
    ids = [random.randrange(VOCABULARY) for _ in range(size_bytes * 10 // 69)]  # 6.9 characters each, with its comma
    text = "".join(random.choices("etaoin shrdlu,.\n", k=size_bytes))
    turns = [{"role": "user", "content": text[at : at + 2000]} for at in range(0, len(text), 2000)]
    quarters = [ids[i::4] for i in range(4)]
    return {
        "chat_text_then_model": ("/v1/chat/completions", dumped({"messages": turns, "model": "m"})),
        "chat_text": ("/v1/chat/completions", dumped({"model": "m", "messages": turns})),
        "messages_text": ("/v1/messages", dumped({"model": "m", "max_tokens": 9, "messages": turns})),
        "completion_text": ("/v1/completions", dumped({"model": "m", "prompt": text})),
        "completion_ids": ("/v1/completions", dumped({"model": "m", "prompt": ids})),
        "completion_lists_of_ids": ("/v1/completions", dumped({"model": "m", "prompt": quarters})),
        "embedding_ids": ("/v1/embeddings", dumped({"model": "m", "input": ids})),
        "responses_text": ("/v1/responses", dumped({"model": "m", "input": text})),
        "vllm_ids": ("/inference/v1/generate", dumped({"model": "m", "token_ids": ids})),
        "vllm_ids_spaced": ("/inference/v1/generate", dumped({"model": "m", "token_ids": ids}, SPACED)),
        "sglang_ids": ("/generate", dumped({"input_ids": ids})),
        "grpc_ids": ("/vllm.grpc.engine.VllmEngine/Generate", framed(ids, size_bytes)),
    }


def dumped(body: dict[str, object], separators: tuple[str, str] = COMPACT) -> bytes:
    return json.dumps(body, separators=separators).encode()


def framed(ids: list[int], size_bytes: int) -> bytes:
    """A GenerateRequest of that size; packed, an id takes less than 3 bytes."""
    packed = b"".join(map(varint, ids))
    packed *= max(1, size_bytes // len(packed))
    tokenized = b"\x12" + varint(len(packed)) + packed
    message = b"\x12" + varint(len(tokenized)) + tokenized
    return b"\x00" + len(message).to_bytes(4, "big") + message


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def hashed(prompts: Sequence[bytes]) -> None:
    for prompt in prompts:
        block_hashes(prompt, "m", BLOCK_TOKENS, MAX_BLOCKS)


def spent_ms(work: Callable[[], object]) -> float:
    begin_s = time.process_time()
    work()
    return 1e3 * (time.process_time() - begin_s)


def measure(size_bytes: int, rounds: int) -> dict[str, float]:
    tokens.warm_up()
    registry = ParserRegistry([kind() for kind in PARSERS.values()])
    work: dict[str, Callable[[], object]] = {}
    scale: dict[str, float] = {}
    for name, (path, body) in bodies(size_bytes, Random(SEED)).items():
        parsed = registry.parse(path, body)
        steps: dict[str, Callable[[], object]] = {
            "parse": partial(registry.parse, path, body),
            "hash": partial(hashed, parsed.prompts),
        }
        if parsed.names_model:
            steps["rewrite"] = partial(with_model, body, "another")
        work |= {f"{name}_{step}": do for step, do in steps.items()}
        scale |= {f"{name}_{step}": 1e6 / len(body) for step in steps}
    least = {name: min(spent_ms(do) for _ in range(3)) for name, do in work.items()}
    for _ in range(rounds):
        for name, do in work.items():
            least[name] = min(least[name], spent_ms(do))
    return figures({name: value * scale[name] for name, value in least.items()})


def figures(steps_ms: dict[str, float]) -> dict[str, float]:
    """Each step, and each format's sum."""
    found = {f"{name}_ms_per_mb": value for name, value in steps_ms.items()}
    for name in dict.fromkeys(step.rpartition("_")[0] for step in steps_ms):
        found[f"{name}_in_all_ms_per_mb"] = sum(v for step, v in steps_ms.items() if step.rpartition("_")[0] == name)
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bytes", type=int, default=1_000_000, help="of each body")
    p.add_argument("--rounds", type=int, default=40)
    p.add_argument("--json", metavar="OUT")
    args = p.parse_args()
    found = measure(args.bytes, args.rounds)
    table(found)
    if args.json:
        write_json(args.json, {"bytes": args.bytes, "rounds": args.rounds}, SEED, found)


if __name__ == "__main__":
    main()
