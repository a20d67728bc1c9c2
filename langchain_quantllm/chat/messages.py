"""LangChain's messages as the plain dicts that chat templates take.

Owns the conversion of each kind of message and content block, and the joining of contents. The limits of a single
template are `template`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from langchain_quantllm.chat.audio import SoundSource
from langchain_quantllm.chat.images import ImageSource
from langchain_quantllm.chat.media import MediaSource
from langchain_quantllm.errors import InvalidOptionError, QuantLLMError, UnsupportedError, first_line

Part = dict[str, Any]
"""`{"type": "text", "text": ...}`, `{"type": "image", "image": ImageSource}` or `{"type": "audio", "audio":
SoundSource}`."""

Content = str | list[Part]
"""The content of a message; a list where images or sounds are part of it."""

Message = dict[str, Any]
"""`role` and `content`, with `tool_calls`, `tool_call_id`, `name`, `reasoning_content`."""

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
        "server_tool_call",
        "server_tool_call_chunk",
        "server_tool_result",
        "non_standard",
    }
)
"""Blocks whose content stands in other fields of the message, or is another provider's own."""

_IMAGES = frozenset({"image", "image_url", "input_image"})
_SOUNDS = frozenset({"audio", "input_audio"})
_MEDIA = _IMAGES | _SOUNDS | {"video", "video_url", "file", "media", "document"}


def joined(contents: Sequence[Content], between: str) -> Content:
    """Join contents, leaving out empty ones.

    Args:
        contents: Texts and lists of parts.
        between: Stands between two texts; images and sounds need nothing around them.
    """
    filled = [content for content in contents if content]
    parts: list[Part] = []
    for content in filled:
        for i, part in enumerate([{"type": "text", "text": content}] if isinstance(content, str) else content):
            last = parts[-1] if parts else None
            if i == 0 and last is not None and last["type"] == part["type"] == "text":
                parts[-1] = {"type": "text", "text": f"{last['text']}{between}{part['text']}"}
            else:
                parts.append(part)
    if all(isinstance(content, str) for content in filled):
        return "".join(part["text"] for part in parts)
    return parts


def media_in(messages: Sequence[Mapping[str, Any]]) -> list[MediaSource]:
    """List the images and the sounds of messages, in their order."""
    lists = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return [part[part["type"]] for content in lists for part in content if part["type"] != "text"]


def texts_with_roles(messages: Sequence[BaseMessage]) -> list[str]:
    """List the texts of messages, their calls included, each after its role."""
    found = []
    for message in template_messages(messages, images=True, sounds=True):
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
        found.append(f"{message['role']}: " + "\n".join([*parts, *calls]))
    return found


def template_messages(messages: Sequence[BaseMessage], *, images: bool = False, sounds: bool = False) -> list[Message]:
    """Turn LangChain's messages into dicts for a template.

    A list of content blocks becomes its texts, a line each; where images or sounds are among them, a list of parts.
    Reasoning of an earlier answer stands in `reasoning_content`, for templates that show it. A call whose arguments
    were no JSON goes back as the text that it was.

    Args:
        messages: At least one.
        images: Whether the model reads images.
        sounds: Whether it hears sounds.

    Returns:
        The dicts, one more for each further tool result in a message.

    Raises:
        InvalidOptionError: If there is no message, or one of an unknown kind.
        UnsupportedError: If a message holds something that the model does not read.
    """
    if not messages:
        msg = "there are no messages; give at least one, such as HumanMessage('...')."
        raise InvalidOptionError(msg)
    found: list[Message] = []
    names: dict[str, str] = {}  # of the functions, by the ids of their calls
    for at, message in enumerate(messages):
        try:
            made = _convert(message, _Place(at, images, sounds), names)
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            if isinstance(error, QuantLLMError):
                raise
            msg = (
                f"message {at}, a {type(message).__name__}, cannot be read ({first_line(error)[:200]}); make it by "
                "LangChain's classes, with a text or a list of content blocks."
            )
            raise InvalidOptionError(msg) from error
        for call in (call for one in made for call in one.get("tool_calls", ()) if call["id"]):
            names[call["id"]] = call["function"]["name"]
        found += made
    return found


