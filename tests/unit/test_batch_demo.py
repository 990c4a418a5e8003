"""The demo batch: what it asks, and what it makes of an output file."""

import json
from typing import Any

import pytest

from batchgw.demo import CHAT, DemoError, checked, requests
from batchgw.lines import Limits, Scanner


def line(custom_id: str, status: int = 200) -> dict[str, Any]:
    body = {"choices": [{"message": {"role": "assistant", "content": f"answer to {custom_id}"}}]}
    return {"custom_id": custom_id, "response": {"status_code": status, "body": body}, "error": None}


def output(*lines: dict[str, Any]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in lines).encode()


def test_its_file_is_one_that_the_gateway_takes() -> None:
    scanner = Scanner(Limits())
    scanner.feed("".join(json.dumps(asked) + "\n" for asked in requests("m", 30)).encode())
    scan, plan = scanner.finish()
    assert (scan.lines, scan.error_count, list(scan.models), list(scan.urls)) == (30, 0, ["m"], [CHAT])
    assert len(plan) == 30


def test_answers_are_found_by_custom_id_in_whatever_order_they_come() -> None:
    answers = checked(output(line("c2"), line("c0"), line("c1")), 3)
    assert {id: body["choices"][0]["message"]["content"] for id, body in answers.items()} == {
        f"c{i}": f"answer to c{i}" for i in range(3)
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "3 of 3 lines not answered: c0, c1, c2"),
        ([line("c0"), line("c2")], "1 of 3 lines not answered: c1"),
        ([line("c0"), line("c1"), line("c2"), line("c1")], "1 of 3 lines answered more than once: c1"),
        ([line("c0"), line("c1"), line("c2"), line("c3")], "1 of 3 lines never asked: c3"),
        ([line("c0"), line("c1", 400), line("c2")], "1 of 3 lines not answered with 200: c1"),
    ],
)
def test_anything_but_one_answer_a_line_is_told(given: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(DemoError, match=f"^{said}$"):
        checked(output(*given), 3)


def test_a_long_list_of_faults_is_cut() -> None:
    with pytest.raises(DemoError, match=r"^90 of 90 lines not answered: c0, c1, c2, c3, c4, \.\.\.$"):
        checked(b"", 90)
