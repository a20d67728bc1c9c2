"""Switching a whole model between its adapters, by peft's own means.

Owns the adapters' names, the switch and its reversal. `lora` runs sequences of several adapters in one batch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from langchain_quantllm.compat.peft import (
    adapter_modules,
    choice_of,
    choose_adapter,
    merged_adapter,
    restore_choice,
)
from langchain_quantllm.errors import GenerationError, UnsupportedError
from langchain_quantllm.options import BASE_ADAPTER


class AdapterSwitch:
    """Switches a model between its adapters, one at a time."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        """Take the names of the adapters that were loaded onto the model."""
        self.names = tuple(names)
        self._model = model
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Let no other thread's block of `chosen` begin or end inside the block."""
        with self._lock:
            yield

    @contextlib.contextmanager
    def chosen(self, name: str | None) -> Iterator[None]:
        """Run the model with an adapter inside the block; afterwards its choice is as before.

        Blocks of several threads wait for each other.

        Args:
            name: One of the names, or `"base"`; None for the same.

        Raises:
            GenerationError: If the adapter was taken off the model, or one was merged into its weights.
        """
        with self._lock:
            if (reason := why_not_switched(self._model, self.names)) is not None:
                raise GenerationError(changed_by_hand(reason))
            modules = adapter_modules(self._model)
            before = [(module, choice_of(module)) for module in modules]
            trained = {id(p): (p, p.requires_grad) for module in modules for p in module.parameters()}
            try:
                activate(self._model, name or BASE_ADAPTER)
                yield
            finally:
                for module, choice in before:
                    restore_choice(module, choice)
                for parameter, requires_grad in trained.values():
                    parameter.requires_grad_(requires_grad)


def activate(model: Any, name: str) -> None:
    """Activate an adapter of a model, or none, until it is changed again; no parameter becomes trainable.

    Args:
        model: The model, with peft's layers in it.
        name: The adapter's name, or `"base"`.
    """
    for module in adapter_modules(model):
        choose_adapter(module, None if name == BASE_ADAPTER else name)


def why_not_switched(model: Any, names: Sequence[str]) -> str | None:
    """Find the reason why a model cannot run with each of these adapters; None if there is none."""
    here = getattr(model, "peft_config", None) or {}
    if gone := [name for name in names if name not in here]:
        return f"adapter {gone[0]!r} is not on the model any more"
    merged = next(filter(None, map(merged_adapter, adapter_modules(model))), None)
    return None if merged is None else f"adapter {merged!r} is merged into the weights"


def changed_by_hand(reason: str) -> str:
    """Write the message about adapters that were changed on the model itself."""
    return f"the model's adapters were changed: {reason}; undo that, or call llm.unload() to load them anew."


def unsupported(reason: str) -> UnsupportedError:
    """Make the error of adapters that cannot run in one batch."""
    return UnsupportedError(f"its adapters cannot run beside each other: {reason}")
