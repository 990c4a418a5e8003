"""What the OpenAPI page says about bodies: schemas come from the structs that are decoded and encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

REF = "#/components/schemas/{name}"

_TEXT_OR_NULL = {"type": ["string", "null"]}
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT_OR_NULL,
                "code": _TEXT_OR_NULL,
            },
        }
    },
}
_ERROR_ANSWER = {
    "description": "Refused: what is wrong, where, and what is accepted",
    "content": {"application/json": {"schema": {"$ref": REF.format(name="Error")}}},
}


def returns(kind: Any) -> dict[str, Any]:
    """Arguments of a route whose answer is ``kind``."""
    return {"responses": {200: {"description": "Done", "content": {"application/json": {"schema": _schema(kind)}}}}}


def body(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return _request("application/json", _schema(kind))


def _request(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


def _form(fields: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": fields, "required": required}
    return _request("multipart/form-data", schema)


def _schema(kind: Any) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=REF)
    return schema


BINARY = {"type": "string", "format": "binary"}
FILE_FORM = _form(
    {
        "purpose": {"type": "string", "enum": ["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
        "file": BINARY,
    },
    ["purpose", "file"],
)
PART_FORM = _form({"data": BINARY}, ["data"])


def describe(app: FastAPI, kinds: Sequence[Any]) -> dict[str, Any]:
    """The OpenAPI document, made once; ``kinds`` are all structs that routes refer to."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, components = msgspec.json.schema_components(kinds, ref_template=REF)
        document.setdefault("components", {})["schemas"] = components | {"Error": ERROR}
        for operation in (one for path in document["paths"].values() for one in path.values()):
            operation["responses"].pop("422", None)  # FastAPI's own, which is never sent
            operation["responses"]["4XX"] = _ERROR_ANSWER
        app.openapi_schema = document
    return app.openapi_schema
