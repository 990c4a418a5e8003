"""SGLang's generate path: ids in, and junk that must only ever be a 400."""

from __future__ import annotations

import contextlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmd_sched.errors import BadRequest
from llmd_sched.parsers.sglang import SGLangParser
from llmd_sched.plugin import Parsed
from tests.builders import fuzzed


def parse(body: object) -> Parsed:
    return SGLangParser().parse("/generate", body if isinstance(body, bytes) else json.dumps(body).encode())


def test_every_field_is_read() -> None:
    sampling = {"max_new_tokens": 7, "temperature": 0.5}
    body = {"rid": "r", "input_ids": [1, 258], "sampling_params": sampling, "stream": True, "extra_key": "s"}
    assert parse(body) == Parsed(
        prompts=(struct.pack("<2I", 1, 258),), max_output_tokens=7, streaming=True, cache_salt="s", names_model=False
    )


@pytest.mark.parametrize(
    "fields", [{}, {"sampling_params": {}}, {"sampling_params": None, "stream": None, "extra_key": None, "text": None}]
)
def test_what_is_absent_or_null_has_its_default(fields: dict[str, object]) -> None:
    assert parse({"input_ids": [5], **fields}) == Parsed(prompts=(b"\5\0\0\0",), names_model=False)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "invalid generate request: must have input_ids field"),
        ({"text": "hi"}, "must have input_ids field"),
        ({"input_ids": []}, "must have input_ids field"),
        ({"input_ids": [-1]}, "token ids must be between 0 and 4294967295"),
        ({"input_ids": [[1]]}, "got `array`"),
        ({"input_ids": ["1"]}, r"\$\.input_ids\[0\]"),
        ({"input_ids": [1], "sampling_params": []}, r"\$\.sampling_params"),
        ({"input_ids": [1], "sampling_params": {"max_new_tokens": "9"}}, r"\$\.sampling_params\.max_new_tokens"),
        ({"input_ids": [1], "extra_key": 3}, r"\$\.extra_key"),
        (b"{", "error unmarshaling request bodyMap: "),
        (b"[]", "error unmarshaling request bodyMap: "),
    ],
)
def test_a_body_that_cannot_be_generated_from_is_refused(body: object, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        parse(body)


@fuzzed
@given(st.dictionaries(st.sampled_from(["input_ids", "sampling_params", "stream"]), st.lists(st.integers(-3, 9))))
def test_any_object_raises_nothing_but_bad_requests(body: dict[str, object]) -> None:
    with contextlib.suppress(BadRequest):
        parse(body)
