"""The choice of rules that bring a conversation into a shape that a chat template takes without losing a part of it.

Owns the order in which they are tried, and the marks by which a lost text is found; the rules are `bridge_rules`'.
Renders nothing: `template` does. Knows plain messages alone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_quantllm.chat.bridge_rules import RULES
from langchain_quantllm.chat.messages import Message

_MARK = "Kq7Zx"  # appears in no template
_MOST_TRIES = 150

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


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """Rules to apply to a conversation, in their order.

    Args:
        names: Names of `bridge_rules.RULES`.
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
            changed = RULES[name](changed)
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
        return json.dumps(self.messages, default=lambda source: getattr(source, "noun", "image"))

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
    marked: list[Message] = []
    groups: list[list[str]] = []
    system: list[str] = []
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
