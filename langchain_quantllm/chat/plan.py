"""The plan of a chat call: its prompt, and the format of its answers.

Owns the choice of formats and constraints for a call's tools, choice and wanted answer. Loads no model, compiles no
grammar and runs no engine.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from langchain_core.messages import BaseMessage

from langchain_quantllm.chat.images import FETCH_S, read_image
from langchain_quantllm.chat.messages import Message, images_in, joined, template_messages
from langchain_quantllm.chat.options import ChatOptions
from langchain_quantllm.chat.output_parser import AnswerParser
from langchain_quantllm.chat.response_template import TemplateParser
from langchain_quantllm.chat.result import ResultReader
from langchain_quantllm.chat.template import ChatTemplate
from langchain_quantllm.engine.request import Request
from langchain_quantllm.loading.checkpoint import reads_images
from langchain_quantllm.loading.processors import why_blind
from langchain_quantllm.options import GenerationOptions
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


@dataclass(frozen=True, kw_only=True)
class ChatPlan:
    """One call, ready for the engine.

    Args:
        options: The options of generating.
        requests: One for each answer.
        new_reader: Makes the reader of an answer.
    """

    options: GenerationOptions
    requests: list[Request]
    new_reader: Callable[[], ResultReader]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt.

    Args:
        text: The rendered conversation.
        images: Its Pillow images, in the order of their placeholders.
        adds_begin: Whether the tokenizer is to add its begin token: most templates write it, but not those made for
            processors. Source: `ProcessorMixin.apply_chat_template` in transformers/processing_utils.py.
    """

    text: str
    images: list[Any]
    adds_begin: bool


def write_prompt(
    messages: Sequence[BaseMessage],
    chat: ChatOptions,
    template: ChatTemplate,
    pipeline: Any,
    *,
    variables: Mapping[str, Any],
    timeout_s: float | None = None,
) -> Prompt:
    """Render the messages of a call and read their images.

    Args:
        messages: The conversation.
        chat: The call's own options; a JSON schema among them is told to the model in the system message.
        template: The model's chat template.
        pipeline: The transformers pipeline that holds the model.
        variables: Variables of the template.
        timeout_s: Seconds after which fetching an image is given up, if less than `FETCH_S`.

    Raises:
        InvalidOptionError: If the template refuses the conversation, or an image cannot be read.
        UnsupportedError: If there is no template, or the model does not read the images.
    """
    processor = getattr(pipeline, "processor", None)
    plain = template_messages(messages, images=processor is not None or reads_images(pipeline.model.config))
    if (found := images_in(plain)) and (error := why_blind(pipeline, found[0].message)) is not None:
        raise error
    if isinstance(chat.constraint, JSONSchema):
        plain = _with_schema(plain, chat.constraint)
    text, sources = template.render(plain, chat.tools, {**variables, **(chat.template_kwargs or {})})
    begin = pipeline.tokenizer.bos_token
    return Prompt(
        text=text,
        images=[read_image(source, min(timeout_s or FETCH_S, FETCH_S)) for source in sources],
        adds_begin=processor is not None and not (begin is not None and text.startswith(begin)),
    )


