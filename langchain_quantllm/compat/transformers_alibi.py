"""Models of transformers that bias scores by distance (ALiBi): Bloom, MPT and Falcon.

Their attention is reached by no registry, so its parts are used here one by one: projections, biases, and what follows
the attention. None of these is promised by transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch


class Attend(Protocol):
    """Writes keys and values, and attends with biases."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scale: float
    ) -> torch.Tensor:
        """Attend with states of shape `(1, heads of its own, tokens, dim)`; returns `(1, tokens, heads * dim)`."""
        ...


def is_biased_by_distance(config: Any) -> bool:
    """Say whether a text model's config names biases by distance."""
    return (
        config.model_type in ("bloom", "mpt")
        or bool(getattr(config, "alibi", False))
        or bool(getattr(getattr(config, "attn_config", None), "alibi", False))
    )


def has_known_biases(module: Any) -> bool:
    """Say whether a module is an attention that `attend_biased` can replace."""
    known = _ATTENTIONS.get(type(module).__name__)
    return known is not None and type(module).__module__.startswith("transformers.models.") and known[2](module)


def attend_biased(module: Any, attend: Attend, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Run an attention's forward with another attention between its projections.

    Args:
        module: One that `has_known_biases`.
        attend: The attention.
        args: Arguments of its forward.
        kwargs: Keyword arguments of its forward.

    Returns:
        Its output, and None for the shares.
    """
    return _ATTENTIONS[type(module).__name__][0](module, attend, *args, **kwargs), None


def biases_of(module: Any, positions: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Compute the biases of keys at some positions, rounded as the model rounds them.

    Args:
        module: One that `has_known_biases`.
        positions: How many positions.
        dtype: Dtype of the hidden states.
        device: Device of the result.

    Returns:
        Of shape `(heads, positions)`, float32, contiguous.
    """
    build = sys.modules[type(module).__module__]
    ones = torch.ones(1, positions, dtype=torch.long, device=device)
    biases: torch.Tensor = _ATTENTIONS[type(module).__name__][1](module, build, ones, dtype)
    return biases.reshape(-1, positions).float().contiguous()


def ignored_mask(config: Any) -> torch.Tensor | None:
    """Return a mask for a model that computes with it before the attention, which ignores it; None for others."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool) if getattr(config, "model_type", None) == "mpt" else None


def _bloom(module: Any, attend: Attend, hidden_states: Any, residual: Any, *_: Any, **__: Any) -> Any:
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    return module.dense(attend(query, key, value, module.layer_idx, module.inv_norm_factor)) + residual


def _mpt(module: Any, attend: Attend, hidden_states: Any, *_: Any, **__: Any) -> Any:
    states = module.Wqkv(hidden_states)
    if module.clip_qkv:
        states = states.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (t.unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for t in states.chunk(3, dim=2))
    return module.out_proj(attend(query, key, value, module.layer_idx, module.softmax_scale))


def _falcon(module: Any, attend: Attend, hidden_states: Any, *_: Any, **__: Any) -> Any:
    query, key, value = (t.transpose(1, 2) for t in module._split_heads(module.query_key_value(hidden_states)))
    return module.dense(attend(query, key, value, module.layer_idx, module.inv_norm_factor))


def _bloom_biases(module: Any, build: Any, ones: torch.Tensor, dtype: torch.dtype) -> Any:
    return build.build_alibi_tensor(ones, module.num_heads, dtype)


def _mpt_biases(module: Any, build: Any, ones: torch.Tensor, dtype: torch.dtype) -> Any:
    del dtype
    return build.build_mpt_alibi_tensor(module.n_heads, ones.shape[1], device=ones.device)


def _falcon_biases(module: Any, build: Any, ones: torch.Tensor, dtype: torch.dtype) -> Any:
    return build.build_alibi_tensor(ones, module.num_heads, dtype).float() * module.inv_norm_factor


def _bloom_is_whole(module: Any) -> bool:
    return not (module.pretraining_tp > 1 and module.slow_but_exact)


def _falcon_is_biased(module: Any) -> bool:
    return bool(module.config.alibi)


_ATTENTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[[Any], bool]]] = {
    "BloomAttention": (_bloom, _bloom_biases, _bloom_is_whole),
    "MptAttention": (_mpt, _mpt_biases, lambda module: True),
    "FalconAttention": (_falcon, _falcon_biases, _falcon_is_biased),
}
"""By the name of the class: its forward, its biases, and whether they are used."""
