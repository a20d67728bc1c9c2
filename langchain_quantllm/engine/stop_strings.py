"""Finding stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds stop strings across the borders of pieces, and holds back an end that may become one.

    The stop string that is complete first ends the text; of two that end at the same place, the longer. So the cut
    does not depend on where the pieces end.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Look for any of the strings, none of them empty."""
        self._stop = sorted(stop, key=len, reverse=True)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add a piece and return the text that is now safe to show.

        Once a stop string is complete, it and everything after it are discarded, and `found` is True.
        """
        if not self._stop:
            return text
        self._held += text
        if ends := [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]:
            self.found = True
            _, start = min(ends)
            text, self._held = self._held[:start], ""
            return text
        keep = max((n for s in self._stop if (n := _overlap(self._held, s))), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def flush(self) -> str:
        """Return the text that was held back; the text ends here."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string, short of the whole stop string."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
