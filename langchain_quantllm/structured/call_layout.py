"""The layout of tool calls and of reasoning, in the terms of xgrammar's structural tags.

Owns the formats that xgrammar can write, the parameters of calls in XML, and where reasoning may end. Makes no grammar
of JSON, and compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from langchain_quantllm.structured.constraints import ToolCalls
from langchain_quantllm.structured.schema_limits import read_json
from langchain_quantllm.structured.tool_formats import HERMES, ToolFormat

Layout = tuple[dict[str, Any], int, int]
"""A structural tag's format, and the most tokens needed to close it: at first, and for each open object."""

_WRITABLE = ("json", "qwen_xml", "glm_xml")
_OBJECT_WORDS = frozenset({"type", "properties", "required", "additionalProperties", "$defs", "title", "description"})
_NOTES = frozenset({"title", "description", "default", "examples"})


def writable(tools: ToolFormat) -> ToolFormat:
    """Return a format that xgrammar can write: the given one, or Hermes, which is read in every format's answers."""
    return tools if tools.style in _WRITABLE else HERMES


def has_trigger(tools: ToolFormat) -> bool:
    """Whether a text in this format can be held to valid calls from the mark on that opens one."""
    return bool(tools.trigger) and writable(tools) is tools and (tools.opening or tools.call).startswith(tools.trigger)


def value_ends(tools: ToolFormat) -> tuple[str, ...]:
    """List the texts that end a value in XML; none for other notations."""
    if tools.style == "qwen_xml":
        return "\n</parameter>\n", "</parameter>"
    if tools.style == "glm_xml":
        return "</arg_value>\n", "</arg_value>"
    return ()


def calls_layout(constraint: ToolCalls, json_layout: Callable[[Any, str], Layout]) -> Layout:
    """Lay out tool calls, amid text or alone.

    Args:
        constraint: The calls.
        json_layout: Lays out a value under a schema in a style of xgrammar's.
    """
    tools = writable(constraint.format)
    calls, reserve, object_reserve = [], 0, 0
    for text in constraint.tools:
        function = read_json(str(text))["function"]
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        content, tokens, more = json_layout(parameters, tools.style)
        if value_ends(tools):
            tokens += len("".join(_around_text("", tools))) // 2 * len(parameters.get("properties", ()))
            content = _xml_parameters(content, tools)
        calls.append({"type": "tag", "begin": tools.begin(function["name"]), "content": content, "end": tools.call_end})
        reserve, object_reserve = max(reserve, tokens), max(object_reserve, more)
    marks = tools.call + tools.call_end + tools.separator + tools.closing
    # A character outside ASCII may take a token for each of its bytes.
    reserve += len(marks) // 2 if marks.isascii() else len(marks.encode())
    once = not constraint.parallel
    section: dict[str, Any] = {"type": "tags_with_separator", "tags": calls, "separator": tools.separator}
    section |= {"at_least_one": True, "stop_after_first": once}
    if tools.opening:
        section = {"type": "tag", "begin": tools.opening, "content": section, "end": tools.closing}
    if constraint.mode == "required":
        return section, reserve, object_reserve
    tags = [section] if tools.opening else calls
    free = {"type": "triggered_tags", "triggers": [tools.trigger], "tags": tags, "stop_after_first": once}
    return free, reserve, object_reserve


def after_reasoning(
    layout: dict[str, Any], reasoning: tuple[str, str, bool], *, may_end_open: bool = False
) -> dict[str, Any]:
    """Lay out reasoning before an answer; it may be left out where the prompt has not opened it.

    Args:
        layout: The answer's.
        reasoning: `(begin, end, already_open)`, as constraints have it.
        may_end_open: Whether the text may end amid reasoning: some models never close what the prompt has opened.
    """
    begin, end, is_open = reasoning
    gap = {"type": "regex", "pattern": "[\\n ]{0,2}"}
    if may_end_open:
        reasoned = {"type": "dispatch", "rules": [(end, _sequence(gap, layout))], "loop": False}
        begun = _sequence({"type": "const_string", "value": begin}, reasoned)
        return reasoned if is_open else {"type": "or", "elements": [begun, layout]}
    reasoned = {"type": "tag", "begin": "" if is_open else begin, "content": {"type": "any_text"}, "end": end}
    both = _sequence(reasoned, gap)
    return _sequence(both if is_open else {"type": "optional", "content": both}, layout)


def _sequence(*elements: dict[str, Any]) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}


# Parameters in XML.


def _xml_parameters(layout: dict[str, Any], tools: ToolFormat) -> dict[str, Any]:
    """Lay out the parameters one by one, so that a text ends only where its tag stands as the format writes it.

    xgrammar's own layout of them ends a text at the first end tag, and so cuts one that quotes the tag. It is kept for
    values that are no free texts, and for objects of other properties than the named ones.
    """
    schema = layout["json_schema"]
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not properties or schema.keys() - _OBJECT_WORDS or schema.get("additionalProperties") is not False:
        return layout
    elements = []
    for key, value in properties.items():
        if _is_free(value):
            begin, end = _around_text(key, tools)
            element = {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": end}
        else:
            alone = {**schema, "properties": {key: value}, "required": [key]}
            element = layout | {"json_schema": alone}
        is_required = key in schema.get("required", ())
        elements.append(element if is_required else {"type": "optional", "content": element})
    return _sequence(*elements)


def _is_free(schema: Any) -> bool:
    """Whether any text is a value under a schema."""
    if not isinstance(schema, Mapping):
        return schema is True
    words = schema.keys() - _NOTES
    if words == {"type"}:
        return "string" in (schema["type"] if isinstance(schema["type"], list) else [schema["type"]])
    return not words or (words == {"anyOf"} and any(map(_is_free, schema["anyOf"])))


def _around_text(key: str, tools: ToolFormat) -> tuple[str, str]:
    """Write what stands before and after a text."""
    end = value_ends(tools)[0]
    if tools.style == "qwen_xml":
        return f"<parameter={key}>\n", end
    line = "\n" if tools.call.endswith("\n") else ""
    return f"<arg_key>{key}</arg_key>{line}<arg_value>", end.rstrip("\n") + line
