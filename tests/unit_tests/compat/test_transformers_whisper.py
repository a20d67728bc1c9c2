"""What Whisper of transformers does not promise: the segments of its `generate`, and the names in its configs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration

from langchain_quantllm.compat import transformers_whisper as whisper
from tests.support.sounds import MUSEUM, decoded
from tests.support.speech_models import whisper_model


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, Any]:
    """Load model, tokenizer and feature extractor of whisper-base."""
    folder = whisper_model()
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder), AutoFeatureExtractor.from_pretrained(folder)


def features_of(extractor: Any) -> Any:
    return extractor([decoded(MUSEUM.read_bytes())], sampling_rate=16_000, return_tensors="pt").input_features


@pytest.mark.compat
def test_languages_have_codes_and_names(parts: Any) -> None:
    codes, names = whisper.languages_of(parts[0]), whisper.language_names()
    assert len(codes) == 99
    assert (names["english"], names["german"]) == ("en", "de")
    assert {names["english"], names["german"]} <= codes.keys()
    assert whisper.writes_timestamps(parts[0])


@pytest.mark.compat
def test_a_window_is_heard_as_by_generate_and_detect_language(
    parts: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer, extractor = parts
    features = features_of(extractor)
    states = whisper.encode(model, features)
    language, (silence,) = whisper.first_impression(model, states)
    assert whisper.languages_of(model)[language] == int(model.detect_language(features)[0])
    assert silence < 0.3
    options = {"language": language, "task": "transcribe", "num_beams": 1}
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        (heard,) = whisper.listen(model, tokenizer, states, options, 0.0)
    assert not caplog.records
    assert "transformers" not in capfd.readouterr().err
    own = model.generate(features, return_timestamps=True, **options)
    assert "".join(segment.text for segment in heard.segments) == tokenizer.decode(own[0], skip_special_tokens=True)
    assert [segment.is_cut for segment in heard.segments] == [False] * len(heard.segments)
    assert -0.5 < heard.logprob < 0
    assert 0 < heard.compression_ratio < 1.35


@pytest.mark.compat
def test_windows_of_a_batch_are_heard_as_alone(parts: Any, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer, extractor = parts
    states = whisper.encode(model, features_of(extractor))
    options = {"language": "en", "task": "transcribe", "num_beams": 1}
    (alone,) = whisper.listen(model, tokenizer, states, options, 0.0)
    capfd.readouterr()
    together = whisper.listen(model, tokenizer, torch.cat([states, states * 0]), options, 0.0)
    assert together[0].segments == alone.segments
    assert together[0].logprob == pytest.approx(alone.logprob, abs=1e-3)
    assert "attention mask" not in capfd.readouterr().err
