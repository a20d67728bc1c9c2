"""The schemas of tools and wanted answers: from functions, classes and dicts to OpenAI's descriptions.

LangChain writes the names and descriptions; the schemas are `class_schemas`' where there is a class, so that what
follows the schema is valid for the class. Knows no model.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from langchain_core.tools import BaseTool, StructuredTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from typing_extensions import is_typeddict

from langchain_quantllm.chat.class_schemas import class_schema, name_of, schemas_in, tidied
from langchain_quantllm.chat.typed_dicts import required_names, without_requirements
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.structured.schema_limits import check_json, shortened

_OF_OBJECTS = ("type", "properties", "required", "additionalProperties", "$defs")
_ENVELOPES = ("schema", "parameters", "input_schema")
"""The keys of a schema beside a name: in OpenAI's formats and functions, in Anthropic's tools."""

_KEYWORDS = {"type", "properties", "anyOf", "oneOf", "allOf", "enum", "const", "$ref", "$schema", "items", "required"}


_CONVERSION_ERRORS = (ValueError, TypeError, RecursionError, AttributeError, LookupError, NameError)
"""What LangChain's conversions raise for what they cannot describe."""


def tool_schema(tool: Any, strict: bool | None = None) -> dict[str, Any]:
    """Describe a function as OpenAI's API takes it.

    Args:
        tool: A function, a pydantic class, a LangChain tool, a JSON schema with a title, or such a description.
        strict: Written into the description.

    Raises:
        InvalidOptionError: If it is none of these, another provider's built-in tool, or takes no object.
    """
    if isinstance(tool, Mapping):
        _check(tool, "the tool")
    given = _named(tool)
    try:
        described: dict[str, Any] = convert_to_openai_tool(given, strict=strict)
    except _CONVERSION_ERRORS as error:
        msg = (
            f"the tool {shortened(repr(tool))} cannot be described ({shortened(str(error), 200)}); give a function "
            "with type hints, a pydantic class, a LangChain tool, or a JSON schema of an object with a title."
        )
        raise InvalidOptionError(msg) from error
    function = described.get("function")
    if not isinstance(function, dict) or not function.get("name"):
        kind = described.get("type")
        msg = f"the tool {kind!r} is one that another provider runs, or has no name; give a function."
        raise InvalidOptionError(msg)
    if isinstance(tool, Mapping) and not {"function", *_ENVELOPES} & tool.keys() and "properties" not in tool:
        function["parameters"] = {k: v for k, v in tool.items() if k not in ("title", "description", "name")}
    elif (own := _arguments_schema(given)) is not None:
        own = _with_its_parts(own)
        _take_descriptions(own, function.get("parameters"))
        function["parameters"] = {name: own[name] for name in _OF_OBJECTS if name in own}
        if strict:
            for part in schemas_in(function["parameters"]):
                part |= {"additionalProperties": False} if "properties" in part else {}
    parameters = function.get("parameters") or {}
    kind = parameters.get("type", "object") if isinstance(parameters, Mapping) else parameters
    if kind != "object":
        msg = f"the arguments of the tool {function['name']!r} are of type {kind!r}; they must be an object."
        raise InvalidOptionError(msg)
    return described


def answer_tool(schema: Any, strict: bool | None = None) -> dict[str, Any]:
    """Describe a function that takes a wanted answer.

    Raises:
        InvalidOptionError: If there is no JSON schema for it, or it is no object.
    """
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    if is_class and not _is_pydantic(schema):
        return tool_schema(schema, strict)
    name, found = answer_schema(schema, strict)
    found = found if isinstance(schema, Mapping) else _with_its_parts(found)
    given = schema if isinstance(schema, Mapping) else {}
    given = next((given[key] for key in ("function", "json_schema") if isinstance(given.get(key), Mapping)), given)
    about = str(given.get("description") or found.get("description") or ("" if given else _summary(schema)))
    parameters = {k: v for k, v in found.items() if k not in ("title", "description", "name")}
    if parameters.get("type", "object") != "object":
        msg = (
            f"schema={shortened(repr(schema))} is of type {parameters['type']!r}, but a function takes an object; use "
            "method='json_schema', or give a class with a field of it."
        )
        raise InvalidOptionError(msg)
    parameters = {"type": "object", "properties": {}, **parameters} if "anyOf" not in parameters else parameters
    described = {"name": name, "description": about, "parameters": parameters}
    return tool_schema({"type": "function", "function": described | ({} if strict is None else {"strict": strict})})


