"""Regular expressions read into trees: the subset that ECMA-262, Python and Rust read alike.

Owns reading, the lengths of the matching texts, and writing an expression for xgrammar that names its characters
explicitly. No expression of a user runs in Python's `re`, which may take forever; `automaton` matches them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from langchain_quantllm.structured.automaton import Either, Node, Repeat, Sequence, States
from langchain_quantllm.structured.characters import (
    ANY,
    CLASSES,
    ESCAPES,
    Characters,
    characters,
    exclusion,
    written,
)

LONGEST_PATTERN = 4_000
"""The most characters of an expression."""

MOST_POSITIONS = 10_000
"""The most characters that an expression may name once its repetitions are written out."""

_DEEPEST = 40
_CODES = {
    "x": re.compile(r"\{([0-9a-fA-F]{1,6})\}|([0-9a-fA-F]{2})"),
    "u": re.compile(r"\{([0-9a-fA-F]{1,6})\}|([0-9a-fA-F]{4})"),
}
_QUANTIFIER = re.compile(r"\{(\d{1,12})(?:(,)(\d{1,12})?)?\}")


class _Anchor(NamedTuple):
    sign: str


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """An expression.

    Args:
        text: The expression as it was given.
        options: Its alternatives, each with whether it is bound to the begin and to the end of a text.
    """

    text: str
    options: tuple[tuple[Node, bool, bool], ...]

    @property
    def whole(self) -> Node:
        """The tree of the texts that match from their beginning to their end."""
        return either([node for node, _, _ in self.options])

    @cached_property
    def _around(self) -> States:
        """The states of the texts in which it is found somewhere."""
        free = Repeat(part=ANY, least=0, most=None)
        around: list[Node] = [
            Sequence(parts=(*([] if begins else [free]), node, *([] if ends else [free])))
            for node, begins, ends in self.options
        ]
        return States(either(around))

    def found_in(self, text: str) -> bool:
        """Whether it matches somewhere in a text, as `pattern` of JSON schema says.

        Raises:
            ValueError: If that takes too long to find out.
        """
        if not self._around.can_match(text):
            msg = (
                f"whether {text[:40]!r} matches the pattern {self.text[:80]!r} takes too long to find out; shorten them"
            )
            raise ValueError(msg)
        return self._around.match(text)


def either(options: list[Node]) -> Node:
    """Join alternatives."""
    return options[0] if len(options) == 1 else Either(options=tuple(options))


class _Reader:
    """Reads an expression by recursive descent."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def error(self, reason: str) -> ValueError:
        shown = self.text if len(self.text) <= 80 else f"{self.text[:80]}..."
        return ValueError(f"the pattern {shown!r} cannot be read at position {self.at}: {reason}")

    def peek(self, length: int = 1) -> str:
        return self.text[self.at : self.at + length]

    def options(self, depth: int) -> list[list[Node | _Anchor]]:
        if depth > _DEEPEST:
            raise self.error(f"its groups are nested more than {_DEEPEST} deep; flatten it.")
        found: list[list[Node | _Anchor]] = [[]]
        while self.peek() not in ("", ")"):
            if self.peek() == "|":
                self.at += 1
                found.append([])
            else:
                found[-1].append(self.repeated(self.atom(depth)))
        return found

    def atom(self, depth: int) -> Node | _Anchor:
        sign = self.peek()
        if sign == "(":
            return self.group(depth)
        if sign == "[":
            return self.set()
        if sign in "*+?" or _QUANTIFIER.match(self.text, self.at):
            raise self.error(f"{sign!r} repeats nothing.")
        self.at += 1
        if sign in "^$":
            return _Anchor(sign)
        if sign == ".":
            return exclusion("\n\r\u0085\u2028\u2029")
        if sign != "\\":
            return characters(sign)
        if self.peek() in ("A", "Z", "z"):
            self.at += 1
            return _Anchor("^" if self.text[self.at - 1] == "A" else "$")
        return self.escape()

    def escape(self) -> Characters:
        """Read what follows a backslash."""
        sign = self.peek()
        self.at += 1
        if sign in CLASSES:
            return CLASSES[sign]
        if sign in ESCAPES:
            return characters(ESCAPES[sign])
        if sign in ("x", "u") and (found := _CODES[sign].match(self.text, self.at)):
            point = int(found[1] or found[2], 16)
            if point < 0x110000:
                self.at = found.end()
                return characters(chr(point))
        if not sign or sign.isalnum():
            raise self.error(
                f"it does not know \\{sign}; write characters, classes such as [a-z], \\d, \\w or \\s, groups, | and "
                "repetitions."
            )
        return characters(sign)

    def group(self, depth: int) -> Node:
        if self.peek(2) == "(?" and self.peek(3) != "(?:":
            if name := re.compile(r"\(\?P?<[A-Za-z_]\w*>").match(self.text, self.at):
                self.at = name.end()
            elif self.peek(3) in ("(?=", "(?!") or self.peek(4) in ("(?<=", "(?<!"):
                raise self.error("it looks ahead or behind.")
            else:
                raise self.error("it has flags or a group of another kind; write (...) or (?:...).")
        else:
            self.at += 3 if self.peek(2) == "(?" else 1
        options = self.options(depth + 1)
        if self.peek() != ")":
            raise self.error("a parenthesis is not closed.")
        self.at += 1
        return _Group(tuple(tuple(option) for option in options))  # type: ignore[return-value]

    def set(self) -> Characters:
        """Read a class in brackets."""
        self.at += 1
        negated = self.peek() == "^"
        self.at += negated
        found: list[Characters] = []
        while self.peek() != "]" or not found:
            if not self.peek():
                raise self.error("Unclosed bracket of a class of characters.")
            if self.peek(2) in ("[:", "&&", "--", "~~"):
                raise self.error(f"{self.peek(2)!r} in a class means different things; write its characters.")
            one = self.member()
            if self.peek() == "-" and self.peek(2)[1:] not in ("", "]"):
                self.at += 1
                last = self.member()
                if not (one.single and last.single) or one.ranges[0][0] > last.ranges[0][0]:
                    raise self.error("a range of a class has no characters.")
                one = Characters(ranges=((one.ranges[0][0], last.ranges[0][0]),))
            found.append(one)
        self.at += 1
        joined = Characters.joined(found)
        # Whether \w has é differs; its complement is that among ASCII.
        ascii_only = negated and any(one in CLASSES.values() for one in found)
        return joined.complement(ascii_only=ascii_only) if negated else joined

    def member(self) -> Characters:
        sign = self.peek()
        self.at += 1
        if sign != "\\":
            return characters(sign)
        if self.peek() == "b":  # a backspace here
            self.at += 1
            return characters("\b")
        return self.escape()

    def repeated(self, part: Node | _Anchor) -> Node | _Anchor:
        counts = _QUANTIFIER.match(self.text, self.at)
        sign = self.peek()
        if counts:
            least, most = int(counts[1]), int(counts[3]) if counts[3] else None if counts[2] else int(counts[1])
            self.at = counts.end()
        elif sign and sign in "*+?":
            least, most = int(sign == "+"), 1 if sign == "?" else None
            self.at += 1
        else:
            return part
        if most is not None and most < least:
            raise self.error(f"the repetition {{{least},{most}}} ends before it begins.")
        self.at += self.peek() == "?"  # of the same texts, the shortest first
        if self.peek() and (self.peek() in "*+?" or _QUANTIFIER.match(self.text, self.at)):
            raise self.error("a repetition is repeated; put it in a group.")
        if isinstance(part, _Anchor):
            raise self.error(f"{part.sign!r} is repeated.")
        return Repeat(part=part, least=least, most=most)


