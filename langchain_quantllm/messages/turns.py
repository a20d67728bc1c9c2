"""From LangChain's messages to the plain dicts that chat templates take.

Owns what each kind of message and content block becomes. Knows no template: what one cannot take is
`templates`' business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from langchain_quantllm.errors import InvalidOptionError, UnsupportedError

Turn = dict[str, Any]
"""One turn of a conversation: `role` and `content`, with `tool_calls`, `tool_call_id`, `name`, `reasoning_content`."""

_ROLES = {"human": "user", "ai": "assistant", "developer": "system"}
_SAID_ELSEWHERE = frozenset(
    {
        "reasoning",
        "thinking",
        "redacted_thinking",
        "tool_use",
        "tool_call",
        "tool_call_chunk",
        "invalid_tool_call",
        "input_json_delta",
        "function_call",
        "non_standard",
    }
)
"""Blocks of an answer whose content stands in other fields of the message, or is another provider's own."""

_MEDIA = frozenset(
    {"image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file", "media", "document"}
)


def turns_of(messages: Sequence[BaseMessage]) -> list[Turn]:
    """Turn messages into dicts.

    A list of content blocks becomes its texts, a line each. Reasoning of an earlier answer stands in
    `reasoning_content`, for templates that show it. A call whose arguments were no JSON goes back as the text it was.

    Args:
        messages: At least one.

    Returns:
        The turns; there are more than messages where one holds results of several tools.

    Raises:
        InvalidOptionError: If there is no message, or one of an unknown kind.
        UnsupportedError: If a message holds something else than text.
    """
    if not messages:
        msg = "there are no messages; give at least one, such as HumanMessage('...')."
        raise InvalidOptionError(msg)
    names = {c["id"]: c["name"] for m in messages if isinstance(m, AIMessage) for c in m.tool_calls if c["id"]}
    return [turn for at, message in enumerate(messages) for turn in _turns(message, at, names)]


def _turns(message: BaseMessage, at: int, names: Mapping[str, str]) -> list[Turn]:
    if isinstance(message, AIMessage):
        return [_answer(message, at)]
    if isinstance(message, ToolMessage):
        turn = {"role": "tool", "content": text_of(message.content, at), "tool_call_id": message.tool_call_id}
        name = message.name or names.get(message.tool_call_id)
        return [turn | ({"name": name} if name else {})]
    if isinstance(message, FunctionMessage):
        return [{"role": "tool", "content": text_of(message.content, at), "name": message.name}]
    if isinstance(message, SystemMessage):
        role = "system"
    elif isinstance(message, ChatMessage):
        role = _ROLES.get(message.role, message.role)
    elif isinstance(message, HumanMessage):
        role = "user"
    else:
        msg = f"message {at} is a {type(message).__name__}, which is no turn of a conversation; leave it out."
        raise InvalidOptionError(msg)
    results, content = _tool_results(message.content, at, names)
    if results and not content:
        return results
    turn = {"role": role, "content": text_of(content, at)}
    return [*results, turn | ({"name": message.name} if message.name else {})]


def _answer(message: AIMessage, at: int) -> Turn:
    content = text_of(message.content, at)
    for call in message.invalid_tool_calls:
        content = "\n".join(filter(None, [content, f"{call['name'] or ''}{call['args'] or ''}"]))
    turn: Turn = {"role": "assistant", "content": content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"type": "function", "id": c["id"] or "", "function": {"name": c["name"], "arguments": c["args"]}}
            for c in message.tool_calls
        ]
    if reasoning := _reasoning(message):
        turn["reasoning_content"] = reasoning
    return turn


def _reasoning(message: AIMessage) -> str:
    if found := message.additional_kwargs.get("reasoning_content"):
        return str(found)
    blocks = message.content if isinstance(message.content, list) else []
    found = [b.get(b["type"]) for b in blocks if isinstance(b, dict) and b.get("type") in ("reasoning", "thinking")]
    return "\n".join(text for text in found if isinstance(text, str))


def _tool_results(content: Any, at: int, names: Mapping[str, str]) -> tuple[list[Turn], Any]:
    """Take Anthropic's tool results, which stand in a user's message, out of its content."""
    if isinstance(content, str):
        return [], content
    found = [b for b in content if isinstance(b, dict) and b.get("type") == "tool_result"]
    turns = [
        {
            "role": "tool",
            "content": text_of(block.get("content") or "", at),
            "tool_call_id": block.get("tool_use_id", ""),
            "name": names.get(block.get("tool_use_id", ""), ""),
        }
        for block in found
    ]
    return turns, [b for b in content if b not in found]


def text_of(content: Any, at: int = 0) -> str:
    """Give the text of a message's content.

    Args:
        content: A text, or a list of texts and content blocks.
        at: Which message it is, for errors.

    Raises:
        UnsupportedError: If a block is an image or another medium.
        InvalidOptionError: If a block is of an unknown type.
    """
    if isinstance(content, str):
        return content
    texts = []
    for block in content if isinstance(content, list | tuple) else [content]:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if isinstance(block, str):
            texts.append(block)
        elif kind in _SAID_ELSEWHERE:
            continue
        elif isinstance(block, Mapping) and isinstance(block.get("text"), str) and kind not in _MEDIA:
            texts.append(block["text"])
        elif kind == "refusal":
            texts.append(str(block.get("refusal", "")))
        elif kind == "json":
            texts.append(json.dumps(block.get("json"), ensure_ascii=False))
        elif kind in _MEDIA:
            msg = f"message {at} holds a block of type {kind!r}, and this model reads text only; leave it out."
            raise UnsupportedError(msg)
        else:
            msg = f"message {at} holds {str(block)[:100]!r}, which is no known content block; give text."
            raise InvalidOptionError(msg)
    return "\n".join(texts)
