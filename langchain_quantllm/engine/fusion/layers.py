"""Whole decoder layers as one function each, over products that are prepared once: for CPUs.

There a step of a small model costs its operations and its calls of modules, not its numbers. A layer is put together
from the steps that `verify` and `linear` have found for its parts, and compared with the layer as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import linear

from langchain_quantllm.compat.transformers_attention import WritingCache
from langchain_quantllm.compat.transformers_models import given_cache_name
from langchain_quantllm.engine.attention_interface import paged_attention
from langchain_quantllm.engine.cuda_graphs import hooks_of
from langchain_quantllm.engine.forward_context import ForwardContext, Step
from langchain_quantllm.engine.forward_patch import ForwardPatch
from langchain_quantllm.engine.fusion.linear import LinearStep
from langchain_quantllm.engine.fusion.patterns import GatedMlpStep, NormStep, ResidualStep, RotaryStep, is_cos_sin
from langchain_quantllm.engine.fusion.recorded_call import RecordedCall, check_same
from langchain_quantllm.engine.fusion.verify import OwnBlocks
from langchain_quantllm.errors import UnsupportedError

_Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class AttentionPart:
    """The attention of a layer.

    Args:
        step: How it computes, rotates and attends.
        states: The products that give queries, keys and values, one after the other.
        output: The product of the output projection.
        heads: Query heads and key heads.
        norms: The norms of queries and keys; None for none.
        layer: Its number.
        dim: Size of a head.
    """

    step: RotaryStep
    states: Sequence[_Function]
    output: _Function
    heads: tuple[int, int]
    norms: tuple[_Function, _Function] | None
    layer: int
    dim: int

    def run(self, hidden: torch.Tensor, context: ForwardContext, cos_sin: Any) -> torch.Tensor:
        """Attend, with an input of shape `(1, tokens, width)`."""
        attention, step, (count, key_count) = context.attention, self.step, self.heads
        assert attention is not None
        parts = [product(hidden) for product in self.states]
        joint = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        if self.norms is not None and step.projections.norms_at == "flat":
            query, key, value = joint.split([count * self.dim, key_count * self.dim, key_count * self.dim], -1)
            joint = torch.cat([self.norms[0](query), self.norms[1](key), value], -1)
        states = joint.view(joint.shape[1], -1, self.dim)
        turned = states[:, : count + key_count]
        if self.norms is not None and step.projections.norms_at != "flat":
            turned = torch.cat([self.norms[0](turned[:, :count]), self.norms[1](turned[:, count:])], 1)
        rotation = attention.rotation(step.kernels, cos_sin, step.layout)
        turned = step.kernels.rotate(turned, rotation, layout=step.layout, rounds=step.rounds)
        value = states[:, count + key_count :]
        attended = attention.write_and_attend(turned[:, :count], turned[:, count:], value, self.layer, step.arguments)
        return self.output(attended)


@dataclass(frozen=True, kw_only=True)
class MlpPart:
    """The gated MLP of a layer.

    Args:
        step: Its activation.
        inner: The products that give gate and up, one after the other.
        down: The last product.
    """

    step: GatedMlpStep
    inner: Sequence[_Function]
    down: _Function

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the MLP."""
        parts = [product(hidden) for product in self.inner]
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, -1)
        return self.down(self.step.kernels.activation_mul(gate, up, self.step.activation))


