"""The binding of tools and structured output to a chat model.

Owns the options that they become (`chat.options` reads them at a call), and the parsers of the answers. Knows no model
of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from langchain_core.language_models.base import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableLambda, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.pydantic import is_basemodel_subclass
from typing_extensions import is_typeddict

from langchain_quantllm.chat.options import choice_of, listed_tools
from langchain_quantllm.chat.tool_schemas import answer_schema, answer_tool, is_type, tool_schema, traced_schema
from langchain_quantllm.chat.typed_parsers import TypedCallParser, TypedJsonParser
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.structured import checked_schema


class BindingChatModel(BaseChatModel):
    """A chat model that takes tools and wanted answers as options of a call."""

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Bind tools to the model.

        Args:
            tools: Functions, pydantic classes, LangChain tools, or OpenAI's descriptions of functions.
            tool_choice: `"auto"` (the default) leaves calls to the model, `"any"` (also `"required"` or True) makes it
                call a tool, a tool's name makes it call that one, `"none"` keeps it from calling.
            strict: Written into the descriptions. Calls match their schema in any case, where the extra `structured`
                is installed.
            parallel_tool_calls: Whether there may be several calls in one answer. The default is yes where the
                model's chat template has tools. Enforced where the extra `structured` is installed.
            **kwargs: Options of the calls.

        Returns:
            The model with tools bound.

        Raises:
            InvalidOptionError: If the choice is none of the tools.
        """
        described = [tool_schema(tool, strict) for tool in listed_tools(tools)]
        choice_of(tool_choice, described)
        given = {"tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls}
        return self.bind(tools=described, **{k: v for k, v in given.items() if v is not None}, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Make the model answer with an object of a schema.

        Args:
            schema: A pydantic class, a TypedDict, a dataclass or other type that pydantic knows, or a JSON schema.
            method: `"json_schema"` tells the model the schema and enforces it; `"function_calling"` makes it call a
                function of that schema; `"json_mode"` allows any JSON object, and does not tell the schema.
            include_raw: Return a dict of `raw` (the message), `parsed`, and `parsing_error` in place of raising.
            strict: Written into the function's description; the schema is enforced in any case.
            **kwargs: Options of the calls, and `tools` that the model may call instead.

        Returns:
            A runnable that returns an instance of the type, or a dict; None where the model called one of the tools.

        Raises:
            InvalidOptionError: If the method is unknown, or needs a schema and has none.
        """
        tools, options, parser = _structured(schema, method, strict, kwargs)
        llm = self.bind_tools(tools, **options) if tools else self.bind(**options)
        if not include_raw:
            return llm | parser
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        parsed = RunnablePassthrough.assign(
            parsed=lambda given: parser.invoke(given["raw"]), parsing_error=lambda _: None
        )
        with_fallback = parsed.with_fallbacks([failed], exception_key="parsing_error")
        # The model comes first: a sequence hands a call's options to its first runnable.
        return llm | RunnableMap(raw=RunnablePassthrough()) | with_fallback


def _structured(
    schema: dict[str, Any] | type | None, method: str, strict: bool | None, options: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any], Runnable[Any, Any]]:
    """Return the tools to bind, the options and the parser of a call whose answer is an object."""
    if method not in ("json_schema", "function_calling", "json_mode"):
        msg = f"method={method!r} is not known; it must be 'json_schema', 'function_calling' or 'json_mode'."
        raise InvalidOptionError(msg)
    if schema is None and method != "json_mode":
        msg = f"method={method!r} needs a schema; give a pydantic class, a TypedDict or a JSON schema."
        raise InvalidOptionError(msg)
    about: dict[str, Any] = {"kwargs": {"method": method, **({} if strict is None else {"strict": strict})}}
    about["schema"] = None if schema is None else traced_schema(schema)
    given = {**options, "ls_structured_output_format": about}
    tools = list(listed_tools(given.pop("tools", None) or ()))
    is_v1 = isinstance(schema, type) and is_basemodel_subclass(schema) and not hasattr(schema, "model_validate_json")
    kind: Any = schema if is_type(schema) and not is_typeddict(schema) and not is_v1 else None
    if method == "function_calling":
        wanted = answer_tool(schema, strict)
        name = wanted["function"]["name"]
        given = {"tool_choice": name, "parallel_tool_calls": False, "strict": strict, **given}
        if kind is not None:
            return [wanted, *tools], given, TypedCallParser(key_name=name, kind=kind)
        if is_v1:
            return [wanted, *tools], given, PydanticToolsParser(tools=[schema], first_tool_only=True)
        return [wanted, *tools], given, JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
    response_format: dict[str, Any] = {"type": "json_object"}
    if method == "json_schema":
        name, described = answer_schema(schema, strict)
        checked_schema(described)
        response_format = {"type": "json_schema", "json_schema": {"name": name, "schema": described}}
    parser: Any = JsonOutputParser()
    if kind is not None:
        parser = TypedJsonParser(kind=kind)
    elif is_v1:
        parser = PydanticOutputParser(pydantic_object=schema)
    given = {"response_format": response_format, **given}
    if not tools:
        return tools, given, parser
    # An answer that calls a tool has no object; the call is in the message, which `include_raw` returns.
    return tools, given, RunnableLambda(lambda message: None if message.tool_calls else parser.invoke(message))