def _with_schema(messages: list[Message], constraint: JSONSchema) -> list[Message]:
    """Add a schema to the system message: a model that knows it writes better values than one that only obeys it."""
    text = _SCHEMA_TEXT.format(schema=constraint.schema)
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [{"role": "system", "content": joined([messages[0]["content"], text], "\n\n")}, *messages[1:]]


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """The format of a call's answers, and the constraint that keeps them to it.

    Args:
        tools: Functions that the model may call, as OpenAI's API takes them.
        tool_format: The model's format of calls; None without tools.
        reasoning: Its format of reasoning, if it has one.
        in_reasoning: Whether the prompt has begun the reasoning already.
        constraint: Keeps the answers to the format; None where anything is one.
        response_prefix: The prompt, where the tokenizer has a response template of its own that reads the answers.
        markers: Special tokens that the parser must see.
    """

    tools: tuple[dict[str, Any], ...]
    tool_format: ToolFormat | None
    reasoning: ReasoningFormat | None
    in_reasoning: bool
    constraint: Constraint | None
    response_prefix: str | None
    markers: tuple[str, ...]

    @classmethod
    def of(
        cls, chat: ChatOptions, template: ChatTemplate, prompt: str, tokenizer: Any, format_name: str | None
    ) -> AnswerFormat:
        """Find the format of a call's answers.

        Args:
            chat: The call's own options.
            template: The model's chat template.
            prompt: The rendered conversation.
            tokenizer: The model's tokenizer.
            format_name: A name of `FORMATS` in place of the template's format.
        """
        takes_tools = template.support.tools
        tool_format = None
        if chat.tools and format_name is not None:
            tool_format = next(known for known in FORMATS if known.name == format_name)
        elif chat.tools:
            tool_format = format_of(template.text(tools=True)) if takes_tools else HERMES
        reasoning = reasoning_of(template.text(tools=bool(chat.tools)))
        in_reasoning = reasoning is not None and prompt.rstrip().endswith(reasoning.begin)
        # A model that was not made for tools calls the same one again and again, if it may.
        constraint = _constraint(chat, tool_format, parallel=takes_tools if chat.parallel is None else chat.parallel)
        if constraint is not None and reasoning is not None:
            constraint = dataclasses.replace(constraint, reasoning=(reasoning.begin, reasoning.end, in_reasoning))
        has_own = getattr(tokenizer, "response_template", None) is not None and format_name is None
        return cls(
            tools=chat.tools,
            tool_format=tool_format,
            reasoning=reasoning,
            in_reasoning=in_reasoning,
            constraint=constraint,
            response_prefix=prompt if has_own else None,
            markers=_markers(tokenizer, tool_format, reasoning),
        )

    @property
    def is_optional(self) -> bool:
        """Whether the constraint only holds calls that the model may leave out."""
        return isinstance(self.constraint, ToolCalls) and self.constraint.mode == "auto"

    @property
    def has_special_tokens(self) -> bool:
        """Whether the parser must see special tokens."""
        return bool(self.markers) or self.response_prefix is not None

    def parser(self, tokenizer: Any) -> AnswerParser | TemplateParser:
        """Make the parser of one answer."""
        if self.response_prefix is not None:
            return TemplateParser(tokenizer, self.response_prefix, self.tools)
        hidden = [t for t in tokenizer.all_special_tokens if not any(t in m or m in t for m in self.markers)]
        return AnswerParser(
            self.tool_format,
            self.tools,
            reasoning=self.reasoning,
            in_reasoning=self.in_reasoning,
            hidden=re.compile("|".join(map(re.escape, hidden))) if self.markers and hidden else None,
        )


def _constraint(chat: ChatOptions, tool_format: ToolFormat | None, *, parallel: bool) -> Constraint | None:
    """Choose the constraint of an answer: the wanted one, calls, or either of them."""
    if tool_format is None:
        return chat.constraint
    is_required = chat.choice is not None or chat.constraint is not None
    mode: Literal["required", "auto"] = "required" if is_required else "auto"
    calls = ToolCalls(tool_format, chat.callable_tools, mode=mode, parallel=parallel)
    return calls if chat.choice is not None or chat.constraint is None else Either((calls, chat.constraint))


def _markers(tokenizer: Any, tool_format: ToolFormat | None, reasoning: ReasoningFormat | None) -> tuple[str, ...]:
    """List the special tokens that the parser must see."""
    texts = [] if reasoning is None else [reasoning.begin, reasoning.end]
    if tool_format is not None:
        texts += [tool_format.opening, tool_format.trigger, tool_format.call, tool_format.call_end, tool_format.closing]
        texts += tool_format.inner
    return tuple(token for token in tokenizer.all_special_tokens if any(token in text for text in texts))
