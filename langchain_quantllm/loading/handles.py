"""The registry of what is loaded: one handle for each model in memory, which dies with the last object that holds it.

Language models, those of engines of others and encoders are in one table, by the keys of their specs.
"""

from __future__ import annotations

import os
import threading
import uuid
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar


class Shared(Protocol):
    """A loaded model that is shared."""

    handle: Handle | None
    """Its entry in the registry, kept alive by it."""

    @property
    def closed(self) -> bool:
        """Whether its weights were released."""


_Model = TypeVar("_Model", bound=Shared)


class Handle:
    """A model's entry in the registry: the lock of its loading, a name, and a weak reference to the model."""

    def __init__(self) -> None:
        self.name = f"pipeline-{uuid.uuid4().hex[:8]}"
        self._lock = threading.Lock()
        self._model: weakref.ref[Any] | None = None

    def get(self, make: Callable[[], _Model]) -> _Model:
        """Return the model; make it if there is none, or its weights were released."""
        with self._lock:
            model: _Model | None = None if self._model is None else self._model()
            if model is None or model.closed:
                model = make()
                model.handle = self
                self._model = weakref.ref(model)
            return model


_lock = threading.Lock()
"""Lock of the tables of handles."""


def _renew_lock() -> None:
    """Make the lock anew in a forked process: another thread of the parent may have held it, for ever."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)

_handles: weakref.WeakValueDictionary[str, Handle] = weakref.WeakValueDictionary()
"""Handles of models that this package loads, by their key. The loading thread and then the model hold a handle."""

_pipeline_handles: weakref.WeakKeyDictionary[Any, Handle] = weakref.WeakKeyDictionary()
"""Handles of users' pipelines. A pipeline keeps its handle, and so its name, even while no model wraps it."""


def get_or_make(key: str, make: Callable[[], _Model]) -> _Model:
    """Return the model of a key; make it if there is none.

    Safe to call from many threads; it is made once. The model lives as long as anybody holds the result.

    Args:
        key: Equal for models that are to be shared.
        make: Makes the model.
    """
    with _lock:
        handle = _handles.setdefault(key, Handle())
    return handle.get(make)


def pipeline_handle(pipeline: Any) -> Handle:
    """Return the handle of a user's pipeline, the same at every call."""
    with _lock:
        return _pipeline_handles.setdefault(pipeline, Handle())
