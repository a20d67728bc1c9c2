"""Checks of whole answers: calls of given tools, and JSON of given schemas, greedily and with many at once.

Each is asked freely, where nothing but the weights keeps an answer valid, and constrained, as the extra `structured`
does for users: a free call is held to its schema from where the model opens it.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Any

from langchain_core.output_parsers import JsonOutputParser

from langchain_quantllm.bench.intervals import share
from langchain_quantllm.chat_models import ChatQuantizedHuggingFace
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import MissingPackageError, pip_install

MODES = ("free", "constrained")
"""Whether masks keep an answer valid."""

_FILE = "checks.json"
_OFFERED = 3
"""Tools of a call: the right one, and others."""

_CALL_TOKENS, _OUTPUT_TOKENS = 96, 192
_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class CallQuestion:
    """A text that asks for one call.

    Args:
        text: The user's words.
        tools: The tools that are offered, as OpenAI's API takes functions.
        name: The tool to call.
        arguments: The arguments that the text names.
    """

    text: str
    tools: tuple[Mapping[str, Any], ...]
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class OutputQuestion:
    """A text whose content is to be written as JSON of a schema."""

    text: str
    schema: Mapping[str, Any]


class _Unconstrained(ChatQuantizedHuggingFace):
    """The same prompts and parsers, without masks."""

    def _mask(self, *args: Any, **kwargs: Any) -> None:
        return None


@functools.cache
def check_data() -> dict[str, Any]:
    """Read the questions that come with the package."""
    found: dict[str, Any] = json.loads((resources.files("langchain_quantllm") / "data" / _FILE).read_text("utf-8"))
    return found


def call_questions() -> list[CallQuestion]:
    """List the questions for calls; any first part of the list has about as many of each tool."""
    data = check_data()
    tools = data["tools"]
    numbers = {tool["name"]: i for i, tool in enumerate(tools)}

    def question(case: Mapping[str, Any], values: Mapping[str, Any]) -> CallQuestion:
        first = numbers[case["tool"]]
        offered = sorted((first + i) % len(tools) for i in range(_OFFERED))
        return CallQuestion(
            text=case["text"].format(**{name: _as_text(value) for name, value in values.items()}),
            tools=tuple(tools[i] for i in offered),
            name=case["tool"],
            arguments=values,
        )

    return list(_in_turns([[question(case, values) for values in case["values"]] for case in data["calls"]]))


def output_questions() -> list[OutputQuestion]:
    """List the questions for JSON; any first part of the list has about as many of each schema."""
    cases = [
        [OutputQuestion(text=case["text"].format(**values), schema=case["schema"]) for values in case["values"]]
        for case in check_data()["outputs"]
    ]
    return list(_in_turns(cases))


def measure_calls(
    fields: Mapping[str, Any], questions: Sequence[CallQuestion], mode: str
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Ask for calls, which the model is free to make or not.

    Args:
        fields: Fields of the chat model.
        questions: The questions.
        mode: One of `MODES`.

    Returns:
        Case and values of two shares: of answers whose calls all are valid for the schemas of offered tools, with at
        least one; and of those that make the one call that was asked for. For the values see `shares`.
    """

    def ask(chat: Any, question: CallQuestion) -> Any:
        tools = [{"type": "function", "function": tool} for tool in question.tools]
        return chat.bind_tools(tools).invoke(question.text, max_tokens=_CALL_TOKENS)

    answered = _ask_all(fields, mode, questions, ask)
    return [
        _share(mode, "valid", [_has_valid_calls(message, question) for message, question in answered]),
        _share(mode, "right", [_has_right_call(message, question) for message, question in answered]),
    ]


def measure_outputs(
    fields: Mapping[str, Any], questions: Sequence[OutputQuestion], mode: str
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Ask for JSON of schemas that the prompt holds.

    Args:
        fields: Fields of the chat model.
        questions: The questions.
        mode: One of `MODES`.

    Returns:
        Case and values of the share of valid answers; JSON is read as leniently as LangChain's parser does.
    """

    def ask(chat: Any, question: OutputQuestion) -> str:
        bound = chat.with_structured_output(
            dict(question.schema), method="json_schema", include_raw=True, max_tokens=_OUTPUT_TOKENS
        )
        return str(bound.invoke(question.text)["raw"].content)

    answered = _ask_all(fields, mode, questions, ask)
    return [_share(mode, "valid", [_is_valid_text(text, question.schema) for text, question in answered])]


def _share(mode: str, name: str, hits: Sequence[bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the case and the values of a share."""
    return {"mode": mode, "share": name}, shares(hits)


def shares(hits: Sequence[bool]) -> dict[str, Any]:
    """Return the values of a share: `value`, `interval` of 95% (Wilson), `questions`, and the `scores` of each."""
    found = share(hits)
    return {
        "value": found.mean,
        "interval": [found.low, found.high],
        "questions": len(hits),
        "scores": [float(hit) for hit in hits],
    }


def is_valid(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value is valid under a JSON schema."""
    from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

    return bool(Draft202012Validator(schema).is_valid(value))


def _chat(fields: Mapping[str, Any], mode: str) -> ChatQuantizedHuggingFace:
    """Make the chat model.

    Raises:
        MissingPackageError: If masks cannot be made; free calls would go on without.
    """
    if mode == "constrained" and not is_installed("xgrammar"):
        msg = f"constrained answers need xgrammar: {pip_install('langchain-quantllm[structured]')}."
        raise MissingPackageError(msg)
    kind = ChatQuantizedHuggingFace if mode == "constrained" else _Unconstrained
    return kind(**fields)


def _ask_all(
    fields: Mapping[str, Any], mode: str, questions: Sequence[Any], ask: Callable[[Any, Any], Any]
) -> list[tuple[Any, Any]]:
    """Ask a chat model many questions at once; returns each answer with its question, in order."""
    chat = _chat(fields, mode)
    with ThreadPoolExecutor(_THREADS) as executor:
        answers = list(executor.map(lambda question: ask(chat, question), questions))
    return list(zip(answers, questions, strict=True))


def _has_valid_calls(message: Any, question: CallQuestion) -> bool:
    schemas = {tool["name"]: tool["parameters"] for tool in question.tools}
    return (
        bool(message.tool_calls)
        and not message.invalid_tool_calls
        and all(
            call["name"] in schemas and is_valid(call["args"], schemas[call["name"]]) for call in message.tool_calls
        )
    )


def _has_right_call(message: Any, question: CallQuestion) -> bool:
    if len(message.tool_calls) != 1 or not _has_valid_calls(message, question):
        return False
    [call] = message.tool_calls
    return bool(call["name"] == question.name and _folded(call["args"]) == _folded(question.arguments))


def _folded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments in lower case, without a full stop at the end."""
    return {k: v.strip().rstrip(".").lower() if isinstance(v, str) else v for k, v in arguments.items()}


def _is_valid_text(text: str, schema: Mapping[str, Any]) -> bool:
    try:
        value = JsonOutputParser().parse(text)
    except ValueError:
        return False
    return is_valid(value, schema)


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _in_turns(rows: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """Take the first of each row, then the second of each."""
    for column in itertools.zip_longest(*rows):
        yield from (one for one in column if one is not None)
