"""Finding the fused step that computes what a module does, by comparing their outputs on a recorded call.

The names of models play no part: a module with a known formula is fused, another one is refused with the reason.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from langchain_quantllm.compat.transformers_experts import are_routed_tokens, is_experts
from langchain_quantllm.compat.transformers_models import given_cache_name
from langchain_quantllm.engine.attention import AttentionArguments, Batch, LayerPool, PagedForward, Span
from langchain_quantllm.engine.attention_interface import paged_attention
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.cuda_graphs import hooks_of
from langchain_quantllm.engine.forward_context import ForwardContext, forward_context
from langchain_quantllm.engine.fusion.patterns import (
    CosSinStep,
    GatedMlpStep,
    GatedNormStep,
    NormStep,
    Projections,
    ResidualStep,
    RotaryStep,
    is_cos_sin,
    is_gated,
    structure_of,
)
from langchain_quantllm.engine.fusion.recorded_call import RecordedCall, check_same, difference, output_of
from langchain_quantllm.engine.gather_attention import GatherAttention
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels import reference

_LAYOUTS = (reference.HALVES, reference.PAIRS, reference.PAIRS_OF_HALVES, reference.HALVES_ONCE)
_NORM_PAIRS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))
_OUTPUTS = ("o_proj", "dense", "out_proj")


# Norms.


def is_norm(module: Any) -> bool:
    """Whether a module may be a norm with a weight over the last dimension."""
    is_known = type(module).__name__.endswith(("RMSNorm", "RMSNormGated")) or type(module) is torch.nn.LayerNorm
    weight = getattr(module, "weight", None)
    return is_known and isinstance(weight, torch.Tensor) and weight.dim() == 1


def norm_step(call: RecordedCall, kernels: Any, *, runs_alone: bool) -> NormStep | GatedNormStep:
    """Find the formula of a norm; one with a gate is fused by itself only.

    Raises:
        UnsupportedError: If it follows none.
    """
    expected, module = output_of(call), call.module
    if type(module).__name__.endswith("Gated") and runs_alone:
        return _gated_norm_step(call, kernels)
    x = call.args[0] if len(call.args) == 1 and not call.kwargs else None
    if not isinstance(x, torch.Tensor) or x.dtype != module.weight.dtype:
        msg = "it is called with unexpected arguments"
        raise UnsupportedError(msg)
    if type(module) is torch.nn.LayerNorm:
        step = NormStep(kernels=kernels, eps=module.eps, centers=True)
        check_same(step.add(module, x, torch.zeros_like(x))[1], expected)
        return step
    eps = _eps_of(module)
    formulas = [
        NormStep(kernels=reference, eps=eps, offset=offset, rounds_first=rounds_first, runs_alone=runs_alone)
        for offset, rounds_first in itertools.product((0.0, 1.0), (True, False))
    ]
    # Formulas that only round differently are all within the tolerance: take the nearest.
    nearest = min(formulas, key=lambda step: difference(step.add(module, x, torch.zeros_like(x))[1], expected))
    step = replace(nearest, kernels=kernels)
    check_same(step.add(module, x, torch.zeros_like(x))[1], expected)
    if runs_alone:
        check_same(call.run(step), expected)
    return step


def _eps_of(norm: Any) -> float:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float):
        msg = "it has no eps"
        raise UnsupportedError(msg)
    return eps


def _gated_norm_step(call: RecordedCall, kernels: Any) -> GatedNormStep:
    expected, module = output_of(call), call.module
    if not is_gated(module, (*call.args, *call.kwargs.values())) or not set(call.kwargs) <= {"gate"}:
        msg = "it is called with unexpected arguments"
        raise UnsupportedError(msg)
    eps = _eps_of(module)
    width, size = module.weight.shape[0], getattr(module, "group_size", None)
    groups = width // size if isinstance(size, int) and size else getattr(module, "n_groups", 1)
    formulas = [
        GatedNormStep(kernels=reference, eps=eps, gating=gating, gates_first=first, rounds=rounds, groups=groups)
        for gating, first, rounds in itertools.product(
            (reference.SILU, reference.SIGMOID), (True, False), (True, False)
        )
    ]
    nearest = min(formulas, key=lambda step: difference(call.run(step), expected))
    step = replace(nearest, kernels=kernels)
    check_same(call.run(step), expected)
    return step


# Gated MLPs.


def is_gated_mlp(module: Any) -> bool:
    """Whether a module may be an MLP of the form down(activation(gate(x)) * up(x))."""
    layers = set(module._modules)  # the experts of a mixture have them as tensors
    return {"gate_proj", "up_proj", "down_proj"} <= layers or {"gate_up_proj", "down_proj"} <= layers


def gated_mlp_step(call: RecordedCall, kernels: Any) -> GatedMlpStep:
    """Find the formula of a gated MLP.

    Raises:
        UnsupportedError: If it follows none.
    """
    expected, module = output_of(call), call.module
    function = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if isinstance(function, torch.nn.Module) and hooks_of(function):
        msg = "its activation has hooks, which the fused step would skip"
        raise UnsupportedError(msg)
    activation = None if function is None else _activation_of(function, expected.device)
    if activation is None:
        msg = "its activation is neither SiLU nor GELU"
        raise UnsupportedError(msg)
    packed = None if hasattr(module, "gate_proj") else "gate_up_proj"
    step = GatedMlpStep(kernels=kernels, activation=activation, packed=packed)
    check_same(call.run(step), expected)
    return step


def _activation_of(function: Callable[[torch.Tensor], Any], device: torch.device) -> str | None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float32, device=device)
    output, one = function(x), torch.ones_like(x)
    for name in (reference.SILU, reference.GELU, reference.GELU_TANH):
        # The two kinds of GELU are 5e-4 apart.
        expected = reference.activation_mul(x, one, name)
        if isinstance(output, torch.Tensor) and torch.allclose(output, expected, rtol=0, atol=1e-5):
            return name
    return None


# Rotary positions.

_FAR = (0, 1, 100, 1_000, 30_000, 130_000)
"""Positions at which cosines and sines are compared in addition to those of the call."""


def is_cos_sin_module(module: Any) -> bool:
    """Whether a module may compute cosines and sines of positions from constant frequencies."""
    frequencies, kind = getattr(module, "inv_freq", None), getattr(module, "rope_type", "default")
    is_constant = isinstance(kind, str) and "dynamic" not in kind and kind != "longrope"
    return isinstance(frequencies, torch.Tensor) and frequencies.dim() == 1 and is_constant


def cos_sin_step(call: RecordedCall, kernels: Any) -> CosSinStep:
    """Compare a module's cosines and sines with the kernel's, at the call's positions and at far ones.

    Raises:
        UnsupportedError: If they differ.
    """
    module = call.module
    scale = getattr(module, "attention_scaling", 1.0)
    if not is_cos_sin(call.output) or not isinstance(scale, int | float):
        msg = "it gives no cosines and sines"
        raise UnsupportedError(msg)
    twice = call.output[0].shape[-1] != module.inv_freq.shape[0]
    step = CosSinStep(kernels=kernels, scale=float(scale), twice=twice)
    device = call.output[0].device
    x, far = torch.zeros(1, dtype=call.output[0].dtype, device=device), torch.tensor([_FAR], device=device)
    expected = type(module).forward(module, x, far)
    output = replace(call, args=(x, far), kwargs={}).run(step)
    for one, other in ((call.run(step), call.output), (output, expected)):
        check_same(one[0], other[0])
        check_same(one[1], other[1])
    return step


# Attention.


def is_rotary(module: Any) -> bool:
    """Whether a module may be an attention with rotary positions."""
    layers = set(module._modules)
    has_states = {"q_proj", "k_proj", "v_proj"} <= layers or "qkv_proj" in layers
    return has_states and isinstance(getattr(module, "layer_idx", None), int)


def rotary_step(
    call: RecordedCall, configs: Sequence[Any], kernels: Any, likely: RotaryStep | None = None
) -> RotaryStep:
    """Find how an attention computes and rotates its states, by running it over blocks of its own.

    Args:
        call: A call of the attention, without a cache.
        configs: Configs of the model; see `paged_attention`.
        kernels: `kernels.norms` or `kernels.reference`.
        likely: The step of another layer, tried first.

    Raises:
        UnsupportedError: If no known way gives the same output.
    """
    module, kwargs = call.module, call.kwargs
    hidden, cos_sin = kwargs.get("hidden_states"), kwargs.get("position_embeddings")
    cache_name = given_cache_name(kwargs)
    if call.args or hidden is None or cache_name is None:
        msg = "it is called with unexpected arguments"
        raise UnsupportedError(msg)
    if not is_cos_sin(cos_sin):
        msg = "it is given no cosines and sines"
        raise UnsupportedError(msg)
    own = OwnBlocks(hidden)
    paged_kwargs = {**kwargs, "attention_mask": None}
    with paged_attention(ForwardContext(attention=own), configs) as cache:
        output = type(module).forward(module, **{**paged_kwargs, cache_name: cache})
    if own.arguments is None or not isinstance(output, tuple) or len(output) != 2 or output[1] is not None:
        msg = "its attention is reached in another way"
        raise UnsupportedError(msg)
    reason = "its projections have other names"
    for step in _rotary_steps(module, kernels, own.arguments, cos_sin[0].shape[-1], likely):
        ours = OwnBlocks(hidden, own.pools)
        context = ForwardContext(attention=ours)
        try:
            with paged_attention(context, configs) as cache:
                attended = replace(call, kwargs={**paged_kwargs, cache_name: cache}).run(step, context)[0]
            check_same(attended, output[0])
            layer = module.layer_idx
            check_same(ours.pools[layer].kv[1:], own.pools[layer].kv[1:])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # shapes that do not match, too
            reason = str(error) if isinstance(error, UnsupportedError) else "its parts are combined in an unknown way"
            continue
        return step
    raise UnsupportedError(reason)


def _rotary_steps(
    module: Any, kernels: Any, arguments: tuple[Any, ...], rotary_dim: int, likely: RotaryStep | None
) -> Iterator[RotaryStep]:
    """Yield the steps that the attention may have, the likely one first."""
    output = next((name for name in _OUTPUTS if hasattr(module, name)), None)
    head_dim = getattr(module, "head_dim", None)
    if output is None or not isinstance(head_dim, int) or rotary_dim > head_dim or rotary_dim % 2:
        return
    packed, heads = None, (0, 0)
    if not hasattr(module, "q_proj"):
        config = module.config
        packed, heads = "qkv_proj", (config.num_attention_heads, config.num_key_value_heads)
    norms = next((pair for pair in _NORM_PAIRS if all(getattr(module, n, None) is not None for n in pair)), None)
    places = ("heads",) if norms is None else ("heads", "transposed", "flat")
    ways = [Projections(packed=packed, heads=heads, norms=norms, norms_at=at) for at in places]
    if norms is not None:
        ways.append(Projections(packed=packed, heads=heads))
    if likely is not None:
        yield replace(likely, arguments=arguments)
    layouts = [way for way in _LAYOUTS if way != reference.HALVES_ONCE or 2 * rotary_dim <= head_dim]
    for projections, layout, rounds in itertools.product(ways, layouts, (True, False)):
        yield RotaryStep(
            kernels=kernels, projections=projections, output=output, layout=layout, rounds=rounds, arguments=arguments
        )


class OwnBlocks(PagedForward):
    """A forward of one attention over blocks made for it; records the arguments that the attention passes."""

    def __init__(self, hidden: torch.Tensor, like: Mapping[int, LayerPool] | None = None) -> None:
        """Allocate blocks for the tokens of `hidden`, of shape `(1, tokens, width)`, as empty copies of other pools."""
        tokens, device = hidden.shape[1], hidden.device
        self.blocks = -(-tokens // BLOCK_TOKENS)
        self.pools = {i: replace(pool, kv=torch.zeros_like(pool.kv)) for i, pool in (like or {}).items()}
        self.arguments: AttentionArguments | None = None
        positions = torch.arange(tokens, dtype=torch.int32, device=device)
        batch = Batch(
            table=torch.arange(1, self.blocks + 1, dtype=torch.int32, device=device)[None],
            slots=torch.zeros_like(positions),
            positions=positions,
            spans=[Span(slot=0, first=0, position=0, count=tokens)],
            decodes=False,
        )
        super().__init__(GatherAttention(), self.pools, batch, by_sdpa=False)

    def write(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Store, in a pool that is allocated for the first keys of a layer."""
        if layer not in self.pools:
            shape = (self.blocks + 1, BLOCK_TOKENS, key.shape[1], key.shape[3] + value.shape[3])
            kv = torch.zeros(shape, dtype=key.dtype, device=key.device)
            self.pools[layer] = LayerPool(kv=kv, key_dim=key.shape[3])
        return super().write(key, value, layer)

    def attend(
        self,
        query: torch.Tensor,
        scale: float | None,
        window: int | None = None,
        softcap: float | None = None,
        chunk: int | None = None,
        sinks: torch.Tensor | None = None,
        biases: torch.Tensor | None = None,
        relative: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend, and record the arguments."""
        self.arguments = (scale, window, softcap, chunk, sinks)
        return super().attend(query, *self.arguments, biases, relative)


# Layers.


def is_layer(module: Any) -> bool:
    """Whether a module may be a layer of attention and MLP."""
    return {"self_attn", "mlp"} <= set(module._modules)


@dataclass(frozen=True, kw_only=True)
class _RoutedAsRecorded:
    """Experts in the check of their layer: tokens go where they went in a recorded call of the experts.

    Their router may choose others for another rounding of its input. The input of the experts is the layer's.
    """

    call: RecordedCall

    def run(
        self,
        module: Any,
        forward: Callable[..., Any],
        context: ForwardContext,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the experts; see `Step.run`."""
        del module, context
        is_same = not kwargs and are_routed_tokens(args) and are_routed_tokens(self.call.args)
        if is_same and args[1].shape == self.call.args[1].shape:
            args = (args[0], *self.call.args[1:])
        return forward(*args, **kwargs)


def residual_step(
    call: RecordedCall, norms: Mapping[int, NormStep], following: RecordedCall | None, calls: Mapping[int, RecordedCall]
) -> ResidualStep:
    """Find the structure of a layer.

    Args:
        call: A call of the layer.
        norms: Steps of the model's norms, by the norms' ids.
        following: The call of the norm whose input is the layer's output; None if there is none.
        calls: The calls of all modules, by the modules' ids.

    Raises:
        UnsupportedError: If the layer has no known structure.
    """
    expected, module = output_of(call), call.module
    names = structure_of(module._modules)
    if names is None:
        msg = "it has parts other than attention, MLP and norms before them"
        raise UnsupportedError(msg)

    def fused(norm: Any) -> tuple[NormStep, weakref.ref[Any]] | None:
        is_plain = norm is not None and not hooks_of(norm)  # the step would skip its hooks
        return (norms[id(norm)], weakref.ref(norm)) if is_plain and id(norm) in norms else None

    step = ResidualStep(
        names=names,
        norm=fused(getattr(module, names.before_mlp)),
        following=None if following is None else fused(following.module),
    )
    if step.norm is None and step.following is None:
        msg = "none of its norms is fused"
        raise UnsupportedError(msg)
    experts = [id(part) for part in module.modules() if is_experts(part) and id(part) in calls]
    context = ForwardContext(steps={key: _RoutedAsRecorded(call=calls[key]) for key in experts})
    with forward_context(context):
        output = call.run(step, context)
    check_same(output, expected)
    if step.following is not None and following is not None:
        normed = context.normed.take(output, id(following.module))
        check_same(normed, output_of(following))
    return step
