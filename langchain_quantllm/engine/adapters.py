"""Switching between a model's adapters by peft's own means, one adapter for the whole model.

Owns which adapters may be named, the switch and its way back. Knows peft's layers by what they offer, and imports
peft only where such a layer was found. How rows of several adapters run beside each other is `lora`'s business.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from langchain_quantllm.engine.options import BASE_ADAPTER
from langchain_quantllm.errors import GenerationError, UnsupportedError


class AdapterSwitch:
    """The adapters of one model, which runs with one of them at a time wherever this switch is used."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        """Serve the adapters of these names, which were loaded onto the model."""
        self.names = tuple(names)
        self._model = model
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def chosen(self, name: str | None) -> Iterator[None]:
        """Run the model with an adapter inside the block; afterwards all is as it was before.

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
            before = [(module, list(module.active_adapters), module.disable_adapters) for module in modules]
            trained = {id(p): (p, p.requires_grad) for module in modules for p in module.parameters()}
            try:
                activate(self._model, name or BASE_ADAPTER)
                yield
            finally:
                for module, names, is_disabled in before:
                    module.set_adapter(names)
                    module.enable_adapters(not is_disabled)
                for parameter, requires_grad in trained.values():
                    parameter.requires_grad_(requires_grad)


def activate(model: Any, name: str) -> None:
    """Let a model run with an adapter, or without any, until somebody says otherwise; nothing of it is trained.

    Args:
        model: The model, with peft's layers in it.
        name: The adapter's name, or `"base"`.
    """
    for module in adapter_modules(model):
        has_it = name != BASE_ADAPTER
        if has_it and hasattr(module, "check_set_adapter"):  # a whole module of an adapter's own, which others have not
            has_it = module.check_set_adapter([name]) is not None
        if has_it:
            module.set_adapter(name)
        module.enable_adapters(has_it)
        for parameter in module.parameters():
            parameter.requires_grad_(False)


def adapter_modules(model: Any) -> list[Any]:
    """List the modules that peft has put into a model: layers with adapters, and copies of whole modules."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def why_not_switched(model: Any, names: Sequence[str]) -> str | None:
    """Give the reason why a model cannot run with each of these adapters; None where nothing is against it."""
    here = getattr(model, "peft_config", None) or {}
    if gone := [name for name in names if name not in here]:
        return f"adapter {gone[0]!r} is not on the model any more"
    merged = next((m.merged_adapters[0] for m in adapter_modules(model) if m.merged_adapters), None)
    return None if merged is None else f"adapter {merged!r} is merged into the weights"


def changed_by_hand(reason: str) -> str:
    """Say what to do about adapters that somebody has changed on the model itself."""
    return f"the model's adapters were changed: {reason}; undo that, or call llm.unload() to load them anew."


def unsupported(reason: str) -> UnsupportedError:
    """Give the error of adapters that cannot run beside each other."""
    return UnsupportedError(f"its adapters cannot run beside each other: {reason}")
