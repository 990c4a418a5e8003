"""Batch input: what is refused and where, and the order lines are run in."""

from __future__ import annotations

import json
from typing import Any

import pytest

from batchgw.lines import MAX_ERRORS, PLAN, Limits, Plan, Scanner, read_plan
from batchgw.records import Scan


def a_line(number: int = 1, **changes: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": f"question {number}"}]}
    plain = {"custom_id": f"c{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return {name: value for name, value in (plain | changes).items() if value is not ...}


def jsonl(*lines: Any) -> bytes:
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines)


def scanned(data: bytes, piece: int = 1 << 20, **limits: Any) -> tuple[Scan, Plan]:
    scanner = Scanner(Limits(**limits))
    for at in range(0, len(data), piece):
        scanner.feed(data[at : at + piece])
    return scanner.finish()


def codes(data: bytes, **limits: Any) -> list[tuple[str, int | None]]:
    scan, plan = scanned(data, **limits)
    assert len(plan) == 0
    assert scan.error_count == len(scan.errors)
    return [(error.code, error.line) for error in scan.errors]


def body(**changes: Any) -> dict[str, Any]:
    plain = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    return {name: value for name, value in (plain | changes).items() if value is not ...}


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", "invalid_json_line"),
        (b"[1]", "invalid_json_line"),
        (b"\xff\xfe", "invalid_json_line"),
        (b"[" * 100_000, "invalid_json_line"),
        (a_line(custom_id=...), "missing_required_parameter"),
        (a_line(custom_id=""), "missing_required_parameter"),
        (a_line(custom_id="x" * 513), "invalid_custom_id"),
        (a_line(method=...), "missing_required_parameter"),
        (a_line(method="GET"), "invalid_method"),
        (a_line(url="https://elsewhere/v1/chat/completions"), "invalid_url"),
        (a_line(url="//elsewhere"), "invalid_url"),
        (a_line(url=7), "invalid_type"),
        (a_line(body=...), "missing_required_parameter"),
        (a_line(body="text"), "invalid_type"),
        (a_line(body=body(model=...)), "missing_required_parameter"),
        (a_line(body=body(model="")), "missing_required_parameter"),
        (a_line(body=body(stream=True)), "stream_unsupported"),
        (a_line(body=body(stream="yes")), "stream_unsupported"),
    ],
)
def test_a_line_that_cannot_run_is_refused_with_its_number(line: Any, code: str) -> None:
    assert codes(jsonl(a_line(0), line, a_line(2))) == [(code, 2)]


@pytest.mark.parametrize(
    "changes",
    [
        {"stream": False},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}]},
        {"messages": None, "seed": 2**70},
        {"messages": json.loads("[" * 300 + "]" * 300)},
    ],
)
def test_what_engines_accept_is_accepted(changes: dict[str, Any]) -> None:
    scan, plan = scanned(jsonl(a_line(body=body(**changes))))
    assert (scan.error_count, len(plan)) == (0, 1)


def test_a_custom_id_is_used_once_and_all_lines_have_one_endpoint() -> None:
    other = a_line(3, url="/v1/embeddings")
    assert codes(jsonl(a_line(1), a_line(2, custom_id="c1"), other)) == [
        ("duplicate_custom_id", 2),
        ("url_mismatch", 3),
    ]


def test_a_last_newline_is_fine_and_a_blank_line_before_another_is_not() -> None:
    assert scanned(jsonl(a_line(1)) + b"\n\n")[0].error_count == 0
    assert codes(jsonl(a_line(1), b"", a_line(2))) == [("invalid_json_line", 2)]


def test_an_empty_file_is_refused() -> None:
    assert codes(b"") == codes(b"\n\n") == [("empty_file", None)]


def test_limits_are_told_with_the_line_that_breaks_them() -> None:
    assert codes(jsonl(*map(a_line, range(3))), max_lines=2) == [("too_many_tasks", 3)]
    assert codes(jsonl(a_line(1), a_line(2, body=body(user="x" * 900))), max_line_bytes=500) == [("line_too_long", 2)]


def test_the_first_errors_are_kept_and_the_others_counted() -> None:
    scan, _ = scanned(jsonl(*[b"{"] * 150))
    assert (len(scan.errors), scan.error_count) == (MAX_ERRORS, 150)


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_where_the_bytes_are_cut_makes_no_difference(piece: int) -> None:
    data = "\ufeff".encode() + jsonl(*map(a_line, range(20)))
    scan, plan = scanned(data, piece)
    assert scan == scanned(data)[0]
    for row in plan:
        line = json.loads(data[row["offset"] : row["offset"] + row["length"]])
        assert line["custom_id"] == f"c{row['line']}"


def test_lines_run_by_model_and_by_the_head_of_their_prompt() -> None:
    def asking(number: int, model: str, head: str) -> dict[str, Any]:
        messages = [{"role": "system", "content": head * 400}, {"role": "user", "content": str(number)}]
        return a_line(number, body={"model": model, "messages": messages})

    heads, models = "xyz", ("a", "b")
    lines = [asking(n, models[n % 2], heads[n % 3]) for n in range(18)]
    scan, plan = scanned(jsonl(*lines))
    assert scan.models == models
    groups = [(int(row["model"]), int(row["line"]) % 3) for row in plan]
    assert len({row["prefix"] for row in plan}) == 6
    assert [group for n, group in enumerate(groups) if n == 0 or groups[n - 1] != group] == sorted(
        set(groups), key=groups.index
    )
    assert sorted(plan["line"]) == list(range(18))


def test_a_plan_is_read_back_as_it_was_written() -> None:
    _, plan = scanned(jsonl(*map(a_line, range(3))))
    assert (read_plan(plan.tobytes()) == plan).all()
    assert read_plan(plan.tobytes()[PLAN.itemsize :])["line"].tolist() == plan["line"][1:].tolist()
