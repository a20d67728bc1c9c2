"""The dtypes of the KV cache: their names, their bytes, and the layers that are not kept in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_quantllm.errors import InvalidOptionError, UnsupportedError

CACHE_DTYPES = ("auto", "fp8", "int8")
"""Values of `kv_cache_dtype`: the dtype of the model, or 8 bits with a scale for each token and head."""

SCALE_BYTES = 4
"""Bytes of the scales of a token's key and value in one head, in 8 bits."""


def check_cache_dtype(dtype: Any) -> str:
    """Check `kv_cache_dtype`, and return it.

    Raises:
        InvalidOptionError: If it is none of `CACHE_DTYPES`.
    """
    if isinstance(dtype, str) and dtype in CACHE_DTYPES:
        return dtype
    allowed = ", ".join(map(repr, CACHE_DTYPES))
    msg = (
        f"kv_cache_dtype={dtype!r} is not allowed; it must be one of {allowed}; 'auto' is the dtype of the model, "
        "which dtype= sets."
    )
    raise InvalidOptionError(msg)


def no_8bit_reason(
    heads: Sequence[tuple[int, int]], *, has_latents: bool = False, has_indexers: bool = False
) -> str | None:
    """Find the reason why layers are not kept in 8 bits; None if they can be.

    Args:
        heads: Sizes of a key and of a value, of each layer that keeps some.
        has_latents: Whether one of them keeps latents, from which keys and values are made.
        has_indexers: Whether one of them keeps keys by which tokens are chosen.
    """
    if not heads:
        return "its layers keep no keys and values"
    if has_latents:
        return "its layers keep latents, which are compressed already"
    if has_indexers:
        return "indexers choose the tokens that its attention sees, by keys of their own"
    odd = next((size for both in heads for size in both if size % 4), None)
    return None if odd is None else f"its heads have {odd} numbers, and 8 bits need a multiple of 4"


def check_8bit(dtype: str, reason: str | None) -> None:
    """Refuse a `kv_cache_dtype` in 8 bits for a reason; None for none.

    Raises:
        UnsupportedError: If there is a reason.
    """
    if dtype != "auto" and reason is not None:
        msg = f"kv_cache_dtype={dtype!r} is not possible for this model, as {reason}; use kv_cache_dtype='auto'."
        raise UnsupportedError(msg)
