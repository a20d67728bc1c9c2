"""Which rows run in the next step: who joins, who prefills, who decodes, who has to wait.

Owns the waiting and the running rows, their pages, and the order of prefill and decode steps.
Counts tokens only: it knows neither tensors nor text, and no model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager


class RowState:
    """Where one row stands. Counts are in tokens.

    A token that was drawn is on its way until the device has told it: `drawn` counts it,
    `ids` does not hold it yet.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        *,
        root: int | None = None,
        max_rows: int | None = None,
        adapter: int = -1,
    ) -> None:
        """Begin a row.

        Args:
            prompt_ids: Token ids of the prompt.
            max_new_tokens: The row is not scheduled beyond so many.
            root: Where its chain of pages begins; None shares none.
            max_rows: Most rows to run beside each other, this one included.
            adapter: Number of the adapter that it runs with; -1 for none.
        """
        self.ids = list(prompt_ids)
        self.prompt_tokens = len(self.ids)
        self.max_new_tokens = max_new_tokens
        self.max_rows = max_rows
        self.adapter = adapter
        self.drawn = 0
        self.written = 0
        """Tokens whose keys and values are in the pages, or on their way there."""
        self.pages: list[int] = []
        self.slot = -1
        """Its place in the device's tables while it runs."""
        self.decodes = False
        """Whether its last token lies on the device, so that a decode step can go on from it."""
        self.cached_tokens: int | None = None
        """Tokens of the prompt that were found in shared pages; None until the row has begun."""
        self.root = root
        self._chain = root
        self._chained_pages = 0

    @property
    def is_known(self) -> bool:
        """Whether every token drawn is in `ids`."""
        return len(self.ids) == self.prompt_tokens + self.drawn

    @property
    def is_complete(self) -> bool:
        """Whether no more tokens are to be drawn."""
        return self.drawn >= self.max_new_tokens

    def find_shared(self, pages: BlockManager) -> tuple[int, int]:
        """Count the pages that it could share from here on: all of them, and those that rows hold."""
        found = held = 0
        chain, at = self._chain, self.written
        while chain is not None and self._may_share(at):
            page = pages.find(chain, self.ids[at : at + BLOCK_TOKENS])
            if page is None:
                break
            found, held, at = found + 1, held + pages.is_held(page), at + BLOCK_TOKENS
            chain = pages.serial_of(page)
        return found, held

    def share(self, pages: BlockManager) -> None:
        """Take over pages of others that hold its next tokens."""
        while self._chain is not None and self._may_share(self.written):
            page = pages.find(self._chain, self.ids[self.written : self.written + BLOCK_TOKENS])
            if page is None:
                break
            self._chain = pages.share(page)
            self.pages.append(page)
            self._chained_pages += 1
            self.written += BLOCK_TOKENS

    def _may_share(self, at: int) -> bool:
        # The last token must run through the model, as the next one is drawn from what it gives.
        return len(self.pages) * BLOCK_TOKENS <= at and len(self.ids) - at > BLOCK_TOKENS

    def register(self, pages: BlockManager) -> None:
        """Let others find its pages that have become full of known tokens."""
        if self._chain is None:
            return
        while (self._chained_pages + 1) * BLOCK_TOKENS <= min(self.written, len(self.ids)):
            at = self._chained_pages * BLOCK_TOKENS
            self._chain = pages.register(self.pages[self._chained_pages], self._chain, self.ids[at : at + BLOCK_TOKENS])
            self._chained_pages += 1

    def keep_to_itself(self) -> None:
        """Share no pages any more, and offer none."""
        self.root = self._chain = None

    def put_back(self, pages: BlockManager) -> None:
        """Give up the pages; all tokens known by then are computed again when it is its turn."""
        pages.release(self.pages)
        self.pages = []
        self.written = 0
        self.slot = -1
        self.decodes = False
        self._chain = self.root
        self._chained_pages = 0


@dataclass(frozen=True)
class Piece:
    """Tokens `start` to `start + count` of one row's ids, to be prefilled; `is_last` draws the next token."""

    row: RowState
    start: int
    count: int
    is_last: bool


@dataclass(frozen=True)
class Prefill:
    """One step over prompts, or pieces of them, packed behind each other."""

    pieces: list[Piece]


@dataclass(frozen=True)
class Decode:
    """One step over rows that each go on by one token. `positions` are those of the tokens that go in."""

    rows: list[RowState]
    positions: list[int]