class _Place(NamedTuple):
    """The number of a message, and what may be in it."""

    at: int
    images: bool
    sounds: bool

    @property
    def reads(self) -> str:
        """What the model takes, in words."""
        taken = ["text", *(["images"] if self.images else []), *(["sounds"] if self.sounds else [])]
        return " and ".join(filter(None, (", ".join(taken[:-1]), taken[-1])))


def _convert(message: BaseMessage, place: _Place, names: Mapping[str, str]) -> list[Message]:
    if isinstance(message, AIMessage):
        return [_from_ai(message, place)]
    if isinstance(message, ToolMessage):
        call_id = str(message.tool_call_id or "")
        made = {"role": "tool", "content": _content(message.content, place), "tool_call_id": call_id}
        name = message.name or names.get(call_id)
        return [made | ({"name": str(name)} if name else {})]
    if isinstance(message, FunctionMessage):
        return [{"role": "tool", "content": _content(message.content, place), "name": str(message.name)}]
    if isinstance(message, SystemMessage):
        role = "system"
    elif isinstance(message, ChatMessage):
        role = _ROLES.get(str(message.role), str(message.role))
    elif isinstance(message, HumanMessage):
        role = "user"
    else:
        msg = f"message {place.at} is a {type(message).__name__}, which is not a turn of a conversation; leave it out."
        raise InvalidOptionError(msg)
    results, content = _tool_results(message.content, place, names)
    if results and not content:
        return results
    made = {"role": role, "content": _content(content, place)}
    return [*results, made | ({"name": str(message.name)} if message.name else {})]


def _from_ai(message: AIMessage, place: _Place) -> Message:
    wrong = [f"{call['name'] or ''}{call['args'] or ''}" for call in message.invalid_tool_calls]
    content = joined([_content(message.content, place), *wrong], "\n")
    made: Message = {"role": "assistant", "content": content}
    if message.tool_calls:
        made["tool_calls"] = [_call(call, place) for call in message.tool_calls]
    if reasoning := _reasoning(message):
        made["reasoning_content"] = reasoning
    return made


def _call(call: Mapping[str, Any], place: _Place) -> dict[str, Any]:
    name = str(call["name"] or "")
    try:
        arguments = json.loads(json.dumps(call["args"]))
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"message {place.at} calls {name[:100]!r} with arguments that are not JSON: {first_line(error)[:200]}."
        raise InvalidOptionError(msg) from error
    return {"type": "function", "id": str(call.get("id") or ""), "function": {"name": name, "arguments": arguments}}


def _reasoning(message: AIMessage) -> str:
    if found := message.additional_kwargs.get("reasoning_content"):
        return str(found)
    blocks = message.content if isinstance(message.content, list) else []
    found = [b.get(b["type"]) for b in blocks if isinstance(b, dict) and b.get("type") in ("reasoning", "thinking")]
    return "\n".join(text for text in found if isinstance(text, str))


def _tool_results(content: Any, place: _Place, names: Mapping[str, str]) -> tuple[list[Message], Any]:
    """Take Anthropic's tool results, which stand in a user's message, out of its content."""
    if not isinstance(content, list | tuple):
        return [], content
    found = [b for b in content if isinstance(b, dict) and b.get("type") == "tool_result"]
    results = [
        {
            "role": "tool",
            "content": _content(block.get("content") or "", place),
            "tool_call_id": str(block.get("tool_use_id", "")),
            "name": names.get(str(block.get("tool_use_id", "")), ""),
        }
        for block in found
    ]
    return results, [b for b in content if b not in found]


