"""The inputs of a loaded model: token ids of prompts, tensors of images and sounds, and a checkpoint's own options."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from langchain_quantllm.compat.transformers_pipelines import options_of
from langchain_quantllm.compat.transformers_tokenizers import encodes_without_change
from langchain_quantllm.engine.clean_thread import in_clean_thread
from langchain_quantllm.engine.worker import UNLOADED
from langchain_quantllm.errors import GenerationError
from langchain_quantllm.loading.parts import ModelParts
from langchain_quantllm.loading.pieces import piece_ids
from langchain_quantllm.loading.processors import NO_MEDIA, Media, process
from langchain_quantllm.loading.registry import SharedModel
from langchain_quantllm.options import normalize


def require_parts(model: SharedModel) -> ModelParts:
    """Return what a loaded model has beside its weights.

    Raises:
        GenerationError: If another thread has unloaded the model meanwhile.
    """
    parts = model.parts
    if parts is None:
        raise GenerationError(UNLOADED)
    return parts


def require_pipeline(model: SharedModel) -> Any:
    """Return the pipeline of a loaded model.

    Raises:
        GenerationError: If another thread has unloaded the model meanwhile.
        UnsupportedError: If its weights are in an engine of others.
    """
    pipeline = model.pipeline
    if pipeline is None:
        raise GenerationError(UNLOADED)
    return pipeline


def token_ids(model: SharedModel, text: str | Sequence[str], *, add_special_tokens: bool = True) -> list[int]:
    """Tokenize a text; a begin token that the text already has, from a chat template say, is not doubled.

    Threads do so at once where the tokenizer allows it: a long text takes seconds.

    Args:
        model: The loaded model.
        text: The text, or pieces of it of which none shares a token with the next.
        add_special_tokens: Let the tokenizer add its begin token.
    """
    parts = require_parts(model)
    tokenizer = parts.tokenizer
    # A processor uses the same tokenizer, with other settings.
    is_shared = parts.processor is None and encodes_without_change(tokenizer)
    with contextlib.nullcontext() if is_shared else model.tokenizer_lock:
        pieces = (text,) if isinstance(text, str) else text
        ids = piece_ids(tokenizer, pieces, add_special_tokens=add_special_tokens)
    bos = tokenizer.bos_token_id
    return ids[1:] if add_special_tokens and bos is not None and ids[:2] == [bos, bos] else ids


def prompt_inputs(
    model: SharedModel, prompt: str | Sequence[str], media: Media = NO_MEDIA, *, add_special_tokens: bool = True
) -> tuple[list[int], dict[str, Any] | None]:
    """Turn a prompt into token ids, and its images and sounds into other inputs, by the names of the model's arguments.

    Args:
        model: The loaded model.
        prompt: The prompt, with a placeholder for each image and sound; or pieces of it of which none shares a token
            with the next.
        media: The images and sounds, in the placeholders' order.
        add_special_tokens: Let the tokenizer add its begin token.

    Returns:
        The token ids, and the other inputs; None without images and sounds.
    """
    if not media:
        return token_ids(model, prompt, add_special_tokens=add_special_tokens), None
    processor = require_parts(model).processor
    with model.tokenizer_lock:  # the processor uses the same tokenizer
        pieces = (prompt,) if isinstance(prompt, str) else prompt
        return in_clean_thread(process)(processor, pieces, media, add_special_tokens=add_special_tokens)


def stop_token_ids(tokenizer: Any, stop: Sequence[str]) -> tuple[int, ...]:
    """Return the ids of the stop strings that are one special token each; these never appear as text."""
    vocabulary: dict[str, int] = tokenizer.get_added_vocab() if stop else {}
    return tuple(vocabulary[s] for s in stop if s in vocabulary)


def stored_options(parts: ModelParts) -> dict[str, Any]:
    """Read the options that came with the checkpoint or were given to its pipeline when it was made.

    The pipeline's own defaults (sampling at temperature 0.7) are not among them.
    """
    stored = parts.generation_config.to_diff_dict()
    stored.pop("eos_token_id", None)  # the engine reads it itself
    stored.pop("use_cache", None)  # often False, left over from training
    given = {} if parts.pipeline is None else options_of(parts.pipeline)
    options = normalize({**stored, **given}, lenient=True)
    options.pop("adapter", None)  # no option of transformers
    return options
