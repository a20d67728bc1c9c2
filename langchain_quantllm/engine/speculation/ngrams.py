"""Proposals from texts, the same one or others: the tokens that followed the last ones where they stood before.

Source: prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding), with the longest match of SuffixDecoding
(arXiv 2411.04975): of all places where the last tokens stand, that which agrees with the most tokens before it counts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

LEAST_MATCH = 3
"""Tokens that must agree; two agree by chance too often."""

LEAST_MATCH_OF_OTHERS = 6
"""Tokens that must agree with another text."""

_MOST_MATCH = 32  # tokens that are compared
_KEPT_TOKENS = 32768  # of ended texts
_PLACES = 8  # the last ones, that are compared


class Match(NamedTuple):
    """An earlier place that ends like the text.

    Args:
        end: Index of the token behind it.
        length: Tokens that agree.
    """

    end: int
    length: int


class NGramIndex:
    """Where each run of `LEAST_MATCH` tokens stands in a text that grows."""

    def __init__(self, ids: Sequence[int]) -> None:
        """Index a text; the sequence of its tokens is read again at each search."""
        self._ids = ids
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._indexed = LEAST_MATCH  # ends of runs before this one

    def find(self) -> Match | None:
        """Find the earlier place that agrees with the most of the last tokens, the latest of several."""
        ids, count = self._ids, len(self._ids)
        if count < LEAST_MATCH:
            return None
        places = self._places
        for end in range(self._indexed, count):  # but for the last run, which would find itself
            places.setdefault(tuple(ids[end - LEAST_MATCH : end]), []).append(end)
        self._indexed = max(self._indexed, count)
        best: Match | None = None
        for end in reversed(places.get(tuple(ids[count - LEAST_MATCH :]), ())[-_PLACES:]):
            length = _agreeing(ids, end, ids, count)
            if best is None or length > best.length:
                best = Match(end, length)
        return best

    def tokens(self, match: Match, most: int) -> tuple[int, ...]:
        """Return the tokens behind a match; a text that repeats itself goes on so beyond its end."""
        ids, count = self._ids, len(self._ids)
        tokens = list(ids[match.end : match.end + most])
        period = count - match.end
        while len(tokens) < most:
            tokens.append(tokens[-period])
        return tuple(tokens)


def _agreeing(text: Sequence[int], end: int, ids: Sequence[int], count: int) -> int:
    """Count the tokens that agree before `end` of a text and before `count` of another; `LEAST_MATCH` are known to."""
    length = LEAST_MATCH
    while length < min(_MOST_MATCH, end, count) and text[end - length - 1] == ids[count - length - 1]:
        length += 1
    return length


class PastTexts:
    """Texts of requests that have ended, the last `_KEPT_TOKENS` tokens, for others that repeat them."""

    def __init__(self) -> None:
        """Begin without texts."""
        self._texts: OrderedDict[int, tuple[int, ...]] = OrderedDict()
        self._places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        self._tokens = self._added = 0

    def add(self, ids: Sequence[int]) -> None:
        """Add a text; a longer one than are kept is not."""
        if len(ids) <= LEAST_MATCH or len(ids) > _KEPT_TOKENS:
            return
        text, number = tuple(ids), self._added
        self._added += 1
        self._texts[number] = text
        self._tokens += len(text)
        for end in range(LEAST_MATCH, len(text)):
            self._places.setdefault(text[end - LEAST_MATCH : end], []).append((number, end))
        while self._tokens > _KEPT_TOKENS:
            self._drop_first()

    def _drop_first(self) -> None:
        number, text = self._texts.popitem(last=False)
        self._tokens -= len(text)
        for end in range(LEAST_MATCH, len(text)):
            key = text[end - LEAST_MATCH : end]
            if places := [place for place in self._places.get(key, ()) if place[0] != number]:
                self._places[key] = places
            else:
                self._places.pop(key, None)

    def find(self, ids: Sequence[int], most: int) -> tuple[int, tuple[int, ...]] | None:
        """Find the place that agrees with the most of the last tokens, the latest of several.

        Returns:
            How many agree, at least `LEAST_MATCH_OF_OTHERS`, and up to `most` tokens behind them; None if there is no
            such place.
        """
        count = len(ids)
        if count < LEAST_MATCH:
            return None
        length, tokens = LEAST_MATCH_OF_OTHERS - 1, tuple[int, ...]()
        for number, end in reversed(self._places.get(tuple(ids[count - LEAST_MATCH :]), ())[-_PLACES:]):
            text = self._texts[number]
            if (agreeing := _agreeing(text, end, ids, count)) > length:
                length, tokens = agreeing, text[end : end + most]
        return (length, tokens) if tokens else None
