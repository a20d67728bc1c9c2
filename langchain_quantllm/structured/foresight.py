"""The tokens that a constrained text most likely goes on with, where its grammar leaves one way, or nearly so.

A grammar leaves one text, not one series of tokens: a model writes it as its tokenizer would, and ends a key by `":` as
often as by `"`. Between two such texts stand a few marks and perhaps a blank, which each model writes by habit. So the
marks that it wrote last are remembered, and count where the grammar allows them. All of it is a guess; what is wrong
costs time only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

_REMEMBERED = 4  # marks after a mark, or in its place
_STEPS = 4  # from one forced text to the next, in one guess
_CACHED = 4096  # texts with their tokens


class Foresight:
    """What is known of a model's habits, for all its constrained texts."""

    def __init__(self, tokens: Sequence[bytes], ids: dict[bytes, int], encode: Callable[[str], Sequence[int]]) -> None:
        """Begin without habits.

        Args:
            tokens: The bytes of each token.
            ids: The token of such bytes, without special tokens.
            encode: Turns a text into tokens, as the model's tokenizer does.
        """
        self._tokens = tokens
        self._ids = ids
        self._encode = encode
        self._spelled: dict[bytes, list[int]] = {}
        self._after: dict[int, list[int]] = {}  # marks after a mark, the last one first
        self._ends: dict[int, list[int]] = {}  # marks that begin with a byte, after other tokens, likewise

    def learn(self, written: Sequence[int]) -> None:
        """Learn from tokens of a constrained text, of which the first is known already."""
        for before, token in itertools.pairwise(written):
            if not self._is_mark(token):
                continue
            place, key = (self._after, before) if self._is_mark(before) else (self._ends, self._tokens[token][0])
            known = place.setdefault(key, [])
            if token in known:
                known.remove(token)
            known.insert(0, token)
            del known[_REMEMBERED:]

    def ahead(self, matcher: Any, last: int | None, most: int) -> list[int]:
        """Guess up to `most` tokens.

        Args:
            matcher: xgrammar's matcher, which stays as it is.
            last: The last token of the text; None if it has none.
            most: Most tokens.
        """
        matcher = matcher.fork()
        guessed: list[int] = []
        for _ in range(_STEPS):
            forced = self._spell(certain_text(matcher))
            if forced and self._tokens[forced[-1]] and self._is_mark(forced[-1]):
                whole = forced.pop()
                others = self._ends.get(self._tokens[whole][0], ())
            else:
                whole, others = None, ()
            if not all(map(matcher.accept_token, forced)):
                break
            guessed += forced
            last = guessed[-1] if guessed else last
            if whole is None:
                others = () if last is None else self._after.get(last, ())
            choices = [*others, *(() if whole is None else (whole,))]
            mark = next((token for token in choices if matcher.accept_token(token)), None)
            if mark is None or len(guessed) >= most:
                break
            guessed.append(mark)
            last = mark
        return guessed[:most]

    def _is_mark(self, token: int) -> bool:
        """Whether a token has neither letters nor digits."""
        text = self._tokens[token]
        return bool(text) and len(text) <= 8 and not any(byte >= 128 or chr(byte).isalnum() for byte in text)

    def _spell(self, text: bytes) -> list[int]:
        """Return the tokens of a text: those of the tokenizer, or else the longest ones that fit."""
        if not text:
            return []
        if (known := self._spelled.get(text)) is not None:
            return list(known)
        tokens = list(self._encode(text.decode()))
        if b"".join(self._tokens[i] for i in tokens) != text:
            tokens = []
            longest, at = max(map(len, self._ids)), 0
            while at < len(text):
                ends = range(min(len(text), at + longest), at, -1)
                end = next((end for end in ends if text[at:end] in self._ids), None)
                if end is None:
                    break
                tokens.append(self._ids[text[at:end]])
                at = end
        if len(self._spelled) < _CACHED:
            self._spelled[text] = list(tokens)
        return tokens


def certain_text(matcher: Any) -> bytes:
    """Return the text that must come next, in whole characters."""
    try:
        return str(matcher.find_jump_forward_string()).encode()
    except UnicodeDecodeError:  # it begins or ends within a character
        return b""
