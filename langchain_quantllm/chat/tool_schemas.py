"""The schemas of tools and wanted answers: from functions, classes and dicts to OpenAI's descriptions.

Keeps the schemas that LangChain's conversion loses: those that are no plain object, and those of classes that refer to
themselves, for which it writes `{}`, under which anything is valid. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.tools import BaseTool, StructuredTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from langchain_quantllm.errors import InvalidOptionError

_OF_OBJECTS = ("type", "properties", "required", "additionalProperties", "$defs")
_ENVELOPES = ("schema", "parameters", "input_schema")
"""The keys of a schema beside a name: in OpenAI's formats and functions, in Anthropic's tools."""


def tool_schema(tool: Any, strict: bool | None = None) -> dict[str, Any]:
    """Describe a function as OpenAI's API takes it.

    Args:
        tool: A function, a pydantic class, a LangChain tool, a JSON schema with a title, or such a description.
        strict: Written into the description.

    Raises:
        InvalidOptionError: If it is none of these, another provider's built-in tool, or takes no object.
    """
    try:
        described: dict[str, Any] = convert_to_openai_tool(tool, strict=strict)
    except (ValueError, TypeError, RecursionError) as error:
        msg = (
            f"the tool {str(tool)[:100]!r} cannot be described ({str(error)[:200]}); give a function with type hints "
            "and a docstring, a pydantic class, a LangChain tool, or a JSON schema of an object with a title."
        )
        raise InvalidOptionError(msg) from error
    function = described.get("function")
    if not isinstance(function, dict) or not function.get("name"):
        kind = described.get("type")
        msg = f"the tool {kind!r} is one that another provider runs, or has no name; give a function."
        raise InvalidOptionError(msg)
    if isinstance(tool, Mapping) and not {"function", *_ENVELOPES} & tool.keys() and "properties" not in tool:
        function["parameters"] = {k: v for k, v in tool.items() if k not in ("title", "description", "name")}
    elif (own := _recursive_schema(tool)) is not None:
        root = {**own["$defs"].get(own.get("$ref", "").rpartition("/")[2], {}), **own}
        function["parameters"] = {name: root[name] for name in _OF_OBJECTS if name in root}
    kind = function.get("parameters", {}).get("type", "object")
    if kind != "object":
        msg = f"the arguments of the tool {function['name']!r} are of type {kind!r}; they must be an object."
        raise InvalidOptionError(msg)
    return described


def answer_schema(schema: Any, strict: bool | None = None) -> tuple[str, dict[str, Any]]:
    """Describe a wanted answer.

    Args:
        schema: A pydantic class, a TypedDict, a JSON schema, or one with its name, as OpenAI's API takes it.
        strict: As in `convert_to_json_schema` of langchain-core; it does not change a schema that is a dict.

    Returns:
        A name and a JSON schema.

    Raises:
        InvalidOptionError: If there is no JSON schema for it.
    """
    if isinstance(schema, Mapping):
        inner = schema
        if isinstance(envelope := inner.get(str(inner.get("type"))), Mapping):  # {"type": "function", "function": ...}
            inner = envelope
        found = next((inner[k] for k in _ENVELOPES if "name" in inner and isinstance(inner.get(k), Mapping)), inner)
        return str(inner.get("name") or found.get("title") or "answer"), dict(found)
    own = _recursive_schema(schema)
    if own is not None:
        return schema.__name__, own
    try:
        described: dict[str, Any] = convert_to_json_schema(schema, strict=strict)
    except (ValueError, TypeError, RecursionError) as error:
        msg = (
            f"schema={str(schema)[:100]!r} has no JSON schema ({str(error)[:200]}); give a pydantic class, a TypedDict "
            "that does not refer to itself, or a JSON schema."
        )
        raise InvalidOptionError(msg) from error
    return str(described.get("title", "answer")), described


def _recursive_schema(given: Any) -> dict[str, Any] | None:
    """Return the JSON schema of a class, or of a tool's or function's arguments, if it refers to itself."""
    if isinstance(given, BaseTool):
        given = given.tool_call_schema
    elif callable(given) and not isinstance(given, type):
        given = StructuredTool.from_function(given).tool_call_schema
    if not (isinstance(given, type) and is_basemodel_subclass(given) and hasattr(given, "model_json_schema")):
        return None
    schema: dict[str, Any] = given.model_json_schema()
    definitions = schema.get("$defs", {})
    is_recursive = any(name in _reachable(definition, definitions) for name, definition in definitions.items())
    return schema if is_recursive else None


def _reachable(schema: Any, definitions: Mapping[str, Any]) -> set[str]:
    """List the definitions that a schema refers to, directly or not."""
    found: set[str] = set()
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, Mapping):
            name = str(part.get("$ref", "")).rpartition("/")[2]
            if name in definitions and name not in found:
                found.add(name)
                waiting.append(definitions[name])
            waiting += part.values()
    return found
