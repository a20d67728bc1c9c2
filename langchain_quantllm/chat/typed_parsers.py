"""Parsers of answers and calls into instances of a type, as pydantic reads JSON: also in strict mode."""

from __future__ import annotations

import json
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.output_parsers import BaseCumulativeTransformOutputParser, JsonOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser
from langchain_core.outputs import Generation
from pydantic import TypeAdapter, ValidationError

from langchain_quantllm.chat.class_schemas import name_of


class TypedJsonParser(BaseCumulativeTransformOutputParser[Any]):
    """Parses the text of an answer."""

    kind: Any
    """The type of the answer."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """Parse an answer; of a partial one, None until it is valid.

        Raises:
            OutputParserException: If the text is no JSON, or the type refuses it.
        """
        text = result[0].text.strip()
        if not partial:
            try:
                return TypeAdapter(self.kind).validate_json(text)
            except ValidationError:
                pass  # perhaps not JSON alone: a model without constraints surrounds it
        value = JsonOutputParser().parse_result(result, partial=partial)
        if partial and value is None:
            return None
        return _validated(self.kind, value, text, partial=partial)

    def parse(self, text: str) -> Any:
        """Parse a text, as `parse_result` does."""
        return self.parse_result([Generation(text=text)])


class TypedCallParser(JsonOutputKeyToolsParser):
    """Parses the arguments of the first call of a function."""

    kind: Any
    """The type of the arguments."""
    first_tool_only: bool = True

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """Parse a call; None where there is none.

        Raises:
            OutputParserException: If the type refuses the arguments.
        """
        value = super().parse_result(result, partial=partial)
        return None if value is None else _validated(self.kind, value, str(value), partial=partial)


def _validated(kind: Any, value: Any, text: str, *, partial: bool) -> Any:
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value))
    except ValidationError as error:
        if partial:
            return None
        msg = f"Failed to parse {name_of(kind)} from completion {text}. Got: {error}"
        raise OutputParserException(msg, llm_output=text) from error
