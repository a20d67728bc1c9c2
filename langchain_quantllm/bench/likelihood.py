"""Log-likelihoods of continuations: token ids in, sums of log probabilities out, in padded batches.

Knows no text and no engine: it takes a model of transformers. Whoever wants the numbers of the fast engine's kernels
calls it inside `ContinuousEngine.products`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_MOST_ROWS, _MOST_TOKENS = 64, 4096
"""Most sequences of a batch, and most tokens with their padding."""

_LOGITS_ROWS = 256
"""Rows of logits that become float32 at once."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How likely a model finds a continuation.

    Args:
        nats: Sum of its tokens' log probabilities, natural logarithm.
        is_greedy: Whether each of its tokens is the likeliest one in its place.
    """

    nats: float
    is_greedy: bool


def score_continuations(
    model: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    most_tokens: int | None = None,
    done: Callable[[int], None] = lambda _: None,
) -> list[Score]:
    """Score continuations of contexts.

    Pairs of nearly the same length share a batch, padded on the right, where no token sees the padding. Pairs with the
    same input, such as answers of one token each to one question, share a row. Logits are brought to float32, sums are
    in float64.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        pairs: Token ids of a context and of its continuation, at least one each.
        most_tokens: Most tokens that the model reads; the beginnings of longer inputs are cut off, and a continuation
            of more than these loses its beginning. None for any number.
        done: Called with the number of pairs after each batch.

    Returns:
        A score for each pair.
    """
    import torch

    rows: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(pairs):
        ids = (*context, *continuation)[:-1]
        rows.setdefault(ids if most_tokens is None else ids[-most_tokens:], []).append(i)
    scores: list[Score | None] = [None] * len(pairs)
    for batch in _batches(sorted(rows, key=len, reverse=True)):
        with torch.no_grad():
            logits = _logits(model, batch)
            for row, ids in enumerate(batch):
                for i in rows[ids]:
                    targets = list(pairs[i][1])[-len(ids) :]
                    scores[i] = _score(logits[row, len(ids) - len(targets) : len(ids)], targets)
        done(sum(len(rows[ids]) for ids in batch))
    return [score for score in scores if score is not None]


def _batches(rows: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
    """Cut rows, the longest first, into batches."""
    start = 0
    while start < len(rows):
        count = max(1, min(_MOST_ROWS, _MOST_TOKENS // len(rows[start])))
        yield rows[start : start + count]
        start += count


def _logits(model: Any, batch: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Return the logits of shape `(rows, tokens, vocabulary)`."""
    import torch

    width = max(map(len, batch))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
    device = model.get_input_embeddings().weight.device
    logits: torch.Tensor = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    return logits


def _score(logits: torch.Tensor, targets: Sequence[int]) -> Score:
    import torch

    nats, is_greedy = 0.0, True
    wanted = torch.tensor(targets, device=logits.device)
    for rows, ids in zip(logits.split(_LOGITS_ROWS), wanted.split(_LOGITS_ROWS), strict=True):
        log_probs = rows.float().log_softmax(-1)
        nats += float(log_probs.gather(1, ids[:, None]).double().sum())
        is_greedy &= bool((log_probs.argmax(-1) == ids).all())
    return Score(nats=nats, is_greedy=is_greedy)
