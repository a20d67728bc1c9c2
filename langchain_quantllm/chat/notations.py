"""The notations of arguments: JSON, and XML, Gemma's notation and Python turned into JSON text.

Each reader raises a `ValueError` with the error of the arguments.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from langchain_quantllm.structured.schema_merge import IS_TYPE

_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)(?:</parameter>|(?=\s*<parameter=)|\s*\Z)", re.DOTALL)
_GEMMA_DELIMITER = re.compile(r'<escape>|<\|"\|>')
_GEMMA_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s{}\[\]:,"]+(?P<key>\s*:)?')
_JSON_WORDS = {"True": "true", "False": "false", "None": "null"}
_PYTHON_WORDS = {"true": True, "false": False, "null": None}

JSON_FAILURES = (ValueError, RecursionError)
"""The errors of reading JSON; a deep nesting raises `RecursionError`."""


def checked(raw: str) -> str:
    """Return arguments as the text of a JSON object, which may come as a JSON string.

    Raises:
        ValueError: They are not JSON, or another value.
    """
    value = loaded(raw)
    if isinstance(value, str):
        raw = value.strip() or "{}"
        value = loaded(raw)
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise ValueError("its arguments are not an object")
    return raw


def loaded(raw: str) -> Any:
    """Read JSON.

    Raises:
        ValueError: It is not valid.
    """
    try:
        return json.loads(raw)
    except JSON_FAILURES as error:
        raise ValueError("it is not valid JSON") from error


def from_qwen_xml(body: str, parameters: Mapping[str, Any]) -> str:
    """Read `<parameter=key>` elements, typed by the JSON schema of the function's parameters.

    Raises:
        ValueError: There is other text between them.
    """
    values: dict[str, Any] = {}
    at = 0
    body = body.rstrip()
    while at < len(body):
        found = _PARAMETER.match(body, at)
        if found is None:
            raise ValueError("its parameters are not marked as such")
        text = found.group(2)
        text = text.removeprefix("\n").removesuffix("\n")
        values[found.group(1).strip()] = _typed(text, found.group(1).strip(), parameters)
        at = found.end()
    return json.dumps(values, ensure_ascii=False)


def _typed(text: str, key: str, parameters: Mapping[str, Any]) -> Any:
    """Read a text as a value of the schema's type; a text that is none stays a text."""
    properties = parameters.get("properties")
    types = _types(properties.get(key) if isinstance(properties, Mapping) else None)
    if not types or (types == {"string"}):
        return text
    try:
        value = json.loads(_JSON_WORDS.get(text.strip(), text))
    except JSON_FAILURES:
        return text
    return value if any(IS_TYPE[kind](value) for kind in types & IS_TYPE.keys()) else text


def _types(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type")
    types = {named} if isinstance(named, str) else set(named) if isinstance(named, list) else set()
    for choice in [*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ())]:
        types |= _types(choice)
    return types


def from_gemma(body: str) -> str:
    """Read `{key:<escape>text<escape>,n:3}`, or the same with Gemma 4's marks around strings.

    Raises:
        ValueError: It is written otherwise.
    """
    parts = _GEMMA_DELIMITER.split(body)
    if len(parts) % 2 == 0:
        raise ValueError("a string of it does not end")
    for place, part in enumerate(parts):
        string = place % 2 == 1
        parts[place] = json.dumps(part, ensure_ascii=False) if string else _GEMMA_TOKEN.sub(_gemma_token, part)
    return checked("".join(parts))


def _gemma_token(found: re.Match[str]) -> str:
    token = found.group()
    if token.startswith('"'):
        return token
    if found.group("key"):
        return json.dumps(token[: -len(found.group("key"))], ensure_ascii=False) + ":"
    token = _JSON_WORDS.get(token, token)
    try:
        json.loads(token)
    except JSON_FAILURES:
        return json.dumps(token, ensure_ascii=False)
    return token


def from_python(arguments: str) -> str:
    """Read the arguments of a Python call: keywords with literals.

    Raises:
        ValueError: They are anything else.
    """
    try:
        call = ast.parse(f"f{arguments}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("its arguments have no names")
        values = {str(word.arg): ast.literal_eval(_JsonWords().visit(word.value)) for word in call.keywords}
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError("its arguments are not Python literals") from error


class _JsonWords(ast.NodeTransformer):
    """Turns JSON's `true`, `false` and `null` into Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_PYTHON_WORDS[node.id]) if node.id in _PYTHON_WORDS else node
