"""The kernels in plain torch: what `attention`, `norms`, `rotary` compute, with the same names and signatures.

The Triton kernels are tested against these functions, which also run where Triton does not. They round in the order in
which transformers does.
"""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, layer_norm, silu

PREFILL_TILE = 64
"""Most query tokens of one block of prefill."""

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


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Write the keys and values of new tokens into their pages.

    Args:
        key: Keys of shape `(1, kv_heads, tokens, key_dim)`, floating, with any strides.
        value: Values of shape `(1, kv_heads, tokens, value_dim)`, floating, with any strides.
        kv: The pool of one layer of shape `(pages, page_tokens, kv_heads, key_dim + value_dim)`, contiguous, in
            float16, bfloat16 or float32: each key with its value behind it. Written to.
        table: The page of each piece of `page_tokens` tokens of each row, of shape `(slots, max_pages)`, int32.
        rows: The row of `table` that each token belongs to, of shape `(tokens,)`, int32.
        positions: The place of each token in its row, of shape `(tokens,)`, int32. Of tokens that share a place,
            any one may win.
    """
    page_tokens = kv.shape[1]
    pages = table[rows.long(), (positions // page_tokens).long()].long()
    both = torch.cat([key, value], dim=-1)[0].transpose(0, 1)
    kv[pages, (positions % page_tokens).long()] = both.to(kv.dtype)


def decode_attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    *,
    value_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    splits: int = 1,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with one new token of each row to the row's pages, which hold the token itself too.

    Args:
        query: Queries of shape `(1, heads, tokens, key_dim)`, floating, with any strides. `heads` is a multiple of
            `kv_heads`.
        kv: The pool of one layer, as in `write_kv`.
        table: The pages of each row of shape `(slots, max_pages)`, int32.
        rows: The row of `table` that each token belongs to, of shape `(tokens,)`, int32.
        positions: The last position that each token sees, its own, of shape `(tokens,)`, int32.
        value_dim: Size of a value; a key has what else there is in the pool's last dimension.
        scale: What scores are multiplied by.
        window: How many of the last positions a token sees, itself counted; 0 for all.
        softcap: Scores become `softcap * tanh(scores / softcap)`; 0 for no cap.
        splits: How many programs share the keys of one row, at most: a power of two. No effect here.
        arrivals: Counts the programs that are done, where a row is shared. No effect here.

    Returns:
        The attended values of shape `(1, tokens, heads, value_dim)`, contiguous, in the dtype of `query`.

    Source:
        The cap: Gemma 2, https://arxiv.org/abs/2408.00118, section 2.
    """
    del splits, arrivals
    out = query.new_empty((1, query.shape[2], query.shape[1], value_dim))
    for token, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        keys, values = _history(kv, table[row], position + 1, value_dim)
        out[0, token] = _attend(query[0, :, token : token + 1], keys, values, position, scale, window, softcap)[0]
    return out


def prefill_attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor,
    blocks: torch.Tensor,
    *,
    value_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attend with chunks of several prompts, packed one behind the other, to the pages of their rows.

    Args:
        query: Queries of shape `(1, heads, tokens, key_dim)`, floating, with any strides.
        kv: The pool of one layer, as in `write_kv`; holds the keys and values of these tokens already.
        table: The pages of each row of shape `(slots, max_pages)`, int32.
        blocks: Runs of tokens that follow each other both in the pack and in their row, of shape `(n, 4)`, int32:
            the row of `table`, the first token's index in the pack, its position, and the number of tokens, at most
            `PREFILL_TILE`. A block of 0 tokens does nothing.
        value_dim: Size of a value.
        scale: What scores are multiplied by.
        window: How many of the last positions a token sees, itself counted; 0 for all.
        softcap: Scores become `softcap * tanh(scores / softcap)`; 0 for no cap.

    Returns:
        The attended values of shape `(1, tokens, heads, value_dim)`, contiguous, in the dtype of `query`; undefined
        for tokens that are in no block.
    """
    out = query.new_empty((1, query.shape[2], query.shape[1], value_dim))
    for row, first, position, count in blocks.tolist():
        keys, values = _history(kv, table[row], position + count, value_dim)
        block = query[0, :, first : first + count]
        out[0, first : first + count] = _attend(block, keys, values, position, scale, window, softcap)
    return out


def arrivals(multiprocessors: int, device: torch.device) -> torch.Tensor:
    """Give what counts arrivals in `decode_attention`, which is nothing: a loop is never shared."""
    del multiprocessors
    return torch.zeros(0, dtype=torch.int32, device=device)


def default_splits(tokens: int, kv_heads: int, multiprocessors: int) -> int:
    """Give the number of splits of `decode_attention`, which is 1: a loop has nothing to share."""
    del tokens, kv_heads, multiprocessors
    return 1


def _history(kv: torch.Tensor, pages: torch.Tensor, tokens: int, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the first tokens of a row.

    Returns:
        Keys of shape `(kv_heads, tokens, key_dim)` and values of shape `(kv_heads, tokens, value_dim)`, float32.
    """
    used = pages[: -(-tokens // kv.shape[1])].long()
    both = kv[used].flatten(0, 1)[:tokens].transpose(0, 1).float()
    return both[..., :-value_dim], both[..., -value_dim:]


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: int,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """Attend with tokens of one row, the first of them at `position`.

    Args:
        query: Queries of shape `(heads, tokens, key_dim)`.
        keys: Keys of shape `(kv_heads, seen, key_dim)`, float32.
        values: Values of shape `(kv_heads, seen, value_dim)`, float32.
        position: Place of the first query in the row.
        scale: What scores are multiplied by.
        window: How many of the last positions a token sees; 0 for all.
        softcap: The cap of the scores; 0 for none.

    Returns:
        Values of shape `(tokens, heads, value_dim)`, float32.
    """
    group = query.shape[0] // keys.shape[0]
    scores = query.float() @ keys.repeat_interleave(group, 0).transpose(1, 2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    ages = torch.arange(position, position + query.shape[1], device=keys.device)[:, None]
    ages = ages - torch.arange(keys.shape[1], device=keys.device)
    hidden = ages < 0 if window <= 0 else (ages < 0) | (ages >= window)
    shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    # What no query sees may be another's page by now, or unwritten: 0 times NaN would be NaN.
    unseen = hidden.all(0)[:, None]
    return (shares @ values.masked_fill(unseen, 0).repeat_interleave(group, 0)).transpose(0, 1)
