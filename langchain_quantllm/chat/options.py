"""The options of a chat call beside sampling: tools, the choice among them, and the form of the answer.

Owns reading these options as LangChain's and OpenAI's users write them. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import Self

from langchain_quantllm.chat.tool_schemas import tool_schema
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.structured import Constraint, JSONObject, JSONSchema

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
        parallel: Whether there may be several calls in one answer; None leaves it to the template.
        constraint: The form of an answer that is no call.
        template_kwargs: Variables for the template.
        model: The model asked for, if any.
    """

    tools: tuple[dict[str, Any], ...] = ()
    choice: str | None = None
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
        tools = tuple(tool_schema(tool) for tool in given.get("tools", ()))
        choice = choice_of(given.get("tool_choice"), tools)
        variables = given.get("chat_template_kwargs")
        if variables is not None and not isinstance(variables, Mapping):
            msg = f"chat_template_kwargs={variables!r} is not a dict; give one, such as {{'enable_thinking': False}}."
            raise InvalidOptionError(msg)
        return cls(
            tools=() if choice == "none" else tools,
            choice=None if choice in ("none", "auto") else choice,
            parallel=given.get("parallel_tool_calls"),
            constraint=_constraint_of(given),
            template_kwargs=variables,
            model=given.get("model"),
        )

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The tools that may be called under the choice."""
        if self.choice in (None, "any"):
            return list(self.tools)
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


def choice_of(given: Any, tools: Sequence[Mapping[str, Any]]) -> str | None:
    """Read a tool choice: None, `"auto"`, `"any"`, `"none"`, or a tool's name.

    Raises:
        InvalidOptionError: If it is none of the tools.
    """
    if isinstance(given, Mapping):
        given = (given.get("function") or given).get("name") or given.get("type")
    if given is True or given == "required":
        given = "any"
    names = [tool["function"]["name"] for tool in tools]
    if given is None or given is False or given in ("auto", "none"):
        return None if given is False else given
    if given == "any":
        if not names:
            msg = "tool_choice='any' needs tools; bind some with bind_tools."
            raise InvalidOptionError(msg)
        return "any"
    if given not in names:
        msg = f"tool_choice={given!r} is none of the tools; it must be 'auto', 'any', 'none' or one of {names}."
        raise InvalidOptionError(msg)
    return str(given)


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
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if kind == "json_schema" and isinstance(wanted.get("json_schema"), Mapping):
        return JSONSchema(wanted["json_schema"].get("schema", {}))
    if kind == "json_object":
        return JSONObject()
    if kind == "text":
        return None
    msg = (
        f"response_format={wanted!r} is not allowed; give {{'type': 'json_schema', 'json_schema': {{'name': ..., "
        "'schema': ...}}, {'type': 'json_object'} or {'type': 'text'}."
    )
    raise InvalidOptionError(msg)
