"""A module's `forward`, replaced for the engine's own forwards.

Fused steps, stacked LoRA adapters, and modules that keep what others do not are patches of this kind.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from langchain_quantllm.engine.forward_context import ForwardContext, current_context

Replacement = Callable[[ForwardContext, Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Runs a module in a forward of the engine: takes the context, the module, its own forward, and the arguments."""


class ForwardPatch:
    """Replaces `module.forward` in the engine's forwards of this thread; other calls reach the module's own forward.

    Hooks of the module still run, as PyTorch calls them around `forward`. Copies and pickles of the module have its own
    forward. The patch holds the module weakly.
    """

    def __init__(self, module: Any, replacement: Replacement) -> None:
        """Patch a module until `close`."""
        self.module_id = id(module)
        self.replacement = replacement
        self._module = weakref.ref(module)
        self._before = module.__dict__.get("forward")
        self._is_closed = False
        module.forward = self

    @property
    def __wrapped__(self) -> Any:
        """The forward that the patch stands before: `inspect.signature` finds its parameters here."""
        return self._before or forward_of(self._module())

    @property
    def before(self) -> Any:
        """The `forward` that was set on the module itself before; None if there was none."""
        return self._before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the replacement inside a forward of the engine, else the module's own forward."""
        module: Any = self._module()
        forward = self._before or forward_of(module)
        context = None if self._is_closed else current_context()
        if context is None:
            return forward(*args, **kwargs)
        if context.stages is not None:  # before the module is replaced: its inputs may lie on another device
            args, kwargs = context.stages.enter(self.module_id, args, kwargs)
        return self.replacement(context, module, forward, args, kwargs)

    def close(self) -> None:
        """Restore the module's `forward`; if other code has replaced it since, the patch stays there without effect."""
        if self._is_closed:
            return
        self._is_closed = True
        module = self._module()
        if module is None or module.__dict__.get("forward") is not self:
            return
        before = self._before
        while isinstance(before, ForwardPatch) and before._is_closed:
            before = before._before
        if before is None:
            del module.forward
        else:
            module.forward = before

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the module's own forward."""
        return forward_of, (self._module(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy as the own forward of the module's copy."""
        copied = memo.get(self.module_id)
        return self if copied is None else forward_of(copied)


class PatchedModules:
    """Modules of one kind whose `forward` is replaced in the engine's forwards, until `close`."""

    def __init__(self, model: Any) -> None:
        """Patch the modules; none if the model has no such ones."""
        self._model = model
        self._patches: list[ForwardPatch] = []
        self.build()

    def _find(self) -> Iterable[tuple[Any, Replacement]]:
        """List the modules, each with what replaces its forward."""
        raise NotImplementedError

    def build(self) -> None:
        """Find the modules anew, as after a change of the model."""
        self.close()
        self._patches = [ForwardPatch(module, replacement) for module, replacement in list(self._find())]

    def close(self) -> None:
        """Restore every module's `forward`."""
        for patch in self._patches:
            patch.close()
        self._patches = []


def forward_of(module: Any) -> Any:
    """Return the `forward` of a module's class, bound to the module."""
    return types.MethodType(type(module).forward, module)
