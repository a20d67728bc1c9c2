"""The constraints that a call can ask for.

Owns their values and the checks of these. `compiler` and `mask` enforce them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from langchain_quantllm.errors import InvalidOptionError, NamedOptions, nearest
from langchain_quantllm.structured.schema_limits import check_json, shortened
from langchain_quantllm.structured.tool_formats import ToolFormat


def frozen_text(value: Any) -> str:
    """Write a value as JSON text, which can be hashed and keeps the order of properties."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _checked_text(option: str, value: Any) -> str:
    """Write a schema or a tool as JSON text.

    Raises:
        InvalidOptionError: If it is no JSON, or too large.
    """
    try:
        if not isinstance(value, str):
            check_json(value)
        return frozen_text(value)
    except (ValueError, TypeError, RecursionError) as error:
        msg = f"{option} cannot be enforced: {error}."
        raise InvalidOptionError(msg) from error


@dataclass(frozen=True)
class Constraint(NamedOptions):
    """The base of all constraints.

    Args:
        reasoning: `(begin, end, already_open)`: the marks around the reasoning that may come before the answer, and
            whether the prompt has opened them. The constraint holds from the end mark on.
    """

    _MEANT: ClassVar[Mapping[str, str]] = {
        "json_schema": "schema",
        "regex": "pattern",
        "choices": "options",
        "values": "options",
        "grammar": "ebnf",
        "gbnf": "ebnf",
    }
    reasoning: tuple[str, str, bool] | None = field(default=None, kw_only=True)

    def _check_text(self, option: str, example: str) -> None:
        if not isinstance(value := getattr(self, option), str):
            msg = f"{type(self).__name__}({option}={value!r}) is not possible; it must be a text, such as {example!r}."
            raise InvalidOptionError(msg)


@dataclass(frozen=True)
class JSONSchema(Constraint):
    """JSON that is valid under a schema, given as a dict and kept as its JSON text."""

    schema: Mapping[str, Any] | str

    def __post_init__(self) -> None:
        """Check the schema and keep its text."""
        if not isinstance(self.schema, Mapping | str):
            msg = (
                f"JSONSchema(schema={shortened(repr(self.schema))}) is not possible; it must be a dict or JSON text, "
                "such as {'type': 'object'}; a pydantic class gives its own by model_json_schema()."
            )
            raise InvalidOptionError(msg)
        object.__setattr__(self, "schema", _checked_text("the schema", self.schema))


@dataclass(frozen=True)
class JSONObject(Constraint):
    """Any JSON object."""


@dataclass(frozen=True)
class Regex(Constraint):
    """A text that matches a regular expression from its beginning to its end."""

    pattern: str

    def __post_init__(self) -> None:
        """Check that it is a text."""
        self._check_text("pattern", "[0-9]+")


@dataclass(frozen=True)
class Choice(Constraint):
    """Exactly one of some texts."""

    options: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the texts."""
        if isinstance(self.options, str) or not isinstance(self.options, Iterable):
            msg = (
                f"Choice(options={self.options!r}) is not possible; it must be a list of texts, such as ['yes', 'no']."
            )
            raise InvalidOptionError(msg)
        object.__setattr__(self, "options", tuple(self.options))
        if not self.options or not all(isinstance(o, str) and o for o in self.options):
            msg = f"options={shortened(repr(list(self.options)))} must be texts, at least one, none of them empty."
            raise InvalidOptionError(msg)


@dataclass(frozen=True)
class Grammar(Constraint):
    """A text of a context-free grammar in xgrammar's EBNF, which is GBNF; it begins with the rule `root`."""

    ebnf: str

    def __post_init__(self) -> None:
        """Check that it is a text."""
        self._check_text("ebnf", 'root ::= "yes" | "no"')


@dataclass(frozen=True)
class ToolCalls(Constraint):
    """Calls of tools, as a family of models writes them.

    Args:
        format: The format of the calls.
        tools: OpenAI function dicts, `{"type": "function", "function": {"name", "parameters"}}`.
        mode: `"required"`: the answer is calls and nothing else. `"auto"`: it is any text, in which the begin of a call
            leads to a valid one.
        parallel: Whether there may be several; without, the answer ends after the first.
    """

    format: ToolFormat
    tools: Sequence[Mapping[str, Any] | str]
    mode: str = "auto"
    parallel: bool = True

    def __post_init__(self) -> None:
        """Check the options and keep the tools' JSON texts."""
        object.__setattr__(self, "tools", tuple(_checked_text("a tool", tool) for tool in self.tools))
        if self.mode not in ("auto", "required"):
            msg = f"mode={self.mode!r} is not known{nearest(str(self.mode), ('auto', 'required'))}"
            raise InvalidOptionError(msg)
        if not self.tools:
            msg = "there are no tools to call; give at least one."
            raise InvalidOptionError(msg)


@dataclass(frozen=True)
class Either(Constraint):
    """A text that one of several constraints allows; calls among them are required ones."""

    options: tuple[Constraint, ...]
