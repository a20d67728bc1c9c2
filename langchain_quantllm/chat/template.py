"""A model's chat template: from turns to the prompt, and what is done where the template does not do it.

Owns the rules for what a template cannot express. What it can is found out by rendering small conversations
with it, once. Knows tokenizers and turns; no model and no LangChain.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_quantllm.chat.contents import ContentForms, images_in, joined
from langchain_quantllm.chat.images import ImageSource
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
"""How a template without tools is taught them: the words of the Hermes format, which most small models have seen."""

_MARK = "Kq7Zx"  # appears in no template
_CALL_ID = "a1B2c3D4e"


_RESERVED = frozenset(
    {"conversation", "messages", "tools", "tokenize", "chat_template", "return_dict", "return_tensors"}
)
"""What `apply_chat_template` is given beside the variables."""


class ChatTemplate:
    """Renders conversations; made once for each tokenizer and template.

    Where the template does not do it, by these rules:

    - Tools are described in the system message, in the Hermes format; calls and their results become text of the
      assistant's and the user's turns.
    - A system message that the template refuses or leaves out stands before the first user turn's text; one in the
      middle joins the first. Several are joined.
    - Turns of one role behind each other are joined, with an empty line in between, where the template insists on
      turns that alternate.
    - Ids of calls become nine letters and digits where the template insists on that (Mistral).
    - An image for which a template that takes texts only has no place becomes the processor's image token, in a line
      of its own; one in a turn of a role that a template with places for images has none for is an error.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, processor: Any = None) -> None:
        """Take a tokenizer's template, or one that the user gives in its place.

        Args:
            tokenizer: A tokenizer of transformers.
            template: A Jinja template.
            processor: The processor of a model that reads images; its template comes before the tokenizer's.
        """
        own = getattr(processor, "chat_template", None)
        self._tokenizer = tokenizer
        self._given = template or (own if isinstance(own, str) else None)
        # Gemma's processors replace another token than the one they call their image token.
        token = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
        self._forms = None if processor is None else ContentForms(self._render_one, token)

    def text(self, *, tools: bool = False) -> str:
        """Give the template itself: of several, the one for conversations with or without tools.

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
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Write a conversation as the model knows it, up to where its answer begins.

        A last turn of the assistant without calls is one to continue.

        Args:
            turns: As `turns.turns_of` makes them.
            tools: Functions, as OpenAI describes them.
            options: Further variables of the template, such as `enable_thinking`.

        Returns:
            The prompt, begin token included where the template writes one.

        Raises:
            InvalidOptionError: If the template refuses the conversation.
            UnsupportedError: If there is no template, or it has no place for an image.
        """
        return self.compose(turns, tools, options)[0]

    def compose(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[ImageSource]]:
        """Write a conversation as `render` does, and list its images in the order in which they stand in the prompt.

        Args:
            turns: As `turns.turns_of` makes them.
            tools: Functions, as OpenAI describes them.
            options: Further variables of the template.

        Raises:
            InvalidOptionError: If the template refuses the conversation.
            UnsupportedError: If there is no template, or it has no place for an image.
        """
        self.text(tools=bool(tools))
        variables = dict(options or {})
        if taken := _RESERVED & variables.keys():
            msg = f"chat_template_kwargs holds {min(taken)!r}, which comes from the call itself; leave it out."
            raise InvalidOptionError(msg)
        if turns and turns[-1].get("tool_calls"):  # written out as text, they would be a turn to continue
            variables = {"add_generation_prompt": True, "continue_final_message": False, **variables}
        fitted = self._fit(turns, tools)
        try:
            return self._apply(fitted, list(tools) if self.takes_tools else [], variables), images_in(fitted)
        except _template_errors() as error:
            is_broken = type(error).__name__ == "TemplateSyntaxError"
            what = "is no valid Jinja" if is_broken else "does not take this conversation"
            msg = f"the model's chat template {what}: {error}"
            raise InvalidOptionError(msg) from error

    def takes_images(self, role: str = "user") -> bool:
        """Whether there is a place for images in turns of a role."""
        return self._forms is not None and self._forms.takes_images(role)

    def _apply(self, turns: Sequence[Mapping[str, Any]], tools: list[Any], options: Mapping[str, Any]) -> str:
        if (forms := self._forms) is not None:
            turns = [turn | {"content": forms.written(turn["role"], turn["content"])} for turn in map(dict, turns)]
        return self._write(turns, tools, options)

    def _write(self, turns: Sequence[Mapping[str, Any]], tools: list[Any], options: Mapping[str, Any]) -> str:
        continues = turns[-1]["role"] == "assistant" and not turns[-1].get("tool_calls") and bool(turns[-1]["content"])
        return str(
            self._tokenizer.apply_chat_template(
                list(turns),
                tools=tools or None,
                chat_template=self._given,
                tokenize=False,
                **{"add_generation_prompt": not continues, "continue_final_message": continues, **options},
            )
        )

    # What the template can do.

    @functools.cached_property
    def takes_tools(self) -> bool:
        """Whether the template shows tools to the model."""
        return self._shows([_user("a")], [f"f{_MARK}"], tools=[_function(f"f{_MARK}")])

    @functools.cached_property
    def _calls_with(self) -> str | None:
        """How the template takes the arguments of calls: `"dict"`, `"text"`, or None where it leaves calls out."""
        for kind, arguments in (("dict", {"x": _MARK}), ("text", json.dumps({"x": _MARK}))):
            if self._shows([_user("a"), _call(arguments), _result("b")], [_MARK], tools=self._some_tool):
                return kind
        return None

    @functools.cached_property
    def _takes_results(self) -> bool:
        call = _call({"x": "y"} if self._calls_with == "dict" else '{"x": "y"}')
        return self._shows([_user("a"), call, _result(_MARK)], [_MARK], tools=self._some_tool)

    @functools.cached_property
    def _takes_system(self) -> bool:
        return self._shows([_turn("system", _MARK), _user("b")], [_MARK])

    @functools.cached_property
    def _takes_late_system(self) -> bool:
        return self._shows([_user("a"), _turn("assistant", "b"), _turn("system", _MARK), _user("c")], [_MARK])

    @functools.cached_property
    def _takes_doubled(self) -> bool:
        answers = [_turn("assistant", f"3{_MARK}"), _turn("assistant", f"4{_MARK}")]
        turns = [_user(f"1{_MARK}"), _user(f"2{_MARK}"), *answers, _user("a")]
        return self._shows(turns, [f"{i}{_MARK}" for i in (1, 2, 3, 4)])

    @functools.cached_property
    def _takes_long_ids(self) -> bool:
        arguments: Any = {"x": "y"} if self._calls_with == "dict" else '{"x": "y"}'
        turns = [_user("a"), _call(arguments, f"call_{_MARK * 4}"), _result("b", f"call_{_MARK * 4}")]
        return self._shows(turns, [], tools=self._some_tool)

    def _render_one(self, role: str, content: Any) -> str | None:
        """Render a conversation in which a turn of a role has a content in a form that the template may not take."""
        asks, turn = self._forms.written("user", "a") if self._forms and role != "user" else "a", _turn(role, content)
        if role == "user":
            tried = [[turn]]
        elif role == "system":
            tried = [[turn, _turn("user", asks)]]
        elif role == "tool":
            tried = [
                [_turn("user", asks), _call(arguments), _result(content)] for arguments in ({"x": "y"}, '{"x": "y"}')
            ]
        else:
            tried = [[_turn("user", asks), turn, _turn("user", asks)]]
        for turns in tried:
            with contextlib.suppress(*_template_errors()):
                return self._write(turns, [], {})
        return None

    @property
    def _some_tool(self) -> list[Any]:
        return [_function("f")] if self.takes_tools else []

    def _shows(self, turns: list[dict[str, Any]], wanted: Sequence[str], tools: Sequence[Any] = ()) -> bool:
        try:
            text = self._apply(turns, list(tools), {})
        except _template_errors():
            return False
        return all(mark in text for mark in wanted)

    # What is done where it cannot.

    def _fit(self, turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        fitted = [dict(turn) for turn in turns]
        has_calls = any(turn.get("tool_calls") for turn in fitted)
        if tools and not self.takes_tools:
            lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
            fitted.insert(0, _turn("system", _TOOLS_TEXT.format(tools=lines)))
            if len(fitted) > 1 and fitted[1]["role"] == "system":  # what the user says comes first
                fitted[0:2] = [_turn("system", joined([fitted[1]["content"], fitted[0]["content"]], "\n\n"))]
        if has_calls or any(turn["role"] == "tool" for turn in fitted):
            fitted = self._fit_calls(fitted)
        fitted = self._fit_system(fitted)
        if not self._takes_doubled:
            fitted = _merged(fitted)
        return fitted

    def _fit_calls(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        written_out = self._calls_with is None or not self._takes_results
        fitted: list[dict[str, Any]] = []
        for turn in turns:
            if written_out and turn["role"] == "tool":
                # Several results are one turn, as the models that this format comes from have them.
                result = joined(["<tool_response>\n", turn["content"], "\n</tool_response>"], "")
                if fitted and fitted[-1].get("results"):
                    fitted[-1]["content"] = joined([fitted[-1]["content"], result], "\n")
                else:
                    fitted.append({**_user(result), "results": True})
                continue
            if calls := turn.get("tool_calls"):
                turn = self._fit_call_turn(turn, calls, written_out=written_out)
            elif turn["role"] == "tool" and not self._takes_long_ids:
                turn["tool_call_id"] = _short_id(turn.get("tool_call_id", ""))
            fitted.append(turn)
        return [{name: value for name, value in turn.items() if name != "results"} for turn in fitted]

    def _fit_call_turn(self, turn: dict[str, Any], calls: Sequence[Any], *, written_out: bool) -> dict[str, Any]:
        if written_out:
            texts = [f"<tool_call>\n{json.dumps(c['function'], ensure_ascii=False)}\n</tool_call>" for c in calls]
            rest = {name: value for name, value in turn.items() if name != "tool_calls"}
            return rest | {"content": joined([turn["content"], *texts], "\n")}
        fitted = []
        for call in calls:
            function = dict(call["function"])
            if self._calls_with == "text":
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
            call_id = call["id"] if self._takes_long_ids else _short_id(call["id"])
            fitted.append({**call, "id": call_id, "function": function})
        return turn | {"tool_calls": fitted}

    def _fit_system(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        systems = [turn for turn in turns if turn["role"] == "system"]
        if not systems:
            return turns
        rest = [turn for turn in turns if turn["role"] != "system"]
        leads = turns[0] is systems[0]
        if self._takes_system and leads and (len(systems) == 1 or self._takes_late_system):
            return turns
        if self._takes_system and self._takes_late_system and not leads:
            return turns
        text = joined([turn["content"] for turn in systems], "\n\n")
        if self._takes_system:
            return [_turn("system", text), *rest]
        at = next((i for i, turn in enumerate(rest) if turn["role"] == "user"), None)
        if at is None:
            return [_user(text), *rest]
        rest[at] = rest[at] | {"content": joined([text, rest[at]["content"]], "\n\n")}
        return rest


def _merged(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join turns of one role behind each other; calls and results stay as they are."""
    merged: list[dict[str, Any]] = []
    for turn in turns:
        last = merged[-1] if merged else None
        plain = turn["role"] in ("user", "assistant", "system") and not turn.get("tool_calls")
        if last is not None and plain and last["role"] == turn["role"] and not last.get("tool_calls"):
            merged[-1] = last | {"content": joined([last["content"], turn["content"]], "\n\n")}
        else:
            merged.append(turn)
    return merged


def _short_id(call_id: str) -> str:
    """Give an id of nine letters and digits, the same one for the same id."""
    letters = string.ascii_letters + string.digits
    if len(call_id) == len(_CALL_ID) and set(call_id) <= set(letters):
        return call_id
    return "".join(letters[byte % len(letters)] for byte in hashlib.sha256(call_id.encode()).digest()[: len(_CALL_ID)])


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _user(content: Any) -> dict[str, Any]:
    return _turn("user", content)


def _function(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]}
    return {"type": "function", "function": {"name": name, "description": "f", "parameters": parameters}}


def _call(arguments: Any, call_id: str = _CALL_ID) -> dict[str, Any]:
    call = {"type": "function", "id": call_id, "function": {"name": "f", "arguments": arguments}}
    return _turn("assistant", "") | {"tool_calls": [call]}


def _result(content: Any, call_id: str = _CALL_ID) -> dict[str, Any]:
    return _turn("tool", content) | {"tool_call_id": call_id, "name": "f"}


def _template_errors() -> tuple[type[Exception], ...]:
    """Errors of a template over turns that it does not take; those of Python come from what it does with them."""
    from jinja2.exceptions import TemplateError

    return (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
