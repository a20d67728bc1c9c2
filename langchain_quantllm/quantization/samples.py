"""The samples of a calibration: texts and conversations, out of rows of files, data sets, documents and traced runs.

Rows are known by their keys or attributes; nothing of LangChain or LangSmith is imported.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.quantization.conversations import Conversation, Message, is_message, messages_from

Sample = str | Conversation

_FORMS = (
    "a text, a list of messages, or an object with messages, with inputs and outputs (an example or a run of "
    "LangSmith) or with page_content (a document)"
)
_TURN = re.compile(r"^(System|Human|AI|Tool|Function): ", re.MULTILINE)
"""Beginning of a message in LangChain's text of a chat. Source: langchain_core/messages/utils.py, get_buffer_string."""

_MODEL_RUNS = ("chat_model", "llm")


def samples_from(rows: Iterable[Any], where: str, column: str) -> Iterator[Sample]:
    """Yield the samples of rows; empty texts are left out.

    A run of a chain yields those of the runs of models in it, and its own inputs and outputs only if there are none;
    where the runs of a trace are rows of their own, those of models are read.

    Args:
        rows: Texts, dicts or objects.
        where: Where they come from, for errors.
        column: Key of the text in a dict.

    Raises:
        InvalidOptionError: If a row is none of what can be read.
    """
    rows = list(rows)
    traces = {str(_field(row, "trace_id")) for row in rows if _field(row, "run_type") in _MODEL_RUNS}
    for at, row in enumerate(rows):
        kind = _field(row, "run_type")
        if kind is None or kind in _MODEL_RUNS or str(_field(row, "trace_id")) not in traces:
            yield from _samples(row, f"row {at + 1} of {where}", column)


def _field(row: Any, name: str) -> Any:
    return row.get(name) if isinstance(row, Mapping) else getattr(row, name, None)


def _samples(row: Any, where: str, column: str) -> Iterator[Sample]:
    if _is_list(row) and (is_message(row[0]) or _is_pair(row[0])):
        yield Conversation(messages=messages_from(row, where))
        return
    own = row if isinstance(row, Mapping) else _fields(row)
    if isinstance(row, str):
        if row.strip():
            yield row
    elif column in own:
        yield from _column(own[column], where, column)
    elif "messages" in own or "conversations" in own:
        messages = messages_from(own.get("messages") or own.get("conversations", own.get("messages")), where)
        yield Conversation(messages=messages, tools=_tools(own.get("tools"), where))
    elif "inputs" in own:
        yield from _traced(own, where, column)
    elif isinstance(text := own.get("page_content"), str):
        if text.strip():
            yield text
    elif isinstance(row, Mapping) and is_message(row):
        msg = f"{where} is a single message; a conversation is a list of messages, so put them into one more list."
        raise InvalidOptionError(msg)
    elif isinstance(row, Mapping):
        msg = f"{where} has no column {column!r}; its columns are {', '.join(map(repr, row)) or 'none'}."
        raise InvalidOptionError(msg)
    else:
        msg = f"{where} is of type {type(row).__name__}; it must be {_FORMS}."
        raise InvalidOptionError(msg)


def _column(value: Any, where: str, column: str) -> Iterator[Sample]:
    if _is_list(value) and is_message(value[0]):
        yield Conversation(messages=messages_from(value, where))
    elif not isinstance(value, str | None):
        msg = f"column {column!r} of {where} holds {type(value).__name__}, not text; name another with column=."
        raise InvalidOptionError(msg)
    elif value and value.strip():
        yield value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value)


