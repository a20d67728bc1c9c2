"""Messages of chat models."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import add
from typing import Any


def folded(chunks: Iterable[Any]) -> Any:
    """Add up the chunks of a stream, at least one."""
    return reduce(add, chunks)