def _content(content: Any, place: _Place) -> Content:
    """Convert a message's content: its texts, a line each; a list of parts where images or sounds are among them."""
    if content is None or isinstance(content, str):
        return content or ""
    blocks = content if isinstance(content, list | tuple) else [content]
    found = [part for block in blocks if (part := _part(block, place)) is not None]
    if all(isinstance(part, str) for part in found):
        return "\n".join(found)  # type: ignore[arg-type]
    return joined([part if isinstance(part, str) else [part] for part in found], "\n")


def _part(block: Any, place: _Place) -> str | Part | None:
    """Convert a block to its text, image or sound; None for one that has no place in a prompt."""
    kind = block.get("type") if isinstance(block, Mapping) else None
    kind = kind if isinstance(kind, str) else None
    if isinstance(block, str):
        return block
    if kind in _SAID_ELSEWHERE:
        return None
    if kind in _IMAGES and place.images:
        return {"type": "image", "image": _image(block, place.at)}
    if kind in _SOUNDS and place.sounds:
        return {"type": "audio", "audio": _sound(block, place.at)}
    if kind in _MEDIA:
        msg = (
            f"message {place.at} holds a block of type {kind!r}, and this model reads {place.reads} only; leave it out."
        )
        raise UnsupportedError(msg)
    if isinstance(block, Mapping) and isinstance(block.get("text"), str):
        return str(block["text"])
    if kind == "refusal":
        return str(block.get("refusal", ""))
    if kind == "json":
        return json.dumps(block.get("json"), ensure_ascii=False)
    msg = f"message {place.at} holds {str(block)[:100]!r}, which is not a known content block; give text."
    raise InvalidOptionError(msg)


def _image(block: Mapping[str, Any], at: int) -> ImageSource:
    """Find the source of an image in a block of LangChain's, OpenAI's or Anthropic's."""
    kind = block["type"]
    file_id = block.get("file_id")
    if kind != "image":  # OpenAI's other API, and old prompts, have a text in place of the dict
        url = block.get("image_url")
        block = {"type": "image_url", "image_url": url if isinstance(url, Mapping) else {"url": url}}
        block |= {} if file_id is None else {"file_id": file_id}
    source = block.get("source")  # Anthropic's; LangChain has no standard for a file of its own
    file_id = file_id or (source.get("file_id") if isinstance(source, Mapping) else None)
    texts = _given(block, file_id)
    if not texts:
        msg = (
            f"message {at} holds {str(dict(block))[:100]!r}, an image without its data; give "
            "{'type': 'image', 'base64': ..., 'mime_type': 'image/png'} or {'type': 'image', 'url': ...}."
        )
        raise InvalidOptionError(msg)
    return ImageSource(message=at, kind=kind, **texts)


def _sound(block: Mapping[str, Any], at: int) -> SoundSource:
    """Find the source of a sound in a block of LangChain's or OpenAI's."""
    texts = _given(block, block.get("file_id"))
    if not texts:
        msg = (
            f"message {at} holds {str(dict(block))[:100]!r}, a sound without its data; give "
            "{'type': 'audio', 'base64': ..., 'mime_type': 'audio/wav'} or {'type': 'audio', 'url': ...}."
        )
        raise InvalidOptionError(msg)
    return SoundSource(message=at, kind=block["type"], **texts)


def _given(block: Mapping[str, Any], file_id: Any) -> dict[str, str]:
    """Find the data, the URL or the id of a file in a block, by the names of a source's fields."""
    # LangChain reads all dialects of a standard block.
    try:
        standard: Mapping[str, Any] = HumanMessage(content=[dict(block)]).content_blocks[0]
    except Exception:  # it has no promise for blocks of any form
        standard = {}
    given = {
        "data": standard.get("base64"),
        "url": standard.get("url"),
        "file_id": standard.get("file_id") or file_id,
    }
    return {name: value for name, value in given.items() if isinstance(value, str)}