@dataclass(frozen=True, kw_only=True)
class LayerStep:
    """A decoder layer.

    Args:
        residual: The step that calls the modules: of forwards with adapters, and outside of the engine's blocks.
        before_attention: The norm at the beginning, and its id.
        after_attention: The norm of the attention's output, if there is one.
        before_mlp: The norm between both, and its formula.
        after_mlp: The norm of the MLP's output, if there is one.
        attention: The attention.
        mlp: The MLP; the module's own for a mixture, for example.
    """

    residual: ResidualStep
    before_attention: tuple[_Function, int]
    after_attention: _Function | None
    before_mlp: tuple[NormStep, Any]
    after_mlp: _Function | None
    attention: AttentionPart
    mlp: _Function

    def run(
        self,
        module: Any,
        forward: Callable[..., Any],
        context: ForwardContext,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the layer; see `Step.run`."""
        cos_sin, cache_name = kwargs.get("position_embeddings"), given_cache_name(kwargs)
        is_paged = cache_name is not None and isinstance(kwargs[cache_name], WritingCache)
        is_own = context.attention is not None and context.adapters is None and context.stages is None
        if not (is_own and is_paged) or len(args) != 1 or "hidden_states" in kwargs or not is_cos_sin(cos_sin):
            return self.residual.run(module, forward, context, args, kwargs)
        hidden = args[0]
        normed = context.normed.take(hidden, self.before_attention[1])
        if normed is None:
            normed = self.before_attention[0](hidden)
        attended = self.attention.run(normed, context, cos_sin)
        if self.after_attention is not None:
            attended = self.after_attention(attended)
        total, normed = self.before_mlp[0].add(self.before_mlp[1](), attended, hidden)
        out = self.mlp(normed)
        if isinstance(out, tuple):
            out = out[0]
        if self.after_mlp is not None:
            out = self.after_mlp(out)
        return self.residual.end(context, out, total)


def layer_step(
    call: RecordedCall, steps: Mapping[int, Step], norms: Mapping[int, NormStep], configs: Sequence[Any], kernels: Any
) -> LayerStep:
    """Put a layer together from the steps of its parts, and compare it with these, on the recorded input of the layer.

    Args:
        call: A call of the layer, without a cache.
        steps: The steps of the model's modules, by the modules' ids.
        norms: The steps of its norms, likewise.
        configs: Configs of the model; see `paged_attention`.
        kernels: `kernels.linear.cpu`.

    Raises:
        UnsupportedError: If a part has no step, or the whole gives something else.
    """
    module = call.module
    residual, names = steps.get(id(module)), None
    attention = steps.get(id(module.self_attn))
    if isinstance(residual, ResidualStep):
        names = residual.names
    if names is None or not isinstance(residual, ResidualStep) or residual.norm is None:
        msg = "its additions are not fused"
        raise UnsupportedError(msg)
    if not isinstance(attention, RotaryStep):
        msg = "its attention is not fused"
        raise UnsupportedError(msg)
    parts = _Parts(module, steps, norms, kernels)

    def norm(name: str | None) -> _Function | None:
        return None if name is None else parts.norm(getattr(module, name))

    first = getattr(module, names.before_attention)
    step = LayerStep(
        residual=residual,
        before_attention=(parts.norm(first), id(first)),
        after_attention=norm(names.after_attention),
        before_mlp=residual.norm,
        after_mlp=norm(names.after_mlp),
        attention=parts.attention(module.self_attn, attention),
        mlp=parts.mlp(module.mlp),
    )
    hidden, name = call.args[0], given_cache_name(call.kwargs)
    if name is None:
        msg = "it is called with unexpected arguments"
        raise UnsupportedError(msg)
    # What its parts give together, which are compared with the model's own: those of int8 round less.
    made = []
    for one in (residual, step):
        context = ForwardContext(attention=OwnBlocks(hidden), steps=steps)
        with paged_attention(context, configs) as cache:
            paged = replace(call, kwargs={**call.kwargs, "attention_mask": None, name: cache})
            made.append(paged.run(one, context))
    check_same(made[1], made[0])
    return step


class _Parts:
    """Makes the functions of one layer's parts."""

    def __init__(self, layer: Any, steps: Mapping[int, Step], norms: Mapping[int, NormStep], kernels: Any) -> None:
        self._steps, self._norms, self._kernels = steps, norms, kernels
        for module in (layer.self_attn, *layer.self_attn.modules()):
            self._check(module)

    @staticmethod
    def _check(module: Any) -> None:
        """Refuse a module whose call does more than its class says: hooks, and what other code has put there."""
        forward = module.__dict__.get("forward")
        while isinstance(forward, ForwardPatch):
            forward = forward.before
        if forward is not None or hooks_of(module):
            msg = "a part of it has hooks, or another forward"
            raise UnsupportedError(msg)

    def norm(self, module: Any) -> _Function:
        step = self._norms.get(id(module))
        if step is None or step.centers or not step.runs_alone or hooks_of(module):
            return module  # type: ignore[no-any-return]
        options = {"offset": step.offset, "rounds_first": step.rounds_first}
        return functools.partial(step.kernels.rms_norm, weight=module.weight.detach(), eps=step.eps, **options)

    def products(self, *modules: Any) -> list[_Function]:
        """Make the products of layers with the same input; one, if they are stored together."""
        found = [step for module in modules if isinstance(step := self._steps.get(id(module)), LinearStep)]
        group = tuple(key for key, _ in found[0].group) if found else ()
        if len(found) == len(modules) and group == tuple(map(id, modules)):
            return list(self._kernels.product_of([weight for _, weight in found[0].group]))
        return [self._product(module) for module in modules]

    def _product(self, module: Any) -> _Function:
        step = self._steps.get(id(module))
        if isinstance(step, LinearStep):
            [product] = self._kernels.product_of([step.weight])
            return product  # type: ignore[no-any-return]
        if type(module) is torch.nn.Linear:
            bias = None if module.bias is None else module.bias.detach()
            return functools.partial(linear, weight=module.weight.detach(), bias=bias)
        return module  # type: ignore[no-any-return]

    def attention(self, module: Any, step: RotaryStep) -> AttentionPart:
        way, dim = step.projections, module.head_dim
        layers: tuple[Any, ...]
        if way.packed is None:
            layers = (module.q_proj, module.k_proj, module.v_proj)
            widths = [getattr(layer, "out_features", 0) for layer in layers]
            if widths[1] != widths[2] or 0 in widths or any(width % dim for width in widths):
                msg = "its values have another size than its keys"
                raise UnsupportedError(msg)
            heads = (widths[0] // dim, widths[1] // dim)
        else:
            layers, heads = (getattr(module, way.packed),), way.heads
        norms = None
        if way.norms is not None:
            norms = (self.norm(getattr(module, way.norms[0])), self.norm(getattr(module, way.norms[1])))
        return AttentionPart(
            step=step,
            states=self.products(*layers),
            output=self.products(getattr(module, step.output))[0],
            heads=heads,
            norms=norms,
            layer=module.layer_idx,
            dim=dim,
        )

    def mlp(self, module: Any) -> _Function:
        step = self._steps.get(id(module))
        if not isinstance(step, GatedMlpStep):
            return module  # type: ignore[no-any-return]
        try:
            for part in module.modules():
                self._check(part)
        except UnsupportedError:
            return module  # type: ignore[no-any-return]
        names = ("gate_proj", "up_proj") if step.packed is None else (step.packed,)
        inner = [getattr(module, name) for name in names]
        return MlpPart(step=step, inner=self.products(*inner), down=self.products(module.down_proj)[0]).run
