"""The kernels in plain torch: what `attention`, `norms`, `rotary` compute, with the same names and signatures.

The Triton kernels are tested against these functions, which also run where Triton does not. They round in the order in
which transformers does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import gelu, layer_norm, silu

from langchain_quantllm.kernels import kv_quantization

PREFILL_TILE = 64
"""Most query tokens of one tile of a prefill."""

SILU, GELU, GELU_TANH = "silu", "gelu", "gelu_tanh"
"""Names of activations; the last one is GELU by its approximation with tanh."""

SIGMOID = "sigmoid"
"""Name of what some norms multiply by in place of SiLU."""

HALVES, PAIRS, PAIRS_OF_HALVES, HALVES_ONCE = 0, 1, 2, 3
"""The numbers of a head that are rotated with each other, and the index of their cosine and sine.

`HALVES`: i with i + half, each by its own index. `PAIRS`: 2i with 2i + 1, each by its own index. `PAIRS_OF_HALVES`: 2i
with 2i + 1, both by index i. `HALVES_ONCE`: i with i + half, both by index i, of cosines that are there once.
"""


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, rounds_first: bool = True
) -> torch.Tensor:
    """Divide by the root of the mean square, in float32, and multiply by a weight.

    Args:
        x: Numbers of shape `(..., width)`, floating, with any strides.
        weight: Of shape `(width,)`, contiguous, in the dtype of `x`.
        eps: Added to the mean square.
        offset: Added to the weight; 1 in Gemma, whose weights are close to 0.
        rounds_first: Whether numbers are rounded to their dtype before they are multiplied by the weight, as in Llama;
            otherwise there is one rounding at the end.

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


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    gating: str,
    gates_first: bool,
    rounds: bool,
    groups: int,
) -> torch.Tensor:
    """Normalize as `rms_norm` does, by groups, and multiply by an activation of a gate before or after that.

    Args:
        x: Numbers of shape `(..., width)`, floating, with any strides.
        gate: In the shape of `x`, with any strides.
        weight: Of shape `(width,)`, contiguous, in the dtype of `x`.
        eps: Added to the mean square.
        gating: `SILU`, or `SIGMOID`; computed in float32.
        gates_first: Whether the product with the gate is normalized; otherwise the normalized numbers are multiplied.
        rounds: Whether normalized numbers are rounded to their dtype before and after the product with the weight;
            otherwise there is one rounding at the end.
        groups: Consecutive parts of the width that have a mean square each.

    Returns:
        Numbers in the shape and dtype of `x`, contiguous.
    """
    factor = torch.sigmoid(gate.float()) if gating == SIGMOID else silu(gate.float())
    wide = x.float() * factor if gates_first else x.float()
    parts = wide.unflatten(-1, (groups, -1))
    wide = (parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2)
    out = weight * wide.to(x.dtype) if rounds else weight.float() * wide
    return (out if gates_first else out * factor).to(x.dtype).contiguous()


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
        The sum and the normalized sum, each in the shape and dtype of `x`, contiguous.
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
        The sum and the normalized sum, each in the shape and dtype of `x`, contiguous.
    """
    total = (residual + x).contiguous()
    return total, layer_norm(total, weight.shape, weight, bias, eps)


def activation_mul(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Multiply an activation of one tensor by another: the middle of a gated MLP.

    Args:
        gate: The input of the activation, of shape `(..., width)`, floating, with any strides.
        up: In the shape and dtype of `gate`, with any strides.
        activation: `SILU`, `GELU` or `GELU_TANH`.

    Returns:
        The products in the shape and dtype of `gate`, contiguous; the activation is rounded before the product.
    """
    if activation == SILU:
        activated = silu(gate)
    else:
        activated = gelu(gate, approximate="tanh" if activation == GELU_TANH else "none")
    return (activated * up).contiguous()