class Scheduler:
    """Plans one step after another. First come, first served; nobody starves."""

    def __init__(self, pages: BlockManager, *, slots: int, prefill_tokens: int, prefill_tokens_beside: int) -> None:
        """Begin with nothing to do.

        Args:
            pages: The pages to give out.
            slots: Most rows at once.
            prefill_tokens: Most tokens of a prefill step while no row decodes.
            prefill_tokens_beside: Most tokens of a prefill step while rows wait to decode on.
        """
        self.pages = pages
        self.waiting: deque[RowState] = deque()
        self.running: list[RowState] = []  # in the order in which they joined
        self.prefill_tokens = prefill_tokens
        self.prefill_tokens_beside = prefill_tokens_beside
        self.preempted = 0
        """Times that a row was put back for want of pages."""
        self._slots = list(range(slots - 1, -1, -1))
        self._prefilled_last = False

    @property
    def has_work(self) -> bool:
        """Whether any row waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, row: RowState) -> None:
        """Queue a row."""
        self.waiting.append(row)

    def remove(self, row: RowState) -> None:
        """Drop a row that has ended, wherever it is, and free what it holds."""
        if row in self.running:
            self._leave(row)
        else:
            self.waiting.remove(row)

    def plan(self) -> Prefill | Decode | None:
        """Choose the next step; None if there is nothing that can run before more is known.

        The step counts as made: rows are written and drawn from then on.
        """
        decoding = [row for row in self.running if row.decodes and not row.is_complete]
        if not (self._prefilled_last and decoding) and (pieces := self._plan_prefill(bool(decoding))):
            self._prefilled_last = True
            return Prefill(pieces)
        self._prefilled_last = False
        return self._plan_decode(decoding)

    def push(self, row: RowState, token_id: int) -> None:
        """Note a drawn token, now that the device has told it."""
        row.ids.append(token_id)
        if row.slot >= 0:
            row.register(self.pages)

    # Prefill.

    def _plan_prefill(self, beside_decoding: bool) -> list[Piece]:
        budget = self.prefill_tokens_beside if beside_decoding else self.prefill_tokens
        pieces: list[Piece] = []
        for row in [row for row in self.running if not row.decodes]:
            if budget <= 0:
                break
            if row.slot >= 0 and (piece := self._plan_piece(row, budget)):
                pieces.append(piece)
                budget -= piece.count
        while budget > 0 and self.waiting and self._admit(self.waiting[0]):
            row = self.waiting.popleft()
            piece = self._plan_piece(row, budget)
            if piece is None:  # others are to give their pages back first
                break
            pieces.append(piece)
            budget -= piece.count
        return pieces

    def _admit(self, row: RowState) -> bool:
        if not self._slots or not row.is_known:
            return False
        if any(other.max_rows is not None and len(self.running) >= other.max_rows for other in (*self.running, row)):
            return False
        found, held = row.find_shared(self.pages)
        needed = -(-(len(row.ids) + 1) // BLOCK_TOKENS) - held
        # Each running row soon needs a page too; without this margin the newcomer would be put back at once.
        if needed + len(self.running) > self.pages.available and self.running:
            return False
        row.slot = self._slots.pop()
        self.running.append(row)
        if row.cached_tokens is None:
            row.cached_tokens = found * BLOCK_TOKENS
        return True

    def _plan_piece(self, row: RowState, budget: int) -> Piece | None:
        before = row.written
        row.share(self.pages)
        if row.cached_tokens is not None and before and row.drawn == 0:  # found on the way, as another row made it
            row.cached_tokens += row.written - before
        start = row.written
        count = min(budget, len(row.ids) - start)
        if not self._reserve(row, start + count):
            return None
        row.written += count
        is_last = row.written == len(row.ids)
        if is_last:
            row.decodes = True
            row.drawn += 1
        row.register(self.pages)
        return Piece(row, start, count, is_last)

    # Decode.

    def _plan_decode(self, decoding: list[RowState]) -> Decode | None:
        for row in decoding:
            if row.slot >= 0:
                self._reserve(row, row.written + 1)
        # Whoever lost its pages to an older row is back in the queue by now, itself perhaps too.
        rows = [row for row in decoding if row.slot >= 0 and len(row.pages) * BLOCK_TOKENS > row.written]
        positions = [row.written for row in rows]
        for row in rows:
            row.written += 1
            row.drawn += 1
            row.register(self.pages)
        return Decode(rows, positions) if rows else None

    # Pages.

    def _reserve(self, row: RowState, tokens: int) -> bool:
        """Give a row pages for so many tokens, taking them from the youngest rows if need be."""
        while len(row.pages) * BLOCK_TOKENS < tokens:
            page = self.pages.take()
            if page is not None:
                row.pages.append(page)
                continue
            youngest = self.running[-1]
            self._put_back(youngest)
            if youngest is row:
                return False
        return True

    def _put_back(self, row: RowState) -> None:
        self.preempted += 1
        self._leave(row)
        self.waiting.appendleft(row)

    def _leave(self, row: RowState) -> None:
        self.running.remove(row)
        self._slots.append(row.slot)
        row.put_back(self.pages)
