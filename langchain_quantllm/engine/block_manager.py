"""Pages of the KV cache: which are free, who holds them, and which hold what again later.

Owns the bookkeeping of pages by number. A full page is found again by the tokens in it and the
page before it, so that prompts which begin alike share their beginning. Knows no tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

BLOCK_TOKENS = 16
"""Tokens of one page."""

Key = tuple[int, tuple[int, ...]]
"""What a full page holds: the number of what came before it, and its own tokens."""


class BlockManager:
    """Pages from 1 on, each free, held by rows, or kept for whoever comes with the same tokens.

    Page 0 is never given out: what a forward writes for rows that only fill up a batch goes there.
    A kept page is given out again when no free one is left, the longest unused first.
    """

    def __init__(self, pages: int) -> None:
        """Begin with all pages free; `pages` counts page 0 as well."""
        self.pages = pages
        self._free = list(range(pages - 1, 0, -1))  # the lowest comes first: memory is touched as late as possible
        self._holders = [0] * pages
        self._keys: list[Key | None] = [None] * pages
        self._serials = [0] * pages
        self._by_key: dict[Key, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._next_serial = 1

    @property
    def available(self) -> int:
        """Pages that can be taken: the free ones and the kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        """Pages that rows hold."""
        return self.pages - 1 - self.available

    def new_root(self) -> int:
        """Give a number that no page has: chains that begin there are found by whoever knows it only."""
        self._next_serial += 1
        return self._next_serial - 1

    def take(self) -> int | None:
        """Take a page of unknown content, or None if rows hold them all."""
        if self._free:
            page = self._free.pop()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._holders[page] = 1
        return page

    def find(self, parent: int, tokens: Sequence[int]) -> int | None:
        """Find the page that holds these tokens after this parent."""
        return self._by_key.get((parent, tuple(tokens)))

    def serial_of(self, page: int) -> int:
        """Give the number by which what comes after a found page is found."""
        return self._serials[page]

    def is_held(self, page: int) -> bool:
        """Whether a row holds the page, so that sharing it takes none of those available."""
        return self._holders[page] > 0

    def share(self, page: int) -> int:
        """Hold a found page as one more row, and give its number for those that come after it."""
        if not self._holders[page]:
            del self._kept[page]
        self._holders[page] += 1
        return self._serials[page]

    def register(self, page: int, parent: int, tokens: Sequence[int]) -> int:
        """Say what a full page holds.

        Returns:
            The number that stands for this beginning: another page's, if one holds the same.
        """
        key = (parent, tuple(tokens))
        same = self._by_key.get(key)
        if same is not None:
            return self._serials[same]
        self._by_key[key] = page
        self._keys[page] = key
        self._serials[page] = self.new_root()
        return self._serials[page]

    def release(self, pages: Sequence[int]) -> None:
        """Let go of a row's pages; the last ones of a row are given out again before its first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if self._keys[page] is None:
                self._free.append(page)
            else:
                self._kept[page] = None

    def discard(self, pages: Sequence[int]) -> list[int]:
        """Let nobody find pages that were released; those that other rows still hold stay as they are.

        Returns:
            The pages that hold nothing any more.
        """
        discarded = [page for page in dict.fromkeys(pages) if not self._holders[page]]
        for page in discarded:
            if page in self._kept:
                del self._kept[page]
                self._forget(page)
                self._free.append(page)
        return discarded

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        if key is not None:
            del self._by_key[key]
            self._keys[page] = None
