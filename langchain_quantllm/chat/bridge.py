"""The rules that bring a conversation into a shape that a chat template takes without losing a part of it.

Owns the rules, their order, and the marks by which a lost text is found. Renders nothing: `template` does, and tells
how each shape fared. Knows plain messages alone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_quantllm.chat.messages import Message, joined

FILLER = "(continued)"
"""The text of a turn that only a template's order of turns asks for."""

_MARK = "Kq7Zx"  # appears in no template
_KNOWN_ROLES = ("system", "user", "assistant", "tool")
_MOST_TRIES = 150

Rule = Callable[[list[Message]], list[Message]]


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """Rules to apply to a conversation, in their order.

    Args:
        names: Names of `_RULES`.
        appends_prefill: Whether the last answer, which is to be continued, is written behind the prompt of the others.
    """

    names: tuple[str, ...] = ()
    appends_prefill: bool = False

    def apply(self, messages: Sequence[Message]) -> list[Message]:
        """Apply the rules.

        Args:
            messages: The conversation.

        Returns:
            A new list; no message is changed.
        """
        changed = list(messages)
        for name in self.names:
            changed = _RULES[name](changed)
        return changed


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A conversation with marks in place of its texts, by which one sees what a template leaves out.

    Args:
        messages: The messages with marks.
        groups: The marks whose order counts, turn by turn; a call and its results are one turn.
        system: The marks of system messages, which may stand anywhere.
    """

    messages: list[Message]
    groups: tuple[tuple[str, ...], ...]
    system: tuple[str, ...]

    @property
    def key(self) -> str:
        """The shape as a text: conversations of one shape differ in their texts alone."""
        return json.dumps(self.messages, default=lambda _: "image")

    def loss(self, prompt: str) -> tuple[int, int]:
        """Count what a prompt lacks of the shape.

        Args:
            prompt: The rendered shape.

        Returns:
            The number of texts that are missing, and of turns that stand before an earlier one.
        """
        places = [[prompt.find(mark) for mark in group] for group in self.groups]
        lost = sum(place < 0 for group in places for place in group) + sum(m not in prompt for m in self.system)
        found = [[place for place in group if place >= 0] for group in places]
        found = [group for group in found if group]
        return lost, sum(max(one) > min(other) for one, other in itertools.pairwise(found))


def shape_of(messages: Sequence[Mapping[str, Any]]) -> Shape:
    """Replace the texts of a conversation, its arguments and its ids by marks.

    Args:
        messages: The conversation.
    """
    marked, groups, system = [], [], []
    ids: dict[str, str] = {}
    for at, message in enumerate(messages):
        marks = []
        made = {name: value for name, value in message.items() if name in ("role", "reasoning_content")}
        if "reasoning_content" in made:
            made["reasoning_content"] = "r"
        content, mark = _marked(message["content"], f"{_MARK}{at}e")
        made["content"] = content
        if mark is not None:
            marks.append(mark)
        if calls := message.get("tool_calls"):
            made["tool_calls"] = []
            for n, call in enumerate(calls):
                mark = f"{_MARK}{at}c{n}e"
                marks.append(mark)
                function = {"name": "f", "arguments": {"x": mark}}
                call_id = ids.setdefault(call["id"], f"{len(ids):09d}")
                made["tool_calls"].append({"type": "function", "id": call_id, "function": function})
        if message["role"] == "tool":
            made |= {"tool_call_id": ids.setdefault(message.get("tool_call_id", ""), f"{len(ids):09d}"), "name": "f"}
        elif message.get("name"):
            made["name"] = "n"
        if message["role"] == "system":
            system += marks
        elif message["role"] == "tool" and groups:
            groups[-1] += marks
        else:
            groups.append(marks)
        marked.append(made)
    return Shape(messages=marked, groups=tuple(map(tuple, groups)), system=tuple(system))


def _marked(content: Any, mark: str) -> tuple[Any, str | None]:
    """Put a mark in place of the text of a content; None where it has no text."""
    if isinstance(content, str):
        return (mark, mark) if content.strip() else (content, None)
    parts, found = [], None
    for part in content:
        if part["type"] == "text" and part["text"].strip():
            found = mark
            parts.append({"type": "text", "text": mark})
        else:
            parts.append(part)
    return parts, found


def bridges(messages: Sequence[Message], *, continues: bool) -> Iterator[Bridge]:
    """List the bridges for a conversation, from none at all to the one that changes the most.

    Args:
        messages: The conversation.
        continues: Whether its last message is an answer to continue.

    Yields:
        Each bridge that makes another conversation than those before it.
    """
    yield Bridge()
    seen = {_key(messages, appends=False)}
    has_calls = any(m.get("tool_calls") or m["role"] == "tool" for m in messages)
    has_system = any(m["role"] == "system" for m in messages)
    choices = itertools.product(
        [(), ("other roles", "empty turns")],
        _CALLS if has_calls else [()],
        _SYSTEM if has_system else [()],
        _ORDERS,
        [(), ("user last",)] if not continues and messages[-1]["role"] == "assistant" else [()],
        [False, True] if continues else [False],
    )
    found = [Bridge(names=(*a, *b, *c, *d, *e), appends_prefill=appends) for a, b, c, d, e, appends in choices]
    found.sort(key=lambda bridge: sum(_COSTS[name] for name in bridge.names) + 6 * bridge.appends_prefill)
    last_resorts = [Bridge(names=_LAST_RESORT, appends_prefill=continues)]
    if not continues:
        last_resorts.append(Bridge(names=(*_LAST_RESORT, "user last")))
    for bridge in itertools.chain(found, last_resorts):
        if len(seen) > _MOST_TRIES and bridge not in last_resorts:
            continue
        key = _key(bridge.apply(messages), appends=bridge.appends_prefill)
        if key not in seen:
            seen.add(key)
            yield bridge


def _key(messages: Sequence[Message], *, appends: bool) -> str:
    return json.dumps([messages, appends], default=id)


# The rules.


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


_RULES: dict[str, Rule] = {
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

_COSTS = {
    "other roles": 1,
    "empty turns": 0,
    "lone calls": 2,
    "one call": 3,
    "text before calls": 3,
    "calls as text": 12,
    "system first": 1,
    "system in user": 4,
    "user between": 5,
    "merged": 2,
    "user first": 5,
    "answer between": 5,
    "user last": 5,
}
"""How much a rule changes a conversation; of two bridges that both lose nothing, the cheaper one is taken."""



def _subsets(*names: str) -> list[tuple[str, ...]]:
    return [chosen for count in range(len(names) + 1) for chosen in itertools.combinations(names, count)]


_CALLS = [*_subsets("lone calls", "one call", "text before calls"), ("calls as text",)]
_SYSTEM = [(), ("system first",), ("system in user",)]
_ORDERS = _subsets("user between", "merged", "user first", "answer between")
_LAST_RESORT = ("other roles", "empty turns", "calls as text", "system in user", "merged", "user first")
