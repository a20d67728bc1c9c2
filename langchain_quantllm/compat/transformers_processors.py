"""Processors of transformers: encoding their text in another way, and the length of their sounds.

Processors call their tokenizer, an attribute, with a list of texts; no option says how to encode them.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable
from typing import Any


class _Encoder:
    """A tokenizer with its own way to encode a text."""

    def __init__(self, tokenizer: Any, encode: Callable[[str], list[int]]) -> None:
        self._tokenizer = tokenizer
        self._encode = encode

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, *, return_tensors: Any = None, **options: Any) -> Any:
        from transformers import BatchEncoding

        texts = [text] if isinstance(text, str) else text
        rows = [self._encode(one) for one in texts]
        masks = [[1] * len(row) for row in rows]
        made = BatchEncoding({"input_ids": rows, "attention_mask": masks}, tensor_type=return_tensors)

        def char_to_token(row: int, char: int) -> int:
            """Count the tokens before that of a character, by encoding the text up to it (Idefics3 asks for images)."""
            return len(self._encode(texts[row][: char + 1])) - 1

        made.char_to_token = char_to_token
        return made


def with_encoder(processor: Any, encode: Callable[[str], list[int]]) -> Any:
    """Copy a processor so that it encodes the text in which it has replaced the placeholders by `encode`.

    Args:
        processor: The processor, which stays as it is.
        encode: Makes token ids of a text.
    """
    changed = copy.copy(processor)
    changed.tokenizer = _Encoder(processor.tokenizer, encode)
    return changed


def sample_image_prompt(processor: Any) -> tuple[list[int], dict[str, Any]]:
    """Make a short prompt with one small picture of random pixels.

    Args:
        processor: A processor for texts and images.

    Returns:
        Token ids, and the other inputs of the model.
    """
    from PIL import Image

    picture = Image.frombytes("RGB", (64, 48), random.Random(0).randbytes(64 * 48 * 3))  # noqa: S311  (no secrets)
    inputs = dict(processor(text=[f"{processor.image_token}\n"], images=[[picture]], return_tensors="pt"))
    del inputs["attention_mask"]
    return inputs.pop("input_ids")[0].tolist(), inputs


_MOST_S = 600.0
"""Seconds of a sound where a feature extractor sets no bound."""


def longest_sound_s(extractor: Any) -> float:
    """Return the most seconds of a sound that a feature extractor takes whole; of a longer one it drops the end.

    Whisper's kind has the number of samples as an attribute; Gemma's has it as a default of its call.
    """
    samples = getattr(extractor, "n_samples", None)
    if samples is None:
        parameter = inspect.signature(type(extractor).__call__).parameters.get("max_length")
        samples = None if parameter is None or not isinstance(parameter.default, int) else parameter.default
    return _MOST_S if not samples else min(_MOST_S, float(samples) / extractor.sampling_rate)
