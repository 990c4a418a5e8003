"""Batch input: every rule of a line, its error by code, line and parameter; the plan's order."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from batchgw.lines import (
    BOM,
    MAX_EMBEDDING_INPUTS,
    MAX_ERRORS,
    MAX_MODELS,
    PLAN,
    Limits,
    Plan,
    Scanner,
    read_plan,
    refusals,
)
from batchgw.prompts import MEDIA_BYTES
from batchgw.records import LineError, Scan
from tests.batch_api import line


def scan(data: bytes, limits: Limits | None = None, piece: int = 1 << 20) -> tuple[Scan, Plan]:
    scanner = Scanner(limits or Limits())
    for at in range(0, len(data), piece):
        scanner.feed(data[at : at + piece])
    return scanner.finish()


def chat(custom_id: str, system: str, user: str, model: str = "m", **body: Any) -> bytes:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return line(custom_id, body_messages=messages, body_model=model, **{f"body_{k}": v for k, v in body.items()})


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (b"{\n", "invalid_json_line", None),
        (b"[]\n", "invalid_json_line", None),
        (b'"text"\n', "invalid_json_line", None),
        (b"\xff\xfe\n", "invalid_json_line", None),
        (b'{"custom_id": NaN}\n', "invalid_json_line", None),
        (b"[" * 100_000 + b"\n", "invalid_json_line", None),
        (line().replace(b"hi", b"\\ud800"), "invalid_json_line", None),
        (line(custom_id="") , "missing_required_parameter", "custom_id"),
        (b'{"method":"POST"}\n', "missing_required_parameter", "custom_id"),
        (line(method=None), "missing_required_parameter", "method"),
        (line(url=None), "missing_required_parameter", "url"),
        (line(body=None), "missing_required_parameter", "body"),
        (line(body={}), "missing_required_parameter", "body.model"),
        (line(body_model=""), "missing_required_parameter", "body.model"),
        (line(body_model=None), "missing_required_parameter", "body.model"),
        (line(body_model=7), "invalid_type", "body.model"),
        (line(body_model="m" * 257), "invalid_model", "body.model"),
        (line(body=[]), "invalid_type", "body"),
        (line(method=1), "invalid_type", "method"),
        (b'{"custom_id":5,"method":"POST","url":"/v1/embeddings","body":{"model":"m"}}\n', "invalid_type", "custom_id"),
        (line(custom_id="x" * 513), "invalid_custom_id", "custom_id"),
        (line(method="GET"), "invalid_method", "method"),
        (line(method="post"), "invalid_method", "method"),
        (line(url="/v1/other"), "invalid_url", "url"),
        (line(url="v1/chat/completions"), "invalid_url", "url"),
        (line(url="//v1/chat/completions"), "invalid_url", "url"),
        (line(url="http://evil/v1/chat/completions"), "invalid_url", "url"),
        (line(url="/v1/chat/completions?x=1"), "invalid_url", "url"),
        (line(body_stream=True), "stream_unsupported", "body.stream"),
        (line(body_stream="yes"), "stream_unsupported", "body.stream"),
        (line("first"), "duplicate_custom_id", "custom_id"),
        (line(url="/v1/embeddings"), "url_mismatch", "url"),
        (b"  \n", "invalid_json_line", None),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_by_code_parameter_and_number(raw: bytes, code: str, param: str | None) -> None:
    found, plan = scan(line("first") + raw + line("last"))
    assert [(e.code, e.param, e.line) for e in found.errors] == [(code, param, 2)]
    assert (found.error_count, len(plan)) == (1, 0)
    assert found.errors[0].message


@pytest.mark.parametrize(
    "raw",
    [
        line(body_stream=False),
        line(body_stream=None),
        line(extra={"unknown": 1}),
        line(body_messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]),
        line(
            body_messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]
        ),
        line(body_messages="not even a list: the engine's business"),
        line(custom_id="ключ 🔑"),
        line().replace(b"hi", b"\\u0000\\ud83d\\ude00"),
        line().rstrip() + b"  \r\n",
    ],
)
def test_what_only_looks_odd_is_taken(raw: bytes) -> None:
    found, plan = scan(line("first") + raw)
    assert (found.errors, found.lines, len(plan)) == ((), 2, 2)


def test_the_duplicate_error_names_the_first_use() -> None:
    found, _ = scan(line("a") + line("b") + line("a") + line("a"))
    assert [(e.line, "line 1" in e.message) for e in found.errors] == [(3, True), (4, True)]


@pytest.mark.parametrize("data", [b"", b"\n", b"\n\n  \r\n", BOM])
def test_a_file_without_a_request_is_refused(data: bytes) -> None:
    found, _ = scan(data)
    assert [(e.code, e.line) for e in found.errors] == [("empty_file", None)]
    assert found.lines == 0


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n", b"\r\n \n"])
def test_blank_lines_at_the_end_are_no_requests(end: bytes) -> None:
    found, plan = scan(line("a") + line("b").rstrip() + end)
    assert (found.errors, found.lines, len(plan)) == ((), 2, 2)


def test_each_blank_line_in_the_middle_is_an_error() -> None:
    found, _ = scan(line("a") + b"\n \n" + line("b"))
    assert [e.line for e in found.errors] == [2, 3]
    assert found.lines == 2


def test_a_byte_order_mark_is_passed_over() -> None:
    data = BOM + line("a") + line("b")
    found, plan = scan(data)
    assert found.errors == ()
    assert [_text(data, row) for row in plan] == [line("a").rstrip(), line("b").rstrip()]


def test_a_hundred_errors_are_kept_and_all_are_counted() -> None:
    found, _ = scan(b"x\n" * 250)
    assert (len(found.errors), found.error_count, found.lines) == (MAX_ERRORS, 250, 250)
    *_, last = refusals(found, "/v1/chat/completions")
    assert (last.code, "150 more" in last.message) == ("more_errors", True)


@pytest.mark.parametrize(("count", "error"), [(5, False), (6, True), (500, True)])
def test_lines_beyond_the_limit_are_one_error(count: int, error: bool) -> None:
    found, _ = scan(b"".join(line(str(i)) for i in range(count)), Limits(max_lines=5))
    assert [(e.code, e.line) for e in found.errors] == ([("too_many_tasks", 6)] if error else [])


def test_a_request_after_a_sea_of_blank_lines_is_not_lost_silently() -> None:
    found, _ = scan(line("a") + b"\n" * 100 + line("b"), Limits(max_lines=5))
    assert [e.code for e in found.errors] == ["too_many_tasks"]


def test_a_line_that_is_too_long_costs_no_memory_and_the_next_is_read() -> None:
    scanner = Scanner(Limits(max_line_bytes=1000))
    scanner.feed(line("a"))
    for _ in range(100):
        scanner.feed(b"x" * 900)
        assert len(scanner._line) <= 1000
    scanner.feed(b"\n" + line("b"))
    found, _ = scanner.finish()
    assert [(e.code, e.line) for e in found.errors] == [("line_too_long", 2)]
    assert found.lines == 3


def test_too_many_models_are_refused() -> None:
    lines = [line(str(i), body_model=f"m{i}") for i in range(MAX_MODELS + 1)]
    found, _ = scan(b"".join(lines))
    assert [(e.code, e.line) for e in found.errors] == [("too_many_models", MAX_MODELS + 1)]
    assert scan(b"".join(lines[:-1]))[0].errors == ()


@pytest.mark.parametrize(
    ("value", "each"), [("text", 1), ([1, 2, 3], 1), (["a", "b"], 2), ([[1, 2], [3]], 2), ([], 1), (None, 1)]
)
def test_embedding_inputs_are_counted_over_the_file(value: object, each: int) -> None:
    lines = [line("big", url="/v1/embeddings", body={"model": "m", "input": ["x"] * (MAX_EMBEDDING_INPUTS - 2)})]
    lines += [line(f"{i}", url="/v1/embeddings", body={"model": "m", "input": value}) for i in range(3)]
    found, _ = scan(b"".join(lines))
    assert [(e.code, e.line) for e in found.errors] == [("too_many_inputs", 2 + 2 // each)]


@pytest.mark.parametrize("piece", [1, 7, 64, 1000])
def test_where_the_bytes_are_cut_changes_nothing(piece: int) -> None:
    data = BOM + b"".join(chat(f"c{i}", "s" * 20 * (i % 3), "ü" * i) for i in range(20)) + b"bad\n" * (piece % 2)
    whole, cut = scan(data), scan(data, piece=piece)
    assert whole[0] == cut[0]
    assert np.array_equal(whole[1], cut[1])


def test_the_plan_finds_every_line_and_keeps_prefixes_together() -> None:
    systems, models = ["a" * 600, "b" * 600, "a" * 300 + "c" * 300], ["m1", "m2"]
    data = b"".join(chat(f"{i}", systems[i % 3], f"question {i}", models[i % 2]) for i in range(60))
    found, plan = scan(data)
    assert found.models == ("m1", "m2")
    assert sorted(plan["line"]) == list(range(60))
    for row in plan:
        request = json.loads(_text(data, row))
        assert request["custom_id"] == str(row["line"])
        assert request["body"]["model"] == found.models[row["model"]]
    groups = [(int(row["model"]), int(row["line"]) % 3) for row in plan]
    changes = sum(a != b for a, b in itertools.pairwise(groups))
    assert changes == 5, "six groups, each in one piece"
    of_system = {
        (m, s): {int(r["prefix"]) for r, g in zip(plan, groups, strict=True) if g == (m, s)} for m, s in groups
    }
    assert all(len(prefixes) == 1 for prefixes in of_system.values())
    assert of_system[0, 0] == of_system[0, 2], "equal in their first block"
    assert of_system[0, 0] != of_system[0, 1]
    assert of_system[0, 0] != of_system[1, 0]


def test_text_alone_and_as_a_part_have_one_prefix() -> None:
    plain = line("a", body_messages=[{"role": "user", "content": "same words"}])
    parts = line("b", body_messages=[{"content": [{"text": "same words", "type": "text"}], "role": "user"}])
    other = line("c", body_messages=[{"role": "user", "content": "other words"}])
    _, plan = scan(plain + parts + other)
    prefix = {int(row["line"]): row["prefix"] for row in plan}
    assert prefix[0] == prefix[1] != prefix[2]


def test_tools_are_part_of_the_prefix() -> None:
    _, plan = scan(line("a", body_tools=[{"type": "function"}]) + line("b"))
    assert plan["prefix"][0] != plan["prefix"][1]


@pytest.mark.parametrize(
    ("body", "size"),
    [
        ({"messages": [{"role": "user", "content": "12345"}]}, 4 + 5),
        ({"messages": [{"role": "user", "content": "äö"}]}, 4 + 4),
        ({"prompt": "abc"}, 3),
        ({"prompt": [1, 22]}, 5),
        ({"input": ["ab", "c"], "instructions": "xyz"}, 6),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"
          + "A" * 100_000}}]}]}, 4 + MEDIA_BYTES),
        ({}, 0),
    ],
)  # fmt: skip
def test_prompt_bytes_count_text_and_a_flat_rate_for_media(body: dict[str, Any], size: int) -> None:
    found, plan = scan(line("a", body={"model": "m", **body}))
    assert (found.prompt_bytes, plan["prompt_bytes"][0]) == (size, size)


def test_deep_nesting_inside_a_prompt_is_no_fault_of_the_scanner() -> None:
    depth = 800
    found, _ = scan(line("a", body_messages="X").replace(b'"X"', b"[" * depth + b'"hi"' + b"]" * depth))
    assert found.errors == ()


def test_a_plan_reads_back_by_rows() -> None:
    _, plan = scan(b"".join(line(str(i)) for i in range(10)))
    raw = plan.tobytes()
    assert PLAN.itemsize == 30
    assert np.array_equal(read_plan(raw[3 * PLAN.itemsize : 7 * PLAN.itemsize]), plan[3:7])


def test_an_endpoint_may_be_added() -> None:
    found, _ = scan(line(url="/v1/rerank"), Limits(endpoints=("/v1/rerank",)))
    assert (found.errors, found.urls) == ((), ("/v1/rerank",))


def test_a_batch_of_another_endpoint_is_refused_with_both_named() -> None:
    found, _ = scan(line())
    assert refusals(found, "/v1/chat/completions") == ()
    (error,) = refusals(found, "/v1/embeddings")
    assert isinstance(error, LineError)
    assert (error.code, error.param, error.line) == ("url_mismatch", "url", 1)
    assert "/v1/chat/completions" in error.message
    assert "/v1/embeddings" in error.message


def _text(data: bytes, row: Any) -> bytes:
    return data[int(row["offset"]) : int(row["offset"]) + int(row["length"])]
