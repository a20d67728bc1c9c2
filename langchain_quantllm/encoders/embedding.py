"""The operation of an embedding model: from texts or images to vectors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_quantllm.compat.sentence_transformers import features_of, longest_input
from langchain_quantllm.encoders.texts import cut_texts
from langchain_quantllm.errors import InvalidOptionError, PromptTooLongError

SDPA_KERNELS = ("flash", "efficient", "cudnn", "math")
"""Values of `sdpa_kernel`, which kernel PyTorch's attention uses."""

_IMAGE_TOKENS = 256
"""Tokens that an image counts as in a batch: about the patches of a picture of 224 to 256 pixels."""


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Compute one vector for each text or image.

    Args:
        prompt: Put before each text.
        task: `"query"`, `"document"` or None; models with a Router choose their modules by it.
        max_length: Most tokens of a text; None is what the model reads.
        cuts: Cut texts that are too long; otherwise they are an error.
        sdpa_kernel: One of `SDPA_KERNELS`; None leaves it to PyTorch.
        is_image: Whether the items are Pillow images instead of texts.
    """

    prompt: str | None = None
    task: str | None = None
    max_length: int | None = None
    cuts: bool = True
    sdpa_kernel: str | None = None
    is_image: bool = False

    def measure(self, model: Any, items: Sequence[Any]) -> tuple[Sequence[Any], Sequence[int]]:
        """Count the tokens of texts, and cut those that are too long.

        Args:
            model: The model of sentence-transformers.
            items: Texts or images.

        Raises:
            PromptTooLongError: If a text is too long and may not be cut.
            InvalidOptionError: If `max_length` is more than the model reads, or a text has no token.
        """
        if self.is_image:
            return items, [_IMAGE_TOKENS] * len(items)
        most_tokens = self._most_tokens(model)
        prompt = self.prompt or ""
        cut, lengths = cut_texts(model.tokenizer, [prompt + text for text in items], most_tokens)
        for text, length in zip(items, lengths, strict=True):
            if length == 0:
                msg = f"the text {text!r} has no token for this model, and so no vector; leave it out."
                raise InvalidOptionError(msg)
            if most_tokens is not None and length > most_tokens and not self.cuts:
                msg = (
                    f"a text of {len(text)} characters, which begins with {text[:40]!r}, has more than the "
                    f"{most_tokens} tokens that are read; split it, or pass on_too_long='truncate'."
                )
                raise PromptTooLongError(msg)
        bounded = [length if most_tokens is None else min(length, most_tokens) for length in lengths]
        return [text[len(prompt) :] for text in cut], bounded

    def _most_tokens(self, model: Any) -> int | None:
        longest = longest_input(model)
        if self.max_length is not None and longest is not None and self.max_length > longest:
            msg = f"max_length={self.max_length} is more than the {longest} tokens that this model reads."
            raise InvalidOptionError(msg)
        return self.max_length or longest

    def run(self, model: Any, items: Sequence[Any]) -> Sequence[Any]:
        """Compute the vectors, float32 of shape `(size,)`; pooled and normalized as the model's files say."""
        import torch

        features = features_of(
            model,
            items,
            prompt=None if self.is_image else self.prompt,
            task=self.task,
            max_length=None if self.is_image else self.max_length,
        )
        options = {} if self.task is None else {"task": self.task}
        with torch.inference_mode(), sdpa_by(self.sdpa_kernel):
            vectors = model(features, **options)["sentence_embedding"]
        return list(vectors.float().cpu().numpy())


@contextlib.contextmanager
def sdpa_by(kernel: str | None) -> Iterator[None]:
    """Let PyTorch's attention use one kernel inside the block; None leaves the choice to PyTorch."""
    if kernel is None:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    with sdpa_kernel(backends[kernel]):
        yield
