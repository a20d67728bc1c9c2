"""LangChain's own unit tests of chat models. Nothing is loaded."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel

from langchain_quantllm import ChatQuantizedHuggingFace

pytest.importorskip("langchain_tests")
from langchain_tests.unit_tests import ChatModelUnitTests

loading = importlib.import_module("langchain_core.load.load")
PATH = ("langchain_quantllm", "chat_models", "ChatQuantizedHuggingFace")


@pytest.mark.compat
class TestChatQuantizedHuggingFaceUnit(ChatModelUnitTests):
    @pytest.fixture(autouse=True)
    def _known_to_load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put the class where langchain-core 1.7 lists its partners' classes: `load` gives no others by `"all"`.

        Users name the class, as in test_chat.py.
        """
        monkeypatch.setattr(loading, "ALL_SERIALIZABLE_MAPPINGS", {**loading.ALL_SERIALIZABLE_MAPPINGS, PATH: PATH})
        monkeypatch.setattr(loading, "_default_class_paths_cache", {})

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatQuantizedHuggingFace

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "quantization": "nf4"}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"HF_TOKEN": "hf_test"}, self.chat_model_params, {}

    @property
    def supports_model_override(self) -> bool:
        return False  # the weights of one model are loaded
