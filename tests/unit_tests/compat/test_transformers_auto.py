"""transformers' mappings by model type and the parts of its processors, checked on transformers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from langchain_quantllm.compat.transformers_auto import (
    has_causal_lm,
    has_image_text_to_text,
    load_image_processor,
    make_processor,
    processor_class,
    processor_parts,
)
from tests.support.vision import make_vision_checkpoint, picture


@pytest.mark.parametrize(
    ("model_type", "texts", "images"),
    [
        ("llama", True, False),
        ("qwen2", True, False),
        ("gemma3", True, True),
        ("llava", False, True),
        ("qwen2_5_vl", False, True),
        ("bert", True, False),
        ("t5", False, False),
        ("whisper", True, False),
        ("no_such_type", False, False),
    ],
)
def test_what_continues_texts(model_type: str, texts: bool, images: bool) -> None:
    assert (has_causal_lm(model_type), has_image_text_to_text(model_type)) == (texts, images)


def test_processors_belong_to_configs() -> None:
    pytest.importorskip("PIL")
    kind = processor_class(transformers.Qwen2_5_VLConfig)
    assert kind.__name__ == "Qwen2_5_VLProcessor"
    assert set(processor_parts(kind)) == {"image_processor", "tokenizer", "video_processor"}
    assert processor_class(transformers.LlamaConfig) is None


def test_a_processor_without_one_of_its_parts(tmp_path: Path) -> None:
    """The video part is None if torchvision is not installed."""
    pytest.importorskip("PIL")
    folder = str(make_vision_checkpoint(tmp_path / "vision", "qwen2_5_vl"))
    options = {"local_files_only": True}
    kind = processor_class(transformers.Qwen2_5_VLConfig)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    loaded = {
        "image_processor": load_image_processor(folder, **options),
        "tokenizer": tokenizer,
        "video_processor": None,
    }
    processor = make_processor(kind, [loaded[part] for part in processor_parts(kind)], folder, **options)
    assert processor.video_processor is None
    assert processor.tokenizer is tokenizer
    inputs = processor(text=[processor.image_token], images=[[picture()]], return_tensors="pt")
    assert inputs["input_ids"].shape[1] >= inputs["image_grid_thw"].prod() // 4
