"""Rerankers: models that order documents by how well they answer a query.

`QuantizedReranker` and `LateInteractionReranker` are LangChain's document compressors, `QuantizedCrossEncoder` is its
cross-encoder.
"""

from langchain_quantllm.rerankers.cross_encoder import QuantizedCrossEncoder
from langchain_quantllm.rerankers.late_interaction import LateInteractionReranker
from langchain_quantllm.rerankers.ranking import PairScores
from langchain_quantllm.rerankers.reranker import QuantizedReranker

__all__ = ["LateInteractionReranker", "PairScores", "QuantizedCrossEncoder", "QuantizedReranker"]
