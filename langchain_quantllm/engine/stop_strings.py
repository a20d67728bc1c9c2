"""Finding stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds stop strings across the borders of pieces, and holds back an end that may become one.

    The stop string that is complete first ends the text; of two that end at the same place, the longer. So the cut
    does not depend on where the pieces end. Each character takes a few steps for each stop string, however long these
    are.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Look for any of the strings, none of them empty."""
        self._searches = [_Search(s) for s in sorted(stop, key=len, reverse=True)]
        self._first_characters = {s[0] for s in stop}
        self._held = ""  # the stop string that the text held back begins
        self._held_chars = 0
        self.found = False

    def push(self, text: str) -> str:
        """Add a piece and return the text that is now safe to show.

        Once a stop string is complete, it and everything after it are discarded, and `found` is True.
        """
        if self.found:
            return ""
        if not self._held_chars and not any(character in text for character in self._first_characters):
            return text
        for at, character in enumerate(text, 1):
            complete = [search for search in self._searches if search.push(character)]
            if complete:
                self.found = True
                return self._release(text, self._held_chars + at - len(complete[0].stop))
        longest = max(self._searches, key=lambda search: search.matched)
        safe = self._release(text, self._held_chars + len(text) - longest.matched)
        self._held, self._held_chars = longest.stop, longest.matched
        return safe

    def flush(self) -> str:
        """Return the text that was held back; the text ends here."""
        return self._release("", self._held_chars)

    def _release(self, text: str, count: int) -> str:
        """Return the first characters of the text held back and a piece after it, and hold back nothing."""
        held, self._held_chars = self._held_chars, 0
        return self._held[: min(count, held)] + text[: max(0, count - held)]


class _Search:
    """The search for one string, character by character: Knuth, Morris and Pratt's."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        """Length of the longest end of the text that begins the string."""
        # For each beginning of the string, the length of its longest shorter end that begins the string too; as far as
        # any text has come.
        self._borders = [0, 0]

    def push(self, character: str) -> bool:
        """Add a character of the text; True when the string is complete."""
        stop, borders = self.stop, self._borders
        self.matched = n = self._longer(self.matched, character)
        if n == len(borders):
            borders.append(self._longer(borders[n - 1], stop[n - 1]))
        return n == len(stop)

    def _longer(self, n: int, character: str) -> int:
        """Return the length of the longest end that begins the string, from that before the character."""
        while n and self.stop[n] != character:
            n = self._borders[n]
        return n + (self.stop[n] == character)