class _Group(NamedTuple):
    """A group whose anchors are still in it."""

    options: tuple[tuple[Node | _Anchor, ...], ...]


@lru_cache(maxsize=256)
def read(text: str) -> Pattern:
    """Read an expression.

    Args:
        text: The expression, of at most `LONGEST_PATTERN` characters.

    Raises:
        ValueError: If it cannot be read, is too large, or asks for something that differs between engines of regular
            expressions or cannot be enforced: looking ahead or behind, borders of words, flags, references.
    """
    reader = _Reader(text)
    if len(text) > LONGEST_PATTERN:
        raise reader.error(f"it has {len(text)} characters; at most {LONGEST_PATTERN} are possible.")
    options = reader.options(0)
    if reader.at < len(text):
        raise reader.error("a parenthesis closes nothing.")
    flat = [found for option in options for found in _unanchored(option, reader, (True, True))]
    pattern = Pattern(text=text, options=tuple(flat))
    if (count := positions(pattern.whole)) > MOST_POSITIONS:
        msg = f"its repetitions are {count} characters when written out; at most {MOST_POSITIONS} are possible."
        raise reader.error(msg)
    return pattern


def _unanchored(
    parts: list[Node | _Anchor], reader: _Reader, sides: tuple[bool, bool]
) -> list[tuple[Node, bool, bool]]:
    """Take the anchors off both ends of a sequence; refuse others.

    Args:
        parts: The sequence.
        reader: Tells where an error is.
        sides: Whether the sequence stands at the begin, and at the end, of the expression.

    Returns:
        Alternatives, each with whether it was anchored at its begin and its end.
    """
    begins = ends = False
    while parts and isinstance(parts[0], _Anchor) and parts[0].sign == "^" and sides[0]:
        parts, begins = parts[1:], True
    while parts and isinstance(parts[-1], _Anchor) and parts[-1].sign == "$" and sides[1]:
        parts, ends = parts[:-1], True
    if len(parts) == 1 and isinstance(parts[0], _Group):
        found = [o for option in parts[0].options for o in _unanchored(list(option), reader, sides)]
        return [(node, begins or b, ends or e) for node, b, e in found]
    plain: list[Node] = []
    for i, part in enumerate(parts):
        if isinstance(part, _Anchor):
            reader.at = 0
            raise reader.error(f"{part.sign!r} stands amid it.")
        inner = _grouped(
            part, reader, (sides[0] and not begins and i == 0, sides[1] and not ends and i == len(parts) - 1)
        )
        if inner[1] or inner[2]:
            begins, ends = begins or inner[1], ends or inner[2]
        plain.append(inner[0])
    return [(plain[0] if len(plain) == 1 else Sequence(parts=tuple(plain)), begins, ends)]


