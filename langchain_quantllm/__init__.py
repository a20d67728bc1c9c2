"""Quantized local language models for LangChain.

Importing this package imports neither torch nor transformers; the first model does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_quantllm._version import __version__
from langchain_quantllm.schemes import AWQ, FP4, GPTQ, MXFP4, NF4, SCHEMES, Int8, Scheme, Unquantized

if TYPE_CHECKING:
    from langchain_quantllm.bench.compare import compare
    from langchain_quantllm.chat_models import ChatQuantizedHuggingFace
    from langchain_quantllm.embeddings import QuantizedHuggingFaceEmbeddings
    from langchain_quantllm.encoders.estimate import estimate_memory
    from langchain_quantllm.engine.external.server import Server
    from langchain_quantllm.engine.external.vllm import VLLM
    from langchain_quantllm.llms import QuantizedHuggingFaceLLM
    from langchain_quantllm.memory import MemoryEstimate, MemoryReport, take_snapshot, track_memory
    from langchain_quantllm.quantization.api import QuantizedCheckpoint, quantize
    from langchain_quantllm.quantization.calibration import Calibration
    from langchain_quantllm.quantization.distill import Distillation
    from langchain_quantllm.quantization.merge import merge_adapter
    from langchain_quantllm.rerankers import LateInteractionReranker, QuantizedCrossEncoder, QuantizedReranker
    from langchain_quantllm.speech import QuantizedWhisperParser

_LAZY = {
    "Calibration": "langchain_quantllm.quantization.calibration",
    "ChatQuantizedHuggingFace": "langchain_quantllm.chat_models",
    "Distillation": "langchain_quantllm.quantization.distill",
    "LateInteractionReranker": "langchain_quantllm.rerankers",
    "MemoryEstimate": "langchain_quantllm.memory",
    "MemoryReport": "langchain_quantllm.memory",
    "QuantizedCheckpoint": "langchain_quantllm.quantization.api",
    "QuantizedCrossEncoder": "langchain_quantllm.rerankers",
    "QuantizedHuggingFaceEmbeddings": "langchain_quantllm.embeddings",
    "QuantizedHuggingFaceLLM": "langchain_quantllm.llms",
    "QuantizedReranker": "langchain_quantllm.rerankers",
    "QuantizedWhisperParser": "langchain_quantllm.speech",
    "Server": "langchain_quantllm.engine.external.server",
    "VLLM": "langchain_quantllm.engine.external.vllm",
    "compare": "langchain_quantllm.bench.compare",
    "estimate_memory": "langchain_quantllm.encoders.estimate",
    "merge_adapter": "langchain_quantllm.quantization.merge",
    "quantize": "langchain_quantllm.quantization.api",
    "take_snapshot": "langchain_quantllm.memory",
    "track_memory": "langchain_quantllm.memory",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    msg = f"module 'langchain_quantllm' has no attribute {name!r}"
    raise AttributeError(msg)


__all__ = [
    "AWQ",
    "FP4",
    "GPTQ",
    "MXFP4",
    "NF4",
    "SCHEMES",
    "VLLM",
    "Calibration",
    "ChatQuantizedHuggingFace",
    "Distillation",
    "Int8",
    "LateInteractionReranker",
    "MemoryEstimate",
    "MemoryReport",
    "QuantizedCheckpoint",
    "QuantizedCrossEncoder",
    "QuantizedHuggingFaceEmbeddings",
    "QuantizedHuggingFaceLLM",
    "QuantizedReranker",
    "QuantizedWhisperParser",
    "Scheme",
    "Server",
    "Unquantized",
    "__version__",
    "compare",
    "estimate_memory",
    "merge_adapter",
    "quantize",
    "take_snapshot",
    "track_memory",
]