def cos_sin(
    positions: torch.Tensor, frequencies: torch.Tensor, scale: float, dtype: torch.dtype, *, twice: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the cosines and sines that rotate positions.

    Args:
        positions: Of shape `(1, tokens)`, int64.
        frequencies: The angle of one position for each pair of numbers, of shape `(rotary_dim / 2,)`, float32.
        scale: Factor of the cosines and sines.
        dtype: Dtype of the result.
        twice: Whether each is there for both numbers of a pair.

    Returns:
        Cosines and sines of shape `(1, tokens, rotary_dim)`: of all frequencies, twice; half as many if not `twice`.
    """
    angles = (positions[..., None].float() * frequencies).repeat(1, 1, 1 + twice)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate_and_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    layout: int = HALVES,
    rounds: bool = True,
    scales: kv_quantization.KVScales | None = None,
) -> torch.Tensor:
    """Rotate queries and keys by their positions, and write keys and values into their blocks.

    Args:
        query: Queries of shape `(1, heads, tokens, key_dim)`, floating, with any strides.
        key: Keys of shape `(1, kv_heads, tokens, key_dim)` in the dtype of `query`, with any strides.
        value: Values of shape `(1, kv_heads, tokens, value_dim)` in the dtype of `query`, with any strides.
        cos: Cosines of shape `(1, tokens, rotary_dim)`, floating, half as many for `HALVES_ONCE`; the first
            `rotary_dim` numbers of a head are rotated, which are an even count.
        sin: Sines in the shape and dtype of `cos`.
        kv: The pool of one layer; see `write_kv`. Written to.
        table: Block table; see `write_kv`.
        slots: Row of the table of each token; see `write_kv`.
        positions: Position of each token; see `write_kv`.
        layout: `HALVES`, `PAIRS`, `PAIRS_OF_HALVES` or `HALVES_ONCE`.
        rounds: Whether both products of a rotation are rounded to the dtype of `query` before they are added, as in
            Llama; otherwise there is one rounding at the end.
        scales: See `write_kv`.

    Returns:
        The rotated queries, of shape `(1, heads, tokens, key_dim)`, dense in the last dimension.

    Source:
        https://arxiv.org/abs/2104.09864, equation 34.
    """
    rotated = _rotated(key, cos, sin, layout, rounds)
    write_kv(rotated, value, kv, table, slots, positions, scales)
    return _rotated(query, cos, sin, layout, rounds)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: int, rounds: bool) -> torch.Tensor:
    if layout == HALVES_ONCE:
        cos, sin = (torch.cat([part, part], -1) for part in (cos, sin))
    width = cos.shape[-1]
    rotary, rest = x[..., :width], x[..., width:]
    cos, sin = cos[:, None], sin[:, None]
    if layout in (HALVES, HALVES_ONCE):
        others = torch.cat([-rotary[..., width // 2 :], rotary[..., : width // 2]], -1)
    else:
        others = torch.stack([-rotary[..., 1::2], rotary[..., ::2]], -1).flatten(-2)
    if layout == PAIRS_OF_HALVES:
        cos, sin = (t[..., : width // 2].repeat_interleave(2, -1) for t in (cos, sin))
    first, second = rotary.float() * cos.float(), others.float() * sin.float()
    if rounds:
        first, second = first.to(x.dtype).float(), second.to(x.dtype).float()
    return torch.cat([(first + second).to(x.dtype), rest], -1)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    scales: kv_quantization.KVScales | None = None,
) -> None:
    """Write the keys and values of new tokens into their blocks.

    A value that is not finite is written as zeros, with a key of NaN. So every value in the pool is finite, and a token
    spoils only the tokens that see it: scores are masked exactly, whereas 0 times NaN is NaN.

    Args:
        key: Keys of shape `(1, kv_heads, tokens, key_dim)`, floating, with any strides.
        value: Values of shape `(1, kv_heads, tokens, value_dim)`, floating, with any strides.
        kv: The pool of one layer of shape `(blocks, block_tokens, kv_heads, key_dim + value_dim)`, contiguous, in
            float16, bfloat16 or float32, or in 8 bits: each key followed by its value. Written to. `block_tokens` is a
            power of two.
        table: Block table: the blocks of each sequence, of shape `(slots, max_blocks)`, int32, contiguous.
        slots: Row of the table of each token, of shape `(tokens,)`, int32, contiguous.
        positions: Position of each token in its sequence, of shape `(tokens,)`, int32, contiguous. If tokens of a
            sequence share a position, any one of them may be written.
        scales: The scales of a pool in 8 bits; written to. None for other pools.
    """
    block_tokens = kv.shape[1]
    blocks = table[slots.long(), (positions // block_tokens).long()].long()
    if scales is not None:
        new = (key[0].transpose(0, 1), value[0].transpose(0, 1))
        kv_quantization.write(*new, kv, scales, blocks, (positions % block_tokens).long())
        return
    key, value = key.to(kv.dtype), value.to(kv.dtype)
    spoils = ~value.isfinite().all(-1, keepdim=True)
    both = torch.cat([key.masked_fill(spoils, torch.nan), value.masked_fill(spoils, 0)], dim=-1)
    kv[blocks, (positions % block_tokens).long()] = both[0].transpose(0, 1)


def decode_attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    value_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    chunk: int = 0,
    sinks: torch.Tensor | None = None,
    biases: torch.Tensor | None = None,
    scales: kv_quantization.KVScales | None = None,
    splits: int = 1,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with one new token of each sequence to the sequence's blocks, which include the token itself.

    Args:
        query: Queries of shape `(1, heads, tokens, key_dim)`, floating, with any strides. `heads` is a multiple of
            `kv_heads`. If they have the size of a key and a value together, the value belongs to the key as well.
        kv: The pool of one layer; see `write_kv`.
        table: Block table; see `write_kv`.
        slots: Row of the table of each token; see `write_kv`.
        positions: The last position that each token sees, its own, of shape `(tokens,)`, int32, contiguous.
        value_dim: Size of a value, which the pool's last dimension ends with.
        scale: Factor of the scores.
        window: How many of the last positions a token sees, its own included; 0 for all.
        softcap: Scores become `softcap * tanh(scores / softcap)`; 0 for no cap.
        chunk: A token sees its own chunk of so many positions, up to itself; 0 for all.
        sinks: A score of each head that takes its share of the softmax and has no value, of shape `(heads,)`, floating,
            contiguous; None for none.
        biases: Added to the scores, by head and position of the key, less that of the token's own position. Of shape
            `(heads, positions)`, float32, contiguous, finite, with at least as many positions as keys; None for none.
        scales: See `write_kv`.
        splits: Most programs that share the keys of one sequence: a power of two. No effect here.
        arrivals: Counts of finished programs, for sequences that are shared. No effect here.

    Returns:
        The attended values of shape `(1, tokens, heads, value_dim)`, contiguous, in the dtype of `query`.

    Source:
        The cap: Gemma 2, https://arxiv.org/abs/2408.00118, section 2. Sinks: gpt-oss,
        https://arxiv.org/abs/2508.10925, section 2. Biases: ALiBi, https://arxiv.org/abs/2108.12409, section 3.
    """
    del splits, arrivals
    scoring = _Scoring(scale, window, softcap, chunk, sinks, biases)
    out = query.new_empty((1, query.shape[2], query.shape[1], value_dim))
    for token, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        keys, values = _history(kv, scales, table[slot], position + 1, query.shape[3], value_dim)
        out[0, token] = _attend(query[0, :, token : token + 1], keys, values, position, scoring)[0]
    return out


def prefill_attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor,
    tiles: torch.Tensor,
    *,
    value_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    chunk: int = 0,
    sinks: torch.Tensor | None = None,
    biases: torch.Tensor | None = None,
    scales: kv_quantization.KVScales | None = None,
) -> torch.Tensor:
    """Attend with packed chunks of several prompts to the blocks of their sequences.

    Args:
        query: Queries; see `decode_attention`.
        kv: The pool of one layer; see `write_kv`. Contains the keys and values of these tokens already.
        table: Block table; see `write_kv`.
        tiles: Runs of consecutive tokens of a sequence, of shape `(n, 4)`, int32, contiguous: the row of the table,
            the first token's index in the pack, its position, and the number of tokens, at most `PREFILL_TILE`. A tile
            of 0 tokens has no effect. n is at most 65535.
        value_dim: Size of a value.
        scale: Factor of the scores.
        window: How many of the last positions a token sees, its own included; 0 for all.
        softcap: Scores become `softcap * tanh(scores / softcap)`; 0 for no cap.
        chunk: See `decode_attention`.
        sinks: See `decode_attention`.
        biases: See `decode_attention`.
        scales: See `write_kv`.

    Returns:
        The attended values of shape `(1, tokens, heads, value_dim)`, contiguous, in the dtype of `query`; undefined
        for tokens in no tile.
    """
    scoring = _Scoring(scale, window, softcap, chunk, sinks, biases)
    out = query.new_empty((1, query.shape[2], query.shape[1], value_dim))
    for slot, first, position, count in tiles.tolist():
        keys, values = _history(kv, scales, table[slot], position + count, query.shape[3], value_dim)
        tile = query[0, :, first : first + count]
        out[0, first : first + count] = _attend(tile, keys, values, position, scoring)
    return out


