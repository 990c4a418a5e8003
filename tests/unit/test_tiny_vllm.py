"""The made-up model, the command line and the environment of a real vLLM server, without vLLM."""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from llmd_sched import tiny_vllm


def _options(arguments: list[str]) -> dict[str, str]:
    return {option: value for option, value in pairwise(arguments) if option.startswith("--")}


def _interpreter(folder: Path, script: str) -> str:
    """An executable that answers the probe with `script`'s output in place of a Python that has vLLM."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_vllm.make_model_folder(tmp_path / "a" / "model")


def test_the_folder_holds_a_small_qwen3_whose_vocabulary_is_the_tokenizers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert (config["num_hidden_layers"], config["hidden_size"]) == (4, 256)
    assert sorted(vocabulary.values()) == list(range(config["vocab_size"]))
    assert config["eos_token_id"] is None


def test_the_bytes_of_cached_state_per_token_follow_from_the_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    numbers = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    assert 2 * numbers == tiny_vllm.KV_BYTES_PER_TOKEN


def test_every_merge_joins_known_pieces_into_a_known_piece(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    assert all({left, right, left + right} <= model["vocab"].keys() for left, right in model["merges"])


def test_a_right_file_is_left_alone_and_a_wrong_one_is_replaced(folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    right = (folder / "config.json").read_text()
    (folder / "config.json").write_text("{}")
    tiny_vllm.make_model_folder(folder)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert (folder / "config.json").read_text() == right
    assert sorted(after) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert after["tokenizer.json"] == before["tokenizer.json"]


def test_the_tokenizers_package_makes_one_token_of_each_word_and_reads_text_back(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = " ".join(tiny_vllm.WORDS)
    assert len(tokenizer.encode(text).ids) == len(tiny_vllm.WORDS)
    for sample in (text, "Hello, World!\n\tx = {'a': 42}~"):
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample


def test_the_chat_template_marks_each_role_and_ends_with_the_assistants(folder: Path) -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": None},
    ]
    text = jinja2.Template(template).render(messages=messages, add_generation_prompt=True)
    assert text == "<|system|>be brief<|end|>\n<|user|>hello<|end|>\n<|assistant|><|end|>\n<|assistant|>"


def test_the_command_serves_the_folder_on_loopback_with_usage_details_and_no_weights() -> None:
    arguments = tiny_vllm.command(Path("model"), 8101, "small", kv_cache_mib=64, max_num_seqs=8)
    assert arguments[:5] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "model"]
    options = _options(arguments)
    assert (options["--host"], options["--port"]) == ("127.0.0.1", "8101")
    assert (options["--served-model-name"], options["--load-format"]) == ("small", "dummy")
    assert (options["--max-model-len"], options["--max-num-seqs"]) == ("8192", "8")
    assert options["--kv-cache-memory-bytes"] == str(64 * 1024 * 1024)
    assert {"--enforce-eager", "--enable-prompt-tokens-details"} <= set(arguments)
    assert "--kv-events-config" not in arguments


def test_the_command_names_the_server_in_its_cache_events_when_asked() -> None:
    arguments = tiny_vllm.command(Path("model"), 8101, kv_events_endpoint="ipc:///run/kv", python="other")
    events = json.loads(_options(arguments)["--kv-events-config"])
    assert arguments[0] == "other"
    assert events == {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "ipc:///run/kv",
        "topic": "kv@127.0.0.1:8101@tiny",
    }


def test_a_context_beyond_the_model_or_the_cache_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"max_model_len is 40000; the made-up model holds 1 to 32768"):
        tiny_vllm.command(Path("model"), 8101, max_model_len=40000)
    with pytest.raises(ValueError, match=r"kv_cache_mib is 8, which holds 4096 tokens; .* 8192 needs 16 MiB"):
        tiny_vllm.command(Path("model"), 8101, kv_cache_mib=8)


def test_the_environment_keeps_the_callers_but_for_what_would_change_the_server() -> None:
    base = {"PATH": "/bin", "VLLM_API_KEY": "k", "VLLM_CPU_KVCACHE_SPACE": "40", "OMP_NUM_THREADS": "64"}
    made = tiny_vllm.environment(threads=2, base=base)
    assert made["PATH"] == "/bin"
    assert made["OMP_NUM_THREADS"] == "2"
    assert (made["HF_HUB_OFFLINE"], made["VLLM_NO_USAGE_STATS"]) == ("1", "1")
    assert made["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert not {"VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE"} & made.keys()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('echo noise; echo \'{"said": null, "named": true}\'', None),
        ('echo \'{"said": "ImportError: libx", "named": true}\'', r"cannot import vLLM \(ImportError: libx\).*README"),
        ('echo \'{"said": null, "named": false}\'', r"does not find its version as the distribution 'vllm'.*README"),
        ("kill -ABRT $$", r"died while it imported vLLM.*README"),
        ("exec sleep 5", r"did not import vLLM within 0\.3 s"),
    ],
)
def test_the_reason_says_what_is_wrong_and_what_to_do(tmp_path: Path, script: str, reason: str | None) -> None:
    found = tiny_vllm.available(_interpreter(tmp_path, script), timeout_s=0.3 if "sleep" in script else 30.0)
    assert found is None if reason is None else re.search(reason, found or "")


def test_an_interpreter_that_does_not_exist_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    assert tiny_vllm.available(missing) == (
        f"Cannot run {missing!r} to look for vLLM: No such file or directory. Name an interpreter that exists."
    )


def test_the_probe_finds_no_vllm_in_an_interpreter_without_site_packages(tmp_path: Path) -> None:
    bare = _interpreter(tmp_path, f'exec "{sys.executable}" -I -S "$@"')
    reason = tiny_vllm.available(bare)
    assert reason is not None
    assert "cannot import vLLM (ModuleNotFoundError: No module named 'vllm')" in reason
