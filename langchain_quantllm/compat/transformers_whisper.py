"""Whisper in transformers: the settings of its `generate`, and what its segments hold.

Source: `WhisperGenerationMixin` in transformers/models/whisper/generation_whisper.py. Not promised there: the names in
a generation config that only Whisper has, the marks of a segment without an end, and the tensors in a segment.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from langchain_quantllm.compat.library_logging import dropped_messages


class HeardWindow(NamedTuple):
    """What Whisper heard in a window, and how sure it is."""

    segments: list[SpokenSegment]
    logprob: float  # mean of the tokens
    compression_ratio: float  # of the tokens; high where they repeat themselves


class SpokenSegment(NamedTuple):
    """What Whisper heard between two of its timestamps."""

    start_s: float
    end_s: float
    text: str
    is_cut: bool  # the window ended within the next one


def languages_of(model: Any) -> dict[str, int]:
    """Return a model's languages by their codes, such as `"en"`, with their tokens; empty if it only knows English."""
    config = model.generation_config
    if not getattr(config, "is_multilingual", False):
        return {}
    return {name.strip("<|>"): token for name, token in (getattr(config, "lang_to_id", None) or {}).items()}


def writes_timestamps(model: Any) -> bool:
    """Say whether a model's generation config has the settings that timestamps need."""
    return hasattr(model.generation_config, "no_timestamps_token_id")


def language_names() -> dict[str, str]:
    """Return the codes of languages by their English names in lower case."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    return dict(TO_LANGUAGE_CODE)


def encode(model: Any, features: Any) -> Any:
    """Run the encoder over windows of 30 seconds.

    Args:
        model: A Whisper.
        features: Its input, of shape `(windows, mel bins, frames)`.

    Returns:
        The states, of shape `(windows, frames / 2, size)`.
    """
    import torch

    with torch.inference_mode():
        return model.get_encoder()(features).last_hidden_state


def first_impression(model: Any, states: Any) -> tuple[str | None, list[float]]:
    """Read what the model says before any text: the language of the first window, and whether windows have speech.

    Args:
        model: A Whisper.
        states: What `encode` returned.

    Returns:
        The code of the language, None for a model of English only; and the probability of no speech in each window.
    """
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    config, known = model.generation_config, languages_of(model)
    start = torch.full((len(states), 1), config.decoder_start_token_id, device=states.device)
    with torch.inference_mode():
        output = model(encoder_outputs=BaseModelOutput(states), decoder_input_ids=start, use_cache=False)
    logits = output.logits[:, -1].float()
    silence = logits.softmax(-1)[:, config.no_timestamps_token_id - 1].tolist()
    codes = list(known)
    language = codes[int(logits[0, list(known.values())].argmax())] if codes else None
    return language, silence


def prompt_ids(tokenizer: Any, text: str) -> Any:
    """Return the tokens of a text that a window's own text is to go on from, as a tensor."""
    return tokenizer.get_prompt_ids(text, return_tensors="pt")


def listen(
    model: Any, tokenizer: Any, states: Any, options: Mapping[str, Any], temperature: float
) -> list[HeardWindow]:
    """Write down windows of 30 seconds, once.

    Args:
        model: A Whisper.
        tokenizer: Its tokenizer.
        states: What `encode` returned.
        options: Arguments of its `generate`.
        temperature: 0 takes the most likely tokens.
    """
    from transformers.modeling_outputs import BaseModelOutput

    with _known_warnings():
        output = model.generate(
            encoder_outputs=BaseModelOutput(states.clone()),
            return_timestamps=True,
            return_segments=True,
            force_unique_generate_call=True,  # windows follow each other by the caller's rules
            temperature=temperature,
            logprob_threshold=-math.inf,  # the scores stay in the result
            **options,
        )
    begin = model.generation_config.no_timestamps_token_id + 1
    return [_heard(model, tokenizer, segments, begin, temperature) for segments in output["segments"]]


def _heard(
    model: Any, tokenizer: Any, segments: Sequence[Mapping[str, Any]], begin: int, temperature: float
) -> HeardWindow:
    import torch

    found = [_segment(tokenizer, segment, begin) for segment in segments]
    if not segments:
        return HeardWindow([], 0.0, 0.0)
    result = segments[0]["result"]
    # The tokens that were not sampled are the beginning, which has no scores.
    tokens = result["sequences"][-len(result["scores"]) :]
    ended = tokens[: int((tokens != model.generation_config.eos_token_id).sum()) + 1]
    score = result.get("sequences_scores")
    if score is None:
        score = model._retrieve_avg_logprobs(result["scores"], ended, temperature)
    text = torch.cat([segment["tokens"] for segment in segments])
    return HeardWindow(found, float(score), float(model._retrieve_compression_ratio(text, model.config.vocab_size)))


def _segment(tokenizer: Any, segment: Mapping[str, Any], begin: int) -> SpokenSegment:
    tokens: Sequence[int] = segment["tokens"].tolist()
    # Two timestamps at the end: that of the segment, and the beginning of one that the window cuts.
    is_cut = len(tokens) > 1 and min(tokens[-2:]) >= begin
    text = tokenizer.decode([token for token in tokens if token < begin], skip_special_tokens=True)
    return SpokenSegment(float(segment["start"]), float(segment["end"]), text, is_cut)


@contextlib.contextmanager
def _known_warnings() -> Iterator[None]:
    """Drop warnings about what `generate` passes to itself (5.24), and about settings that it does use."""
    with (
        dropped_messages("transformers.generation.utils", "Passing `generation_config` together with"),
        dropped_messages("transformers.models.whisper.generation_whisper", "Audio input consists of only"),
    ):
        yield