def _is_pair(value: Any) -> bool:
    """Say whether a value is a message as a pair of role and text."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _fields(row: Any) -> dict[str, Any]:
    """Return what a document, an example or a run has that is read here."""
    names = ("page_content", "inputs", "outputs", "run_type", "child_runs", "extra")
    return {name: value for name in names if (value := getattr(row, name, None)) is not None}


# --- examples and runs ---


def _traced(own: Mapping[str, Any], where: str, column: str) -> Iterator[Sample]:
    """Yield the samples of an example, or of a run and the runs in it."""
    inside = [sample for run in _child_runs(own) for sample in _model_samples(run, where, column)]
    if inside and own.get("run_type") not in _MODEL_RUNS:
        yield from inside
        return
    inputs, outputs = own["inputs"], own.get("outputs")
    if not isinstance(inputs, Mapping) or not inputs:
        msg = f"{where} has inputs={str(inputs)[:60]!r}, which is no object with content."
        raise InvalidOptionError(msg)
    answers = _answers(outputs, where)
    if isinstance(prompts := inputs.get("prompts"), list):  # a run of a model for texts
        of_chat = _TURN.match(str(prompts[0])) if prompts and _has_message(outputs) else None
        for at, prompt in enumerate(map(str, prompts)):
            if of_chat:
                yield Conversation(messages=[*_turns_of_text(prompt, where), *answers[at : at + 1]])
            else:
                yield prompt + "".join(answer["content"] for answer in answers[at : at + 1])
        return
    asked = _turns(inputs, "user", where)
    if asked or answers:
        yield Conversation(messages=[*asked, *answers], tools=_tools(_told_tools(own), where))


def _model_samples(run: Any, where: str, column: str) -> list[Sample]:
    """Return the samples of the runs of models in a run; none if there are none."""
    own = run if isinstance(run, Mapping) else _fields(run)
    if own.get("run_type") in _MODEL_RUNS:
        return list(_traced(own, where, column)) if own.get("inputs") else []
    return [sample for child in _child_runs(own) for sample in _model_samples(child, where, column)]


def _child_runs(own: Mapping[str, Any]) -> Sequence[Any]:
    runs = own.get("child_runs")
    return runs if isinstance(runs, list | tuple) else ()


def _told_tools(own: Mapping[str, Any]) -> Any:
    extra = own.get("extra")
    options = extra.get("invocation_params") if isinstance(extra, Mapping) else None
    return options.get("tools") if isinstance(options, Mapping) else None


def _tools(tools: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if isinstance(tools, str):  # as data sets whose rows have different tools store them
        with contextlib.suppress(ValueError, RecursionError):  # the error below shows it
            tools = json.loads(tools or "[]")
    if tools is None:
        return ()
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        msg = f"{where} has tools={str(tools)[:60]!r}; they must be a list of JSON schemas."
        raise InvalidOptionError(msg)
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _turns(value: Any, role: str, where: str) -> list[Message]:
    """Read what a chain was given, or has answered, as messages."""
    if isinstance(value, Mapping) and not is_message(value):
        found = next((value[key] for key in ("messages", "input", "output") if value.get(key)), None)
        if found is None:
            found = next(iter(value.values())) if len(value) == 1 else _below_each_other(value)
        return _turns(found, role, where) if found is not value else []
    if is_message(value):
        return messages_from([value], where)
    if _is_list(value):
        if _is_list(value[0]) and is_message(value[0][0]):
            return messages_from(value[0], where)  # a tracer's list of one list of messages
        if is_message(value[0]) or _is_pair(value[0]):
            return messages_from(value, where)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return [{"role": role, "content": text}] if text.strip() else []


def _turns_of_text(prompt: str, where: str) -> list[Message]:
    """Take a chat apart that a tracer has written as one text."""
    _, *parts = _TURN.split(prompt)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return messages_from([(role.lower(), text.removesuffix("\n")) for role, text in pairs], where)


def _has_message(outputs: Any) -> bool:
    """Say whether the outputs of a run are a chat model's."""
    try:
        return is_message(outputs["generations"][0][0]["message"])
    except (TypeError, LookupError):
        return False


def _below_each_other(value: Mapping[str, Any]) -> str:
    texts = {
        key: own if isinstance(own, str) else json.dumps(own, ensure_ascii=False, default=str)
        for key, own in value.items()
    }
    return "\n\n".join(f"{key}: {text}" for key, text in texts.items())


def _answers(outputs: Any, where: str) -> list[Message]:
    """Read the outputs of an example or a run as messages of the model."""
    if not outputs:
        return []
    generations = outputs.get("generations") if isinstance(outputs, Mapping) else None
    if not isinstance(generations, list):
        return _turns(outputs, "assistant", where)
    found = []
    for several in generations:
        one = several[0] if isinstance(several, list) and several else several
        if isinstance(one, Mapping) and is_message(one.get("message")):
            found += messages_from([one["message"]], where)
        elif isinstance(one, Mapping) and isinstance(one.get("text"), str):
            found.append({"role": "assistant", "content": one["text"]})
    return found
