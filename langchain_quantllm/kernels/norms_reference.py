"""What `fused` computes, in plain torch: the same names and signatures, in the order in which transformers rounds.

Owns the meaning of the functions: the Triton kernels are tested against them, and they run where Triton does not.
Knows tensors; no model, no engine, no Triton.
"""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, layer_norm, silu

from langchain_quantllm.kernels.attention_reference import write_kv

SILU, GELU, GELU_TANH = "silu", "gelu", "gelu_tanh"
"""Names of activations: the last is GELU by its approximation with tanh."""

HALVES, PAIRS, PAIRS_OF_HALVES = 0, 1, 2
"""Which numbers of a head are rotated with each other, and by what.

`HALVES`: number i with i + half, each by the cosine of its own place. `PAIRS`: number 2i with 2i + 1, each by that of
its own place. `PAIRS_OF_HALVES`: number 2i with 2i + 1, both by that of place i.
"""


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, rounds_first: bool = True
) -> torch.Tensor:
    """Divide by the root of the mean square, in float32, and multiply by a weight.

    Args:
        x: Numbers of shape `(..., width)`, floating, with any strides.
        weight: Of shape `(width,)`, contiguous, in the dtype of `x`.
        eps: Added to the mean square.
        offset: Added to the weight; 1 in Gemma, whose weights lie around 0.
        rounds_first: Whether numbers are rounded to their dtype before the weight comes, as in Llama; else there is
            one rounding at the end.

    Returns:
        Numbers in the shape and dtype of `x`, contiguous.

    Source:
        https://arxiv.org/abs/1910.07467, equation 4.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if rounds_first:
        wide = wide.to(x.dtype).float()
    return (wide * (weight.float() + offset)).to(x.dtype).contiguous()


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    rounds_first: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add, and normalize the sum as `rms_norm` does.

    Args:
        x: Numbers of shape `(..., width)`, floating, with any strides.
        residual: Added to them; in their shape and dtype.
        weight: See `rms_norm`.
        eps: See `rms_norm`.
        offset: See `rms_norm`.
        rounds_first: See `rms_norm`.

    Returns:
        The sum, and what becomes of it; each in the shape and dtype of `x`, contiguous.
    """
    total = (residual + x).contiguous()
    return total, rms_norm(total, weight, eps, offset=offset, rounds_first=rounds_first)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add, and normalize the sum to mean 0 and variance 1, in float32, before weight and bias.

    Args:
        x: Numbers of shape `(..., width)`, floating, with any strides.
        residual: Added to them; in their shape and dtype.
        weight: Of shape `(width,)`, contiguous, in the dtype of `x`.
        bias: In the shape of the weight; None for none.
        eps: Added to the variance.

    Returns:
        The sum, and what becomes of it; each in the shape and dtype of `x`, contiguous.
    """
    total = (residual + x).contiguous()
    return total, layer_norm(total, weight.shape, weight, bias, eps)


def gate(opening: torch.Tensor, values: torch.Tensor, activation: str) -> torch.Tensor:
    """Multiply values by an activation of others: what stands in the middle of a gated MLP.

    Args:
        opening: What the activation is taken of, of shape `(..., width)`, floating, with any strides.
        values: In the shape and dtype of `opening`, with any strides.
        activation: `SILU`, `GELU` or `GELU_TANH`.

    Returns:
        The products in the shape and dtype of `opening`, contiguous; the activation is rounded before it multiplies.
    """
    if activation == SILU:
        opened = silu(opening)
    else:
        opened = gelu(opening, approximate="tanh" if activation == GELU_TANH else "none")
    return (opened * values).contiguous()


def angles(
    positions: torch.Tensor, frequencies: torch.Tensor, scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the cosines and sines by which positions are rotated.

    Args:
        positions: Of shape `(1, tokens)`, int64.
        frequencies: What one position turns each pair of numbers by, of shape `(rotary_dim / 2,)`, float32.
        scale: What cosines and sines are multiplied by.
        dtype: What they are rounded to.

    Returns:
        Cosines and sines of shape `(1, tokens, rotary_dim)`: of all frequencies, and once more.
    """
    turned = (positions[..., None].float() * frequencies).repeat(1, 1, 2)
    return (turned.cos() * scale).to(dtype), (turned.sin() * scale).to(dtype)


def rotate_and_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    *,
    layout: int = HALVES,
    rounds: bool = True,
) -> torch.Tensor:
    """Rotate queries and keys by their positions, and write keys and values into their pages.

    Args:
        query: Queries of shape `(1, heads, tokens, key_dim)`, floating, with any strides.
        key: Keys of shape `(1, kv_heads, tokens, key_dim)` in the dtype of `query`, with any strides.
        value: Values of shape `(1, kv_heads, tokens, value_dim)` in the dtype of `query`, with any strides.
        cos: Cosines of shape `(1, tokens, rotary_dim)`, floating; the first `rotary_dim` numbers of a head are
            rotated, which are an even count.
        sin: Sines in the shape and dtype of `cos`.
        kv: The pool of one layer, as in `reference.write_kv`. Written to.
        table: The pages of each row, as in `reference.write_kv`.
        rows: The row of each token, as in `reference.write_kv`.
        positions: The place of each token in its row, as in `reference.write_kv`.
        layout: `HALVES`, `PAIRS` or `PAIRS_OF_HALVES`.
        rounds: Whether both products of a rotation are rounded to the dtype of `query` before they are added, as in
            Llama; else there is one rounding at the end.

    Returns:
        The rotated queries, of shape `(1, heads, tokens, key_dim)`, dense in the last dimension.

    Source:
        https://arxiv.org/abs/2104.09864, equation 34.
    """
    rotated = _rotated(key, cos, sin, layout, rounds)
    write_kv(rotated, value, kv, table, rows, positions)
    return _rotated(query, cos, sin, layout, rounds)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: int, rounds: bool) -> torch.Tensor:
    width = cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    cos, sin = cos[:, None], sin[:, None]
    if layout == HALVES:
        others = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], -1)
    else:
        others = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    if layout == PAIRS_OF_HALVES:
        cos, sin = (t[..., : width // 2].repeat_interleave(2, -1) for t in (cos, sin))
    first, second = turned.float() * cos.float(), others.float() * sin.float()
    if rounds:
        first, second = first.to(x.dtype).float(), second.to(x.dtype).float()
    return torch.cat([(first + second).to(x.dtype), kept], -1)
