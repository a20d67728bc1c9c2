"""A recorded call of a module, and the comparison of a step's output with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from langchain_quantllm.engine.forward_context import ForwardContext, Step
from langchain_quantllm.errors import UnsupportedError

TOLERANCES = {torch.float32: 2e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
"""Largest difference from a module's own output, relative to its norm, by dtype.

In 16 bits, four times the largest rounding error: sums in another order may round to the neighbouring number. In
float32, where such sums have some thousand terms, about 300 times.
"""


@dataclass(frozen=True, kw_only=True)
class RecordedCall:
    """A recorded call of a module.

    Tensors are copies, as models overwrite theirs; `originals` are the first argument and the output themselves, which
    show the modules that were called with the same tensor.
    """

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    originals: tuple[Any, Any]

    @classmethod
    def of(cls, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> RecordedCall:
        """Record a call that a module has just returned from."""
        copies = [copy_of(args), copy_of(kwargs)]
        originals = (args[0] if args else None, output)
        return cls(module=module, args=copies[0], kwargs=copies[1], output=copy_of(output), originals=originals)

    def run(self, step: Step, context: ForwardContext | None = None) -> Any:
        """Repeat the call with a step, which must not leave it to the module."""

        def refuse(*args: Any, **kwargs: Any) -> Any:
            msg = "it is called with unexpected arguments"
            raise UnsupportedError(msg)

        return step.run(self.module, refuse, context or ForwardContext(), self.args, self.kwargs)


def tensors_of(*parts: Any) -> list[torch.Tensor]:
    """List the tensors among the parts of a call."""
    return [part for part in parts if isinstance(part, torch.Tensor)]


def copy_of(part: Any) -> Any:
    """Copy the tensors in a part of a call, in tuples and dictionaries too."""
    if isinstance(part, torch.Tensor):
        return part.clone()
    if type(part) is tuple:
        return tuple(copy_of(one) for one in part)
    return {key: copy_of(one) for key, one in part.items()} if type(part) is dict else part


def output_of(call: RecordedCall) -> torch.Tensor:
    """Return the call's output, a tensor.

    Raises:
        UnsupportedError: If it is something else.
    """
    if not isinstance(call.output, torch.Tensor):
        msg = "it gives more than a tensor"
        raise UnsupportedError(msg)
    return call.output


def check_same(output: Any, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """Compare the output of a step with the module's.

    Raises:
        UnsupportedError: If they differ by more than the tolerance; None takes it from `TOLERANCES`.
    """
    tolerance = tolerance or TOLERANCES.get(expected.dtype)
    if tolerance is None:
        msg = f"its numbers are {expected.dtype}"
        raise UnsupportedError(msg)
    if not isinstance(output, torch.Tensor) or output.shape != expected.shape or output.dtype != expected.dtype:
        msg = "it gives another shape or dtype"
        raise UnsupportedError(msg)
    found = difference(output, expected)
    if not found <= tolerance:
        msg = f"it gives something else (a difference of {found:.1g}, where {tolerance:.1g} is allowed)"
        raise UnsupportedError(msg)


def difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the difference of two tensors, relative to the norm of the second one."""
    output, expected = output.float(), expected.float()
    return float((output - expected).norm() / expected.norm().clamp(min=1e-30))
