"""One token of gated delta rules and of short convolutions as Triton kernels, over states where they lie.

Each state is read and written once.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.activation import activated
from langchain_quantllm.kernels.launch import (
    dense_vectors,
    launch_options,
    let_next_begin,
    power_of_2,
    wait_for_inputs,
)

__all__ = ["conv_step", "delta_step"]

_TILE = 4096
"""Numbers of a state of a delta rule in one program."""

_CHANNELS = 256
"""Channels of a convolution in one program."""


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
    """Compute one token of each row; see `recurrent_reference.delta_step`. `normalizes` and the sizes are compiled in.

    Rows that share a slot, as padding does, leave any of their states there. The states must be contiguous but for
    their slots.
    """
    rows, key_heads, key_dim = query.shape
    heads, value_dim = value.shape[1:]
    out = torch.empty(value.shape, dtype=query.dtype, device=query.device)
    query, key, value, decay, beta = map(dense_vectors, (query, key, value, decay, beta))
    by_channel = decay.dim() == 3
    tile_keys = power_of_2(key_dim)
    tile_values = min(power_of_2(value_dim), max(8, _TILE // tile_keys))
    _delta_step_kernel[(-(-value_dim // tile_values), heads, rows)](
        query,
        key,
        value,
        decay,
        beta,
        states,
        slots,
        out,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        decay.stride(0),
        decay.stride(1) if by_channel else 1,
        beta.stride(0),
        states.stride(0),
        key_dim**-0.5,
        group=heads // key_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        tile_keys=tile_keys,
        tile_values=tile_values,
        normalizes=normalizes,
        by_channel=by_channel,
        num_warps=4,
        **launch_options(out.device),
    )
    return out


def conv_step(
    x: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    activates: bool,
) -> torch.Tensor:
    """Convolve the last inputs of each row; see `recurrent_reference.conv_step`. Sizes but channels are compiled in.

    Rows that share a slot, as padding does, leave any of their inputs there. The states must be contiguous but for
    their slots.
    """
    rows, channels = x.shape
    out = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    x = dense_vectors(x)
    tile = min(_CHANNELS, power_of_2(channels, 16))
    _conv_step_kernel[(-(-channels // tile), rows)](
        x,
        states,
        slots,
        weight,
        weight if bias is None else bias,
        out,
        x.stride(0),
        states.stride(0),
        channels,
        inputs=states.shape[-1],
        taps=weight.shape[-1],
        has_bias=bias is not None,
        activates=activates,
        tile=tile,
        num_warps=2,
        **launch_options(out.device),
    )
    return out


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _conv_step_kernel(
    x: tl.tensor,
    states: tl.tensor,
    slots: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    x_row: tl.tensor,
    states_row: tl.tensor,
    channels: tl.tensor,
    inputs: tl.constexpr,
    taps: tl.constexpr,
    has_bias: tl.constexpr,
    activates: tl.constexpr,
    tile: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Convolve some channels of one row; grid `(parts of the channels, rows)`."""
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * tile + tl.arange(0, tile)
    inside = channel < channels
    factors = weight + channel * taps + (taps - 1 - inputs)  # of the oldest input; those without a tap lie before it
    total = tl.zeros([tile], tl.float32)
    if has_bias:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(early)
    at = states + tl.load(slots + row).to(tl.int64) * states_row + channel * inputs
    new = tl.load(x + row * x_row + channel, mask=inside, other=0.0)
    for i in tl.static_range(inputs):
        past = tl.load(at + i, mask=inside, other=0.0)
        if i >= inputs + 1 - taps:
            total += past.to(tl.float32) * tl.load(factors + i, mask=inside, other=0.0).to(tl.float32)
        if i > 0:
            tl.store(at + i - 1, past, mask=inside)
    tl.store(at + inputs - 1, new.to(states.dtype.element_ty), mask=inside)
    let_next_begin(early)
    total += new.to(tl.float32) * tl.load(factors + inputs, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(out.dtype.element_ty)
    if activates:
        rounded = activated(rounded.to(tl.float32), 0).to(out.dtype.element_ty)
    tl.store(out + row * channels + channel, rounded, mask=inside)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _delta_step_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    decay: tl.tensor,
    beta: tl.tensor,
    states: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    query_row: tl.tensor,
    query_head: tl.tensor,
    key_row: tl.tensor,
    key_head: tl.tensor,
    value_row: tl.tensor,
    value_head: tl.tensor,
    decay_row: tl.tensor,
    decay_head: tl.tensor,
    beta_row: tl.tensor,
    states_row: tl.tensor,
    scale: tl.tensor,
    group: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    tile_keys: tl.constexpr,
    tile_values: tl.constexpr,
    normalizes: tl.constexpr,
    by_channel: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Compute some values of one head of one row; grid `(parts of a head's values, heads, rows)`."""
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    keys = tl.arange(0, tile_keys)
    values = tl.program_id(0) * tile_values + tl.arange(0, tile_values)
    is_key, is_value = keys < key_dim, values < value_dim
    is_both = is_key[:, None] & is_value[None, :]
    wait_for_inputs(early)
    slot = tl.load(slots + row).to(tl.int64)
    within = keys[:, None] * value_dim + values[None, :]
    at = states + slot * states_row + head * (key_dim * value_dim) + within
    state = tl.load(at, mask=is_both, other=0.0)
    q = tl.load(query + row * query_row + (head // group) * query_head + keys, mask=is_key, other=0.0).to(tl.float32)
    k = tl.load(key + row * key_row + (head // group) * key_head + keys, mask=is_key, other=0.0).to(tl.float32)
    v = tl.load(value + row * value_row + head * value_head + values, mask=is_value, other=0.0).to(tl.float32)
    amount = tl.load(beta + row * beta_row + head).to(tl.float32)
    if by_channel:
        kept = tl.exp(
            tl.load(decay + row * decay_row + head * decay_head + keys, mask=is_key, other=0.0).to(tl.float32)
        )
        state = state * kept[:, None]
    else:
        state = state * tl.exp(tl.load(decay + row * decay_row + head).to(tl.float32))
    let_next_begin(early)
    if normalizes:
        q = q * tl.rsqrt(tl.sum(q * q, 0) + 1e-6)
        k = k * tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    q = q * scale
    written = (v - tl.sum(state * k[:, None], 0)) * amount
    state = state + k[:, None] * written[None, :]
    tl.store(at, state, mask=is_both)
    result = tl.sum(state * q[:, None], 0)
    tl.store(
        out + (row * tl.num_programs(1) + head) * value_dim + values, result.to(out.dtype.element_ty), mask=is_value
    )
