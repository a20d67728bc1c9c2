"""The forward of the engine that the current thread runs: its attention, fused steps and adapters.

The runner enters one context for each forward. Code that replaces a part of the model looks here: without a context, as
in other threads and in the user's own calls of the model, the model runs as it is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from langchain_quantllm.engine.adapter_choice import AdapterChoice
from langchain_quantllm.engine.attention import PagedForward
from langchain_quantllm.engine.image_overlay import ImageOverlay


class Step(Protocol):
    """A fused computation that replaces a module's `forward`."""

    def run(
        self,
        module: Any,
        forward: Callable[..., Any],
        context: ForwardContext,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Compute the output of the module's own `forward`, or call it for arguments that the step does not take."""
        ...


class States(Protocol):
    """The states of layers that keep some, in one forward; see `state_forward`."""

    def run(
        self,
        context: ForwardContext,
        module: Any,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Compute the output of a module that keeps a state, over packed tokens."""
        ...


class Absorption(Protocol):
    """Replaces the heads' keys and values by products on the side of the queries and of what is attended."""

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """Turn the queries of an attention into those for the pool."""
        ...

    def expand(self, attended: torch.Tensor) -> torch.Tensor:
        """Turn what is attended in the pool into values."""
        ...


class StageRun(Protocol):
    """The stages of one forward; see `stages`."""

    def enter(
        self, module_id: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Go on in the stage of a module; returns the module's arguments, brought to its device."""
        ...


class PrecomputedOutputs:
    """Outputs of modules for one input, computed before these modules are called."""

    def __init__(self) -> None:
        """Start empty."""
        self._input: torch.Tensor | None = None
        self._version = 0
        self._outputs: dict[int, torch.Tensor] = {}

    def put(self, x: torch.Tensor, outputs: dict[int, torch.Tensor]) -> None:
        """Store the outputs for an input, by the modules' ids; outputs for another input are dropped."""
        self._input, self._version, self._outputs = x, x._version, outputs

    def take(self, x: torch.Tensor, module_id: int) -> torch.Tensor | None:
        """Remove and return a module's output for this tensor; None if there is none, or the tensor was changed."""
        if self._input is None or x is not self._input or x._version != self._version:
            return None
        output = self._outputs.pop(module_id, None)
        if not self._outputs:
            self._input = None
        return output


@dataclass(kw_only=True)
class ForwardContext:
    """What one forward of the engine runs with.

    Args:
        attention: Attention over the blocks of the KV cache; None for the model's own attention.
        states: States of the layers that keep some; None for the module's own.
        steps: Fused steps by the ids of the modules that they replace.
        adapters: The adapter of each token; None for peft's own choice.
        images: Features of images among the tokens; None if there are none.
        text_lengths: The length that decides on each token's rotary frequencies, of shape `(tokens,)`; None if no
            length does.
        absorptions: What the attentions with latents multiply by, by their ids; see `latent_attention`.
        biases_by_distance: Whether the biases that attentions pass are those of distances; see `relative_bias`.
        stages: The stages of a model on several devices; None if it lies on one.
        first_position: Position of the first token, where a check runs the model's own forward.
        record: Called with each patched module that has no step, its arguments, keyword arguments and output.
        normed: Outputs of norms whose kernel also computed their input.
        projected: Outputs of linear layers that were multiplied together with another one.
    """

    attention: PagedForward | None = None
    states: States | None = None
    steps: Mapping[int, Step] = field(default_factory=dict)
    adapters: AdapterChoice | None = None
    images: ImageOverlay | None = None
    text_lengths: torch.Tensor | None = None
    absorptions: Mapping[int, Absorption] = field(default_factory=dict)
    biases_by_distance: bool = False
    stages: StageRun | None = None
    first_position: int = 0
    record: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None] | None = None
    normed: PrecomputedOutputs = field(default_factory=PrecomputedOutputs)
    projected: PrecomputedOutputs = field(default_factory=PrecomputedOutputs)


_thread = threading.local()


def current_context() -> ForwardContext | None:
    """Return the context of the forward that this thread runs; None outside the engine's forwards."""
    return getattr(_thread, "context", None)


@contextlib.contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Make a context the current one of this thread inside the block."""
    before = current_context()
    _thread.context = context
    try:
        yield
    finally:
        _thread.context = before
