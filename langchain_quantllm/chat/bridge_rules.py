"""Rules that change the shape of a conversation, and keep every text of it.

Owns each rule by its name. Which of them a template needs is found by `bridge`. Knows plain messages alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from langchain_quantllm.chat.messages import Message, joined

FILLER = "(continued)"
"""The text of a turn that only a template's order of turns asks for."""

Rule = Callable[[list[Message]], list[Message]]

_KNOWN_ROLES = ("system", "user", "assistant", "tool")


def _other_roles(messages: list[Message]) -> list[Message]:
    made = []
    for message in messages:
        if message["role"] not in _KNOWN_ROLES:
            content = joined([f"{message['role']}: ", message["content"]], "")
            message = {**message, "role": "user", "content": content}
        made.append(message)
    return made


def _empty_turns(messages: list[Message]) -> list[Message]:
    """Leave out turns without a content, but not a tool's result."""
    filled = [m for m in messages if m["role"] == "tool" or m.get("tool_calls") or not _is_blank(m["content"])]
    return filled or messages


def _is_blank(content: Any) -> bool:
    return not content.strip() if isinstance(content, str) else not content


def call_text(call: Mapping[str, Any]) -> str:
    """Write a call as text, in the Hermes format."""
    return f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"


def _as_text(message: Message, calls: Sequence[Mapping[str, Any]]) -> Message:
    """Move some calls of a message into its text."""
    left = [call for call in message["tool_calls"] if call not in calls]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    made = rest | {"content": joined([message["content"], *map(call_text, calls)], "\n")}
    return made | ({"tool_calls": left} if left else {})


def _result_text(message: Message) -> Message:
    content = joined(["<tool_response>\n", message["content"], "\n</tool_response>"], "")
    return {"role": "user", "content": content}


def _calls_as_text(messages: list[Message]) -> list[Message]:
    """Write calls and results out; several results behind each other are one message of the user's."""
    made: list[Message] = []
    in_results = False
    for message in messages:
        if message["role"] == "tool":
            text = _result_text(message)
            if in_results:
                made[-1] = made[-1] | {"content": joined([made[-1]["content"], text["content"]], "\n")}
            else:
                made.append(text)
            in_results = True
            continue
        in_results = False
        made.append(_as_text(message, message["tool_calls"]) if message.get("tool_calls") else message)
    return made


def _turns(messages: list[Message]) -> Iterator[tuple[Message, list[Message | None], list[Message]]]:
    """Walk over the messages: each with the results of its calls, None for a missing one, and stray results."""
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        if message["role"] == "tool":
            yield message, [], [message]
            continue
        calls = message.get("tool_calls") or []
        results: list[Message | None] = [None] * len(calls)
        stray = []
        while calls and at < len(messages) and messages[at]["role"] == "tool":
            result = messages[at]
            at += 1
            wanted = result.get("tool_call_id")
            fits = (i for i, c in enumerate(calls) if results[i] is None and (not wanted or c["id"] == wanted))
            if (place := next(fits, None)) is None:
                stray.append(result)
            else:
                results[place] = result
        yield message, results, stray


def _lone_calls(messages: list[Message]) -> list[Message]:
    """Write out calls without a result and results without a call."""
    made: list[Message] = []
    for message, results, stray in _turns(messages):
        if message["role"] == "tool":
            made.append(_result_text(message))
            continue
        calls = message.get("tool_calls") or []
        lone = [call for call, result in zip(calls, results, strict=True) if result is None]
        made.append(_as_text(message, lone) if lone else message)
        made += [result for result in results if result is not None]
        made += map(_result_text, stray)
    return made


def _one_call_a_turn(messages: list[Message]) -> list[Message]:
    made: list[Message] = []
    for message, results, stray in _turns(messages):
        if message["role"] == "tool":
            made.append(message)
            continue
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            made += [message, *(result for result in results if result is not None), *stray]
            continue
        for n, (call, result) in enumerate(zip(calls, results, strict=True)):
            turn = message if n == 0 else {"role": "assistant", "content": ""}
            made.append(turn | {"tool_calls": [call]})
            made += [result] if result is not None else []
        made += stray
    return made


def _text_before_calls(messages: list[Message]) -> list[Message]:
    made: list[Message] = []
    for message in messages:
        if message.get("tool_calls") and not _is_blank(message["content"]):
            made.append({name: value for name, value in message.items() if name != "tool_calls"})
            message = {"role": "assistant", "content": "", "tool_calls": message["tool_calls"]}
        made.append(message)
    return made


def _system_first(messages: list[Message]) -> list[Message]:
    rest = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": _system_content(messages)}, *rest]


def _system_in_user(messages: list[Message]) -> list[Message]:
    rest = [message for message in messages if message["role"] != "system"]
    content = _system_content(messages)
    at = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if at is None:
        return [{"role": "user", "content": content}, *rest]
    rest[at] = rest[at] | {"content": joined([content, rest[at]["content"]], "\n\n")}
    return rest


def _system_content(messages: list[Message]) -> Any:
    return joined([message["content"] for message in messages if message["role"] == "system"], "\n\n")


def _merged(messages: list[Message]) -> list[Message]:
    """Join messages of one role behind each other; results stay apart, and a call ends its turn."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        joins = last is not None and message["role"] != "tool" and last["role"] == message["role"]
        if last is not None and joins and not last.get("tool_calls"):
            merged[-1] = {**last, **message, "content": joined([last["content"], message["content"]], "\n\n")}
        else:
            merged.append(message)
    return merged


def _user_first(messages: list[Message]) -> list[Message]:
    at = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if at < len(messages) and messages[at]["role"] == "user":
        return messages
    return [*messages[:at], {"role": "user", "content": FILLER}, *messages[at:]]


def _user_last(messages: list[Message]) -> list[Message]:
    return [*messages, {"role": "user", "content": FILLER}] if messages[-1]["role"] == "assistant" else messages


def _between(before: str, after: str, role: str) -> Rule:
    """Make the rule that a turn of a role stands between two others."""

    def fill(messages: list[Message]) -> list[Message]:
        made: list[Message] = []
        for message in messages:
            if made and made[-1]["role"] == before and message["role"] == after:
                made.append({"role": role, "content": FILLER})
            made.append(message)
        return made

    return fill


RULES: dict[str, Rule] = {
    "other roles": _other_roles,
    "empty turns": _empty_turns,
    "lone calls": _lone_calls,
    "one call": _one_call_a_turn,
    "text before calls": _text_before_calls,
    "calls as text": _calls_as_text,
    "system first": _system_first,
    "system in user": _system_in_user,
    "user between": _between("assistant", "assistant", "user"),
    "merged": _merged,
    "user first": _user_first,
    "answer between": _between("tool", "user", "assistant"),
    "user last": _user_last,
}
"""The rules by name, in the order in which they are applied."""
