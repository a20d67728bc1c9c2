"""The abilities of a chat template, found by rendering small conversations with it.

Owns these trials and the forms of content that a template takes. Renders no conversation of a user.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

from langchain_quantllm.chat.messages import Content, Message
from langchain_quantllm.compat.jinja_bounds import TemplateBoundError
from langchain_quantllm.errors import UnsupportedError

_logger = logging.getLogger(__name__)

T = TypeVar("T")

CALL_ID = "a1B2c3D4e"  # nine letters and digits, which every template takes
_MARK = "Kq7Zx"  # appears in no template
_NOUNS = {"image": "an image", "audio": "a sound"}
_ROLE_NAMES = {"system": "system", "user": "the user's", "assistant": "the assistant's", "tool": "tool"}

Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Any]], str]
"""Renders messages and tools as they are given; raises any error where the template refuses them."""


class remembered(Generic[T]):  # noqa: N801
    """A property that is computed once; unlike `functools.cached_property` of Python 3.11, without a lock.

    A slow template would hold up all others by that.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __get__(self, owner: Any, kind: Any = None) -> T:
        value = owner.__dict__[self._compute.__name__] = self._compute(owner)
        return value


def some_tool() -> dict[str, Any]:
    """Make a tool for trials, with a name that no template has."""
    parameters = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]}
    function = {"name": f"f{_MARK}", "description": "f", "parameters": parameters}
    return {"type": "function", "function": function}


def message_of(role: str, content: Any) -> Message:
    """Make a message."""
    return {"role": role, "content": content}


