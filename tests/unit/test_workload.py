"""Workloads: the traces' readers, the chat generator, and the bodies of both."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from llmd_sched import tiny_vllm
from llmd_sched.load import workload
from llmd_sched.load.traces import TraceError, mooncake_jsonl, read_trace
from llmd_sched.load.workload import ChatShape, Item, LogNormal, Span, chat

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:00:00.0000000,374,44\r
2023-11-16 18:00:04.5000000,91,16\r
2023-11-16 18:00:10.0000000,91,0"""


def azure(tmp_path: Path, text: str = AZURE) -> Path:
    path = tmp_path / "azure.csv"
    path.write_text(text, newline="")
    return path


def mooncake(tmp_path: Path, *rows: tuple[float, int, int, list[int]]) -> Path:
    path = tmp_path / "mooncake.jsonl"
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


def prompt(item: Item) -> str:
    return str(json.loads(item.body("m"))["prompt"])


def texts(item: Item) -> list[str]:
    return [message["content"] for message in json.loads(item.body("m"))["messages"]]


@pytest.mark.parametrize("tokens", [1, 7, 512, 300_000])
def test_a_span_is_four_bytes_of_json_safe_ascii_per_token(tokens: int) -> None:
    text = Span("key", tokens).text()
    assert len(text) == 4 * tokens
    assert json.loads(b'"' + text + b'"').encode() == text


def test_a_shorter_span_is_a_prefix_of_a_longer_one_with_its_key() -> None:
    assert Span("key", 600_000).text().startswith(Span("key", 100).text())


def test_spans_of_different_keys_differ_in_their_first_block() -> None:
    firsts = {Span(f"block-{number}", 512).text()[:64] for number in range(20_000)}
    assert len(firsts) == 20_000


def test_a_completion_asks_for_exactly_the_tokens_of_the_trace(tmp_path: Path) -> None:
    body = json.loads(next(read_trace(azure(tmp_path))).body("tiny"))
    assert len(body.pop("prompt")) == 4 * 374
    assert body == {
        "model": "tiny",
        "max_tokens": 44,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_whole_reply_is_asked_for_without_stream_options() -> None:
    body = json.loads(Item(at_s=0, session="s", prompt=(Span("a", 1),), output_tokens=1, streaming=False).body("m"))
    assert body["stream"] is False
    assert "stream_options" not in body


def test_azure_rows_keep_their_times_and_share_no_prefix(tmp_path: Path) -> None:
    items = list(read_trace(azure(tmp_path)))
    assert [item.at_s for item in items] == [0.0, 4.5, 10.0]
    assert [item.path for item in items] == ["/v1/completions"] * 3
    assert [item.output_tokens for item in items] == [44, 16, 1]
    assert prompt(items[1])[:8] != prompt(items[2])[:8]


def test_duration_is_counted_after_the_speed_up(tmp_path: Path) -> None:
    items = read_trace(azure(tmp_path), speed=2, duration_s=5)
    assert [item.at_s for item in items] == [0.0, 2.25]


def test_a_limit_keeps_the_first_items(tmp_path: Path) -> None:
    assert len(list(read_trace(azure(tmp_path), limit=2))) == 2


def test_blank_lines_at_the_end_of_a_trace_are_no_rows(tmp_path: Path) -> None:
    assert len(list(read_trace(azure(tmp_path, AZURE + "\r\n\r\n")))) == 3


def test_mooncake_prompts_share_the_text_of_their_common_blocks(tmp_path: Path) -> None:
    path = mooncake(tmp_path, (0, 1500, 10, [0, 1, 2]), (3000, 1100, 10, [0, 1, 3]), (6000, 1400, 10, [0, 1, 2]))
    first, second, third = (prompt(item) for item in read_trace(path))
    assert [len(text) for text in (first, second, third)] == [6000, 4400, 5600]
    assert first[:4096] == second[:4096]
    assert first[4096:4160] != second[4096:4160]
    assert first.startswith(third)


def test_mooncake_rows_of_one_timestamp_are_spread_over_their_bucket_in_order(tmp_path: Path) -> None:
    row = (512, 1, [0])
    path = mooncake(tmp_path, *[(1000, *row)] * 50, *[(4000, *row)] * 50)
    times_s = [item.at_s for item in mooncake_jsonl(path)]
    assert times_s == sorted(times_s)
    assert len(set(times_s)) == 100
    assert all(0 <= at_s < 3 for at_s in times_s[:50])
    assert all(3 <= at_s < 6 for at_s in times_s[50:])
    assert times_s == [item.at_s for item in mooncake_jsonl(path)]
    assert times_s != [item.at_s for item in mooncake_jsonl(path, seed=1)]


def test_a_mooncake_row_alone_at_its_time_keeps_it(tmp_path: Path) -> None:
    path = mooncake(tmp_path, (500, 10, 1, [0]), (520, 10, 1, [1]))
    assert [item.at_s for item in read_trace(path, speed=2)] == [0.0, 0.01]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", 1, "empty"),
        ("time,in,out\n1,2,3\n", 1, "'time,in,out'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", 2, "no rows"),
        (AZURE.replace("91,16", "many,16"), 3, "'many'"),
        (AZURE.replace("91,16", "91"), 3, "not enough values"),
        (AZURE.replace("91,16", "91,-1"), 3, "out of range"),
        (AZURE.replace("91,16", "9999999,1"), 3, "out of range"),
        (AZURE.replace("18:00:04", "yesterday"), 3, "yesterday"),
        (AZURE.replace("18:00:10", "18:00:01"), 4, "before"),
        ('{"timestamp": 0}\n', 1, "input_length"),
        ('{"timestamp": 0, "input_length": "x", "output_length": 1, "hash_ids": []}\n', 1, "input_length"),
        ('{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}\n', 1, "1 hash_ids"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [1]}\nnot json\n', 2, "JSON"),
    ],
)
def test_a_bad_trace_is_refused_before_the_replay_naming_file_line_and_what_is_accepted(
    tmp_path: Path, text: str, line: int, what: str
) -> None:
    path = azure(tmp_path, text)
    with pytest.raises(TraceError) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}, line {line}: ")
    assert what in str(error.value)
    assert "accepted are an Azure LLM trace" in str(error.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00binary"])
def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "trace"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TraceError, match="accepted are"):
        read_trace(path)


