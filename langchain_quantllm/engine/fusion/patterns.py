"""Fused steps of a model's layers: what stands in for the `forward` of a norm, a gated MLP, an attention, a layer.

Owns the order of the fused computations. They call the submodules of what they stand in for and never read the weights
of a linear layer, so quantization and adapters stay what they are. Which modules they stand in for, and whether they
give the same there, is not their business.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import torch

from langchain_quantllm.compat.transformers_attention import WritingCache
from langchain_quantllm.compat.transformers_models import given_cache_name
from langchain_quantllm.engine.attention import driven
from langchain_quantllm.engine.fusion.linear import Products

_Forward = Callable[..., Any]


class Carried:
    """What one forward takes along.

    That is what it has normalized already, together with a sum, for the norm that will be given that sum; and what it
    has multiplied already, for layers that have their input in common.
    """

    def __init__(self) -> None:
        """Carry nothing."""
        self.products = Products()
        self._sum: torch.Tensor | None = None
        self._version = 0
        self._norm: Any = None
        self._normed: torch.Tensor | None = None

    def put(self, total: torch.Tensor, norm: Any, normed: torch.Tensor) -> None:
        """Carry what a norm will give for a sum."""
        self._sum, self._version, self._norm, self._normed = total, total._version, norm, normed

    def take(self, x: torch.Tensor, norm: Any) -> torch.Tensor | None:
        """Give what is carried if it is for this norm of this very tensor, unchanged since; else None."""
        if self._sum is None or x is not self._sum or norm is not self._norm or x._version != self._version:
            return None
        normed = self._normed
        self._sum = self._norm = self._normed = None
        return normed


class Step(Protocol):
    """A fused computation that stands in for a module's forward."""

    def run(
        self, module: Any, forward: _Forward, carried: Carried, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Compute what the module's own `forward` gives for these arguments, or leave it to that."""
        ...


@dataclass(frozen=True, kw_only=True)
class NormStep:
    """An RMSNorm, or a LayerNorm behind an addition.

    Args:
        kernels: `kernels.fused` or `kernels.reference`.
        eps: Of the norm.
        offset: See `reference.rms_norm`.
        rounds_first: See `reference.rms_norm`.
        centers: Whether it is a LayerNorm.
        runs_alone: Whether the norm is fused where no addition comes before it, too.
    """

    kernels: Any
    eps: float
    offset: float = 0.0
    rounds_first: bool = False
    centers: bool = False
    runs_alone: bool = True

    def run(
        self, module: Any, forward: _Forward, carried: Carried, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Normalize; see `Step.run`."""
        if len(args) != 1 or kwargs:
            return forward(*args, **kwargs)
        x = args[0]
        normed = carried.take(x, module)
        if normed is not None:
            return normed
        if self.centers or not self.runs_alone or not fits(module, x):
            return forward(x)
        return self.kernels.rms_norm(x, module.weight, self.eps, offset=self.offset, rounds_first=self.rounds_first)

    def add(self, module: Any, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add, and normalize the sum; gives both."""
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


def fits(norm: Any, x: torch.Tensor) -> bool:
    """Whether a norm's weight is such as the kernels take it for these numbers."""
    return bool(norm.weight.dtype == x.dtype and norm.weight.shape == x.shape[-1:])


@dataclass(frozen=True, kw_only=True)
class GateStep:
    """A gated MLP: down(activation(gate(x)) * up(x)).

    Args:
        kernels: `kernels.fused` or `kernels.reference`.
        activation: See `reference.gate`.
        packed: Name of the layer that gives gate and up behind each other; None where they are two layers.
    """

    kernels: Any
    activation: str
    packed: str | None = None

    def run(
        self, module: Any, forward: _Forward, carried: Carried, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the MLP; see `Step.run`."""
        del carried
        if len(args) != 1 or kwargs:
            return forward(*args, **kwargs)
        if self.packed is None:
            opening, values = module.gate_proj(args[0]), module.up_proj(args[0])
        else:
            opening, values = getattr(module, self.packed)(args[0]).chunk(2, -1)
        return module.down_proj(self.kernels.gate(opening, values, self.activation))


@dataclass(frozen=True, kw_only=True)
class Projections:
    """How an attention gets queries, keys and values from its input.

    Args:
        packed: Name of the layer that gives all three behind each other; None where they are `q_proj` and so on.
        heads: Query heads and key heads; of use where packed.
        norms: Names of the norms of queries and keys; None for none.
        norms_at: Where they are: `"flat"` before numbers are divided into heads, `"heads"` behind that with heads
            behind tokens, `"transposed"` with tokens behind heads.
    """

    packed: str | None = None
    heads: tuple[int, int] = (0, 0)
    norms: tuple[str, str] | None = None
    norms_at: str = "heads"

    def run(self, module: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give queries, keys and values, each of shape `(1, heads of its own, tokens, head_dim)`."""
        dim = module.head_dim
        if self.packed is None:
            query, key, value = module.q_proj(hidden), module.k_proj(hidden), module.v_proj(hidden)
        else:
            both = getattr(module, self.packed)(hidden)
            sizes = [self.heads[0] * dim, self.heads[1] * dim]
            query, key, value = both.split([*sizes, both.shape[-1] - sum(sizes)], -1)
        if self.norms is not None and self.norms_at == "flat":
            query, key = getattr(module, self.norms[0])(query), getattr(module, self.norms[1])(key)
        query, key, value = (t.unflatten(-1, (-1, dim)) for t in (query, key, value))
        if self.norms is not None and self.norms_at == "heads":
            query, key = getattr(module, self.norms[0])(query), getattr(module, self.norms[1])(key)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        if self.norms is not None and self.norms_at == "transposed":
            query, key = getattr(module, self.norms[0])(query), getattr(module, self.norms[1])(key)
        return query, key, value


@dataclass(frozen=True, kw_only=True)
class RotaryStep:
    """An attention whose rotation is one kernel with the writing of keys and values.

    Args:
        kernels: `kernels.fused` or `kernels.reference`.
        projections: How it gets queries, keys and values.
        output: Name of the layer behind the attention.
        layout: See `reference.rotate_and_write`.
        rounds: See `reference.rotate_and_write`.
        asked: Scale, window and softcap, as the module hands them on.
    """

    kernels: Any
    projections: Projections
    output: str
    layout: int
    rounds: bool
    asked: tuple[float | None, int | None, float | None]

    def run(
        self, module: Any, forward: _Forward, carried: Carried, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Attend; see `Step.run`."""
        del carried
        drives, angles = driven(), kwargs.get("position_embeddings")
        cache_name = given_cache_name(kwargs)
        is_over_pages = cache_name is not None and isinstance(kwargs[cache_name], WritingCache)
        if args or drives is None or not is_over_pages or not are_angles(angles):
            return forward(*args, **kwargs)
        hidden = kwargs["hidden_states"]
        states = self.projections.run(module, hidden)
        query = drives.rotate_and_write(
            self.kernels, states, angles, module.layer_idx, layout=self.layout, rounds=self.rounds
        )
        attended = drives.attend(query, *self.asked)
        return getattr(module, self.output)(attended.flatten(2)), None


@dataclass(frozen=True, kw_only=True)
class AnglesStep:
    """A module that gives the cosines and sines of positions, by frequencies that stay.

    Args:
        kernels: `kernels.fused` or `kernels.reference`.
        scale: See `reference.angles`.
    """

    kernels: Any
    scale: float

    def run(
        self, module: Any, forward: _Forward, carried: Carried, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Give them; see `Step.run`."""
        del carried
        if len(args) == 1 and set(kwargs) == {"position_ids"}:
            args, kwargs = (*args, kwargs["position_ids"]), {}
        if len(args) != 2 or kwargs or args[1].dim() != 2 or args[1].shape[0] != 1:
            return forward(*args, **kwargs)
        x, positions = args
        return self.kernels.angles(positions.contiguous(), module.inv_freq.float(), self.scale, x.dtype)


def are_angles(angles: Any) -> TypeGuard[tuple[torch.Tensor, torch.Tensor]]:
    """Whether these are cosines and sines of shape `(1, tokens, rotary_dim)`."""
    return isinstance(angles, tuple) and len(angles) == 2 and all(t.dim() == 3 and t.shape[0] == 1 for t in angles)


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the parts of a layer are called: norms before and behind attention and MLP, where they are."""

    before_attention: str = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True, kw_only=True)
class ResidualStep:
    """A layer whose additions are one kernel with the norm behind each: its own, and the first of the next layer.

    Args:
        names: What its parts are called.
        norm: Step of the norm before the MLP, and a reference to that; None where it is none that is fused.
        following: Step of the norm that is given the layer's output, and a reference to that; None likewise.
    """

    names: Names
    norm: tuple[NormStep, weakref.ref[Any]] | None
    following: tuple[NormStep, weakref.ref[Any]] | None

    def run(
        self, module: Any, forward: _Forward, carried: Carried, args: tuple[Any, ...], kwargs: dict[str, Any]
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
        following = None if self.following is None else self.following[1]()
        if self.following is None or following is None:
            return total + out
        last, normed = self.following[0].add(following, out, total)
        carried.put(last, following, normed)
        return last


def _first(found: Any) -> Any:
    return found[0] if isinstance(found, tuple) else found


def _added(
    norm: tuple[NormStep, weakref.ref[Any]] | None, module: Any, x: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add, and normalize by a module: in one go, if it is still the one that was found to allow it."""
    if norm is not None and norm[1]() is module:
        return norm[0].add(module, x, residual)
    total = residual + x
    return total, module(total)


STRUCTURES: tuple[Names, ...] = (
    Names(),
    Names(
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
    Names(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
)
"""Structures of layers that are tried: as in Llama, in Gemma 2 and in GLM 4."""


def structure_of(children: Mapping[str, Any]) -> Names | None:
    """Find the structure of a layer by the names of its parts; None where it is none of `STRUCTURES`."""
    if not {"self_attn", "mlp"} <= set(children):
        return None
    norms = {name for name in children if "norm" in name}
    for names in STRUCTURES:
        wanted = {names.before_attention, names.after_attention, names.before_mlp, names.after_mlp} - {None}
        if wanted == norms:
            return names
    return None
