"""Mixtures of experts, whose products with routed rows are computed by the kernels of this package.

A step takes the place of a model's experts, not of the router before them. It is found by what the experts compute: the
function between their two products is compared with known ones, and the whole with the experts' own output.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from langchain_quantllm.compat.transformers_experts import are_routed_tokens, is_experts, projections
from langchain_quantllm.compat.transformers_gating import gated_outputs
from langchain_quantllm.engine.cuda_graphs import hooks_of
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.fusion.recorded_call import RecordedCall, check_same, output_of
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.experts.stacked import StackedLinear
from langchain_quantllm.kernels.experts.gating import (
    GELU,
    GELU_TANH,
    RELU,
    RELU_SQUARED,
    SILU,
    Gating,
    gate,
)
from langchain_quantllm.kernels.experts.weights import FloatStack, Stack

__all__ = ["ExpertsStep", "experts_step", "gating_of", "is_experts"]

_COPIES = 12
"""How often the tokens of a recorded call are repeated, to compare tiles of rows as well."""

_ALPHAS = (1.0, 1.702)
"""Known factors of SiLU; others are looked for among a module's numbers."""

_PROBED_ROWS, _PROBED_WIDTH, _PROBED_TO = 8, 32, 20.0
"""Rows and outputs of the probe of a function, and its largest number."""


@dataclass(frozen=True, kw_only=True)
class ExpertsStep:
    """The experts of a mixture.

    Args:
        kernels: `kernels.experts.dispatch`, `.invariant` or `.reference`.
        first: Weights of the first product.
        second: Weights of the second product.
        gating: What is computed between them.
    """

    kernels: Any
    first: tuple[Stack, ...]
    second: Stack
    gating: Gating

    def run(
        self,
        module: Any,
        forward: Callable[..., Any],
        context: ForwardContext,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Compute the experts of each token; see `Step.run`."""
        del context
        if kwargs or not are_routed_tokens(args) or torch.nn.utils.parametrize.is_parametrized(module):
            return forward(*args, **kwargs)
        x, index, weights = args
        return self.kernels.experts(x, self.first, self.second, index, weights, self.gating).to(x.dtype)


def experts_step(call: RecordedCall, kernels: Any, likely: Gating | None = None) -> ExpertsStep:
    """Find what experts compute, and compare it on all tokens of a call, on a single one and on many.

    Args:
        call: A call of the experts.
        kernels: See `ExpertsStep`.
        likely: The function of other experts, tried first.

    Raises:
        UnsupportedError: If the weights are stored in another way, or the step gives something else.
    """
    expected, module = output_of(call), call.module
    if not are_routed_tokens(call.args) or call.kwargs:
        msg = "it is called with unexpected arguments"
        raise UnsupportedError(msg)
    first, second = _stacks(module, "gate_up_proj" if module.has_gate else "up_proj"), _stacks(module, "down_proj")
    if len(second) != 1 or {stack.experts for stack in (*first, *second)} != {module.num_experts}:
        msg = "its weights are not those of its experts"
        raise UnsupportedError(msg)
    gating = gating_of(module, expected.device, likely)
    step = ExpertsStep(kernels=kernels, first=first, second=second[0], gating=gating)
    check_same(call.run(step), expected)
    parts = [(tuple(one[:1] for one in call.args), expected[:1])]
    parts.append((tuple(one.repeat(_COPIES, 1) for one in call.args), expected.repeat(_COPIES, 1)))
    for args, output in parts:
        check_same(kernels.experts(args[0], first, second[0], *args[1:], gating).to(output.dtype), output)
    return step


def _stacks(module: Any, name: str) -> tuple[Stack, ...]:
    """Return the weights of a projection, without copying them.

    Raises:
        UnsupportedError: If they are stored in another way.
    """
    weight = module._modules.get(name, module._parameters.get(name))
    if isinstance(weight, StackedLinear):
        return (weight.stack,)
    layout = projections(module).get(name)
    if layout is None or weight is None or not weight.is_floating_point() or type(weight) is not torch.nn.Parameter:
        msg = "its weights are stored in a way that has no kernel"
        raise UnsupportedError(msg)
    values = weight.detach()
    values = values.transpose(1, 2) if layout.transposed else values
    bias = None if layout.bias is None else getattr(module, layout.bias).detach()
    return (FloatStack(in_features=layout.in_features, out_features=layout.out_features, values=values, bias=bias),)


def gating_of(module: Any, device: torch.device, likely: Gating | None = None) -> Gating:
    """Find the function between the two products of experts, by its values.

    Args:
        module: The experts.
        device: Where to compute.
        likely: A function that is tried first.

    Raises:
        UnsupportedError: If it is none that is known.
    """
    function = getattr(module, "act_fn", None)
    if isinstance(function, torch.nn.Module) and hooks_of(function):
        msg = "its activation has hooks, which the fused step would skip"
        raise UnsupportedError(msg)
    is_gated = bool(module.has_gate)
    shape = (_PROBED_ROWS, _PROBED_WIDTH * (2 if is_gated else 1))
    count = math.prod(shape)
    # In an order in which gates and ups of all sizes meet.
    probe = torch.linspace(-_PROBED_TO, _PROBED_TO, count, dtype=torch.float32, device=device)
    probe = probe[torch.arange(count, device=device) * 37 % count].view(shape)
    probe[-1] *= 1000  # so that no limit stays unseen
    expected = gated_outputs(module, probe)
    for gating in _known_gatings(module, is_gated, likely):
        if torch.allclose(gate(probe, gating), expected, rtol=1e-5, atol=1e-5):
            return gating
    msg = "what it computes between its two products is unknown"
    raise UnsupportedError(msg)


def _known_gatings(module: Any, is_gated: bool, likely: Gating | None) -> Iterator[Gating]:
    """Yield the functions that the experts may have; factors and limits are among the module's numbers."""
    if likely is not None and likely.is_gated == is_gated:
        yield likely
    numbers = {
        float(value)
        for value in vars(module).values()
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    }
    alphas = [*_ALPHAS, *sorted(numbers.difference(_ALPHAS))]
    activations = [(name, 1.0) for name in (SILU, GELU, GELU_TANH, RELU, RELU_SQUARED)]
    activations += [(SILU, alpha) for alpha in alphas[1:]]
    if not is_gated:
        for name, alpha in activations:
            yield Gating(activation=name, alpha=alpha, is_gated=False)
        return
    limits = [(None, False), *itertools.product(sorted(numbers), (False, True))]
    for (limit, after), shift, interleaved in itertools.product(limits, (0.0, 1.0), (False, True)):
        for name, alpha in activations:
            yield Gating(
                activation=name, alpha=alpha, is_interleaved=interleaved, limit=limit, limits_activated=after,
                shift=shift,
            )  # fmt: skip
