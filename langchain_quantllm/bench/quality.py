"""The perplexity of a text under a loaded model, the measure of the quality of a scheme.

Knows no scheme and no engine: it takes the logits of a transformers model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

from langchain_quantllm.errors import GenerationError, InvalidOptionError, UnsupportedError

_TEXT = "evaluation.txt"


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well a model predicts a text.

    Args:
        perplexity: `exp(loss_nats)`.
        loss_nats: Mean negative log-likelihood of the scored tokens, natural logarithm.
        tokens: Tokens that were scored.
    """

    perplexity: float
    loss_nats: float
    tokens: int


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
    import torch

    _check(model, window_tokens, max_tokens)
    windows = list(_windows(tokenizer, text, window_tokens, max_tokens))
    if not windows:
        msg = (
            f"the text of {len(text)} characters is too short: none of its tokens has another before it; use a text "
            "of at least a few sentences."
        )
        raise InvalidOptionError(msg)
    device = model.get_input_embeddings().weight.device
    loss_sum, tokens = 0.0, 0
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="none")
            loss_sum += float(losses.double().sum())
            tokens += len(window) - 1
    loss_nats = loss_sum / tokens
    if not math.isfinite(loss_nats):
        msg = f"the model's loss on the text is {loss_nats}: its logits are not numbers; try dtype='bfloat16'."
        raise GenerationError(msg)
    return Perplexity(perplexity=math.exp(loss_nats), loss_nats=loss_nats, tokens=tokens)


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
