"""Sets of characters, as ranges of code points, and how xgrammar reads them in a regular expression."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

_LAST = 0x10FFFF


@dataclass(frozen=True, kw_only=True)
class Characters:
    """A set of characters.

    Args:
        ranges: The first and the last code point of each range, sorted, without gaps of nothing between two.
    """

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def joined(cls, sets: Iterable[Characters]) -> Characters:
        """Join sets."""
        found: list[tuple[int, int]] = []
        for first, last in sorted(r for one in sets for r in one.ranges):
            if found and first <= found[-1][1] + 1:
                found[-1] = (found[-1][0], max(found[-1][1], last))
            else:
                found.append((first, last))
        return cls(ranges=tuple(found))

    @property
    def single(self) -> bool:
        """Whether it is one character."""
        return len(self.ranges) == 1 and self.ranges[0][0] == self.ranges[0][1]

    def complement(self, *, ascii_only: bool = False) -> Characters:
        """Return the other characters; of ASCII alone if asked for."""
        end, begin, found = (0x7E if ascii_only else _LAST), (0x20 if ascii_only else 0), []
        for first, last in self.ranges:
            if begin < first:
                found.append((begin, min(first - 1, end)))
            begin = max(begin, last + 1)
        if begin <= end:
            found.append((begin, end))
        return Characters(ranges=tuple((a, b) for a, b in found if a <= b))

    def without(self, other: Characters) -> Characters:
        """Return the characters that are not in another set."""
        return Characters.joined([self.complement(), other]).complement()

    def __contains__(self, sign: str) -> bool:
        """Whether a character is in the set."""
        i = bisect.bisect_right(self.ranges, (ord(sign), _LAST)) - 1
        return i >= 0 and ord(sign) <= self.ranges[i][1]


def characters(signs: str) -> Characters:
    """Make the set of some characters."""
    return Characters.joined(Characters(ranges=((ord(s), ord(s)),)) for s in signs)


def exclusion(signs: str) -> Characters:
    """Make the set of all characters but some."""
    return characters(signs).complement()


ANY = Characters(ranges=((0, _LAST),))
_DIGITS = Characters(ranges=((0x30, 0x39),))
_WORD = Characters.joined(
    [_DIGITS, Characters(ranges=((0x41, 0x5A),)), Characters(ranges=((0x61, 0x7A),)), characters("_")]
)
_BLANKS = characters("\t\n\v\f\r ")
_ALL_BLANKS = characters("\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff\u180e")
CLASSES = {
    "d": _DIGITS,
    "w": _WORD,
    "s": _BLANKS,
    "D": _DIGITS.complement(ascii_only=True),
    "W": _WORD.complement(ascii_only=True),
    "S": Characters.joined([_ALL_BLANKS, Characters(ranges=((0x2000, 0x200F),))]).complement(),
}
"""The classes that are written by a letter: their members in every engine of regular expressions."""

ESCAPES = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}

_NOT_IN_JSON = Characters.joined([Characters(ranges=((0, 0x1F),)), characters('"\\\x7f')])
_SURROGATES = Characters(ranges=((0xD800, 0xDFFF),))
_CODES = {"\t": "\\t", "\n": "\\n", "\r": "\\r", "\f": "\\f", "\v": "\\v"}


def _code(point: int, special: str) -> str:
    sign = chr(point)
    if sign in special:
        return f"\\{sign}"
    if point < 0x20 or point == 0x7F:
        return _CODES.get(sign, f"\\u{point:04x}")
    return sign


def written(signs: Characters, *, in_json: bool) -> str:
    """Write a set for xgrammar, as a character or a class in brackets.

    Args:
        signs: The set.
        in_json: Whether to leave out what a JSON string has only as escapes.

    Raises:
        ValueError: If no character is left.
    """
    left = signs.without(Characters.joined([_NOT_IN_JSON, _SURROGATES]) if in_json else _SURROGATES)
    left = left.without(characters("\0"))
    if not left.ranges:
        msg = "a pattern asks for quotes, backslashes or control characters, which a JSON string has only as escapes"
        raise ValueError(msg)
    if left.single:
        return _code(left.ranges[0][0], "\\^$.|?*+()[]{}/-")
    negated = left.ranges[-1][1] == _LAST
    # xgrammar refuses a null character, which no token has anyway, and surrogates.
    shown = left.complement().without(Characters.joined([characters("\0"), _SURROGATES])) if negated else left
    parts = []
    for first, last in shown.ranges:
        ends = _code(first, "\\]^-["), _code(last, "\\]^-[")
        parts.append(ends[0] if first == last else "-".join(ends))
    return f"[{'^' if negated else ''}{''.join(parts)}]"
