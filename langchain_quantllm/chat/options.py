"""The options of a chat call beside sampling: tools, the choice among them, and the form of the answer.

Owns reading these options as LangChain's and OpenAI's users write them. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from langchain_core.tools import BaseTool
from typing_extensions import Self

from langchain_quantllm.chat.tool_schemas import answer_schema, is_type, tool_schema
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.structured import Constraint, JSONObject, JSONSchema
from langchain_quantllm.structured.schema_limits import shortened

CHAT_OPTIONS = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "constraint",
    "chat_template_kwargs",
    "model",
    "strict",
    "stream",
    "stream_usage",
    "ls_structured_output_format",
)
"""Options of a chat call that do not control generating."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The chat model's own options of one call.

    Args:
        tools: The functions that the prompt describes, as OpenAI's API takes them.
        choice: `"any"`, a function's name, or None where the model decides.
        allowed: The names of the functions that may be called; None for all.
        parallel: Whether there may be several calls in one answer; None leaves it to the template.
        constraint: The form of an answer that is no call.
        template_kwargs: Variables for the template.
        model: The model asked for, if any.
    """

    tools: tuple[dict[str, Any], ...] = ()
    choice: str | None = None
    allowed: tuple[str, ...] | None = None
    parallel: bool | None = None
    constraint: Constraint | None = None
    template_kwargs: Mapping[str, Any] | None = None
    model: str | None = None

    @classmethod
    def of(cls, call: Mapping[str, Any]) -> Self:
        """Read them from a call's options, among others.

        Raises:
            InvalidOptionError: If the choice is none of the tools, or the form of the answer cannot be understood.
        """
        given = {name: call[name] for name in CHAT_OPTIONS if call.get(name) is not None}
        tools = tuple(tool_schema(tool) for tool in listed_tools(given.get("tools", ())))
        choice = choice_of(given.get("tool_choice"), tools)
        variables = given.get("chat_template_kwargs")
        if variables is not None and not isinstance(variables, Mapping):
            msg = f"chat_template_kwargs={variables!r} is not a dict; give one, such as {{'enable_thinking': False}}."
            raise InvalidOptionError(msg)
        return cls(
            tools=() if choice.name == "none" else tools,
            choice=None if choice.name in ("none", "auto") else choice.name,
            allowed=choice.allowed,
            parallel=given.get("parallel_tool_calls"),
            constraint=_constraint_of(given),
            template_kwargs=variables,
            model=given.get("model"),
        )

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The tools that may be called under the choice."""
        if self.choice in (None, "any"):
            return [tool for tool in self.tools if self.allowed is None or tool["function"]["name"] in self.allowed]
        return [tool for tool in self.tools if tool["function"]["name"] == self.choice]

    def check_model(self, model_id: str) -> None:
        """Check that a call asks for no other model than the loaded one.

        Raises:
            InvalidOptionError: If it does.
        """
        if self.model not in (None, model_id):
            msg = (
                f"model={self.model!r} is not this model ({model_id!r}), which is loaded; make another "
                "ChatQuantizedHuggingFace for it."
            )
            raise InvalidOptionError(msg)


def refuse_full_text(return_full_text: bool | None) -> None:
    """Refuse an option of models that continue texts.

    Raises:
        InvalidOptionError: If it is set.
    """
    if return_full_text:
        msg = "return_full_text=True is not possible here: a chat model returns messages; leave it out."
        raise InvalidOptionError(msg)


def listed_tools(tools: Any) -> Sequence[Any]:
    """Return tools as a list.

    Raises:
        InvalidOptionError: If they are one tool, or something else.
    """
    if isinstance(tools, Mapping | str | BaseTool) or not isinstance(tools, Iterable):
        msg = f"tools={shortened(repr(tools))} is no list; give one, such as tools=[get_weather]."
        raise InvalidOptionError(msg)
    return list(tools)


