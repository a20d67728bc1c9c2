"""The critical messages of engines whose slots, blocks and sequences do not account for each other."""

from __future__ import annotations

import logging


class CriticalMessages(logging.Handler):
    """Collects the critical messages of every engine's thread."""

    def __init__(self) -> None:
        super().__init__(logging.CRITICAL)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