def test_a_speed_or_rate_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="speed is 0"):
        read_trace(azure(tmp_path), speed=0)
    with pytest.raises(ValueError, match="rate is -1"):
        next(chat(1, rate_per_s=-1, duration_s=1))


def test_chat_is_the_same_for_the_same_seed_and_shares_no_text_with_another() -> None:
    once, again, other = (list(chat(seed, rate_per_s=5, duration_s=20)) for seed in (1, 1, 2))
    assert once == again
    assert texts(once[0])[0][:64] not in {texts(item)[0][:64] for item in other}


def test_chat_requests_come_in_order_at_the_rate_asked_for() -> None:
    times_s = [item.at_s for item in chat(3, rate_per_s=20, duration_s=500)]
    assert times_s == sorted(times_s)
    assert times_s[-1] < 500
    assert len(times_s) == pytest.approx(10_000, rel=0.05)
    gaps_s = [after - before for before, after in itertools.pairwise(times_s)]
    mean_s = sum(gaps_s) / len(gaps_s)
    variance = sum((gap_s - mean_s) ** 2 for gap_s in gaps_s) / len(gaps_s)
    assert variance / mean_s**2 == pytest.approx(1, abs=0.1), "gaps of a Poisson process vary as much as their mean"


def test_each_turn_of_a_chat_extends_the_one_before_by_a_reply_and_a_question() -> None:
    sessions: dict[str, list[Item]] = {}
    for item in chat(4, rate_per_s=5, duration_s=200):
        sessions.setdefault(item.session, []).append(item)
    pairs = [pair for items in sessions.values() for pair in itertools.pairwise(items)]
    assert len(pairs) > 100
    for before, after in pairs:
        assert after.path == "/v1/chat/completions"
        assert after.prompt[: len(before.prompt)] == before.prompt
        assert after.roles == (*before.roles, "assistant", "user")
        assert after.prompt[-2].tokens == before.output_tokens
        assert after.at_s - before.at_s >= before.output_tokens * ChatShape().assumed_tpot_s + 1


def test_users_of_one_group_share_a_system_prompt() -> None:
    items = list(chat(5, rate_per_s=5, duration_s=100, shape=ChatShape(groups=3)))
    assert {item.roles[0] for item in items} == {"system"}
    assert len({item.prompt[0] for item in items}) == 3
    assert len({item.session for item in items}) > 20


def test_a_chat_prompt_is_as_long_as_its_tokens_say() -> None:
    for item in chat(6, rate_per_s=5, duration_s=20):
        assert sum(map(len, texts(item))) == 4 * item.input_tokens


def test_a_conversation_ends_before_its_context_is_full() -> None:
    shape = ChatShape(context_tokens_max=1500, turns=LogNormal(15, 1, 15, 15))
    assert all(sum(span.tokens for span in item.prompt[:-1]) < 1500 for item in chat(7, 10, 200, shape))


def test_log_normal_draws_have_their_mean_and_keep_their_limits() -> None:
    rng = random.Random(0)
    wide = [LogNormal(100, 80, 0, 1e9).draw(rng) for _ in range(20_000)]
    assert sum(wide) / len(wide) == pytest.approx(100, rel=0.03)
    assert {LogNormal(100, 80, 99, 101).draw(rng) for _ in range(100)} >= {99, 101}


def test_every_word_of_the_text_is_one_token_of_the_made_up_vllm_model():
    assert set(workload.WORDS) <= set(tiny_vllm.WORDS)
    assert {len(word) for word in workload.WORDS} == {3}
