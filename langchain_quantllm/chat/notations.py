"""The notations of arguments: JSON, Gemma's notation and Python turned into JSON text, and the types of texts in XML.

Each reader of arguments raises a `ValueError` with their error.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from langchain_quantllm.structured.schema_merge import IS_TYPE

_CHOICES = ("anyOf", "oneOf", "allOf")
_GEMMA_DELIMITER = re.compile(r'<escape>|<\|"\|>')
_GEMMA_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s{}\[\]:,"]+(?P<key>\s*:)?')
_JSON_WORDS = {"True": "true", "False": "false", "None": "null"}
_PYTHON_WORDS = {"true": True, "false": False, "null": None}

MAX_DEPTH = 100
"""The most brackets of arguments within each other; Python's readers and writers of JSON recurse over them."""

JSON_FAILURES = (ValueError, RecursionError)
"""The errors of reading JSON; a deep nesting raises `RecursionError`."""


def checked(raw: str) -> str:
    """Return arguments as the text of a JSON object, which may come as a JSON string.

    Raises:
        ValueError: They are not JSON, or another value, or nested deeper than `MAX_DEPTH`.
    """
    value = loaded(raw)
    if isinstance(value, str):
        raw = value.strip() or "{}"
        value = loaded(raw)
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise ValueError("its arguments are not an object")
    check_depth(value)
    return raw


def check_depth(value: Any) -> None:
    """Refuse a value that is nested too deeply.

    Raises:
        ValueError: It is nested deeper than `MAX_DEPTH`.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for inner in level if isinstance(inner, dict | list) for item in _items(inner)]
    if any(isinstance(inner, dict | list) for inner in level):
        raise ValueError(f"its arguments are nested deeper than {MAX_DEPTH} brackets")


def _items(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def loaded(raw: str) -> Any:
    """Read JSON.

    Raises:
        ValueError: It is not valid.
    """
    try:
        return json.loads(raw)
    except JSON_FAILURES as error:
        raise ValueError("it is not valid JSON") from error


def typed(text: str, key: str, parameters: Mapping[str, Any]) -> Any:
    """Read a text as a value of its parameter's type; a text that is none stays a text.

    Args:
        text: The value as it is written in XML.
        key: The parameter's name.
        parameters: The JSON schema of the function's parameters.
    """
    types = types_of(key, parameters)
    if not types or (types == {"string"}):
        return text
    try:
        value = json.loads(_JSON_WORDS.get(text.strip(), text))
    except JSON_FAILURES:
        return text
    return value if any(IS_TYPE[kind](value) for kind in types & IS_TYPE.keys()) else text


def types_of(key: str, parameters: Mapping[str, Any]) -> set[str]:
    """List the types that a schema of parameters names for one of them; none where it leaves them open."""
    properties = parameters.get("properties")
    return _types(properties.get(key) if isinstance(properties, Mapping) else None, parameters, frozenset())


def _types(schema: Any, root: Mapping[str, Any], seen: frozenset[str]) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type")
    if isinstance(named, str):
        return {named}
    if isinstance(named, list):
        return {kind for kind in named if isinstance(kind, str)}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        return _types(_referred(reference, root), root, seen | {reference})
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return {kind for kind, is_type in IS_TYPE.items() if any(is_type(value) for value in values)}
    types: set[str] = set()
    for choice in [choice for word in _CHOICES for choice in schema.get(word) or ()]:
        types |= _types(choice, root, seen)
    return types


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    """Find the part of a schema that a reference such as `#/$defs/Point` names; None where there is none."""
    found: Any = root
    for name in reference.removeprefix("#").split("/")[1:]:
        found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found if reference.startswith("#") else None


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
        check_depth(values)
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError("its arguments are not Python literals") from error


class _JsonWords(ast.NodeTransformer):
    """Turns JSON's `true`, `false` and `null` into Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_PYTHON_WORDS[node.id]) if node.id in _PYTHON_WORDS else node