def answer_schema(schema: Any, strict: bool | None = None) -> tuple[str, dict[str, Any]]:
    """Describe a wanted answer.

    Args:
        schema: A pydantic class, a TypedDict, another type that pydantic knows, a function whose arguments are wanted,
            a JSON schema, or one with its name, as OpenAI's API takes it.
        strict: As in `convert_to_json_schema` of langchain-core; it does not change a schema that is a dict.

    Returns:
        A name and a JSON schema.

    Raises:
        InvalidOptionError: If there is no JSON schema for it, or its values cannot be guaranteed.
    """
    if isinstance(schema, Mapping):
        return _of_mapping(schema)
    if is_typeddict(schema):
        return _of_typed_dict(schema, strict)
    if isinstance(schema, type) and is_basemodel_subclass(schema) and not _is_pydantic(schema):  # pydantic 1
        return name_of(schema), _converted(schema, strict)
    if isinstance(schema, BaseTool) or (callable(schema) and not is_type(schema)):
        function = tool_schema(schema, strict)["function"]
        return function["name"], dict(function.get("parameters") or {"type": "object", "properties": {}})
    if not is_type(schema):
        msg = (
            f"schema={shortened(repr(schema))} is a {type(schema).__name__}, which has no JSON schema; give a pydantic "
            "class, a TypedDict or a JSON schema."
        )
        raise InvalidOptionError(msg)
    found = class_schema(schema)
    if strict:
        for part in schemas_in(found):
            part |= {"additionalProperties": False} if "properties" in part else {}
    title = name_of(schema) if isinstance(schema, type) and not hasattr(schema, "__origin__") else "answer"
    if "$ref" in found:
        return title, found
    about = found.pop("description", None) or _summary(schema)
    return title, {"title": title, **({"description": about} if about else {}), **found}


def traced_schema(schema: Any) -> Any:
    """Return a wanted answer as LangChain's tracing can describe it; None where it cannot."""
    try:
        convert_to_json_schema(schema)
    except _CONVERSION_ERRORS:
        name, found = answer_schema(schema)
        return {"title": name, **found} if "properties" in found else None
    return schema


def is_type(given: Any) -> bool:
    """Whether something is a type of values, not a value, a function or a tool."""
    if isinstance(given, type):
        return True
    return (
        not isinstance(given, Mapping | str | bytes | int | float | list | tuple | set | BaseTool)
        and (hasattr(given, "__origin__") or type(given).__module__ in ("typing", "types", "typing_extensions"))
        and not hasattr(given, "__code__")
    )


