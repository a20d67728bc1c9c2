"""The quality of a scheme: the perplexity of a text, and how far predictions are from the unquantized model's.

Knows no scheme and no engine: it takes the logits of a transformers model. Numbers that are compared have intervals:
a bootstrap over blocks of the text, as tokens beside each other are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from langchain_quantllm.bench.intervals import Interval, bootstrap
from langchain_quantllm.errors import GenerationError, InvalidOptionError, UnsupportedError

if TYPE_CHECKING:
    import torch

_TEXT = "evaluation.txt"
_BLOCK_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well a model predicts a text.

    Args:
        perplexity: `exp(loss_nats)`.
        loss_nats: Mean negative log-likelihood of the scored tokens, natural logarithm.
        tokens: Tokens that were scored.
        low: Lower end of the perplexity's interval of 95%, of a bootstrap over blocks of the text.
        high: Its upper end.
    """

    perplexity: float
    loss_nats: float
    tokens: int
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far a model's predictions of a text are from a reference's.

    Args:
        perplexity: The model's own perplexity.
        kl_nats: Kullback-Leibler divergence of the model from the reference at each token, natural logarithm: 0 where
            the predictions are equal.
        loss_increase_nats: Loss above that of the reference.
        agreement: Share of the places where both find the same token likeliest, from 0 to 1.
    """

    perplexity: Perplexity
    kl_nats: Interval
    loss_increase_nats: Interval
    agreement: Interval


class Reference:
    """The predictions of a text by the model that others are compared with.

    Log probabilities are kept in float16 in main memory, two bytes for each token of the text and word of the
    vocabulary; the error of a divergence that comes from it is below 1e-4 nats.
    """

    def __init__(
        self, model: Any, tokenizer: Any, text: str, *, window_tokens: int = 512, max_tokens: int | None = None
    ) -> None:
        """Predict a text; arguments and errors are those of `perplexity`."""
        self._cut = (tokenizer, text, window_tokens, max_tokens)
        windows = _checked_windows(model, *self._cut)
        self._predictions = [(log_probs.half().cpu(), losses) for log_probs, losses in _predict(model, windows)]
        self.perplexity = _perplexity([losses for _, losses in self._predictions])
        """The reference's own perplexity."""

    def distance(self, model: Any) -> Distance:
        """Compare a model with the reference on the same windows.

        Args:
            model: A causal language model of transformers with the same tokenizer, in evaluation mode.

        Raises:
            InvalidOptionError: If its vocabulary has another size.
            GenerationError: If its logits are not numbers.
        """
        import torch

        found: list[tuple[torch.Tensor, ...]] = []
        predicted = _predict(model, _checked_windows(model, *self._cut))
        for (log_probs, losses), (kept, expected_losses) in zip(predicted, self._predictions, strict=True):
            if log_probs.shape != kept.shape:
                msg = f"the model predicts {log_probs.shape[-1]} tokens, and the reference {kept.shape[-1]}."
                raise InvalidOptionError(msg)
            expected = kept.to(log_probs).log_softmax(-1)
            kl = torch.nn.functional.kl_div(log_probs, expected, reduction="none", log_target=True).sum(-1)
            agreement = log_probs.argmax(-1) == expected.argmax(-1)
            found.append((losses, kl.double().cpu(), losses - expected_losses, agreement.double().cpu()))
        losses, *compared = zip(*found, strict=True)
        kl_nats, loss_increase_nats, agreement = (bootstrap(torch.cat(parts), _BLOCK_TOKENS) for parts in compared)
        return Distance(
            perplexity=_perplexity(losses),
            kl_nats=kl_nats,
            loss_increase_nats=loss_increase_nats,
            agreement=agreement,
        )


