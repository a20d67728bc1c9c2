"""Compilers of constraints that the tests share, each made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from langchain_quantllm.structured import Compiler


@pytest.fixture(scope="session")
def small(smollm2: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def compiler(small: Any) -> Compiler:
    return Compiler(small, len(small), (small.eos_token_id,))


@pytest.fixture(scope="session")
def qwen(qwen_coder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(qwen_coder)


@pytest.fixture(scope="session")
def wide(qwen: Any) -> Compiler:
    """A compiler of a model whose logits are wider than its tokenizer."""
    return Compiler(qwen, 152064, (qwen.eos_token_id,))
