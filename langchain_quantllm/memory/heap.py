"""Main memory that was freed, but that the process still keeps.

Owns giving it back to the system. Measures nothing.
"""

from __future__ import annotations

import contextlib
import ctypes


def release_heap() -> None:
    """Return freed memory of the heap to the system; does nothing where the C library is not glibc.

    glibc keeps blocks of up to 32 MB for what comes next. Quantizing and repacking weights goes by way of several
    times their size in such blocks.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
