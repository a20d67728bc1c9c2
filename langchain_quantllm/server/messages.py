"""The messages of a chat request, as LangChain's.

Owns which of their fields count. langchain-core converts them, and `chat.messages` brings them to the template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, InvalidToolCall, convert_to_messages
from langchain_core.messages.tool import invalid_tool_call

from langchain_quantllm.chat.notations import JSON_FAILURES
from langchain_quantllm.errors import first_line
from langchain_quantllm.server.errors import APIError, invalid

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def messages_of(given: Sequence[Mapping[str, Any]]) -> list[BaseMessage]:
    """Convert the messages of a request.

    Raises:
        APIError: If one of them cannot be read.
    """
    return [_message(message, f"messages.{at}") for at, message in enumerate(given)]


def _message(given: Mapping[str, Any], where: str) -> BaseMessage:
    role, content = given.get("role"), given.get("content")
    if role not in _ROLES:
        msg = f"{where}.role={str(role)[:80]!r} is not allowed; it must be one of {', '.join(_ROLES)}."
        raise invalid(where, msg)
    is_text = isinstance(content, str) or (content is None and role == "assistant")
    if not is_text and not (isinstance(content, list) and all(isinstance(part, dict) for part in content)):
        msg = f"{where}.content is not allowed; it must be a text, or a list of parts such as {{'type': 'text', ...}}."
        raise invalid(where, msg)
    plain: dict[str, Any] = {"role": role, "content": content or ""}
    if isinstance(name := given.get("name"), str):
        plain["name"] = name
    if role == "tool":
        plain["tool_call_id"] = str(given.get("tool_call_id") or "")
    calls, broken = _calls(given.get("tool_calls") or (), where) if role == "assistant" else ([], [])
    if calls:
        plain["tool_calls"] = calls
    try:
        [message] = convert_to_messages([plain])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, NotImplementedError) as error:
        msg = f"{where} cannot be read: {first_line(error)[:200]}."
        raise invalid(where, msg) from error
    if isinstance(message, AIMessage):
        message.invalid_tool_calls = broken
        if isinstance(reasoning := given.get("reasoning_content") or given.get("reasoning"), str):
            message.additional_kwargs["reasoning_content"] = reasoning
    return message


def _calls(given: Any, where: str) -> tuple[list[dict[str, Any]], list[InvalidToolCall]]:
    """Sort the calls of an assistant's message into those whose arguments are JSON objects, and others.

    Raises:
        APIError: If one is no call.
    """
    if not isinstance(given, list):
        raise _no_call(where)
    calls: list[dict[str, Any]] = []
    broken: list[InvalidToolCall] = []
    for call in given:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _no_call(where)
        name, written, call_id = function["name"], function.get("arguments"), str(call.get("id") or "")
        written = "{}" if written in (None, "") else written
        if not isinstance(written, str):
            raise _no_call(where)
        try:
            is_object = isinstance(json.loads(written, strict=False), dict)
        except JSON_FAILURES:
            is_object = False
        if is_object:
            function = {"name": name, "arguments": written}
            calls.append({"id": call_id, "type": "function", "function": function})
        else:
            broken.append(invalid_tool_call(name=name, args=written, id=call_id, error="the arguments are no JSON"))
    return calls, broken


def _no_call(where: str) -> APIError:
    msg = (
        f"{where}.tool_calls is not allowed; it must be a list of {{'id': ..., 'type': 'function', 'function': "
        "{'name': ..., 'arguments': 'JSON text'}}."
    )
    return invalid(where, msg)