def _grouped(part: Node, reader: _Reader, sides: tuple[bool, bool]) -> tuple[Node, bool, bool]:
    """Take the anchors out of a part, and tell whether it began and ended with them."""
    if isinstance(part, Repeat):
        node = _grouped(part.part, reader, (False, False))[0]
        return Repeat(part=node, least=part.least, most=part.most), False, False
    if not isinstance(part, _Group):
        return part, False, False
    found = [o for option in part.options for o in _unanchored(list(option), reader, sides)]
    if len({b for _, b, _ in found}) > 1 or len({e for _, _, e in found}) > 1:
        reader.at = 0
        raise reader.error("'^' or '$' stands in some alternatives of a group and not in others.")
    return either([node for node, _, _ in found]), found[0][1], found[0][2]


def positions(node: Node) -> int:
    """Count the characters that a tree names, with repetitions written out."""
    if isinstance(node, Characters):
        return 1
    if isinstance(node, Repeat):
        return positions(node.part) * max(1, node.least, node.most or 0)
    return sum(positions(part) for part in (node.parts if isinstance(node, Sequence) else node.options))


def expression(node: Node, *, in_json: bool) -> str:
    """Write a tree for xgrammar.

    Args:
        node: The tree.
        in_json: Whether the text stands in a JSON string: it then has no quotes, backslashes and control characters,
            which JSON has only as escapes.

    Raises:
        ValueError: If a character is asked for that may not stand there.
    """
    if isinstance(node, Characters):
        return written(node, in_json=in_json)
    if isinstance(node, Repeat):
        if node.most == 0:
            return "()"
        part = expression(node.part, in_json=in_json)
        part = part if isinstance(node.part, Characters) else f"({part})"
        if (node.least, node.most) == (0, 1):
            return f"({part}|)"  # after (a)? xgrammar 0.2.8 accepts an end of the group in place of the group
        counts = "" if node.most is not None or node.least > 1 else "*+"[node.least]
        return part + (counts or f"{{{node.least},{'' if node.most is None else node.most}}}")
    if isinstance(node, Sequence):
        parts = [expression(part, in_json=in_json) for part in node.parts]
        return "".join(f"({t})" if isinstance(p, Either) else t for p, t in zip(node.parts, parts, strict=True))
    texts = []
    failure: ValueError | None = None
    for option in node.options:
        try:
            texts.append(expression(option, in_json=in_json))
        except ValueError as error:
            failure = error
    if failure is not None and not texts:
        raise failure
    return "|".join(texts)
