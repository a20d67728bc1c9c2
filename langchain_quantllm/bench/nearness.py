"""How near answers are to a reference model, usually the same one in 16 bits.

The reference reads each answer once: how likely it finds the answer's tokens, and how far the distributions that they
were chosen from are from its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_quantllm.bench.intervals import Interval, ratio


@dataclass(frozen=True, kw_only=True)
class Nearness:
    """An answer, as the reference sees it.

    Args:
        nats: Log-likelihood of each token under the reference, natural logarithm.
        kl_nats: Kullback-Leibler divergence of the answering model from the reference at each token, over the model's
            likeliest tokens and all others as one: at most the divergence over the whole vocabulary, and near it.
        choices: The token that the reference finds likeliest in each place, as text.
    """

    nats: tuple[float, ...]
    kl_nats: tuple[float, ...]
    choices: tuple[str, ...]

    @property
    def mean_nats(self) -> float:
        """Mean log-likelihood of a token."""
        return sum(self.nats) / len(self.nats)

    @property
    def mean_kl_nats(self) -> float:
        """Mean divergence at a token."""
        return sum(self.kl_nats) / len(self.kl_nats)


class ReferenceReader:
    """Reads answers with a loaded reference model."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Take a causal language model of transformers and its tokenizer."""
        self._model, self._tokenizer = model, tokenizer

    def read(self, prompt_ids: Sequence[int], entries: Sequence[Mapping[str, Any]]) -> Nearness | None:
        """Read an answer.

        Args:
            prompt_ids: Token ids of its prompt.
            entries: Its tokens, as `logprobs` reports them, with the likeliest ones in each place.

        Returns:
            None for an answer without tokens.
        """
        if not entries:
            return None
        rows = self._log_probs(prompt_ids, [entry["token_id"] for entry in entries])
        return Nearness(
            nats=tuple(float(row[entry["token_id"]]) for row, entry in zip(rows, entries, strict=True)),
            kl_nats=tuple(_divergence(row, entry["top_logprobs"]) for row, entry in zip(rows, entries, strict=True)),
            choices=tuple(self._tokenizer.decode(int(row.argmax())) for row in rows),
        )

    def gap_nats(self, prompt_ids: Sequence[int], common_ids: Sequence[int], a: int, b: int) -> float:
        """How much likelier the reference finds token `a` than `b` after a prompt and the answers' common beginning."""
        row = self._log_probs(prompt_ids, [*common_ids, a])[-1]
        return float(row[a] - row[b])

    def _log_probs(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Any:
        """Log probabilities in the places of an answer, of shape `(tokens, vocabulary)`, float64 on the CPU."""
        import torch

        device = self._model.get_input_embeddings().weight.device
        ids = torch.tensor([[*prompt_ids, *answer_ids[:-1]]], device=device)
        with torch.no_grad():
            logits = self._model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 :]
        return logits.double().log_softmax(-1).cpu()


def mean_kl(found: Sequence[Nearness]) -> Interval:
    """Mean divergence at a token of some answers, with the interval of 95% of a bootstrap over the answers."""
    return ratio([sum(one.kl_nats) for one in found], [len(one.kl_nats) for one in found])


def _divergence(reference: Any, likeliest: Sequence[Mapping[str, Any]]) -> float:
    """Divergence of a model's distribution from the reference's row, by the model's likeliest tokens and the rest."""
    own = [math.exp(entry["logprob"]) for entry in likeliest]
    expected = [math.exp(reference[entry["token_id"]]) for entry in likeliest]
    pairs = [*zip(expected, own, strict=True), (1 - sum(expected), 1 - sum(own))]
    return sum(p * math.log(p / max(q, _LEAST)) for p, q in pairs if p > _LEAST)


_LEAST = 1e-9
"""Shares below this are those of rounding."""
