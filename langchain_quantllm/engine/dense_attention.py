"""Attention by PyTorch over the keys and values that tokens see: how keys are scored, and the operations of it.

Knows no block and no sequence: `gather_attention` and its like bring keys and values together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How a layer scores keys.

    Args:
        scale: Factor of the scores.
        window: How many of the last positions a token sees, its own included; 0 for all.
        softcap: Scores become `softcap * tanh(scores / softcap)`; 0 for no cap.
        chunk: A token sees its own chunk of so many positions, up to itself; 0 for all.
        sinks: See `kernels.reference.decode_attention`.
        biases: See `kernels.reference.decode_attention`.
        relative: See `Attention.attend`; of the tokens that attend.
    """

    scale: float
    window: int
    softcap: float
    chunk: int = 0
    sinks: torch.Tensor | None = None
    biases: torch.Tensor | None = None
    relative: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether PyTorch's own attention scores keys this way."""
        return not self.softcap and self.sinks is None and self.biases is None and self.relative is None

    def of_tokens(self, tokens: slice | torch.Tensor | None) -> Scoring:
        """Return that of some of the tokens; None for all."""
        if self.relative is None or tokens is None:
            return self
        has_own_sinks = self.sinks is not None and self.sinks.dim() > 1
        sinks = self.sinks[:, tokens] if self.sinks is not None and has_own_sinks else self.sinks
        return replace(self, relative=self.relative[:, tokens], sinks=sinks)

    def first_seen(self, position: int) -> int:
        """Return the first position that a token sees."""
        first = max(0, position + 1 - self.window) if self.window else 0
        return max(first, position // self.chunk * self.chunk) if self.chunk else first


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scoring: Scoring
) -> torch.Tensor:
    """Attend with PyTorch; in separate operations if its own attention does not score this way.

    Args:
        query: Of shape `(rows, heads, queries, key_dim)`.
        key: Of shape `(rows, heads, keys, key_dim)`.
        value: Of shape `(rows, heads, keys, value_dim)`; finite where the mask hides it.
        mask: The keys that each query sees, bool, in a shape that fits the scores; None for all.
        scoring: How keys are scored; sinks and biases in shapes that fit the scores.

    Returns:
        Of shape `(rows, heads, queries, value_dim)`.
    """
    if scoring.is_plain:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scoring.scale)
    return _product(_shares(_scores(query, key, mask, scoring), scoring.sinks).to(value.dtype), value)


def dense_attention_around_nan(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scoring: Scoring
) -> torch.Tensor:
    """Attend in float32; a key or a value that is NaN or infinite spoils the tokens that see it, and no other.

    Arguments and result are those of `dense_attention`.
    """
    spoils = ~value.isfinite().all(-1)
    scores = _scores(query.float(), key.float().masked_fill(spoils[..., None], torch.nan), mask, scoring)
    return _product(_shares(scores, scoring.sinks), value.float().masked_fill(spoils[..., None], 0)).to(value.dtype)


def _scores(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scoring: Scoring) -> torch.Tensor:
    """Compute scores of shape `(..., queries, keys)`, -inf where the mask hides a key."""
    scores = _product(query, key.transpose(-1, -2)) * (scoring.scale / (scoring.softcap or 1.0))
    if scoring.softcap:
        scores = scoring.softcap * torch.tanh(scores)
    if scoring.biases is not None:
        scores = scores + scoring.biases
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def _shares(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Compute the softmax in float32, beside sinks in a shape that fits the scores."""
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32)
    beside = sinks.float().expand(*scores.shape[:-1], 1)
    return torch.cat([scores.float(), beside], -1).softmax(-1)[..., :-1]


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply `(a, heads, n, m)` by `(a, heads, m, k)`; without copies if the second has one head, expanded."""
    if right.shape[1] == 1 or right.stride(1):
        return left @ right
    return (left.flatten(1, 2) @ right[:, 0]).unflatten(1, left.shape[1:3])


def by_distance(relative: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """Take each token's biases of keys at some distances.

    Args:
        relative: See `Attention.attend`.
        distances: How far each key is behind the token, of shape `(tokens, keys)`, int64; negative for keys that a
            mask hides.

    Returns:
        Of shape `(heads, tokens, keys)`.
    """
    most = relative.shape[-1] - 1
    taken = relative.gather(-1, distances.clamp(0, most).expand(len(relative), -1, -1))
    return taken.masked_fill(distances > most, 0)
