"""What a process holds: its threads, files, tensors, objects and memory, counted to find what a run leaves behind."""

from __future__ import annotations

import gc
import sys
import threading
import time
import types
import weakref
from typing import Any

import psutil
import torch

COUNTED = ("threads", "files", "tensors", "bytes of tensors")
"""Counts that may not grow from one census to the next."""


class Census:
    """Counts what there is, and names the tensors that were not there at the first count."""

    def __init__(self) -> None:
        """Begin without a count."""
        self._process = psutil.Process()
        self._known: dict[int, weakref.ref[torch.Tensor]] = {}

    def settled(self) -> dict[str, Any]:
        """Count until two counts agree, for ten seconds at most: tensors of a running step are no leak."""
        deadline, seen = time.monotonic() + 10, self._count()
        while time.monotonic() < deadline:
            time.sleep(0.05)
            before, seen = seen, self._count()
            if all(seen[name] == before[name] for name in COUNTED):
                break
        return seen

    def _count(self) -> dict[str, Any]:
        gc.collect()
        # By the type itself, since some objects look at who asks for their class.
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        known = self._known
        new = [t for t in tensors if id(t) not in known or known[id(t)]() is not t] if known else []
        if not known:
            known.update((id(t), weakref.ref(t)) for t in tensors)
        return {
            "threads": threading.active_count(),
            "files": self._process.num_fds(),
            "tensors": len(tensors),
            "bytes of tensors": sum(t.numel() * t.element_size() for t in tensors),
            "new tensors": [f"{list(t.shape)} {t.dtype} in {_holders(t)}" for t in new],
            "objects": len(gc.get_objects()),
            "MB resident": round(self._process.memory_info().rss / 1e6),
        }


def _holders(tensor: torch.Tensor) -> str:
    """Describe the objects that hold a tensor: their types, and the keys of dictionaries."""
    here = sys._getframe().f_back
    holders = []
    for holder in gc.get_referrers(tensor):
        keys = [key for key, value in holder.items() if value is tensor] if isinstance(holder, dict) else []
        if holder is not here and not isinstance(holder, (list, types.CellType)):  # made by the search itself
            holders.append(f"{type(holder).__name__}{keys or ''}")
    return " ".join(holders)


def left_behind(half: dict[str, Any], end: dict[str, Any]) -> list[str]:
    """List what there is more of at the end of a run than halfway, with the tensors that are new."""
    left = [name for name in COUNTED if end[name] > half[name]]
    if end["objects"] > half["objects"] * 1.01:  # caches of the libraries fill up for a while
        left.append("objects")
    if end["MB resident"] > half["MB resident"] * 1.1 + 20:
        left.append("MB resident")
    return [*left, *end["new tensors"]] if left else []