class TemplateSupport:
    """The abilities of one template, each tried once.

    Of content, a template takes these forms, role by role:

    - Where it takes lists of texts and images, an image is an entry of the list, for which the template writes its
      placeholder. A text alone stays a text, unless the template takes lists only.
    - Where it takes texts only, an image becomes the processor's image token, in a line of its own.

    The same holds of sounds.
    """

    def __init__(self, render: Render, tokens: Mapping[str, str | None], *, has_processor: bool) -> None:
        """Begin with nothing tried.

        Args:
            render: Renders messages.
            tokens: The text that the processor replaces by the tokens of an `"image"` or of `"audio"`; None where that
                is unknown.
            has_processor: Whether the model reads images or hears.
        """
        self._render = render
        self._tokens = tokens
        self._has_processor = has_processor
        self._is_stopped = False
        self._forms: dict[tuple[str, str], str | None] = {}

    # Roles, tools and calls.

    @remembered
    def tools(self) -> bool:
        """Whether the template shows tools to the model."""
        return self._shows([_user("a")], [some_tool()["function"]["name"]], [some_tool()])

    @remembered
    def arguments(self) -> str | None:
        """The form of the arguments of calls: `"dict"`, `"text"`, or None where the template leaves calls out."""
        for form, arguments in (("dict", {"x": _MARK}), ("text", json.dumps({"x": _MARK}))):
            if self._shows([_user("a"), _call(arguments), _result("b")], [_MARK], self._some_tool):
                return form
        return None

    @remembered
    def long_ids(self) -> bool:
        """Whether it takes any ids of calls, and not those of nine letters and digits alone."""
        call_id = f"call_{_MARK * 4}"
        return self._shows([_user("a"), self._some_call(call_id), _result("b", call_id)], [], self._some_tool)

    @property
    def _some_tool(self) -> list[Any]:
        return [some_tool()] if self.tools else []

    def _some_call(self, call_id: str = CALL_ID) -> Message:
        return _call({"x": "y"} if self.arguments == "dict" else '{"x": "y"}', call_id)

    def _shows(self, messages: list[Message], wanted: Sequence[str], tools: Sequence[Any] = ()) -> bool:
        text = self._try(self.written(messages), tools)
        return text is not None and all(mark in text for mark in wanted)

    def _try(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str | None:
        if self._is_stopped:
            return None
        try:
            return self._render(messages, tools)
        except TemplateBoundError as error:
            self._is_stopped = True  # so that not each trial takes as long; the call itself will say why
            _logger.debug("trials of the chat template are given up: %s", error)
        except Exception as error:  # whatever it is, the call itself will say so if it matters
            _logger.debug("a trial of the chat template failed: %r", error)
        return None

    # Content.

    def images(self, role: str = "user") -> bool:
        """Whether an image may stand in a message of a role."""
        return self._has_processor and self._form("image", role) is not None

    def sounds(self, role: str = "user") -> bool:
        """Whether a sound may stand in a message of a role."""
        return self._has_processor and self._form("audio", role) is not None

    def written(self, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """Bring the contents of messages to the forms that the template takes.

        Raises:
            UnsupportedError: If an image or a sound stands in a message of a role in which the template takes none.
        """
        if not self._has_processor:
            return [dict(message) for message in messages]
        return [{**message, "content": self._written(message["role"], message["content"])} for message in messages]

    def _written(self, role: str, content: Content) -> Any:
        if isinstance(content, str):
            return self._written_text(role, content)
        media = [part for part in content if part["type"] != "text"]
        forms = {part["type"]: self._form(part["type"], role) for part in media}
        for part in media:
            if forms[part["type"]] is None:
                raise self._refused(part, role)
        if "list" in forms.values():
            return [part if part["type"] == "text" else {"type": part["type"]} for part in content]
        return self._written_text(
            role, "\n".join(self._tokens.get(part["type"]) or part.get("text", "") for part in content)
        )

    def _refused(self, part: Mapping[str, Any], role: str) -> UnsupportedError:
        kind, what = part["type"], _NOUNS[part["type"]]
        allowed = [name for known, name in _ROLE_NAMES.items() if self._form(kind, known) is not None]
        use = f"put it into one of {' or '.join(allowed)} messages" if allowed else "give text"
        return UnsupportedError(
            f"message {part[kind].message} holds {what}, and the model's chat template takes none in "
            f"{_ROLE_NAMES.get(role, role)} messages; {use}."
        )

    def _written_text(self, role: str, text: str) -> Any:
        return text if self._form("text", role) == "text" else [_text(text)]

    def _form(self, kind: Literal["text", "image", "audio"], role: str) -> str | None:
        if (kind, role) not in self._forms:
            self._forms[kind, role] = self._form_of_text(role) if kind == "text" else self._form_of_media(kind, role)
        return self._forms[kind, role]

    def _form_of_text(self, role: str) -> str:
        takes_lists_only = self._trial(role, _MARK) is None and self._trial(role, [_text(_MARK)]) is not None
        return "list" if takes_lists_only else "text"

    def _form_of_media(self, kind: Literal["image", "audio"], role: str) -> str | None:
        with_media = self._trial(role, [{"type": kind}, _text(_MARK)])
        if with_media is not None and with_media != self._trial(role, [_text(_MARK)]):
            return "list"
        token = self._tokens.get(kind)
        if token is None or (role != "user" and self._form(kind, "user") != "token"):
            return None
        with_token = self._trial(role, self._written_text(role, f"{token}\n{_MARK}"))
        return "token" if with_token is not None else None

    def _trial(self, role: str, content: Any) -> str | None:
        """Render a message of a role with a content in one form; None where the template does not show its text."""
        asked, message = self._written_text("user", "a") if role != "user" else "a", message_of(role, content)
        if role == "user":
            tried = [[message]]
        elif role == "system":
            tried = [[message, _user(asked)]]
        elif role == "tool":
            tried = [[_user(asked), _call(arguments), _result(content)] for arguments in ({"x": "y"}, '{"x": "y"}')]
        else:
            tried = [[_user(asked), message, _user(asked)]]
        for messages in tried:
            if (text := self._try(messages)) is not None:
                # Some templates write the list itself, as Python or JSON.
                quoted = ("'type': 'text'", '"type": "text"', '"type":"text"')
                return text if _MARK in text and not any(mark in text for mark in quoted) else None
        return None


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _user(content: Any) -> Message:
    return message_of("user", content)


def _call(arguments: Any, call_id: str = CALL_ID) -> Message:
    call = {"type": "function", "id": call_id, "function": {"name": "f", "arguments": arguments}}
    return message_of("assistant", "") | {"tool_calls": [call]}


def _result(content: Any, call_id: str = CALL_ID) -> Message:
    return message_of("tool", content) | {"tool_call_id": call_id, "name": "f"}
