"""What turns say: a text, or texts and images in their order; and in which of these forms a template takes it.

Owns the joining of contents, and the rules for templates that take only one form. Knows no tokenizer and no processor,
and reads no image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from langchain_quantllm.chat.images import ImageSource
from langchain_quantllm.errors import UnsupportedError

Part = dict[str, Any]
"""`{"type": "text", "text": ...}` or `{"type": "image", "image": ImageSource}`."""

Content = str | list[Part]
"""What a turn says; a list where images are part of it."""

_MARK = "Wv4Jq"  # appears in no template
_ROLE_NAMES = {"system": "system", "user": "the user's", "assistant": "the assistant's", "tool": "tool"}


def joined(contents: Sequence[Content], between: str) -> Content:
    """Join contents, leaving out empty ones.

    Args:
        contents: Texts and lists of parts.
        between: Stands between two texts; images need nothing around them.
    """
    filled = [content for content in contents if content]
    parts: list[Part] = []
    for content in filled:
        for i, part in enumerate([_text(content)] if isinstance(content, str) else content):
            last = parts[-1] if parts else None
            if i == 0 and last is not None and last["type"] == part["type"] == "text":
                parts[-1] = _text(f"{last['text']}{between}{part['text']}")
            else:
                parts.append(part)
    if all(isinstance(content, str) for content in filled):
        return "".join(part["text"] for part in parts)
    return parts


def images_in(turns: Sequence[Mapping[str, Any]]) -> list[ImageSource]:
    """List the images of turns, in their order."""
    lists = [turn["content"] for turn in turns if isinstance(turn.get("content"), list)]
    return [part["image"] for content in lists for part in content if part["type"] == "image"]


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


class ContentForms:
    """The forms in which a template takes what a turn says, found out role by role.

    - Where it takes lists of texts and images, an image is an entry of the list, which the template writes its
      placeholder for. A text alone stays a text, but where the template takes lists only.
    - Where it takes texts only, an image becomes the processor's image token, in a line of its own.
    """

    def __init__(self, render: Callable[[str, Any], str | None], image_token: str | None) -> None:
        """Take what the forms are found out with.

        Args:
            render: Gives the prompt of a small conversation in which a turn of a role has a content as it is given;
                None where the template refuses it.
            image_token: What the processor replaces by an image's tokens; None where that is not known.
        """
        self._render = render
        self._image_token = image_token
        self._found: dict[tuple[str, str], str | None] = {}

    def takes_images(self, role: str) -> bool:
        """Whether an image may stand in a turn of a role."""
        return self._form("image", role) is not None

    def written(self, role: str, content: Content) -> Any:
        """Give a turn's content in the form that the template takes.

        Raises:
            UnsupportedError: If an image stands in it, and the template takes none in turns of this role.
        """
        if isinstance(content, str):
            return self._written_text(role, content)
        form = self._form("image", role)
        if form == "list":
            return [{"type": "image"} if part["type"] == "image" else part for part in content]
        if form is None:
            at = next(part["image"].message for part in content if part["type"] == "image")
            allowed = [name for known, name in _ROLE_NAMES.items() if self.takes_images(known)]
            use = f"put it into one of {' or '.join(allowed)} messages" if allowed else "give text"
            msg = (
                f"message {at} holds an image, and the model's chat template takes none in "
                f"{_ROLE_NAMES.get(role, role)} messages; {use}."
            )
            raise UnsupportedError(msg)
        token = self._image_token or ""
        return self._written_text(
            role, "\n".join(token if part["type"] == "image" else part["text"] for part in content)
        )

    def _written_text(self, role: str, text: str) -> Any:
        return text if self._form("text", role) == "text" else [_text(text)]

    def _form(self, what: Literal["text", "image"], role: str) -> str | None:
        if (what, role) not in self._found:
            find = self._form_of_text if what == "text" else self._form_of_images
            self._found[what, role] = find(role)
        return self._found[what, role]

    def _form_of_text(self, role: str) -> str:
        takes_lists_only = self._shows(role, _MARK) is None and self._shows(role, [_text(_MARK)]) is not None
        return "list" if takes_lists_only else "text"

    def _form_of_images(self, role: str) -> str | None:
        with_image = self._shows(role, [{"type": "image"}, _text(_MARK)])
        if with_image is not None and with_image != self._shows(role, [_text(_MARK)]):
            return "list"
        if self._image_token is None or (role != "user" and self._form("image", "user") != "token"):
            return None
        with_token = self._shows(role, self._written_text(role, f"{self._image_token}\n{_MARK}"))
        return "token" if with_token is not None else None

    def _shows(self, role: str, content: Any) -> str | None:
        """Give the prompt if the content's text is in it, as a text and not as Python or JSON write the list."""
        text = self._render(role, content)
        if text is None or _MARK not in text:
            return None
        return None if any(quoted in text for quoted in ("'type': 'text'", '"type": "text"', '"type":"text"')) else text
