"""Fused steps of a model's layers: replacements for the `forward` of a norm, a gated MLP, an attention, a layer.

They call the submodules of the module that they replace and never read the weights of a linear layer, so quantization
and adapters stay in place. `verify` finds which step a module has.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from langchain_quantllm.compat.transformers_attention import WritingCache
from langchain_quantllm.compat.transformers_models import given_cache_name
from langchain_quantllm.engine.attention import AttentionArguments
from langchain_quantllm.engine.forward_context import ForwardContext

_Forward = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class NormStep:
    """An RMSNorm, or a LayerNorm after an addition.

    Args:
        kernels: `kernels.norms`, `.reference` or `.cpu`.
        eps: Of the norm.
        offset: See `kernels.reference.rms_norm`.
        rounds_first: See `kernels.reference.rms_norm`.
        centers: Whether it is a LayerNorm.
        runs_alone: Whether the norm is also fused without an addition before it.
    """

    kernels: Any
    eps: float
    offset: float = 0.0
    rounds_first: bool = False
    centers: bool = False
    runs_alone: bool = True

    def run(
        self, module: Any, forward: _Forward, context: ForwardContext, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Normalize; see `Step.run`."""
        if len(args) != 1 or kwargs:
            return forward(*args, **kwargs)
        x = args[0]
        normed = context.normed.take(x, id(module))
        if normed is not None:
            return normed
        if self.centers or not self.runs_alone or not fits(module, x):
            return forward(x)
        return self.kernels.rms_norm(x, module.weight, self.eps, offset=self.offset, rounds_first=self.rounds_first)

    def add(self, module: Any, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add, and normalize the sum; returns both."""
        if not fits(module, x) or residual.dtype != x.dtype:
            total = residual + x
            return total, module(total)
        if self.centers:
            return self.kernels.add_layer_norm(  # type: ignore[no-any-return]
                x, residual, module.weight, module.bias, self.eps
            )
        return self.kernels.add_rms_norm(  # type: ignore[no-any-return]
            x, residual, module.weight, self.eps, offset=self.offset, rounds_first=self.rounds_first
        )


@dataclass(frozen=True, kw_only=True)
class GatedNormStep:
    """An RMSNorm with a gate.

    Args:
        kernels: `kernels.norms`, `.reference` or `.cpu`.
        eps: Of the norm.
        gating: See `kernels.reference.gated_rms_norm`.
        gates_first: See `kernels.reference.gated_rms_norm`.
        rounds: See `kernels.reference.gated_rms_norm`.
        groups: See `kernels.reference.gated_rms_norm`.
    """

    kernels: Any
    eps: float
    gating: str
    gates_first: bool
    rounds: bool
    groups: int

    def run(
        self, module: Any, forward: _Forward, context: ForwardContext, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Normalize; see `Step.run`."""
        del context
        given = (*args, *kwargs.values())
        if not is_gated(module, given) or not set(kwargs) <= {"gate"}:
            return forward(*args, **kwargs)
        x, gate = given
        options = {"gates_first": self.gates_first, "rounds": self.rounds, "groups": self.groups}
        return self.kernels.gated_rms_norm(x, gate, module.weight, self.eps, gating=self.gating, **options)


def fits(norm: Any, x: torch.Tensor) -> bool:
    """Whether a norm's weight has the dtype and the width of its input, as the kernels need it."""
    return bool(norm.weight.dtype == x.dtype and norm.weight.shape == x.shape[-1:])


def is_gated(norm: Any, given: Sequence[Any]) -> bool:
    """Whether a norm is given numbers and a gate, as the kernel needs them."""
    if len(given) != 2 or not all(isinstance(one, torch.Tensor) for one in given):
        return False
    x, gate = given
    return fits(norm, x) and gate.shape == x.shape and gate.dtype == x.dtype


@dataclass(frozen=True, kw_only=True)
class GatedMlpStep:
    """A gated MLP: down(activation(gate(x)) * up(x)).

    Args:
        kernels: `kernels.norms`, `.reference` or `.cpu`.
        activation: See `kernels.reference.activation_mul`.
        packed: Name of the layer whose output is gate and up, concatenated; None if they are two layers.
    """

    kernels: Any
    activation: str
    packed: str | None = None

    def run(
        self, module: Any, forward: _Forward, context: ForwardContext, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the MLP; see `Step.run`."""
        del context
        if len(args) != 1 or kwargs:
            return forward(*args, **kwargs)
        if self.packed is None:
            gate, up = module.gate_proj(args[0]), module.up_proj(args[0])
        else:
            gate, up = getattr(module, self.packed)(args[0]).chunk(2, -1)
        return module.down_proj(self.kernels.activation_mul(gate, up, self.activation))


@dataclass(frozen=True, kw_only=True)
class Projections:
    """How an attention computes queries, keys and values from its input.

    Args:
        packed: Name of the layer whose output is all three, concatenated; None if they are `q_proj` and so on.
        heads: Query heads and key heads; used if packed.
        norms: Names of the norms of queries and keys; None for none.
        norms_at: Where they are: `"flat"` before the split into heads, `"heads"` on `(tokens, heads, dim)`,
            `"transposed"` on `(heads, tokens, dim)`.
    """

    packed: str | None = None
    heads: tuple[int, int] = (0, 0)
    norms: tuple[str, str] | None = None
    norms_at: str = "heads"

    def run(self, module: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute queries, keys and values, each of shape `(1, heads of its own, tokens, head_dim)`."""
        dim = module.head_dim
        if self.packed is None:
            query, key, value = module.q_proj(hidden), module.k_proj(hidden), module.v_proj(hidden)
        else:
            both = getattr(module, self.packed)(hidden)
            sizes = [self.heads[0] * dim, self.heads[1] * dim]
            query, key, value = both.split([*sizes, both.shape[-1] - sum(sizes)], -1)
        query, key = self._norm_at("flat", module, query, key)
        query, key, value = (t.unflatten(-1, (-1, dim)) for t in (query, key, value))
        query, key = self._norm_at("heads", module, query, key)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        query, key = self._norm_at("transposed", module, query, key)
        return query, key, value

    def _norm_at(
        self, place: str, module: Any, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.norms is None or self.norms_at != place:
            return query, key
        return getattr(module, self.norms[0])(query), getattr(module, self.norms[1])(key)


@dataclass(frozen=True, kw_only=True)
class RotaryStep:
    """An attention whose rotation and writing of keys and values are one kernel.

    Args:
        kernels: `kernels.norms`, `.reference` or `.cpu`.
        projections: How it computes queries, keys and values.
        output: Name of the output projection.
        layout: See `kernels.reference.rotate_and_write`.
        rounds: See `kernels.reference.rotate_and_write`.
        arguments: Scale, window, softcap, chunk and sinks, as the module's attention gets them.
    """

    kernels: Any
    projections: Projections
    output: str
    layout: int
    rounds: bool
    arguments: AttentionArguments

    def run(
        self, module: Any, forward: _Forward, context: ForwardContext, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Attend; see `Step.run`."""
        attention, cos_sin = context.attention, kwargs.get("position_embeddings")
        cache_name = given_cache_name(kwargs)
        is_paged = cache_name is not None and isinstance(kwargs[cache_name], WritingCache)
        if args or attention is None or not is_paged or not is_cos_sin(cos_sin):
            return forward(*args, **kwargs)
        states = self.projections.run(module, kwargs["hidden_states"])
        query = attention.rotate_and_write(
            self.kernels, states, cos_sin, module.layer_idx, layout=self.layout, rounds=self.rounds
        )
        attended = attention.attend(query, *self.arguments)
        return getattr(module, self.output)(attended.flatten(2)), None


@dataclass(frozen=True, kw_only=True)
class CosSinStep:
    """A module that computes the cosines and sines of positions, from constant frequencies.

    Args:
        kernels: `kernels.norms`, `.reference` or `.cpu`.
        scale: See `kernels.reference.cos_sin`.
        twice: See `kernels.reference.cos_sin`.
    """

    kernels: Any
    scale: float
    twice: bool = True

    def run(
        self, module: Any, forward: _Forward, context: ForwardContext, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Compute them; see `Step.run`."""
        del context
        if len(args) == 1 and set(kwargs) == {"position_ids"}:
            args, kwargs = (*args, kwargs["position_ids"]), {}
        if len(args) != 2 or kwargs or args[1].dim() != 2 or args[1].shape[0] != 1:
            return forward(*args, **kwargs)
        x, positions = args
        frequencies = module.inv_freq.float()
        return self.kernels.cos_sin(positions.contiguous(), frequencies, self.scale, x.dtype, twice=self.twice)


def is_cos_sin(value: Any) -> TypeGuard[tuple[torch.Tensor, torch.Tensor]]:
    """Whether a value is a pair of cosines and sines of shape `(1, tokens, rotary_dim)`."""
    return isinstance(value, tuple) and len(value) == 2 and all(t.dim() == 3 and t.shape[0] == 1 for t in value)


@dataclass(frozen=True, kw_only=True)
class NormNames:
    """Names of a layer's norms before and after attention and MLP; None for a norm that it does not have."""

    before_attention: str = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True, kw_only=True)
class ResidualStep:
    """A layer whose additions are one kernel with the norm after them: its own, and the first one of the next layer.

    Args:
        names: Names of its norms.
        norm: The step of the norm before the MLP, and the norm; None if it is not fused.
        following: The step of the norm after the layer, and the norm; None if it is not fused.
    """

    names: NormNames
    norm: tuple[NormStep, weakref.ref[Any]] | None
    following: tuple[NormStep, weakref.ref[Any]] | None

    def run(
        self, module: Any, forward: _Forward, context: ForwardContext, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the layer; see `Step.run`."""
        if len(args) != 1 or "hidden_states" in kwargs:
            return forward(*args, **kwargs)
        names, hidden = self.names, args[0]
        normed = getattr(module, names.before_attention)(hidden)
        attended = _first(module.self_attn(hidden_states=normed, **kwargs))
        if names.after_attention is not None:
            attended = getattr(module, names.after_attention)(attended)
        total, normed = _added(self.norm, getattr(module, names.before_mlp), attended, hidden)
        out = _first(module.mlp(normed))
        if names.after_mlp is not None:
            out = getattr(module, names.after_mlp)(out)
        return self.end(context, out, total)

    def end(self, context: ForwardContext, out: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Add the MLP's output, and normalize the sum for the module after the layer."""
        following = None if self.following is None else self.following[1]()
        if self.following is None or following is None:
            return total + out
        total, normed = self.following[0].add(following, out, total)
        context.normed.put(total, {id(following): normed})
        return total


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _added(
    norm: tuple[NormStep, weakref.ref[Any]] | None, module: Any, x: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add, and normalize by a module: in one kernel, if it is still the module that was verified."""
    if norm is not None and norm[1]() is module:
        return norm[0].add(module, x, residual)
    total = residual + x
    return total, module(total)


STRUCTURES: tuple[NormNames, ...] = (
    NormNames(),
    NormNames(
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
    NormNames(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
)
"""Known structures of layers: of Llama, of Gemma 2, and of GLM 4."""


def structure_of(children: Mapping[str, Any]) -> NormNames | None:
    """Find the structure of a layer by the names of its submodules; None if it is none of `STRUCTURES`."""
    if not {"self_attn", "mlp"} <= set(children):
        return None
    norms = {name for name in children if "norm" in name}
    for names in STRUCTURES:
        wanted = {names.before_attention, names.after_attention, names.before_mlp, names.after_mlp} - {None}
        if wanted == norms:
            return names
    return None
