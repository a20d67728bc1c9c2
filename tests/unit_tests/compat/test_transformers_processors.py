"""Processors that encode in another way, checked on real ones of four families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm.compat.transformers_processors import longest_sound_s, with_encoder
from tests.support.vision import FAMILIES, TEMPLATES, make_vision_checkpoint, picture

TOKENS = {"llava": "<image>", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>"}
TOKENS |= {"gemma3": "<start_of_image>", "idefics3": "<image>"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_uses_the_given_encoder_for_its_whole_text(family: str, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    assert family in TEMPLATES
    if family == "qwen2_5_vl":
        pytest.importorskip("torchvision")  # its processor reads videos, too
    processor: Any = AutoProcessor.from_pretrained(make_vision_checkpoint(tmp_path / family, family))
    options = {"text": [f"What is {TOKENS[family]}?"], "images": [[picture(0)]], "return_tensors": "pt"}
    expected = processor(add_special_tokens=False, **options)
    seen = []

    def encode(text: str) -> list[int]:
        seen.append(text)
        return list(processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    found = with_encoder(processor, encode)(add_special_tokens=False, **options)
    assert any(len(text) > len(options["text"][0]) for text in seen)  # with the image's tokens in it
    assert set(found) == set(expected)
    assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name])) for name in expected)
    again = processor(add_special_tokens=False, **options)  # the processor itself is as before
    assert torch.equal(again["input_ids"], expected["input_ids"])


def test_a_feature_extractor_tells_the_longest_sound() -> None:
    from transformers import Gemma4AudioFeatureExtractor, WhisperFeatureExtractor

    assert longest_sound_s(WhisperFeatureExtractor()) == 30
    assert longest_sound_s(WhisperFeatureExtractor(chunk_length=300)) == 300
    assert longest_sound_s(Gemma4AudioFeatureExtractor()) == 30