def _of_mapping(schema: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Read a JSON schema, or an envelope around one."""
    _check(schema, "the schema")
    inner = schema
    if isinstance(envelope := inner.get(str(inner.get("type"))), Mapping):  # {"type": "function", "function": ...}
        inner = envelope
    named = "name" in inner or inner.get("type") == "json_schema"
    found = next((inner[k] for k in _ENVELOPES if named and isinstance(inner.get(k), Mapping)), inner)
    if found is inner and "name" in inner and not _KEYWORDS & inner.keys():
        msg = f"schema={shortened(repr(schema))} has a name, but no JSON schema; give one as its 'schema'."
        raise InvalidOptionError(msg)
    return str(inner.get("name") or found.get("title") or "answer"), dict(found)


def _of_typed_dict(schema: Any, strict: bool | None) -> tuple[str, dict[str, Any]]:
    described = _converted(without_requirements(schema), strict)
    described["required"] = [name for name in described.get("properties", {}) if name in required_names(schema)]
    return name_of(schema), described


def _converted(schema: Any, strict: bool | None) -> dict[str, Any]:
    """Describe a class by LangChain."""
    try:
        found: dict[str, Any] = convert_to_json_schema(schema, strict=strict)
    except _CONVERSION_ERRORS as error:
        msg = (
            f"schema={shortened(repr(schema))} has no JSON schema ({shortened(str(error), 200)}); give a pydantic "
            "class, a TypedDict that does not refer to itself, or a JSON schema."
        )
        raise InvalidOptionError(msg) from error
    return found


def _take_descriptions(schema: Mapping[str, Any], other: Any) -> None:
    """Describe the arguments in a schema as another one does: LangChain reads them from a function's docstring."""
    others = other.get("properties", {}) if isinstance(other, Mapping) else {}
    for name, part in schema.get("properties", {}).items():
        about = others.get(name)
        if isinstance(about, Mapping) and "description" in about:
            part.setdefault("description", about["description"])


def _with_its_parts(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Write the schema of a class that refers to itself as an object, beside its definition: a function takes one."""
    if "$ref" not in schema:
        return dict(schema)
    return {**schema["$defs"][schema["$ref"].removeprefix("#/$defs/")], "$defs": schema["$defs"]}


def _check(given: Mapping[str, Any], what: str) -> None:
    try:
        check_json(given)
    except ValueError as error:
        name = given.get("name") or given.get("title") or ""
        msg = f"{what} {shortened(str(name))!r} cannot be used: {error}."
        raise InvalidOptionError(msg) from error


def _is_pydantic(kind: Any) -> bool:
    return hasattr(kind, "model_json_schema")


def _summary(schema: Any) -> str:
    """Return the description of a class: its own, not that of a base or the one that a dataclass is given."""
    text = vars(schema).get("__doc__") or "" if isinstance(schema, type) else ""
    return "" if dataclasses.is_dataclass(schema) and text.startswith(f"{name_of(schema)}(") else " ".join(text.split())


def _named(tool: Any) -> Any:
    """Give a name to a callable that has none, such as a `functools.partial` or an object."""
    if isinstance(tool, BaseTool | Mapping | type) or not callable(tool) or hasattr(tool, "__name__"):
        return tool
    inner: Any = tool
    while isinstance(inner, functools.partial):
        inner = inner.func
    named = getattr(inner, "__name__", None)
    try:
        signature = inspect.signature(tool)
        hints = get_type_hints(inner if named else type(tool).__call__)
    except _CONVERSION_ERRORS as error:
        msg = f"the tool {shortened(repr(tool))} cannot be described ({shortened(str(error), 200)}); give a function."
        raise InvalidOptionError(msg) from error

    def described(**_: Any) -> None:
        """Stand for the tool while it is described."""

    described.__name__ = named or type(tool).__name__
    described.__doc__ = inspect.getdoc(inner if named else type(tool)) or described.__name__
    described.__signature__ = signature  # type: ignore[attr-defined]
    described.__annotations__ = {name: hints.get(name, Any) for name in signature.parameters}
    return described


def _arguments_schema(tool: Any) -> dict[str, Any] | None:
    """Return the schema of a class, or of a tool's or function's arguments; None where LangChain's remains."""
    given = tool
    try:
        if isinstance(given, BaseTool):
            given = given.tool_call_schema
        elif callable(given) and not isinstance(given, type):
            given = StructuredTool.from_function(given, description="-").tool_call_schema
    except _CONVERSION_ERRORS:
        return None
    if not (isinstance(given, type) and is_basemodel_subclass(given) and _is_pydantic(given)):
        return None
    try:
        return class_schema(given)
    except InvalidOptionError:  # the tool checks its arguments itself
        model: Any = given
        own: dict[str, Any] = model.model_json_schema()
        own = {**own["$defs"].get(own.get("$ref", "").rpartition("/")[2], {}), **own} if "$ref" in own else own
        return tidied(own)