def arrivals(multiprocessors: int, device: torch.device) -> torch.Tensor:
    """Return no counts: a loop is never shared."""
    del multiprocessors
    return torch.zeros(0, dtype=torch.int32, device=device)


def default_splits(tokens: int, kv_heads: int, multiprocessors: int) -> int:
    """Return 1: a loop is never shared."""
    del tokens, kv_heads, multiprocessors
    return 1


def _history(
    kv: torch.Tensor,
    scales: kv_quantization.KVScales | None,
    blocks: torch.Tensor,
    tokens: int,
    key_dim: int,
    value_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the first tokens of a sequence.

    Returns:
        Keys of shape `(kv_heads, tokens, key_dim)` and values of shape `(kv_heads, tokens, value_dim)`, float32.
    """
    used = blocks[: -(-tokens // kv.shape[1])].long()
    if scales is None:
        both = kv[used].float()
    else:
        both = kv_quantization.read(kv, scales, used, key_dim=key_dim, dtype=torch.float32)
    both = both.flatten(0, 1)[:tokens].transpose(0, 1)
    return both[..., :key_dim], both[..., -value_dim:]


class _Scoring(NamedTuple):
    """How keys are scored; see `decode_attention`."""

    scale: float
    window: int
    softcap: float
    chunk: int
    sinks: torch.Tensor | None
    biases: torch.Tensor | None


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int, scoring: _Scoring
) -> torch.Tensor:
    """Attend with tokens of one sequence, the first of them at `position`.

    Args:
        query: Queries of shape `(heads, tokens, key_dim)`.
        keys: Keys of shape `(kv_heads, seen, key_dim)`, float32.
        values: Values of shape `(kv_heads, seen, value_dim)`, float32.
        position: Position of the first query in the sequence.
        scoring: How keys are scored.

    Returns:
        Values of shape `(tokens, heads, value_dim)`, float32.
    """
    group = query.shape[0] // keys.shape[0]
    scores = query.float() @ keys.repeat_interleave(group, 0).transpose(1, 2) * scoring.scale
    if scoring.softcap > 0:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    at = torch.arange(position, position + query.shape[1], device=keys.device)
    seen = torch.arange(keys.shape[1], device=keys.device)
    if scoring.biases is not None:
        scores = scores + (scoring.biases[:, None, seen] - scoring.biases[:, at, None])
    ages = at[:, None] - seen
    hidden = ages < 0
    if scoring.window > 0:
        hidden = hidden | (ages >= scoring.window)
    if scoring.chunk > 0:
        hidden = hidden | (seen < (at // scoring.chunk * scoring.chunk)[:, None])
    scores = scores.masked_fill(hidden, -torch.inf)
    if scoring.sinks is not None:
        sinks = scoring.sinks.float()[:, None, None].expand(-1, query.shape[1], 1)
        scores = torch.cat([scores, sinks], -1)
    shares = scores.softmax(-1)[..., : keys.shape[1]]
    # Zero the values that no query sees: they may be NaN, as in an unwritten block, and 0 times NaN is NaN.
    unseen = hidden.all(0)[:, None]
    return (shares @ values.masked_fill(unseen, 0).repeat_interleave(group, 0)).transpose(0, 1)
