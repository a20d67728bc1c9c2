"""Attentions of transformers that compute their scores by themselves: GPT, GPT-Neo, XGLM, GIT and DiffLlama.

No registry reaches what they do between their projections, so their parts are used here one by one. None of these is
promised by transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Attend(Protocol):
    """Writes keys and values of a layer, and attends to them."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
    ) -> torch.Tensor:
        """Attend with states of shape `(1, heads of its own, tokens, dim)`; returns `(1, tokens, heads, value_dim)`.

        Scores are multiplied by the scale; by default by one over the square root of `dim`.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """One class of attentions.

    Args:
        run: Its forward, with another attention between its projections: takes the module, the attention, and the
            arguments of its own forward; returns its output.
        layer: Name of the attribute with its layer's number; None for modules that do not know it.
        uncached: Number and size of the heads whose keys and values it computes at each call; None if it keeps them in
            a cache.
        window: How many of the last positions a token sees, 0 for all.
        value_repeats: How many values of the cache's size a head of keys has.
    """

    run: Callable[..., torch.Tensor]
    layer: str | None = "layer_idx"
    uncached: Callable[[Any], tuple[int, int]] | None = None
    window: Callable[[Any], int] = lambda module: 0
    value_repeats: int = 1


def computes_scores_itself(module: Any) -> bool:
    """Say whether a module is an attention that `run_attention` can replace."""
    return _kind_of(module) is not None


def layer_of(module: Any) -> int | None:
    """Return the number of the layer that an attention belongs to; None if it does not know."""
    name = _known(module).layer
    return None if name is None else int(getattr(module, name))


def uncached_heads(module: Any) -> tuple[int, int] | None:
    """Return the number and the size of the heads of an attention without a cache; None for those with one."""
    uncached = _known(module).uncached
    return None if uncached is None else uncached(module)


def window_of(module: Any) -> int:
    """Return how many of the last positions a token sees in an attention, its own included; 0 for all."""
    return _known(module).window(module)


def value_repeats_of(module: Any) -> int:
    """Return how many times as large as in the model's own cache the values are that an attention writes."""
    return _known(module).value_repeats


def run_attention(module: Any, attend: Attend, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an attention's forward with another attention between its projections.

    Args:
        module: One that `computes_scores_itself`.
        attend: The attention.
        args: Arguments of its forward.
        kwargs: Keyword arguments of its forward.

    Returns:
        What its forward returns, without the shares.
    """
    kind = _known(module)
    output = kind.run(module, attend, *args, **kwargs)
    return [output] if kind.uncached is not None else (output, None)


def _gpt(module: Any, attend: Attend, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    projected = module.c_attn(hidden_states).split(module.split_size, dim=2)
    query, key, value = (states.unflatten(-1, (module.n_head, -1)).transpose(1, 2) for states in projected)
    output: torch.Tensor = module.c_proj(attend(query, key, value, None if module.scale else 1.0).flatten(2))
    return output


def _gpt_heads(module: Any) -> tuple[int, int]:
    return module.n_head, module.split_size // module.n_head


def _gpt_neo(module: Any, attend: Attend, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    query, key, value = _heads(hidden_states, module.head_dim, module.q_proj, module.k_proj, module.v_proj)
    output: torch.Tensor = module.out_proj(attend(query, key, value, 1.0).flatten(2))
    return output


def _gpt_neo_window(module: Any) -> int:
    return int(module.config.window_size) if module.attention_type == "local" else 0


def _xglm(module: Any, attend: Attend, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    query, key, value = _heads(hidden_states, module.head_dim, module.q_proj, module.k_proj, module.v_proj)
    output: torch.Tensor = module.out_proj(attend(query, key, value, module.scaling).flatten(2))
    return output


def _git(module: Any, attend: Attend, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    query, key, value = _heads(hidden_states, module.attention_head_size, module.query, module.key, module.value)
    return attend(query, key, value).flatten(2)


def _diffllama(
    module: Any,
    attend: Attend,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    """Attend once, with both halves of the values behind each other, where the module does for each half.

    Source: https://arxiv.org/abs/2410.05258, section 2.1.
    """
    query, key, value = _heads(hidden_states, module.head_dim, module.q_proj, module.k_proj, module.v_proj)
    query, key = sys.modules[type(module).__module__].apply_rotary_pos_emb(query, key, *position_embeddings)
    values = torch.cat([half.repeat(1, 2, 1, 1) for half in value.chunk(2, dim=1)], -1)
    first, second = attend(query, key, values, module.head_dim**-0.5).chunk(2, dim=2)
    gains = [
        torch.exp((q * k).sum(-1, dtype=torch.float32)).to(query.dtype)
        for q, k in ((module.lambda_q1, module.lambda_k1), (module.lambda_q2, module.lambda_k2))
    ]
    difference = first - (gains[0] - gains[1] + module.lambda_init) * second
    output: torch.Tensor = module.o_proj(((1 - module.lambda_init) * module.groupnorm(difference)).flatten(2))
    return output


def _heads(hidden_states: torch.Tensor, dim: int, *projections: Any) -> list[torch.Tensor]:
    """Project hidden states of shape `(1, tokens, width)` to several of shape `(1, heads, tokens, dim)`."""
    return [project(hidden_states).unflatten(-1, (-1, dim)).transpose(1, 2) for project in projections]


_KINDS: Mapping[tuple[str, str], _Kind] = {
    ("openai", "Attention"): _Kind(run=_gpt, layer=None, uncached=_gpt_heads),
    ("gpt_neo", "GPTNeoSelfAttention"): _Kind(run=_gpt_neo, layer="layer_id", window=_gpt_neo_window),
    ("xglm", "XGLMAttention"): _Kind(run=_xglm),
    ("git", "GitSelfAttention"): _Kind(run=_git),
    ("diffllama", "DiffLlamaAttention"): _Kind(run=_diffllama, value_repeats=2),
}
"""By the package of a model in transformers, and the name of the class."""


def _kind_of(module: Any) -> _Kind | None:
    package = type(module).__module__.removeprefix("transformers.models.").partition(".")[0]
    kind = _KINDS.get((package, type(module).__name__))
    if kind is None or kind.layer is None:
        return kind
    return kind if isinstance(getattr(module, kind.layer, None), int) else None


def _known(module: Any) -> _Kind:
    kind = _kind_of(module)
    assert kind is not None
    return kind