class ToolChoice(NamedTuple):
    """A choice among tools.

    Args:
        name: `"auto"`, `"any"`, `"none"` or a tool's name; None where nothing was chosen.
        allowed: The names that may be called; None for all.
    """

    name: str | None
    allowed: tuple[str, ...] | None = None


def choice_of(given: Any, tools: Sequence[Mapping[str, Any]]) -> ToolChoice:
    """Read a tool choice, as a name or as the dicts of OpenAI's and Anthropic's APIs.

    Raises:
        InvalidOptionError: If it is none of the tools.
    """
    names = [tool["function"]["name"] for tool in tools]
    allowed = None
    if isinstance(given, Mapping) and given.get("type") == "allowed_tools":
        given, allowed = _allowed(given, names)
    elif isinstance(given, Mapping):
        given = _name_in(given) or given.get("type") or dict(given)
    if given is True or given == "required":
        given = "any"
    if given is None or given is False or given in ("auto", "none"):
        return ToolChoice(None if given is False else given, allowed)
    if given == "any":
        if not names:
            msg = "tool_choice='any' needs tools; bind some with bind_tools."
            raise InvalidOptionError(msg)
        return ToolChoice("any", allowed)
    if not isinstance(given, str) or given not in names:
        msg = f"tool_choice={given!r} is none of the tools; it must be 'auto', 'any', 'none' or one of {names}."
        raise InvalidOptionError(msg)
    return ToolChoice(given)


def _allowed(given: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, tuple[str, ...]]:
    """Read OpenAI's choice among some of the tools."""
    inner = given.get("allowed_tools", given)
    listed = inner.get("tools") if isinstance(inner, Mapping) else None
    if not isinstance(listed, list | tuple) or not listed or not all(isinstance(tool, Mapping) for tool in listed):
        msg = f"tool_choice={given!r} lists no tools; give 'tools', such as [{{'type': 'function', 'name': ...}}]."
        raise InvalidOptionError(msg)
    found = tuple(_name_in(tool) for tool in listed)
    if unknown := [name for name in found if name not in names]:
        msg = f"tool_choice allows {unknown[0]!r}, which is none of the tools {list(names)}; bind it, or leave it out."
        raise InvalidOptionError(msg)
    mode = inner.get("mode", "auto")
    if mode not in ("auto", "required"):
        msg = f"tool_choice has the mode {mode!r}; it must be 'auto' or 'required'."
        raise InvalidOptionError(msg)
    return mode, found


def _name_in(tool: Mapping[str, Any]) -> Any:
    inner = tool.get("function")
    return (inner if isinstance(inner, Mapping) else tool).get("name")


def _constraint_of(given: Mapping[str, Any]) -> Constraint | None:
    """Read `constraint` and `response_format`."""
    constraint, wanted = given.get("constraint"), given.get("response_format")
    if constraint is not None and wanted is not None:
        msg = "constraint and response_format say two things; give one of them."
        raise InvalidOptionError(msg)
    if constraint is not None and not isinstance(constraint, Constraint):
        msg = f"constraint={constraint!r} is not allowed; give one of langchain_quantllm.structured, such as Regex."
        raise InvalidOptionError(msg)
    if wanted is None or constraint is not None:
        return constraint
    if is_type(wanted):
        return JSONSchema(answer_schema(wanted)[1])
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    inner = wanted.get("json_schema", wanted) if kind == "json_schema" else None  # or without an envelope
    if isinstance(inner, Mapping) and isinstance(inner.get("schema"), Mapping):
        return JSONSchema(inner["schema"])
    if kind == "json_object":
        return JSONObject()
    if kind == "text":
        return None
    msg = (
        f"response_format={shortened(repr(wanted))} is not allowed; give {{'type': 'json_schema', 'json_schema': "
        "{'name': ..., 'schema': ...}}, {'type': 'json_object'}, {'type': 'text'} or a class."
    )
    raise InvalidOptionError(msg)