def perplexity(
    model: Any, tokenizer: Any, text: str, *, window_tokens: int = 512, max_tokens: int | None = None
) -> Perplexity:
    """Measure the perplexity of a text.

    The text is cut into windows that do not overlap, each seen by itself. Where the tokenizer puts a begin token
    before texts, each window has one, and every token of the text is scored; else the first one of a window has
    nothing before it and is not. Logits are brought to float32, losses are summed in float64.

    Source: Jelinek et al., Perplexity, a measure of the difficulty of speech recognition tasks, JASA 62 (1977).

    Args:
        model: A causal language model of transformers, loaded in any scheme and in evaluation mode.
        tokenizer: Its tokenizer.
        text: The text.
        window_tokens: Length of a window in tokens, its begin token included.
        max_tokens: Most tokens of the text that are looked at; None for all.

    Raises:
        InvalidOptionError: If the windows do not fit the model, or the text has no token that can be scored.
        GenerationError: If the model's logits are not numbers.
    """
    windows = _checked_windows(model, tokenizer, text, window_tokens, max_tokens)
    return _perplexity([losses for _, losses in _predict(model, windows)])


def evaluation_text() -> str:
    """Read the text that comes with this package, for comparing the schemes of a model with each other.

    Raises:
        UnsupportedError: If this installation has none.
    """
    file = resources.files("langchain_quantllm") / "data" / _TEXT
    if not file.is_file():
        msg = f"this installation has no {_TEXT}; name a text file of your own, or leave the quality out."
        raise UnsupportedError(msg)
    return file.read_text(encoding="utf-8")


def _predict(model: Any, windows: Sequence[Sequence[int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the log probabilities of each window, `(tokens, vocabulary)`, and the losses, float64 on the CPU."""
    import torch

    device = model.get_input_embeddings().weight.device
    for window in windows:
        ids = torch.tensor([window], device=device)
        with torch.no_grad():
            log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            losses = -log_probs.gather(1, ids[0, 1:, None].to(log_probs.device))[:, 0]
        yield log_probs, losses.double().cpu()


def _perplexity(losses: Sequence[torch.Tensor]) -> Perplexity:
    import torch

    tokens = sum(map(len, losses))
    loss_nats = sum(float(part.sum()) for part in losses) / tokens
    if not math.isfinite(loss_nats):
        msg = f"the model's loss on the text is {loss_nats}: its logits are not numbers; try dtype='bfloat16'."
        raise GenerationError(msg)
    found = bootstrap(torch.cat(list(losses)), _BLOCK_TOKENS)
    return Perplexity(
        perplexity=math.exp(loss_nats),
        loss_nats=loss_nats,
        tokens=tokens,
        low=math.exp(found.low),
        high=math.exp(found.high),
    )


def _checked_windows(
    model: Any, tokenizer: Any, text: str, window_tokens: int, max_tokens: int | None
) -> list[list[int]]:
    _check(model, window_tokens, max_tokens)
    windows = list(_windows(tokenizer, text, window_tokens, max_tokens))
    if not windows:
        msg = (
            f"the text of {len(text)} characters is too short: none of its tokens has another before it; use a text "
            "of at least a few sentences."
        )
        raise InvalidOptionError(msg)
    return windows


def _check(model: Any, window_tokens: int, max_tokens: int | None) -> None:
    if window_tokens < 2:
        msg = f"window_tokens={window_tokens} is not allowed; it must be at least 2."
        raise InvalidOptionError(msg)
    if max_tokens is not None and max_tokens < 1:
        msg = f"max_tokens={max_tokens} is not allowed; it must be at least 1, or None for the whole text."
        raise InvalidOptionError(msg)
    context_tokens = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context_tokens is not None and window_tokens > context_tokens:
        msg = f"window_tokens={window_tokens} is more than the model's context of {context_tokens} tokens."
        raise InvalidOptionError(msg)


def _windows(tokenizer: Any, text: str, window_tokens: int, max_tokens: int | None) -> Iterator[list[int]]:
    """Cut a text into windows; those without a token to score are left out."""
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[:max_tokens]
    begin = _begin(tokenizer)
    step = window_tokens - len(begin)
    for i in range(0, len(ids), step):
        window = [*begin, *ids[i : i + step]]
        if len(window) > 1:
            yield window


def _begin(tokenizer: Any) -> list[int]:
    """The begin token, if the tokenizer puts one before texts by itself, as in training; else nothing."""
    bos = tokenizer.bos_token_id
    found = list(tokenizer("a", verbose=False)["input_ids"])
    return [bos] if bos is not None and found[:1] == [bos] else []
