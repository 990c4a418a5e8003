"""A real vLLM server that needs no download: a made-up model, its command line and its environment.

`llmd-sched up --engine vllm` starts such servers instead of simulated ones. The model has the code of Qwen3 and random
weights, so what it says is noise, while its queue, its batches, its KV cache and its metrics are vLLM's own. It knows
no end-of-text token: a reply ends at `max_tokens`, or at the context length when a request states none.

Nothing here imports vLLM into this process or leaves one running. The caller starts `command` under `environment` in a
session of its own (`start_new_session=True`) and ends it through its process group: a server is several processes, and
the engine outlives a killed front.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

CONTEXT_TOKENS = 8192
"""Longest prompt and reply together, in tokens, unless the caller asks for another length."""

KV_BYTES_PER_TOKEN = 2048
"""Keys and values x 4 layers x 2 heads x 64 wide x 2 bytes."""

MOST_CONTEXT_TOKENS = 32768
"""The made-up model has positions for so many tokens."""

_TEXT = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were her all she there would their we him been has when who will more no if out so said what up its about "
    "into than them can only other new some could time these two may then do first any my now such like our over man "
    "me even most made after also did many before must through back years where much your way well down should because "
    "each just those people how too little state good very make world still own see men work long get here between "
    "both life being under never day same another know while last might us great old year off come since against go "
    "came right used take three request server model token cache queue batch prompt answer question number write list "
    "explain system user story code data value table example function result error message text line"
)
WORDS = tuple(_TEXT.split())
"""Each is one token, with and without a blank before it. Other English makes about a token of 1.6 characters."""

_SPECIAL = ("<unk>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] or [] %}{{ part['text'] or '' }}{% endfor %}{% endif %}"
    "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_PROBE = """
import importlib.metadata, json, sys
try:
    import vllm
    said = None
except BaseException as error:
    said = f"{type(error).__name__}: {error}"
try:
    importlib.metadata.version("vllm")
    named = True
except importlib.metadata.PackageNotFoundError:
    named = False
print("\\n" + json.dumps({"said": said, "named": named}))
"""

_INSTALL = "The README's section on real vLLM servers says how to install the CPU build."

_NOT_INHERITED = frozenset({"VLLM_CPU_KVCACHE_SPACE", "VLLM_PORT", "VLLM_API_KEY", "PROMETHEUS_MULTIPROC_DIR"})
"""Would overrule the command line, ask clients for a key, or mix a server's metrics with its parent's."""


def make_model_folder(path: Path) -> Path:
    """Write the made-up model's configuration and tokenizer to `path`, about 30 KB, and return `path`.

    Same bytes every time. A file that is already right is left alone, another is replaced in one step, so servers that
    start at once may share a folder. Raises `OSError` where the folder cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = _train(WORDS)
    files = {
        "config.json": _model_config(len(vocabulary)),
        "tokenizer.json": _tokenizer(vocabulary, merges),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MOST_CONTEXT_TOKENS,
            "clean_up_tokenization_spaces": False,
            "unk_token": "<unk>",
            "chat_template": _CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        _write(path / name, json.dumps(content, indent=1) + "\n")
    return path


def command(
    model_dir: Path,
    port: int,
    name: str = "tiny",
    *,
    host: str = "127.0.0.1",
    max_model_len: int = CONTEXT_TOKENS,
    max_num_seqs: int = 32,
    kv_cache_mib: int = 256,
    block_tokens: int = 128,
    kv_events_endpoint: str | None = None,
    python: str | None = None,
) -> list[str]:
    """The argument list that starts one server.

    `name` is the model's name in requests. `max_model_len` in tokens; `max_num_seqs` requests run at once, others wait.
    `kv_cache_mib` is the KV cache in MiB, 512 tokens each; `block_tokens` its block size, best a multiple of 32.
    `kv_events_endpoint` is where the server publishes KV events over ZMQ: `ipc://PATH` stays on this machine, while
    `tcp://*:PORT` listens on every interface (vLLM binds no single address); None publishes none.
    `python` is the interpreter that has vLLM, this one by default.

    The model runs inside the engine's process ("uni", which needs `environment`). With the worker process that vLLM
    uses on a CPU otherwise, engine and worker poll each other through shared memory: two servers on two cores then
    make half as many tokens, with stalls of a second.

    Raises `ValueError` when the context exceeds the model's positions or the cache.
    """
    _check_sizes(max_model_len, kv_cache_mib)
    arguments = [python or sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model_dir)]
    options = {
        "--host": host,
        "--port": str(port),
        "--served-model-name": name,
        "--load-format": "dummy",
        "--dtype": "bfloat16",
        "--generation-config": "vllm",
        "--distributed-executor-backend": "uni",
        "--max-model-len": str(max_model_len),
        "--max-num-seqs": str(max_num_seqs),
        "--kv-cache-memory-bytes": str(kv_cache_mib << 20),
        "--block-size": str(block_tokens),
    }
    if kv_events_endpoint is not None:
        options["--kv-events-config"] = _kv_events(kv_events_endpoint, f"kv@{host}:{port}@{name}")
    for option, value in options.items():
        arguments += [option, value]
    return [*arguments, "--enforce-eager", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]


