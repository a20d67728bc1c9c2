"""Models and sizes for the tests of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from langchain_quantllm.schemes import Scheme

MB = 10**6
TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "dtype": "bfloat16",
}


def load_model(folder: Path, scheme: Scheme, dtype: str = "bfloat16", device: str = "cpu") -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        quantization_config=scheme.transformers_config(dtype),
        device_map=device,
        local_files_only=True,
    )


def save_tiny(folder: Path, **options: Any) -> Path:
    config = LlamaConfig(**{**TINY, **options})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
