"""Conversations of a calibration: messages of several libraries as plain ones, and the text that a model reads.

LangChain's messages, and the objects of its tracers, are known by their attributes; nothing of LangChain is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_quantllm.compat.jinja_sandbox import render_chat_template
from langchain_quantllm.errors import InvalidOptionError, first_line, nearest

Message = dict[str, Any]
"""`role` and `content`, both text, with `tool_calls`, `tool_call_id` and `name` where there are any."""

_ROLES = {
    "ai": "assistant",
    "assistant": "assistant",
    "developer": "system",
    "function": "tool",
    "gpt": "assistant",
    "human": "user",
    "system": "system",
    "tool": "tool",
    "user": "user",
}
_CLASSES = {
    f"{name}Message": role for name, role in (("AI", "ai"), ("Human", "human"), ("System", "system"), ("Tool", "tool"))
}
_CLASSES |= {f"{name}Chunk": role for name, role in _CLASSES.items()}
_MEDIA = ("image", "image_url", "input_image", "audio", "input_audio", "video", "file")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages that a model reads through its chat template.

    Args:
        messages: The messages.
        tools: Tools that the model is told of, as JSON schemas of functions.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()

    def render(self, tokenizer: Any) -> str:
        """Write it as the tokenizer's chat template does; without one, the contents below each other.

        Raises:
            InvalidOptionError: If the template takes it in no form.
        """
        template = tokenizer.get_chat_template(tools=list(self.tools) or None) if tokenizer.chat_template else None
        if template is None:
            return "\n\n".join(message["content"] for message in self.messages if message["content"])
        own = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
        refusal: Exception | None = None
        for messages in (self.messages, _with_text_arguments(self.messages), _without_system(self.messages)):
            values = {**own, "messages": messages, "tools": list(self.tools) or None, "documents": None}
            try:
                return render_chat_template(template, {**values, "add_generation_prompt": False})
            except InvalidOptionError:  # the template takes too long, whatever it is given
                raise
            except Exception as error:  # of the template, or of what it does to a message
                refusal = refusal or error
        roles = ", ".join(message["role"] for message in self.messages[:6])
        msg = (
            f"the model's chat template refuses a conversation of the calibration ({roles}; it begins "
            f"{self.messages[0]['content'][:60]!r}): {refusal and first_line(refusal)}."
        )
        raise InvalidOptionError(msg) from refusal


def messages_from(values: Any, where: str) -> list[Message]:
    """Convert a list of messages: dicts of OpenAI's, LangChain's or ShareGPT's form, pairs, or LangChain's objects.

    Args:
        values: The list.
        where: Where it stands, for errors.

    Raises:
        InvalidOptionError: If one is no message, or holds something beside text.
    """
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        msg = f"{where} holds no list of messages, but {str(values)[:60]!r}."
        raise InvalidOptionError(msg)
    return [_message(value, f"message {at + 1} of {where}") for at, value in enumerate(values)]


def is_message(value: Any) -> bool:
    """Say whether a value is a message, of any of these forms."""
    if isinstance(value, Mapping):
        own = _unwrapped(value)
        return any(key in own for key in ("role", "type", "from")) and any(key in own for key in ("content", "value"))
    return isinstance(getattr(value, "type", None), str) and hasattr(value, "content")


def _unwrapped(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of a message that LangChain has written as JSON, of either of its two forms."""
    if isinstance(value.get("data"), Mapping):  # messages_to_dict
        return {"type": value.get("type"), **value["data"]}
    if isinstance(value.get("kwargs"), Mapping):  # dumps
        names = value.get("id")
        kind = _CLASSES.get(str(names[-1])) if isinstance(names, Sequence) and names else None
        return {"type": kind, **value["kwargs"]}
    return value


def _message(value: Any, where: str) -> Message:
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(part, str) for part in value):
        value = {"role": value[0], "content": value[1]}
    if not is_message(value):
        msg = f"{where} is no message with a role and a content, but {str(value)[:60]!r}."
        raise InvalidOptionError(msg)
    names = ("role", "type", "content", "tool_calls", "tool_call_id", "name")
    own = _unwrapped(value) if isinstance(value, Mapping) else {name: getattr(value, name, None) for name in names}
    given = own.get("role") or own.get("type") or own.get("from")
    role = _ROLES.get(str(given).removesuffix("MessageChunk").lower())
    if role is None:
        msg = f"{where} has role {given!r}{nearest(str(given), _ROLES)}"
        raise InvalidOptionError(msg)
    content = own.get("content") if "content" in own else own.get("value")
    message: Message = {"role": role, "content": _text(content, where)}
    extra = own.get("additional_kwargs")
    calls = own.get("tool_calls") or (extra.get("tool_calls") if isinstance(extra, Mapping) else None)
    if calls:
        message["tool_calls"] = [_call(call, where) for call in (calls if isinstance(calls, list | tuple) else [calls])]
    return message | {name: str(own[name]) for name in ("tool_call_id", "name") if own.get(name)}


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        msg = f"{where} has content of type {type(content).__name__}; it must be text, or blocks of text."
        raise InvalidOptionError(msg)
    for block in content:
        if not isinstance(block, str | Mapping):
            kind = type(block).__name__
            msg = f"{where} holds a block {str(block)[:60]!r} of type {kind}; blocks are texts or objects."
            raise InvalidOptionError(msg)
        if isinstance(block, Mapping) and block.get("type") in _MEDIA:
            msg = f"{where} holds a block of type {block['type']!r}; a calibration is of text, so leave such ones out."
            raise InvalidOptionError(msg)
    texts = (block if isinstance(block, str) else block.get("text") for block in content)
    return "".join(text for text in texts if isinstance(text, str))


def _call(call: Any, where: str) -> dict[str, Any]:
    """Convert a tool call of OpenAI's or LangChain's form; its arguments become a dict."""
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    arguments = function.get("arguments", function.get("args"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = None
    if not isinstance(function.get("name"), str) or not isinstance(arguments, Mapping):
        msg = f"{where} has a tool call without a name or with arguments that are no object: {str(call)[:80]!r}."
        raise InvalidOptionError(msg)
    own = {"name": function["name"], "arguments": dict(arguments)}
    return {"type": "function", "id": str(call.get("id") or "call_1"), "function": own}


def _with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """Write the arguments of calls as JSON, for templates that take no dict."""
    found = []
    for message in messages:
        calls = message.get("tool_calls") or []
        written = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in calls
        ]
        found.append({**message, **({"tool_calls": written} if calls else {})})
    return found


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """Put a system message before the first of the user, for templates without such a role."""
    first, *others = messages
    if first["role"] != "system" or not others:
        return list(messages)
    return [{**others[0], "content": f"{first['content']}\n\n{others[0]['content']}"}, *others[1:]]
