"""The prompt of a chat call, and the format of its answers.

Owns the choice of formats and constraints for a call's tools, choice and wanted answer. Loads no model, compiles no
grammar and runs no engine.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from langchain_core.messages import BaseMessage

from langchain_quantllm.chat.audio import SoundSource, read_sound
from langchain_quantllm.chat.fetching import FetchRules
from langchain_quantllm.chat.harmony import HarmonyParser
from langchain_quantllm.chat.images import ImageSource, read_image
from langchain_quantllm.chat.media import FETCH_S, MediaSource
from langchain_quantllm.chat.messages import Message, joined, media_in, template_messages
from langchain_quantllm.chat.options import ChatOptions
from langchain_quantllm.chat.output_parser import AnswerParser
from langchain_quantllm.chat.response_template import TemplateParser
from langchain_quantllm.chat.special_tokens import MarkedTexts
from langchain_quantllm.chat.template import ChatTemplate
from langchain_quantllm.compat.transformers_processors import longest_sound_s
from langchain_quantllm.loading.checkpoint import hears_sounds, reads_images
from langchain_quantllm.loading.parts import ModelParts
from langchain_quantllm.loading.pieces import valid_text
from langchain_quantllm.loading.processors import Media, no_media_reason
from langchain_quantllm.structured import Constraint, Either, JSONSchema, ToolCalls
from langchain_quantllm.structured.tool_formats import (
    FINAL_HEADER,
    FORMATS,
    HARMONY,
    HARMONY_REASONING,
    HERMES,
    ReasoningFormat,
    ToolFormat,
    format_of,
    reasoning_of,
)

_SCHEMA_TEXT = "Answer with a JSON object that matches this JSON schema, and with nothing else:\n{schema}"

_TEXT_VARIABLES = frozenset({"documents"})
"""Variables of templates that hold the texts of strangers."""


class Prompt(NamedTuple):
    """A rendered conversation, and its images and sounds in the order of their placeholders."""

    pieces: tuple[str, ...]  # between two of them, a special token of a message's text is cut
    media: Media
    adds_begin: bool  # whether the tokenizer is to add its begin token
    begun: str  # the answer's beginning, where the conversation ends with one to continue

    @property
    def text(self) -> str:
        """The whole prompt."""
        return "".join(self.pieces)


def write_prompt(
    messages: Sequence[BaseMessage],
    chat: ChatOptions,
    template: ChatTemplate,
    parts: ModelParts,
    *,
    variables: Mapping[str, Any],
    allows_special_tokens: bool = False,
    timeout_s: float | None = None,
    rules: FetchRules,
) -> Prompt:
    """Render the messages of a call and read their images and sounds.

    Args:
        messages: The conversation.
        chat: The call's own options; a JSON schema among them is told to the model in the system message.
        template: The model's chat template.
        parts: The parts of the model.
        variables: Variables of the template.
        allows_special_tokens: Whether special tokens in the texts of messages and tools are tokens.
        timeout_s: Seconds after which fetching the media is given up; `FETCH_S` for each of them at the most.
        rules: Where they may be fetched from.

    Raises:
        InvalidOptionError: If the template refuses the conversation, or an image or a sound cannot be read.
        UnsupportedError: If there is no template, or the model does not take the images or sounds.
    """
    processor, config = parts.processor, parts.config
    plain = template_messages(messages, images=_takes_images(processor, config), sounds=hears_sounds(config))
    for source in media_in(plain):
        kind: Literal["image", "sound"] = "sound" if isinstance(source, SoundSource) else "image"
        if (error := no_media_reason(parts, kind, source.message)) is not None:
            raise error
    if isinstance(chat.constraint, JSONSchema):
        plain = _with_schema(plain, chat.constraint)
    tools, variables = list(chat.tools), {**variables, **(chat.template_kwargs or {})}
    marked = None if allows_special_tokens else MarkedTexts(template.control_tokens)
    shown = plain
    if marked is not None:
        shown, tools = [dict(marked.in_message(message)) for message in plain], marked.in_texts(tools)
        variables |= {name: marked.in_texts(variables[name]) for name in _TEXT_VARIABLES & variables.keys()}
    text, sources = template.render(shown, tools, variables)
    pieces = tuple(map(valid_text, (text,) if marked is None else marked.pieces(text)))
    media = _read_media(sources, processor, timeout_s, rules)
    # Most templates write the begin token, but not those made for processors.
    # Source: `ProcessorMixin.apply_chat_template` in transformers/processing_utils.py.
    begin = parts.tokenizer.bos_token
    adds_begin = processor is not None and not (begin is not None and pieces[0].startswith(begin))
    return Prompt(pieces, media, adds_begin, _begun_answer(plain, "".join(pieces)))


def _begun_answer(messages: Sequence[Message], prompt: str) -> str:
    """Return the beginning of the answer with which a prompt ends; empty where it ends with none."""
    last = messages[-1] if messages else {}
    content = last.get("content")
    if last.get("role") != "assistant" or last.get("tool_calls") or not isinstance(content, str):
        return ""
    return content.strip() if prompt.rstrip().endswith(content.strip()) else ""


def _takes_images(processor: Any, config: Any) -> bool:
    return reads_images(config) or (processor is not None and not hears_sounds(config))


def _read_media(sources: Sequence[MediaSource], processor: Any, timeout_s: float | None, rules: FetchRules) -> Media:
    end = None if timeout_s is None else time.monotonic() + timeout_s
    images, sounds = [], []
    for source in sources:
        left_s = FETCH_S if end is None else min(FETCH_S, max(0.0, end - time.monotonic()))
        if isinstance(source, ImageSource):
            images.append(read_image(source, left_s, rules))
        elif isinstance(source, SoundSource):
            features = processor.feature_extractor
            rate, longest_s = features.sampling_rate, longest_sound_s(features)
            sounds.append(read_sound(source, rate, longest_s, left_s, rules))
    return Media(tuple(images), tuple(sounds))


def _with_schema(messages: list[Message], constraint: JSONSchema) -> list[Message]:
    """Add a schema to the system message: a model that knows it writes better values than one that only obeys it."""
    text = _SCHEMA_TEXT.format(schema=constraint.schema)
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [{"role": "system", "content": joined([messages[0]["content"], text], "\n\n")}, *messages[1:]]


class AnswerFormat:
    """The format of a call's answers, and the constraint that keeps them to it.

    Attributes:
        constraint: None where any text is an answer.
        is_optional: Whether the constraint only holds calls that the model may leave out.
        shows_special_tokens: Whether the parser must see special tokens.
    """

    def __init__(
        self, chat: ChatOptions, template: ChatTemplate, prompt: Prompt, tokenizer: Any, format_name: str | None
    ) -> None:
        """Find the format.

        Args:
            chat: The call's own options.
            template: The model's chat template.
            prompt: The rendered conversation.
            tokenizer: The model's tokenizer.
            format_name: A name of `FORMATS` in place of the template's format.
        """
        self._tokenizer = tokenizer
        self._tools = chat.tools
        self._prompt = prompt.text
        text = template.text(tools=bool(chat.tools))
        self._in_channels = format_name == HARMONY.name if format_name else format_of(text) is HARMONY
        self._tool_format = None
        if chat.tools and format_name is not None:
            self._tool_format = next(known for known in FORMATS if known.name == format_name)
        elif chat.tools:
            self._tool_format = format_of(text) if template.support.tools else HERMES
        self._reasoning = HARMONY_REASONING if self._in_channels else reasoning_of(text)
        self._in_reasoning = self._reasoning is not None and _is_in_reasoning(prompt, self._reasoning)
        # A tokenizer's own response template reads the answer together with the prompt.
        has_own = getattr(tokenizer, "response_template", None) is not None and format_name is None
        self._own_prefix = prompt.text if has_own else None
        # A model that was not made for tools calls the same one again and again, if it may.
        parallel = template.support.tools if chat.parallel is None else chat.parallel
        parallel = parallel and not self._in_channels  # where the first call ends the answer
        self.constraint = _constraint(chat, self._tool_format, parallel=parallel)
        if self.constraint is not None and (marks := self._reasoning) is not None:
            # A call has a header of its own; other answers that are held to a form have none.
            header = FINAL_HEADER if self._in_channels and self.constraint is chat.constraint else ""
            reasoning = (marks.begin, marks.end + header, self._in_reasoning)
            self.constraint = dataclasses.replace(self.constraint, reasoning=reasoning)
        self.is_optional = isinstance(self.constraint, ToolCalls) and self.constraint.mode == "auto"
        self._markers = _markers(tokenizer, self._tool_format, self._reasoning)
        self.shows_special_tokens = bool(self._markers) or has_own

    def parser(self) -> AnswerParser | HarmonyParser | TemplateParser:
        """Make the parser of one answer."""
        if self._own_prefix is not None:
            return TemplateParser(self._tokenizer, self._own_prefix, self._tools)
        tokens = self._tokenizer.all_special_tokens if self._markers else []
        hidden = [token for token in tokens if not any(token in mark or mark in token for mark in self._markers)]
        pattern = re.compile("|".join(map(re.escape, hidden))) if hidden else None
        if self._in_channels:
            return HarmonyParser(self._tools, prefix=self._prompt, hidden=pattern)
        return AnswerParser(
            self._tool_format,
            self._tools,
            reasoning=self._reasoning,
            in_reasoning=self._in_reasoning,
            hidden=pattern,
        )


def _is_in_reasoning(prompt: Prompt, marks: ReasoningFormat) -> bool:
    """Whether the answer goes on in reasoning that the template or a begun answer has opened."""
    before = prompt.text.rstrip().removesuffix(prompt.begun).rstrip()
    is_open, rest = before.endswith(marks.begin), prompt.begun
    while True:
        if not is_open:
            rest = rest.lstrip()
            if not rest.startswith(marks.begin):
                return False
            rest = rest[len(marks.begin) :]
        _, end, rest = rest.partition(marks.end)
        if not end:
            return True
        is_open = False


def _constraint(chat: ChatOptions, tool_format: ToolFormat | None, *, parallel: bool) -> Constraint | None:
    """Choose the constraint of an answer: the wanted one, calls, or either of them."""
    if tool_format is None:
        return chat.constraint
    is_required = chat.choice is not None or chat.constraint is not None
    mode: Literal["required", "auto"] = "required" if is_required else "auto"
    calls = ToolCalls(tool_format, chat.callable_tools, mode=mode, parallel=parallel)
    return calls if chat.choice is not None or chat.constraint is None else Either((calls, chat.constraint))


def _markers(tokenizer: Any, tool_format: ToolFormat | None, reasoning: ReasoningFormat | None) -> list[str]:
    """List the special tokens that the parser must see."""
    texts = [] if reasoning is None else [reasoning.begin, reasoning.end]
    if tool_format is not None:
        texts += [tool_format.opening, tool_format.trigger, tool_format.call, tool_format.call_end, tool_format.closing]
        texts += tool_format.inner
    return [token for token in tokenizer.all_special_tokens if any(token in text for text in texts)]
