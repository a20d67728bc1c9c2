"""The items about images of LangChain's own integration tests of chat models, on a tiny random LLaVA and Qwen2.5-VL.

What a random model writes means nothing; that every form of input is taken is what these items are about.
"""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel

from langchain_quantllm import ChatQuantizedHuggingFace
from tests.support.vision import make_vision_checkpoint, picture, png

pytest.importorskip("langchain_tests")
from langchain_tests.integration_tests import ChatModelIntegrationTests, chat_models


class _Standard(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatQuantizedHuggingFace

    @property
    def supports_image_inputs(self) -> bool:
        return True

    @property
    def supports_image_tool_message(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def chat(request: pytest.FixtureRequest, tmp_path: Path) -> ChatQuantizedHuggingFace:
    folder = make_vision_checkpoint(tmp_path / request.param, request.param)
    return ChatQuantizedHuggingFace(model=str(folder), device="cpu", max_tokens=5, progress=False)


@pytest.mark.parametrize("item", ["test_image_inputs", "test_image_tool_message", "test_anthropic_inputs"])
def test_standard(item: str, chat: ChatQuantizedHuggingFace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite fetches its picture itself, from the web, which is not there; the model gets it in base64."""
    fetched = SimpleNamespace(content=base64.b64decode(png(picture())))
    monkeypatch.setattr(chat_models, "httpx", SimpleNamespace(get=lambda *args, **options: fetched))
    suite: Any = _Standard()
    getattr(suite, item)(chat)
