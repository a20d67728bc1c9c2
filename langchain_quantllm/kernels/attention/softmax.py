"""The softmax of attention, tile by tile, as Triton functions for decode and prefill."""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object, and its compiler
# resolves every annotation of a kernel's arguments, and refuses others than its own.

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.launch import INTERPRETED, dot

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def scores_of(
    query: tl.tensor, key: tl.tensor, key_scales: tl.tensor, scale: tl.tensor, softcap: tl.constexpr
) -> tl.tensor:
    """Compute scores in base 2, as the device has `exp2` but no `exp`.

    Args:
        query: Queries of shape `(queries, key_tile)`.
        key: Keys of shape `(keys, key_tile)`.
        key_scales: Factors of the keys, of shape `(keys,)`; None for none.
        scale: Factor of the scores, one for all or of shape `(queries, 1)`.
        softcap: The cap of the scores; 0 for none.

    Returns:
        Scores of shape `(queries, keys)`, float32.
    """
    products = dot(query, tl.trans(key), None)
    if key_scales is not None:
        products = products * key_scales[None, :]
    return scaled_scores(products, scale, softcap)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def scaled_scores(scores: tl.tensor, scale: tl.tensor, softcap: tl.constexpr) -> tl.tensor:
    """Scale products to scores in base 2, and cap them; see `scores_of`."""
    if softcap > 0:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which has no overflow: its exponential may be 0 or inf.
        doubled = tl.exp2(scores * (scale * (2 * _LOG2_E / softcap)))
        scores = (1 - 2 / (doubled + 1)) * (softcap * _LOG2_E)
    else:
        scores = scores * (scale * _LOG2_E)
    return scores


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def latent_scores_of(
    query: tl.tensor,
    key: tl.tensor,
    latent_query: tl.tensor,
    latent: tl.tensor,
    scale: tl.tensor,
    softcap: tl.constexpr,
) -> tl.tensor:
    """Compute scores in base 2 where the value, a latent, belongs to the key as well; see `scores_of`.

    Args:
        query: Parts of the queries for the keys, of shape `(queries, key_tile)`.
        key: Keys of shape `(keys, key_tile)`.
        latent_query: Parts of the queries for the latents, of shape `(queries, value_tile)`.
        latent: Latents of shape `(keys, value_tile)`.
        scale: Factor of the scores.
        softcap: The cap of the scores; 0 for none.

    Returns:
        Scores of shape `(queries, keys)`, float32.
    """
    return scaled_scores(dot(latent_query, tl.trans(latent), dot(query, tl.trans(key), None)), scale, softcap)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def load_latent_query(
    rows: tl.tensor, wanted: tl.tensor, key_dim: tl.constexpr, value_dim: tl.constexpr, value_tile: tl.constexpr
) -> tl.tensor:
    """Load the parts of some queries for the latents, which follow those for the keys.

    Args:
        rows: Pointers to the queries, of shape `(queries, 1)`.
        wanted: Mask of the queries to load, of shape `(queries, 1)`.
        key_dim: Size of a key without the latent.
        value_dim: Size of a latent.
        value_tile: `value_dim`, rounded up to a power of two.

    Returns:
        Of shape `(queries, value_tile)`; zeros where not wanted.
    """
    columns = tl.arange(0, value_tile)
    return tl.load(rows + key_dim + columns[None, :], mask=wanted & (columns[None, :] < value_dim), other=0.0)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def fold(
    total: tl.tensor,
    highest: tl.tensor,
    weight: tl.tensor,
    scores: tl.tensor,
    value: tl.tensor,
    value_scales: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add a tile of keys to the softmax so far.

    Factors of the values go into the exponentials, which stay below 1 whatever they are, and out of the sum's ones.

    Args:
        total: Weighted values so far, relative to `highest`, of shape `(queries, value_tile)`, float32.
        highest: The highest score so far of shape `(queries,)`, float32; -inf where nothing was seen.
        weight: Sum of the exponentials so far, relative to `highest`, of shape `(queries,)`, float32.
        scores: Scores in base 2 of shape `(queries, keys)`, float32; -inf where not visible.
        value: Values of shape `(keys, value_tile)`; finite also where they are not visible.
        value_scales: Factors of the values above 0, of shape `(keys,)`, float32; None for none.

    Returns:
        `total`, `highest` and `weight`, updated.

    Source:
        FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithm 1, lines 8 to 10.
    """
    shares, decay, highest, weight = next_shares(highest, weight, scores, value_scales)
    total = dot(shares.to(value.dtype), value, total * decay[:, None])
    return total, highest, weight


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def next_shares(
    highest: tl.tensor, weight: tl.tensor, scores: tl.tensor, value_scales: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Compute the factors of a tile of values, and those of the values so far; see `fold`.

    Returns:
        The exponentials of the scores of shape `(queries, keys)`, float32; the factor of what was added before, of
        shape `(queries,)`; `highest` and `weight`, updated.
    """
    if value_scales is not None:
        scores = scores + _log2(value_scales)[None, :]
    peak = tl.maximum(highest, tl.max(scores, 1))
    # A query that has seen no key yet, because of a window: -inf - -inf would be NaN.
    level = tl.where(peak == float("-inf"), 0.0, peak)
    shares = tl.exp2(scores - level[:, None])
    decay = tl.exp2(highest - level)
    if value_scales is not None:
        weight = weight * decay + tl.sum(shares * _inverse(value_scales)[None, :], 1)
    else:
        weight = weight * decay + tl.sum(shares, 1)
    return shares, decay, peak, weight


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _log2(x: tl.tensor) -> tl.tensor:
    """Compute the binary logarithm by one instruction, with an error of some 2**-22; `tl.log2` takes a dozen."""
    if INTERPRETED:
        return tl.log2(x)
    else:  # noqa: RET505  # both branches are not compiled only as an else
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _inverse(x: tl.tensor) -> tl.tensor:
    """Divide 1 by a number by one instruction, with an error of one unit in the last place."""
    if INTERPRETED:
        return 1 / x
    else:  # noqa: RET505  # both branches are not compiled only as an else
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def biased(scores: tl.tensor, biases: tl.tensor, own: tl.tensor) -> tl.tensor:
    """Add biases to scores in base 2, relative to the bias of each query's own position, so that sums stay small.

    Args:
        scores: Of shape `(queries, keys)`, float32.
        biases: Of the keys, of shape `(queries or 1, keys)`, float32.
        own: Of the queries' own positions, of shape `(queries,)`, float32.

    Returns:
        Scores of shape `(queries, keys)`, float32.
    """
    return scores + (biases - own[:, None]) * _LOG2_E


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def with_sink(weight: tl.tensor, highest: tl.tensor, sink: tl.tensor) -> tl.tensor:
    """Add the exponential of a sink to a finished softmax.

    Args:
        weight: Sum of the exponentials, relative to `highest`, of shape `(queries,)`, float32.
        highest: The highest score in base 2 of shape `(queries,)`, float32.
        sink: Score of the sink, of shape `(queries,)` or one for all, floating.

    Returns:
        The sum with the sink: infinite if the sink lies so far above all scores that no other share is left.
    """
    return weight + tl.exp2(sink.to(tl.float32) * _LOG2_E - highest)


def keys_within(tile_bytes: int, token_bytes: int, most: int) -> int:
    """Return the largest power of two of keys, from 16 to `most`, whose tile fits."""
    return min(most, max(16, 1 << (tile_bytes // token_bytes).bit_length() - 1))
