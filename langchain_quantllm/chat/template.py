"""A model's chat template: from messages to the prompt, and the rules for templates that cannot express them.

Owns the rules. The abilities of a template are `template_support`'s. Knows tokenizers and plain messages; no model and
no LangChain.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_quantllm.chat.images import ImageSource
from langchain_quantllm.chat.messages import Message, images_in, joined
from langchain_quantllm.chat.template_support import CALL_ID, TemplateSupport, message_of, template_errors
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError

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


class ChatTemplate:
    """Renders conversations; made once for each tokenizer and template.

    Where the template does not do it, by these rules:

    - Tools are described in the system message, in the Hermes format; calls and their results become text of the
      assistant's and the user's messages.
    - A system message that the template refuses or leaves out stands before the first user message's text; one in the
      middle joins the first. Several are joined.
    - Messages of one role behind each other are joined, with an empty line in between, where the template insists on
      roles that alternate.
    - Ids of calls become nine letters and digits where the template insists on that (Mistral).
    - An image for which a template that takes texts only has no place becomes the processor's image token, in a line
      of its own; an image of a role for which a template with places for images has none is an error.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, processor: Any = None) -> None:
        """Take a tokenizer's template, or one of the user's in its place.

        Args:
            tokenizer: A tokenizer of transformers.
            template: A Jinja template.
            processor: The processor of a model that reads images; its template comes before the tokenizer's.
        """
        own = getattr(processor, "chat_template", None)
        self._tokenizer = tokenizer
        self._given = template or (own if isinstance(own, str) else None)
        # Gemma's processors replace another token than the one that they call their image token.
        token = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
        self.support = TemplateSupport(self._write, token, has_processor=processor is not None)

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
    ) -> tuple[str, list[ImageSource]]:
        """Write a conversation as the model knows it, up to the beginning of its answer.

        A last message of the assistant without calls is one to continue.

        Args:
            messages: As `messages.template_messages` makes them.
            tools: Functions, as OpenAI describes them.
            variables: Further variables of the template, such as `enable_thinking`.

        Returns:
            The prompt, begin token included where the template writes one, and its images in the order in which they
            stand in it.

        Raises:
            InvalidOptionError: If the template refuses the conversation.
            UnsupportedError: If there is no template, or it has no place for an image.
        """
        self.text(tools=bool(tools))
        variables = dict(variables or {})
        if taken := _RESERVED & variables.keys():
            msg = f"chat_template_kwargs holds {min(taken)!r}, which comes from the call itself; leave it out."
            raise InvalidOptionError(msg)
        if messages and messages[-1].get("tool_calls"):  # written out as text, they would be a message to continue
            variables = {"add_generation_prompt": True, "continue_final_message": False, **variables}
        fitted = self._fit(messages, tools)
        shown = list(tools) if self.support.tools else []
        try:
            return self._write(self.support.written(fitted), shown, variables), images_in(fitted)
        except template_errors() as error:
            is_broken = type(error).__name__ == "TemplateSyntaxError"
            problem = "is not valid Jinja" if is_broken else "does not take this conversation"
            msg = f"the model's chat template {problem}: {error}"
            raise InvalidOptionError(msg) from error

    def _write(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], variables: Mapping[str, Any] | None = None
    ) -> str:
        last = messages[-1]
        continues = last["role"] == "assistant" and not last.get("tool_calls") and bool(last["content"])
        return str(
            self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                chat_template=self._given,
                tokenize=False,
                **{"add_generation_prompt": not continues, "continue_final_message": continues, **(variables or {})},
            )
        )

    # The rules.

    def _fit(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
        fitted = [dict(message) for message in messages]
        has_calls = any(message.get("tool_calls") for message in fitted)
        if tools and not self.support.tools:
            lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
            fitted.insert(0, message_of("system", _TOOLS_TEXT.format(tools=lines)))
            if len(fitted) > 1 and fitted[1]["role"] == "system":  # the user's text comes first
                fitted[0:2] = [message_of("system", joined([fitted[1]["content"], fitted[0]["content"]], "\n\n"))]
        if has_calls or any(message["role"] == "tool" for message in fitted):
            fitted = self._fit_calls(fitted)
        fitted = self._fit_system(fitted)
        if not self.support.repeated_roles:
            fitted = _merged(fitted)
        return fitted

    def _fit_calls(self, messages: list[Message]) -> list[Message]:
        written_out = self.support.arguments is None or not self.support.results
        fitted: list[Message] = []
        for message in messages:
            if written_out and message["role"] == "tool":
                # Several results are one message, as in the models that this format comes from.
                result = joined(["<tool_response>\n", message["content"], "\n</tool_response>"], "")
                if fitted and fitted[-1].get("results"):
                    fitted[-1]["content"] = joined([fitted[-1]["content"], result], "\n")
                else:
                    fitted.append({**message_of("user", result), "results": True})
                continue
            if calls := message.get("tool_calls"):
                message = self._fit_call(message, calls, written_out=written_out)
            elif message["role"] == "tool" and not self.support.long_ids:
                message["tool_call_id"] = _short_id(message.get("tool_call_id", ""))
            fitted.append(message)
        return [{name: value for name, value in message.items() if name != "results"} for message in fitted]

    def _fit_call(self, message: Message, calls: Sequence[Any], *, written_out: bool) -> Message:
        if written_out:
            texts = [f"<tool_call>\n{json.dumps(c['function'], ensure_ascii=False)}\n</tool_call>" for c in calls]
            rest = {name: value for name, value in message.items() if name != "tool_calls"}
            return rest | {"content": joined([message["content"], *texts], "\n")}
        fitted = []
        for call in calls:
            function = dict(call["function"])
            if self.support.arguments == "text":
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
            call_id = call["id"] if self.support.long_ids else _short_id(call["id"])
            fitted.append({**call, "id": call_id, "function": function})
        return message | {"tool_calls": fitted}

    def _fit_system(self, messages: list[Message]) -> list[Message]:
        systems = [message for message in messages if message["role"] == "system"]
        if not systems:
            return messages
        rest = [message for message in messages if message["role"] != "system"]
        leads = messages[0] is systems[0]
        if self.support.system and leads and (len(systems) == 1 or self.support.late_system):
            return messages
        if self.support.system and self.support.late_system and not leads:
            return messages
        text = joined([message["content"] for message in systems], "\n\n")
        if self.support.system:
            return [message_of("system", text), *rest]
        at = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
        if at is None:
            return [message_of("user", text), *rest]
        rest[at] = rest[at] | {"content": joined([text, rest[at]["content"]], "\n\n")}
        return rest


def _merged(messages: Sequence[Message]) -> list[Message]:
    """Join messages of one role behind each other; calls and results stay as they are."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        plain = message["role"] in ("user", "assistant", "system") and not message.get("tool_calls")
        if last is not None and plain and last["role"] == message["role"] and not last.get("tool_calls"):
            merged[-1] = last | {"content": joined([last["content"], message["content"]], "\n\n")}
        else:
            merged.append(message)
    return merged


def _short_id(call_id: str) -> str:
    """Make an id of nine letters and digits, always the same one of the same id."""
    letters = string.ascii_letters + string.digits
    if len(call_id) == len(CALL_ID) and set(call_id) <= set(letters):
        return call_id
    return "".join(letters[byte % len(letters)] for byte in hashlib.sha256(call_id.encode()).digest()[: len(CALL_ID)])
