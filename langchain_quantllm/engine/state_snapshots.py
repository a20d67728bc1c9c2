"""Which rows of the state pool hold the states at the ends of which prefixes, so that prompts that begin alike go on.

Rows and prefix ids are numbers here; it knows no tensors. A prefix id stands for all tokens up to the end of a full
block, see `block_manager`; a block that is forgotten takes its snapshot with it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict


class StateSnapshots:
    """Rows for states at block borders; the least recently used one is overwritten when all are taken."""

    def __init__(self, rows: range) -> None:
        """Begin with all rows free."""
        self._free = list(reversed(rows))
        self._rows: OrderedDict[int, int] = OrderedDict()  # by prefix id, the latest last
        self._holders: Counter[int] = Counter()

    def find(self, prefix_id: int) -> int | None:
        """Find the row with the states at the end of a prefix."""
        row = self._rows.get(prefix_id)
        if row is not None:
            self._rows.move_to_end(prefix_id)
        return row

    def save(self, prefix_id: int) -> int | None:
        """Choose the row to write the states at the end of a prefix to; None if they are kept already, or none can be.

        Whoever finds the row from now on reads it after it was written.
        """
        if prefix_id in self._rows:
            self._rows.move_to_end(prefix_id)
            return None
        if self._free:
            row = self._free.pop()
        else:
            oldest = next((key for key, row in self._rows.items() if not self._holders[row]), None)
            if oldest is None:
                return None
            row = self._rows.pop(oldest)
        self._rows[prefix_id] = row
        return row

    def hold(self, row: int) -> None:
        """Keep a found row from being overwritten until `release`."""
        self._holders[row] += 1

    def release(self, row: int) -> None:
        """Hold a row no more."""
        self._holders[row] -= 1
        if not self._holders[row] and row not in self._rows.values():
            self._free.append(row)  # its prefix was forgotten meanwhile

    def forget(self, prefix_id: int) -> None:
        """Free the row of a prefix whose block is found no more."""
        row = self._rows.pop(prefix_id, None)
        if row is not None and not self._holders[row]:
            self._free.append(row)