def environment(threads: int = 1, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The whole environment of one server, made from `base` (this process's own by default).

    `threads` is how many threads compute; they run on any core, so give every server no more than its share of them.
    Nothing is downloaded, nothing is reported, and vLLM's inner sockets stay on the loopback interface.
    """
    own = {key: value for key, value in (os.environ if base is None else base).items() if key not in _NOT_INHERITED}
    return own | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else vLLM on CPU overrules the "uni" executor of `command`
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
    }


def available(python: str | None = None, timeout_s: float = 120.0) -> str | None:
    """Why `python` (this interpreter by default) cannot run vLLM, in a sentence or two; None when it can.

    Imports vLLM in a process of its own, which takes some seconds; `timeout_s` bounds it.
    """
    which = python or sys.executable
    try:
        done = subprocess.run(
            [which, "-c", _PROBE], capture_output=True, text=True, timeout=timeout_s, env=environment(), check=False
        )
    except OSError as error:
        return f"Cannot run {which!r} to look for vLLM: {error.strerror}. Name an interpreter that exists."
    except subprocess.TimeoutExpired:
        return f"{which} did not import vLLM within {timeout_s:g} s. Try once more, or repair that installation."
    return _verdict(which, done.stdout)


def _verdict(which: str, printed: str) -> str | None:
    """What the probe's last line means, as `available` words it."""
    try:
        found = json.loads(printed.strip().rpartition("\n")[2])
    except ValueError:
        return f"{which} died while it imported vLLM. {_INSTALL}"
    if found["said"] is not None:
        return f"{which} cannot import vLLM ({found['said']}). {_INSTALL}"
    if not found["named"]:
        return f"{which} imports vLLM, which does not find its version as the distribution 'vllm'. {_INSTALL}"
    return None


def _check_sizes(max_model_len: int, kv_cache_mib: int) -> None:
    if not 1 <= max_model_len <= MOST_CONTEXT_TOKENS:
        raise ValueError(
            f"max_model_len is {max_model_len}; the made-up model holds 1 to {MOST_CONTEXT_TOKENS} tokens."
        )
    fit = (kv_cache_mib << 20) // KV_BYTES_PER_TOKEN
    if fit < max_model_len:
        raise ValueError(
            f"kv_cache_mib is {kv_cache_mib}, which holds {fit} tokens; one request of max_model_len {max_model_len} "
            f"needs {-(-max_model_len * KV_BYTES_PER_TOKEN >> 20)} MiB. Raise the one or lower the other."
        )


def _kv_events(endpoint: str, topic: str) -> str:
    return json.dumps({"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint, "topic": topic})


def _model_config(vocabulary_tokens: int) -> dict[str, object]:
    """Qwen3 in small. The vocabulary is exactly the tokenizer's, so every token the model utters has a text."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "vocab_size": vocabulary_tokens,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": MOST_CONTEXT_TOKENS,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
        "initializer_range": 0.02,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _tokenizer(vocabulary: list[str], merges: list[tuple[str, str]]) -> dict[str, object]:
    """`tokenizer.json` as the `tokenizers` package reads it: byte-level BPE."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **flags} for number, token in enumerate(_SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(vocabulary)},
            "merges": [list(pair) for pair in merges],
        },
    }


def _train(words: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Byte-pair encoding (Sennrich et al., ACL 2016) trained until every word is one token: vocabulary and merges.

    Done here, in some tenths of a second, so that `up` needs no tokenizer package where vLLM has an interpreter of its
    own. The alphabet is ASCII only: every token is then whole text, and a stream has text in every chunk.
    """
    pieces = [list(blank + word) for word in words for blank in ("", _as_letter(" "))]
    vocabulary = list(
        dict.fromkeys([*_SPECIAL, *map(_as_letter, "\t\n\r"), *map(_as_letter, map(chr, range(32, 127)))])
    )
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        vocabulary.append(best[0] + best[1])
        pieces = [_merged(word, best) for word in pieces]
    return list(dict.fromkeys(vocabulary)), merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    """`word` with every occurrence of `pair` made one piece, from the left."""
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def _as_letter(character: str) -> str:
    """How byte-level BPE (GPT-2) writes an ASCII character: blanks and control characters move up by 256."""
    return character if character > " " else chr(256 + ord(character))


def _write(path: Path, text: str) -> None:
    """Put `text` at `path` in one step unless it is there already."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
