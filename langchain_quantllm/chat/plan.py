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

from langchain_quantllm.chat.fetching import FetchRules
from langchain_quantllm.chat.images import FETCH_S, ImageSource, read_image
from langchain_quantllm.chat.messages import Message, images_in, joined, template_messages
from langchain_quantllm.chat.options import ChatOptions
from langchain_quantllm.chat.output_parser import AnswerParser
from langchain_quantllm.chat.response_template import TemplateParser
from langchain_quantllm.chat.template import ChatTemplate
from langchain_quantllm.loading.checkpoint import reads_images
from langchain_quantllm.loading.processors import no_images_reason
from langchain_quantllm.structured import Constraint, Either, JSONSchema, ToolCalls
from langchain_quantllm.structured.tool_formats import (
    FORMATS,
    HERMES,
    ReasoningFormat,
    ToolFormat,
    format_of,
    reasoning_of,
)

_SCHEMA_TEXT = "Answer with a JSON object that matches this JSON schema, and with nothing else:\n{schema}"


class Prompt(NamedTuple):
    """A rendered conversation, and its Pillow images in the order of their placeholders."""

    text: str
    images: list[Any]
    adds_begin: bool  # whether the tokenizer is to add its begin token


def write_prompt(
    messages: Sequence[BaseMessage],
    chat: ChatOptions,
    template: ChatTemplate,
    pipeline: Any,
    *,
    variables: Mapping[str, Any],
    timeout_s: float | None = None,
    rules: FetchRules,
) -> Prompt:
    """Render the messages of a call and read their images.

    Args:
        messages: The conversation.
        chat: The call's own options; a JSON schema among them is told to the model in the system message.
        template: The model's chat template.
        pipeline: The transformers pipeline that holds the model.
        variables: Variables of the template.
        timeout_s: Seconds after which fetching the images is given up; `FETCH_S` for each of them at the most.
        rules: Where images may be fetched from.

    Raises:
        InvalidOptionError: If the template refuses the conversation, or an image cannot be read.
        UnsupportedError: If there is no template, or the model does not read the images.
    """
    processor = getattr(pipeline, "processor", None)
    plain = template_messages(messages, images=processor is not None or reads_images(pipeline.model.config))
    if (found := images_in(plain)) and (error := no_images_reason(pipeline, found[0].message)) is not None:
        raise error
    if isinstance(chat.constraint, JSONSchema):
        plain = _with_schema(plain, chat.constraint)
    text, sources = template.render(plain, chat.tools, {**variables, **(chat.template_kwargs or {})})
    images = _read_images(sources, timeout_s, rules)
    # Most templates write the begin token, but not those made for processors.
    # Source: `ProcessorMixin.apply_chat_template` in transformers/processing_utils.py.
    begin = pipeline.tokenizer.bos_token
    return Prompt(text, images, processor is not None and not (begin is not None and text.startswith(begin)))


def _read_images(sources: Sequence[ImageSource], timeout_s: float | None, rules: FetchRules) -> list[Any]:
    end = None if timeout_s is None else time.monotonic() + timeout_s
    images = []
    for source in sources:
        left_s = FETCH_S if end is None else min(FETCH_S, max(0.0, end - time.monotonic()))
        images.append(read_image(source, left_s, rules))
    return images


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
        self, chat: ChatOptions, template: ChatTemplate, prompt: str, tokenizer: Any, format_name: str | None
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
        self._tool_format = None
        if chat.tools and format_name is not None:
            self._tool_format = next(known for known in FORMATS if known.name == format_name)
        elif chat.tools:
            self._tool_format = format_of(template.text(tools=True)) if template.support.tools else HERMES
        self._reasoning = reasoning_of(template.text(tools=bool(chat.tools)))
        self._in_reasoning = self._reasoning is not None and prompt.rstrip().endswith(self._reasoning.begin)
        # A tokenizer's own response template reads the answer together with the prompt.
        has_own = getattr(tokenizer, "response_template", None) is not None and format_name is None
        self._own_prefix = prompt if has_own else None
        # A model that was not made for tools calls the same one again and again, if it may.
        parallel = template.support.tools if chat.parallel is None else chat.parallel
        self.constraint = _constraint(chat, self._tool_format, parallel=parallel)
        if self.constraint is not None and (marks := self._reasoning) is not None:
            reasoning = (marks.begin, marks.end, self._in_reasoning)
            self.constraint = dataclasses.replace(self.constraint, reasoning=reasoning)
        self.is_optional = isinstance(self.constraint, ToolCalls) and self.constraint.mode == "auto"
        self._markers = _markers(tokenizer, self._tool_format, self._reasoning)
        self.shows_special_tokens = bool(self._markers) or has_own

    def parser(self) -> AnswerParser | TemplateParser:
        """Make the parser of one answer."""
        if self._own_prefix is not None:
            return TemplateParser(self._tokenizer, self._own_prefix, self._tools)
        tokens = self._tokenizer.all_special_tokens if self._markers else []
        hidden = [token for token in tokens if not any(token in mark or mark in token for mark in self._markers)]
        return AnswerParser(
            self._tool_format,
            self._tools,
            reasoning=self._reasoning,
            in_reasoning=self._in_reasoning,
            hidden=re.compile("|".join(map(re.escape, hidden))) if hidden else None,
        )


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
