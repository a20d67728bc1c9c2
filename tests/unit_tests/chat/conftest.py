"""Rendered prompts; tiny random models that read images, of four families, and one of text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from langchain_quantllm import ChatQuantizedHuggingFace
from langchain_quantllm.chat.messages import template_messages
from langchain_quantllm.chat.template import ChatTemplate
from tests.support.chat_images import chat_of
from tests.support.checkpoints import edit_json, make_checkpoint
from tests.support.vision import FAMILIES, TEMPLATES, make_vision_checkpoint


@pytest.fixture
def render(tokenizer: Any) -> Any:
    def render(template: str | None, messages: list[Any], tools: Any = (), **options: Any) -> str:
        return ChatTemplate(tokenizer, template).render(template_messages(messages), tools, options)[0]

    return render


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vision")
    return {family: make_vision_checkpoint(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def chats(folders: dict[str, Path]) -> Iterator[dict[str, ChatQuantizedHuggingFace]]:
    chats = {family: chat_of(folder).load() for family, folder in folders.items()}
    yield chats
    for chat in chats.values():
        chat.unload()


@pytest.fixture(scope="module")
def chat(chats: dict[str, ChatQuantizedHuggingFace]) -> ChatQuantizedHuggingFace:
    return chats["llava"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("text") / "tiny")
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATES["qwen2_5_vl"])
    return folder
