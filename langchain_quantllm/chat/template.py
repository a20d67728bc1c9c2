"""A model's chat template: from messages to the prompt.

Owns rendering, and choosing the rules of `bridge` for conversations that the template does not take whole. The
abilities of a template are `template_support`'s. Knows tokenizers and plain messages; no model and no LangChain.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_quantllm.chat.bridge import Bridge, Shape, bridges, shape_of
from langchain_quantllm.chat.media import MediaSource
from langchain_quantllm.chat.messages import Message, joined, media_in
from langchain_quantllm.chat.rendering import RefusalError, render_messages
from langchain_quantllm.chat.special_tokens import ControlTokens
from langchain_quantllm.chat.template_support import (
    CALL_ID,
    TemplateSupport,
    message_of,
    remembered,
    some_tool,
)
from langchain_quantllm.compat.jinja_bounds import ProcessorTime, TemplateBoundError
from langchain_quantllm.errors import InvalidOptionError, QuantLLMError, UnsupportedError
from langchain_quantllm.structured.tool_formats import reasoning_of

_TOOLS_TEXT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""The description of tools for a template without them: the Hermes format, which most small models have seen."""

_RESERVED = frozenset(
    {"conversation", "messages", "tools", "tokenize", "chat_template", "return_dict", "return_tensors"}
)
"""Arguments of `apply_chat_template` that are no variables of the template."""

_MOST_SHAPES = 1024
_SEARCH_S = 1.0  # of processor time, and more for many turns


class TemplateRefusalError(InvalidOptionError):
    """A chat template takes a conversation in no shape into which it may be brought."""


