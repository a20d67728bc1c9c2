"""What a process holds: its threads, files, tensors, objects and memory, counted to find what a run leaves behind."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from typing import Any

import psutil
import torch

COUNTED = ("threads", "files", "tensors", "bytes of tensors")
"""Counts that may not grow from one census to the next."""

KINDS = "kinds of tensors"


def settled_census() -> dict[str, Any]:
    """Count what there is until two counts agree, for ten seconds at most: tensors of a running step are no leak."""
    deadline, seen = time.monotonic() + 10, _count()
    while time.monotonic() < deadline:
        time.sleep(0.05)
        before, seen = seen, _count()
        if all(seen[name] == before[name] for name in COUNTED):
            break
    return {**seen, KINDS: _kinds_of_tensors()}


def _count() -> dict[str, Any]:
    gc.collect()
    objects, process = gc.get_objects(), psutil.Process()
    tensors = [one for one in objects if _is_tensor(one)]
    return {
        "threads": threading.active_count(),
        "files": process.num_fds(),
        "tensors": len(tensors),
        "bytes of tensors": sum(t.numel() * t.element_size() for t in tensors),
        "objects": len(objects),
        "MB resident": round(process.memory_info().rss / 1e6),
    }


def _is_tensor(one: Any) -> bool:
    return issubclass(type(one), torch.Tensor)  # by the type itself: some objects look at who asks for their class


def _kinds_of_tensors() -> Counter[str]:
    """Count tensors by shape, dtype and holders: the types of objects that hold them, and the keys of dictionaries."""
    objects = gc.get_objects()
    tensors = {id(one): one for one in objects if _is_tensor(one)}
    holders: dict[int, list[str]] = {key: [] for key in tensors}
    for holder in objects:
        for held in {id(one) for one in gc.get_referents(holder)} & tensors.keys():
            is_dict = issubclass(type(holder), dict)
            keys = [key for key, value in holder.items() if value is tensors[held]] if is_dict else ""
            holders[held].append(f"{type(holder).__name__}{keys}")
    return Counter(f"{list(t.shape)} {t.dtype} in {' '.join(sorted(holders[key]))}" for key, t in tensors.items())


def left_behind(half: dict[str, Any], end: dict[str, Any]) -> list[str]:
    """List what there is more of at the end of a run than halfway, and the kinds of tensors of which there are more."""
    most = {name: half[name] for name in COUNTED}
    most["objects"] = half["objects"] * 1.01  # caches of the libraries fill up for a while
    most["MB resident"] = half["MB resident"] * 1.1 + 20
    left = [f"{name}: {half[name]} halfway, {end[name]} at the end" for name in most if end[name] > most[name]]
    kinds = Counter(end[KINDS]) - Counter(half[KINDS])
    return [*left, *(f"{count} of {kind}" for kind, count in kinds.items())] if left else []
