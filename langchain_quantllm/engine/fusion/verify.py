"""Whether a fused step gives what a module gives: found out on a call that the module has answered.

Owns the search for the formula that a module follows, the comparison and its tolerance. Nothing goes by the name of a
model: what matches is fused, what does not is refused with the reason.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from langchain_quantllm.compat.transformers_models import given_cache_name
from langchain_quantllm.engine.attention import Batch, Forward, GatherAttention, LayerPool, Span, driving
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.cuda_graphs import hooks_of
from langchain_quantllm.engine.fusion.patterns import (
    AnglesStep,
    Carried,
    GateStep,
    NormStep,
    Projections,
    ResidualStep,
    RotaryStep,
    Step,
    are_angles,
    structure_of,
)
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels import norms_reference as reference

TOLERANCES = {torch.float32: 2e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
"""Largest difference from a module's own output, relative to its size, by dtype.

In 16 bits, four times what rounding to the dtype is off by, at most: some roundings differ, as sums of another order
lie on the other side of a border. In float32, where such sums are of some thousand numbers, about 300 times.
"""

_LAYOUTS = tuple(itertools.product((reference.HALVES, reference.PAIRS, reference.PAIRS_OF_HALVES), (True, False)))
_NORM_PAIRS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))
_OUTPUTS = ("o_proj", "dense", "out_proj")


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a module and its answer.

    Tensors are copies, as models write over theirs; `originals` are the first argument and the answer themselves, by
    which one sees who was given what.
    """

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    originals: tuple[Any, Any]

    @classmethod
    def of(cls, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call:
        """Copy a call that a module has just answered."""
        copies = [copy_of(args), copy_of(kwargs)]
        originals = (args[0] if args else None, output)
        return cls(module=module, args=copies[0], kwargs=copies[1], output=copy_of(output), originals=originals)

    def run(self, step: Step, carried: Carried | None = None) -> Any:
        """Answer the call by a step, which may not hand it back to the module."""

        def refuse(*args: Any, **kwargs: Any) -> Any:
            msg = "it is called in another way"
            raise UnsupportedError(msg)

        return step.run(self.module, refuse, carried or Carried(), self.args, self.kwargs)


def tensors_of(*parts: Any) -> list[torch.Tensor]:
    """Give the tensors among the parts of a call."""
    return [part for part in parts if isinstance(part, torch.Tensor)]


def copy_of(part: Any) -> Any:
    """Copy the tensors in a part of a call, in tuples and dictionaries too."""
    if isinstance(part, torch.Tensor):
        return part.clone()
    if type(part) is tuple:
        return tuple(copy_of(one) for one in part)
    return {key: copy_of(one) for key, one in part.items()} if type(part) is dict else part


def output_of(call: Call) -> torch.Tensor:
    """Give the call's output, a tensor.

    Raises:
        UnsupportedError: If it is something else.
    """
    if not isinstance(call.output, torch.Tensor):
        msg = "it gives more than a tensor"
        raise UnsupportedError(msg)
    return call.output


def check_same(found: Any, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """Compare what a fused step gives with what the module gives.

    Raises:
        UnsupportedError: If they differ by more than the tolerance; None is that of `TOLERANCES`.
    """
    tolerance = tolerance or TOLERANCES.get(expected.dtype)
    if tolerance is None:
        msg = f"its numbers are {expected.dtype}"
        raise UnsupportedError(msg)
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        msg = "it gives another shape or dtype"
        raise UnsupportedError(msg)
    difference = _difference(found, expected)
    if not difference <= tolerance:
        msg = f"it gives something else (a difference of {difference:.1g}, where {tolerance:.1g} is allowed)"
        raise UnsupportedError(msg)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


# Norms.


def is_norm(module: Any) -> bool:
    """Whether a module may be a norm with a weight over the last dimension."""
    is_known = type(module).__name__.endswith("RMSNorm") or type(module) is torch.nn.LayerNorm
    weight = getattr(module, "weight", None)
    return is_known and isinstance(weight, torch.Tensor) and weight.dim() == 1


def norm_step(call: Call, kernels: Any, *, runs_alone: bool) -> NormStep:
    """Find the formula of a norm.

    Raises:
        UnsupportedError: If it follows none.
    """
    expected, module = output_of(call), call.module
    x = call.args[0] if len(call.args) == 1 and not call.kwargs else None
    if not isinstance(x, torch.Tensor) or x.dtype != module.weight.dtype:
        msg = "it is called in another way"
        raise UnsupportedError(msg)
    if type(module) is torch.nn.LayerNorm:
        step = NormStep(kernels=kernels, eps=module.eps, centers=True)
        check_same(step.add(module, x, torch.zeros_like(x))[1], expected)
        return step
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float):
        msg = "it has no eps"
        raise UnsupportedError(msg)
    formulas = [
        NormStep(kernels=reference, eps=eps, offset=offset, rounds_first=rounds_first, runs_alone=runs_alone)
        for offset, rounds_first in itertools.product((0.0, 1.0), (True, False))
    ]
    # They round otherwise, which is less than the tolerance: the nearest is the right one.
    nearest = min(formulas, key=lambda step: _difference(step.add(module, x, torch.zeros_like(x))[1], expected))
    step = replace(nearest, kernels=kernels)
    check_same(step.add(module, x, torch.zeros_like(x))[1], expected)
    if runs_alone:
        check_same(call.run(step), expected)
    return step


# Gated MLPs.


def is_gated(module: Any) -> bool:
    """Whether a module may be an MLP with a gate."""
    layers = set(module._modules)  # the experts of a mixture have them as tensors
    return {"gate_proj", "up_proj", "down_proj"} <= layers or {"gate_up_proj", "down_proj"} <= layers


def gate_step(call: Call, kernels: Any) -> GateStep:
    """Find the formula of a gated MLP.

    Raises:
        UnsupportedError: If it follows none.
    """
    expected, module = output_of(call), call.module
    function = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if isinstance(function, torch.nn.Module) and hooks_of(function):
        msg = "its activation has hooks, which would see nothing"
        raise UnsupportedError(msg)
    activation = None if function is None else _activation_of(function, expected.device)
    if activation is None:
        msg = "its activation is neither SiLU nor GELU"
        raise UnsupportedError(msg)
    packed = None if hasattr(module, "gate_proj") else "gate_up_proj"
    step = GateStep(kernels=kernels, activation=activation, packed=packed)
    check_same(call.run(step), expected)
    return step


def _activation_of(function: Callable[[torch.Tensor], Any], device: torch.device) -> str | None:
    x = torch.linspace(-6, 6, 101, device=device)
    found, one = function(x), torch.ones_like(x)
    for name in (reference.SILU, reference.GELU, reference.GELU_TANH):
        # The two of GELU lie 5e-4 apart.
        if isinstance(found, torch.Tensor) and torch.allclose(found, reference.gate(x, one, name), rtol=0, atol=1e-5):
            return name
    return None


# Rotary positions.

_FAR = (0, 1, 100, 1_000, 30_000, 130_000)
"""Positions at which cosines and sines are compared beside those of the call."""


def is_angles(module: Any) -> bool:
    """Whether a module may give cosines and sines of positions, by frequencies that do not depend on the text."""
    frequencies, kind = getattr(module, "inv_freq", None), getattr(module, "rope_type", "default")
    is_fixed = isinstance(kind, str) and "dynamic" not in kind and kind != "longrope"
    return isinstance(frequencies, torch.Tensor) and frequencies.dim() == 1 and is_fixed


def angles_step(call: Call, kernels: Any) -> AnglesStep:
    """Find out whether a module gives the cosines and sines that the kernel gives, far into a text too.

    Raises:
        UnsupportedError: If it does not.
    """
    module = call.module
    scale = getattr(module, "attention_scaling", 1.0)
    if not are_angles(call.output) or not isinstance(scale, int | float):
        msg = "it gives no cosines and sines"
        raise UnsupportedError(msg)
    step = AnglesStep(kernels=kernels, scale=float(scale))
    device = call.output[0].device
    x, far = torch.zeros(1, dtype=call.output[0].dtype, device=device), torch.tensor([_FAR], device=device)
    expected = type(module).forward(module, x, far)
    found = replace(call, args=(x, far), kwargs={}).run(step)
    for one, other in ((call.run(step), call.output), (found, expected)):
        check_same(one[0], other[0])
        check_same(one[1], other[1])
    return step


# Attention.


def is_rotary(module: Any) -> bool:
    """Whether a module may be an attention with rotary positions."""
    layers = set(module._modules)
    has_states = {"q_proj", "k_proj", "v_proj"} <= layers or "qkv_proj" in layers
    return has_states and isinstance(getattr(module, "layer_idx", None), int)


def rotary_step(call: Call, configs: Sequence[Any], kernels: Any, likely: RotaryStep | None = None) -> RotaryStep:
    """Find how an attention gets its states and rotates them, by running it over pages of its own.

    Args:
        call: A call of the attention, without a cache.
        configs: Configs of the model, as `driving` takes them.
        kernels: `kernels.fused` or `kernels.fused_reference`.
        likely: What was found in another layer.

    Raises:
        UnsupportedError: If it is in none of the known ways.
    """
    module, kwargs = call.module, call.kwargs
    hidden, angles = kwargs.get("hidden_states"), kwargs.get("position_embeddings")
    cache_name = given_cache_name(kwargs)
    if call.args or hidden is None or cache_name is None:
        msg = "it is called in another way"
        raise UnsupportedError(msg)
    if not are_angles(angles):
        msg = "it is given no cosines and sines"
        raise UnsupportedError(msg)
    own = _OwnPages(hidden)
    with driving(own, configs) as cache:
        given = {**kwargs, cache_name: cache, "attention_mask": None}
        output = type(module).forward(module, **given)
    if own.asked is None or not isinstance(output, tuple) or len(output) != 2 or output[1] is not None:
        msg = "its attention is reached in another way"
        raise UnsupportedError(msg)
    reason = "its projections have other names"
    for step in _rotary_steps(module, kernels, own.asked, angles[0].shape[-1], likely):
        ours = _OwnPages(hidden, own.pools)
        try:
            with driving(ours, configs) as cache:
                found = replace(call, kwargs={**given, cache_name: cache}).run(step)[0]
            check_same(found, output[0])
            layer = module.layer_idx
            check_same(ours.pools[layer].kv[1:], own.pools[layer].kv[1:])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # shapes that do not go together, too
            reason = str(error) if isinstance(error, UnsupportedError) else "its parts are put together otherwise"
            continue
        return step
    raise UnsupportedError(reason)


def _rotary_steps(
    module: Any, kernels: Any, asked: tuple[Any, ...], rotary_dim: int, likely: RotaryStep | None
) -> Iterator[RotaryStep]:
    """Give the ways that are possible, the likely one first."""
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
        yield replace(likely, asked=asked)
    for projections, (layout, rounds) in itertools.product(ways, _LAYOUTS):
        yield RotaryStep(
            kernels=kernels, projections=projections, output=output, layout=layout, rounds=rounds, asked=asked
        )


class _OwnPages(Forward):
    """A forward of one attention over pages made for it, which notes what the attention is asked."""

    def __init__(self, hidden: torch.Tensor, like: Mapping[int, LayerPool] | None = None) -> None:
        """Make room for the tokens of `hidden`, of shape `(1, tokens, width)`, by empty copies of others' pools."""
        tokens, device = hidden.shape[1], hidden.device
        self.pages = -(-tokens // BLOCK_TOKENS)
        self.pools = {i: replace(pool, kv=torch.zeros_like(pool.kv)) for i, pool in (like or {}).items()}
        self.asked: tuple[float | None, int | None, float | None] | None = None
        positions = torch.arange(tokens, dtype=torch.int32, device=device)
        batch = Batch(
            table=torch.arange(1, self.pages + 1, dtype=torch.int32, device=device)[None],
            slots=torch.zeros_like(positions),
            positions=positions,
            spans=[Span(slot=0, first=0, position=0, count=tokens)],
            decodes=False,
        )
        super().__init__(GatherAttention(), self.pools, batch, by_sdpa=False)

    def write(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
        """Make the layer's pool if there is none, and store."""
        if layer not in self.pools:
            shape = (self.pages + 1, BLOCK_TOKENS, key.shape[1], key.shape[3] + value.shape[3])
            kv = torch.zeros(shape, dtype=key.dtype, device=key.device)
            self.pools[layer] = LayerPool(kv=kv, key_dim=key.shape[3])
        return super().write(key, value, layer)

    def attend(
        self, query: torch.Tensor, scale: float | None, window: int | None = None, softcap: float | None = None
    ) -> torch.Tensor:
        """Attend, and note what was asked for."""
        self.asked = (scale, window, softcap)
        return super().attend(query, scale, window, softcap)


# Layers.


def is_layer(module: Any) -> bool:
    """Whether a module may be a layer of attention and MLP."""
    return {"self_attn", "mlp"} <= set(module._modules)


def residual_step(call: Call, norms: Mapping[int, NormStep], following: Call | None) -> ResidualStep:
    """Find the structure of a layer.

    Args:
        call: A call of the layer.
        norms: Steps of the norms of the model, by the norms' ids.
        following: The call of the norm that was given what the layer gave; None where there is none.

    Raises:
        UnsupportedError: If it has none of the known ones.
    """
    expected, module = output_of(call), call.module
    names = structure_of(module._modules)
    if names is None:
        msg = "its parts are others than attention, MLP and norms before them"
        raise UnsupportedError(msg)

    def known(norm: Any) -> tuple[NormStep, weakref.ref[Any]] | None:
        is_plain = norm is not None and not hooks_of(norm)  # which would see nothing
        return (norms[id(norm)], weakref.ref(norm)) if is_plain and id(norm) in norms else None

    step = ResidualStep(
        names=names,
        norm=known(getattr(module, names.before_mlp)),
        following=None if following is None else known(following.module),
    )
    if step.norm is None and step.following is None:
        msg = "none of its norms is fused"
        raise UnsupportedError(msg)
    carried = Carried()
    found = call.run(step, carried)
    check_same(found, expected)
    if step.following is not None and following is not None:
        normed = carried.take(found, following.module)
        check_same(normed, output_of(following))
    return step