class ChatTemplate:
    """Renders conversations; made once for each tokenizer and template.

    A conversation that the template takes whole is rendered as transformers does it. What it refuses or leaves out is
    brought into another shape by the rules of `bridge`, by as few of them as are needed; what stays the same for every
    conversation:

    - Tools are described in the system message, in the Hermes format, where the template has no place for them.
    - Arguments of calls are text where the template takes no dict. Ids of calls become nine letters and digits where
      the template insists on that (Mistral).
    - An image for which a template that takes texts only has no place becomes the processor's image token, in a line
      of its own; an image of a role for which a template with places for images has none is an error. So are sounds.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, processor: Any = None) -> None:
        """Take a tokenizer's template, or one of the user's in its place.

        Args:
            tokenizer: A tokenizer of transformers.
            template: A Jinja template.
            processor: The processor of a model that reads images or hears; its template comes before the tokenizer's.
        """
        own = getattr(processor, "chat_template", None)
        self._tokenizer = tokenizer
        self._processor = processor
        self._given = template or (own if isinstance(own, str) else None)
        # Gemma's processors replace another token than the one that they call their image token.
        tokens = {
            "image": getattr(processor, "boi_token", None) or getattr(processor, "image_token", None),
            "audio": getattr(processor, "audio_token", None),
        }
        self._best: dict[bytes, Bridge] = {}
        self.support = TemplateSupport(self._write, tokens, has_processor=processor is not None)

    def text(self, *, tools: bool = False) -> str:
        """The Jinja template; of several, the one for conversations with or without tools.

        Raises:
            UnsupportedError: If there is none.
        """
        try:
            return str(self._tokenizer.get_chat_template(self._given, tools=[{}] if tools else None))
        except ValueError as error:
            msg = (
                "the checkpoint has no chat template; use an instruct or chat model, give chat_template=, or take "
                "QuantizedHuggingFaceLLM, which continues plain text."
            )
            raise UnsupportedError(msg) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[MediaSource]]:
        """Write a conversation as the model knows it, up to the beginning of its answer.

        A last message of the assistant without calls is one to continue.

        Args:
            messages: As `messages.template_messages` makes them.
            tools: Functions, as OpenAI describes them.
            variables: Further variables of the template, such as `enable_thinking`.

        Returns:
            The prompt, begin token included where the template writes one, and its images and sounds in the order in
            which they stand in it.

        Raises:
            InvalidOptionError: If the template refuses the conversation.
            UnsupportedError: If there is no template, or it has no place for an image or a sound.
        """
        self.text(tools=bool(tools))
        variables = dict(variables or {})
        if taken := _RESERVED & variables.keys():
            msg = f"chat_template_kwargs holds {min(taken)!r}, which comes from the call itself; leave it out."
            raise InvalidOptionError(msg)
        if messages and messages[-1].get("tool_calls"):  # written out as text, they would be a message to continue
            variables = {"add_generation_prompt": True, "continue_final_message": False, **variables}
        messages = self._with_tools(messages, tools)
        shown = list(tools) if self.support.tools else []
        self.support.written([message for message in messages if message["role"] != "tool"])
        refusal: Exception | None = None
        for bridge in self._bridges(messages, bool(tools), variables):
            try:
                return self._write_over(bridge, messages, shown, variables)
            except (RefusalError, UnsupportedError) as error:
                refusal = refusal or error
                if type(error.__cause__).__name__ in ("TemplateSyntaxError", "TemplateAssertionError"):
                    msg = f"the model's chat template is not valid Jinja: {error}"
                    raise InvalidOptionError(msg) from error
        if isinstance(refusal, UnsupportedError):
            raise refusal
        msg = f"the model's chat template does not take this conversation: {refusal}"
        raise TemplateRefusalError(msg) from refusal

    def _write_over(
        self, bridge: Bridge, messages: Sequence[Message], tools: Sequence[Any], variables: Mapping[str, Any]
    ) -> tuple[str, list[MediaSource]]:
        """Render a conversation over a bridge; raises a `RefusalError` where the template refuses it."""
        fitted = self._fit_calls(bridge.apply(messages))
        prefill = ""
        if bridge.appends_prefill:
            *fitted, last = fitted
            if not isinstance(last["content"], str):
                msg = "an image or a sound cannot be written behind the prompt"
                raise RefusalError(msg)
            prefill = last["content"]
        return self._write(self.support.written(fitted), tools, variables) + prefill, media_in(fitted)

    def _bridges(self, messages: Sequence[Message], has_tools: bool, variables: Mapping[str, Any]) -> Iterator[Bridge]:
        """List the bridges for a conversation, the best for its shape first."""
        shape = shape_of(messages)
        key = hashlib.sha256(repr((has_tools, dict(variables), shape.key)).encode("utf-8", "replace")).digest()
        if (best := self._best.get(key)) is None:
            best, is_final = self._find_bridge(shape, has_tools, variables)
            if len(self._best) >= _MOST_SHAPES:
                self._best.clear()
            if is_final:
                self._best[key] = best
        yield best
        spent = ProcessorTime()
        for other in bridges(messages, continues=_continues(messages, variables)):
            if other != best:
                yield other
            if spent.read() > _search_s(len(messages)):
                return

    def _find_bridge(self, shape: Shape, has_tools: bool, variables: Mapping[str, Any]) -> tuple[Bridge, bool]:
        """Find the first of the bridges over which nothing is lost; else that over which the least is.

        Returns:
            The bridge, and whether none is better: False where there was no time for all of them.
        """
        shown = [some_tool()] if has_tools and self.support.tools else []
        best, least = Bridge(), None
        spent, turns = ProcessorTime(), len(shape.messages)
        for bridge in bridges(shape.messages, continues=_continues(shape.messages, variables)):
            if spent.read() > _search_s(turns):
                return best, False
            try:
                prompt, _ = self._write_over(bridge, shape.messages, shown, variables)
            except (RefusalError, UnsupportedError):  # the latter for images in results
                continue
            loss = shape.loss(prompt)
            if shown and some_tool()["function"]["name"] not in prompt:
                loss = (loss[0] + 1, loss[1])
            if least is None or loss < least:
                best, least = bridge, loss
            if loss == (0, 0):
                break
        return best, True

    def _write(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], variables: Mapping[str, Any] | None = None
    ) -> str:
        return render_messages(
            self._tokenizer,
            self.text(tools=bool(tools)),
            messages,
            tools,
            continues=bool(messages) and _continues(messages, {}),
            variables=variables or {},
        )

    @remembered
    def control_tokens(self) -> ControlTokens:
        """The tokens that must not come from the text of a message."""
        chat = [
            message_of("system", "a"),
            message_of("user", "b"),
            message_of("assistant", "c"),
            message_of("user", "d"),
        ]
        function = {"name": some_tool()["function"]["name"], "arguments": {"x": "y"}}
        call = message_of("assistant", "") | {"tool_calls": [{"type": "function", "id": CALL_ID, "function": function}]}
        result = message_of("tool", "f") | {"tool_call_id": CALL_ID, "name": function["name"]}
        prompts = []
        for messages, tools in ((chat, []), ([*chat, call, result], [some_tool()])):
            try:
                prompts.append(self.render(messages, tools)[0])
            except TemplateBoundError:
                raise
            except QuantLLMError:  # the call itself will say so
                prompts.append("")
        reasoning = reasoning_of(self.text())
        tags = () if reasoning is None else (reasoning.begin, reasoning.end)
        return ControlTokens.of(
            self._tokenizer, self._processor, chat_prompt=prompts[0], tool_prompt=prompts[1], tags=tags
        )

    # What stays the same for every conversation.

    def _with_tools(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
        fitted = [dict(message) for message in messages]
        if tools and not self.support.tools:
            lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
            fitted.insert(0, message_of("system", _TOOLS_TEXT.format(tools=lines)))
            if len(fitted) > 1 and fitted[1]["role"] == "system":  # the user's text comes first
                fitted[0:2] = [message_of("system", joined([fitted[1]["content"], fitted[0]["content"]], "\n\n"))]
        return fitted

    def _fit_calls(self, messages: Sequence[Message]) -> list[Message]:
        return [self._fit_call(m) if m.get("tool_calls") or m["role"] == "tool" else m for m in messages]

    def _fit_call(self, message: Message) -> Message:
        if message["role"] == "tool":
            call_id = message.get("tool_call_id", "")
            return message if self.support.long_ids else message | {"tool_call_id": _short_id(call_id)}
        fitted = []
        for call in message["tool_calls"]:
            function = dict(call["function"])
            if self.support.arguments == "text":
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
            call_id = call["id"] if self.support.long_ids else _short_id(call["id"])
            fitted.append({**call, "id": call_id, "function": function})
        return message | {"tool_calls": fitted}


def _search_s(turns: int) -> float:
    """Return the seconds after which no more bridges are tried: a template of strangers may be slow over each."""
    return _SEARCH_S + turns / 100


def _continues(messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> bool:
    """Whether the last message is an answer to continue."""
    last = messages[-1]
    is_answer = last["role"] == "assistant" and not last.get("tool_calls") and bool(last["content"])
    return is_answer and variables.get("continue_final_message", True) is not False


def _short_id(call_id: str) -> str:
    """Make an id of nine letters and digits, always the same one of the same id."""
    letters = string.ascii_letters + string.digits
    if len(call_id) == len(CALL_ID) and set(call_id) <= set(letters):
        return call_id
    return "".join(letters[byte % len(letters)] for byte in hashlib.sha256(call_id.encode()).digest()[: len(CALL_ID)])
