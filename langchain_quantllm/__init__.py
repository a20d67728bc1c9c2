"""Quantized local language models for LangChain.

Importing this package imports neither torch nor transformers; they come with the first model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_quantllm._version import __version__
from langchain_quantllm.schemes import FP4, GPTQ, NF4, SCHEMES, Int8, Scheme, Unquantized

if TYPE_CHECKING:
    from langchain_quantllm.llms import QuantizedHuggingFaceLLM

_LAZY = {"QuantizedHuggingFaceLLM": "langchain_quantllm.llms"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    msg = f"module 'langchain_quantllm' has no attribute {name!r}"
    raise AttributeError(msg)


__all__ = [
    "FP4",
    "GPTQ",
    "NF4",
    "SCHEMES",
    "Int8",
    "QuantizedHuggingFaceLLM",
    "Scheme",
    "Unquantized",
    "__version__",
]
