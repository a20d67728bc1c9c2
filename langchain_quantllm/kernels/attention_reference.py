"""What `paged_attention` computes, in plain torch: the same names and signatures, in loops and float32.

Owns the meaning of the functions: the Triton kernels are tested against them, and they run where
Triton does not. Knows tensors, pages and rows; no model, no engine, no Triton.
"""

from __future__ import annotations

import torch

PREFILL_BLOCK = 64
"""Most query tokens of one block of prefill."""


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
            `PREFILL_BLOCK`. A block of 0 tokens does nothing.
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
