"""Answers held against OpenAI's published schema, when it lies beside the checkout."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jsonschema
import pytest

_FILE = Path(__file__).parents[2].parent / "shared" / "api" / "openai-openapi.json"


def _with_nulls(node: object) -> object:
    """OpenAPI 3.0's `nullable: true`, which the document still uses, said in JSON Schema."""
    if isinstance(node, list):
        return [_with_nulls(item) for item in node]
    if not isinstance(node, dict):
        return node
    plain = {key: _with_nulls(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if node.get("nullable") is True else plain


@functools.cache
def _components() -> dict:
    if not _FILE.exists():
        pytest.skip("OpenAI's schema does not lie beside this checkout")
    return {"schemas": _with_nulls(json.loads(_FILE.read_text())["components"]["schemas"])}


def check(name: str, answer: object) -> None:
    """Fails unless `answer` is a valid component `name`."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": _components()}
    jsonschema.Draft202012Validator(schema).validate(answer)
