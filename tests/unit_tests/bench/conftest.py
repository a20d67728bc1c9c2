"""Tiny checkpoints of random weights for the tests of the bench."""

from __future__ import annotations

import pytest

from langchain_quantllm.bench.random_models import random_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_checkpoint("tiny", tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def tiny_gptq(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_checkpoint("tiny", tmp_path_factory.mktemp("gptq"), gptq=True))
