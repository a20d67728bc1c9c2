"""Special tokens in the texts of messages: kept from being tokens, so that a stranger's text writes no turn.

Owns finding them, standing marks in for them while a template renders, and cutting the prompt so that each of them is
encoded in two pieces, as ordinary text. Encoding is `loading.pieces`'; knows no model and no LangChain.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_quantllm.errors import InvalidOptionError

_MEDIA = ("image_token", "boi_token", "eoi_token", "video_token", "audio_token", "boa_token", "eoa_token")
"""Attributes of processors and tokenizers that name the placeholders of images and the like."""

_FAR = 512  # characters; no token is as long


@dataclass(frozen=True, kw_only=True)
class ControlTokens:
    """The tokens by which a model tells turns, calls and images apart from text; None where it has none.

    Args:
        in_texts: Matches any of them.
        in_answers: Matches those that make no sense in an earlier answer; the tags of reasoning and of calls do.
    """

    in_texts: re.Pattern[str] | None
    in_answers: re.Pattern[str] | None

    @classmethod
    def of(
        cls, tokenizer: Any, processor: Any, *, chat_prompt: str, tool_prompt: str, tags: Sequence[str]
    ) -> ControlTokens:
        """Find them: the special tokens, the placeholders, and added tokens that the template itself writes.

        Args:
            tokenizer: A tokenizer of transformers.
            processor: The processor of a model that reads images; None for others.
            chat_prompt: The prompt of a conversation without tools.
            tool_prompt: The prompt of a conversation with a call and its result.
            tags: The tags of reasoning, which templates look for in earlier answers.
        """
        added = list(tokenizer.added_tokens_decoder.values())
        always = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        named = [getattr(place, name, None) for place in (processor, tokenizer) for name in _MEDIA]
        always |= {token for token in named if isinstance(token, str)}
        in_chat = {token.content for token in added if token.content in chat_prompt}
        in_calls = {token.content for token in added if token.content in tool_prompt}
        return cls(in_texts=_pattern(always | in_chat | in_calls), in_answers=_pattern((always | in_chat) - set(tags)))


def _pattern(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Compile a pattern of tokens, of which the longest counts; a token of one character or of spaces is text."""
    root: dict[str, Any] = {}
    for token in tokens:
        if len(token) > 1 and not token.isspace():
            node = root
            for letter in token:
                node = node.setdefault(letter, {})
            node[""] = {}
    return re.compile(_branches(root)) if root else None


def _branches(node: Mapping[str, Any]) -> str:
    ways = [re.escape(letter) + _branches(after) for letter, after in node.items() if letter]
    if not ways:
        return ""
    pattern = ways[0] if len(ways) == 1 and "" not in node else f"(?:{'|'.join(ways)})"
    return f"{pattern}?" if "" in node else pattern


class MarkedTexts:
    """The marks of one call; a template treats each as a word of the text around it."""

    def __init__(self, tokens: ControlTokens) -> None:
        """Begin without a mark.

        Args:
            tokens: The tokens to keep out.
        """
        self._tokens = tokens
        self._found: list[str] = []
        self._word = f"Qz{secrets.token_hex(8)}"  # which no text can hold by design
        self._marks = re.compile(f"{self._word}n([0-9]+)e")

    def in_texts(self, value: Any) -> Any:
        """Put marks into every text of a value, those of keys included.

        Raises:
            InvalidOptionError: If it is nested too deeply.
        """
        try:
            return self._marked(value, self._tokens.in_texts)
        except RecursionError as error:
            msg = "a message, a tool or chat_template_kwargs is nested too deeply; give values with fewer levels."
            raise InvalidOptionError(msg) from error

    def in_message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Put marks into a message, by its role."""
        if message["role"] != "assistant":
            whole: dict[str, Any] = self.in_texts(message)
            return whole
        own = ("content", "reasoning_content")
        rest: dict[str, Any] = self.in_texts({name: value for name, value in message.items() if name not in own})
        return rest | {name: self._marked(message[name], self._tokens.in_answers) for name in own if name in message}

    def _marked(self, value: Any, tokens: re.Pattern[str] | None) -> Any:
        if tokens is None:
            return value
        if isinstance(value, str):
            return tokens.sub(self._mark, value)
        if isinstance(value, Mapping):
            return {self._marked(key, tokens): self._marked(entry, tokens) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(entry, tokens) for entry in value]
        return value

    def _mark(self, match: re.Match[str]) -> str:
        self._found.append(match[0])
        return f"{self._word}n{len(self._found) - 1}e"

    def pieces(self, prompt: str) -> tuple[str, ...]:
        """Split a rendered prompt into pieces of which none has a token of a message's; joined, they are the prompt.

        Args:
            prompt: The prompt with its marks.
        """
        if not self._found:
            return (prompt,)
        between = self._marks.split(prompt)
        texts, tokens = between[::2], [self._found[int(number)] for number in between[1::2]]
        pieces, piece = [], texts[0]
        for token, text in zip(tokens, texts[1:], strict=True):
            first, *inner, last = self._parts(piece[-_FAR:], token, text[:_FAR])
            pieces += [piece + first, *inner]
            piece = last + text
        return (*pieces, piece)

    def _parts(self, before: str, token: str, after: str) -> Sequence[str]:
        """Cut a token so that no part is a token, nor makes one with the text beside it."""
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if not self._reaches(before + left, len(before)) and not self._reaches(right + after, 0, len(right)):
                return left, right
        return list(token)

    def _reaches(self, text: str, start: int, end: int | None = None) -> bool:
        """Whether a token in a text has a character from `start` to `end`."""
        matches = self._tokens.in_texts.finditer(text) if self._tokens.in_texts is not None else ()
        return any(match.end() > start and match.start() < (len(text) if end is None else end) for match in matches)
