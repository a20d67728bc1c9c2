"""One token of gated delta rules as a Triton kernel, which reads and writes each state once, where it lies."""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.launch import (
    dense_vectors,
    launch_options,
    let_next_begin,
    power_of_2,
    wait_for_inputs,
)

__all__ = ["delta_step"]

_TILE = 4096
"""Numbers of a state in one program."""


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
