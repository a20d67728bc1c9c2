"""One token of gated delta rules and of short convolutions in plain torch, over states that stay where they are.

The kernels of `recurrent` are tested against these functions, which are tested against those of transformers.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu

__all__ = ["conv_step", "delta_step"]


def delta_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    *,
    normalizes: bool,
) -> torch.Tensor:
    """Let each row's state decay, write the row's value under its key, and read it with its query.

    With the state `S` of a head, of shape `(key_dim, value_dim)`: `S = exp(decay) * S`, then
    `S = S + key * beta * (value - S^T key)`, and the output is `S^T query / sqrt(key_dim)`, all in float32.

    Args:
        query: Queries of shape `(rows, key_heads, key_dim)`.
        key: Keys of the same shape; consecutive heads of values share a head of keys.
        value: Values of shape `(rows, value_heads, value_dim)`.
        decay: Logarithms of how much is kept, of shape `(rows, value_heads)`, or `(rows, value_heads, key_dim)` for
            each channel of the key.
        beta: How much of the difference is written, of shape `(rows, value_heads)`.
        states: States of shape `(slots, value_heads, key_dim, value_dim)`, float32; those of the rows are changed.
        slots: The state of each row, of shape `(rows,)`, integers.
        normalizes: Whether queries and keys are divided by their length.

    Returns:
        The outputs of shape `(rows, value_heads, value_dim)`, in the dtype of the queries.

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv 2412.06464; by
    channels: "Kimi Linear: An Expressive, Efficient Attention Architecture", arXiv 2510.26692.
    """
    group = value.shape[1] // key.shape[1]
    q, k = (_heads(x, group, normalizes=normalizes) for x in (query, key))
    q = q * key.shape[-1] ** -0.5
    at = slots.long()
    kept = decay.float().exp()
    state = states[at] * (kept[..., None, None] if kept.dim() == 2 else kept[..., None])
    written = (value.float() - torch.einsum("rhkv,rhk->rhv", state, k)) * beta.float()[..., None]
    state = state + k[..., None] * written[..., None, :]
    states[at] = state
    return torch.einsum("rhkv,rhk->rhv", state, q).to(query.dtype)


def conv_step(
    x: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    activates: bool,
) -> torch.Tensor:
    """Convolve each channel's last inputs, and keep the new one in place of the oldest.

    Args:
        x: New inputs of shape `(rows, channels)`.
        states: The last inputs, of shape `(slots, channels, inputs)`, oldest first; those of the rows are changed.
        slots: The state of each row, of shape `(rows,)`, integers.
        weight: Of shape `(channels, taps)` with at most one tap more than a state has inputs, contiguous, in the dtype
            of `x`; the last one is the new input's.
        bias: Of shape `(channels,)`; None for none.
        activates: Whether SiLU follows, of the rounded sum.

    Returns:
        The outputs of shape `(rows, channels)`, in the dtype of `x`, summed in float32.
    """
    at = slots.long()
    window = torch.cat([states[at].to(x.dtype), x[..., None]], -1)
    states[at] = window[..., 1:].to(states.dtype)
    out = (window[..., -weight.shape[-1] :].float() * weight.float()).sum(-1)
    if bias is not None:
        out = out + bias.float()
    out = out.to(x.dtype)
    return silu(out) if activates else out


def _heads(x: torch.Tensor, group: int, *, normalizes: bool) -> torch.Tensor:
    """Return queries or keys in float32, one for each head of values."""
    x = x.float()
    if normalizes:
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
    return x.repeat_interleave(group, dim=1)
