"""Attention over the blocks of the KV cache, in Triton; the functions are documented in `kernels.reference`.

The launchers check nothing, because a small model's layer takes no longer than a launch, and the device of the tensors
must be the current one. Grids depend on shapes alone and lengths are read on the device, so that a CUDA graph of a call
works for other lengths too.
"""

from langchain_quantllm.kernels.attention.blocks import write_kv
from langchain_quantllm.kernels.attention.decode import arrivals, decode_attention, default_splits
from langchain_quantllm.kernels.attention.prefill import prefill_attention
from langchain_quantllm.kernels.reference import PREFILL_TILE

__all__ = ["PREFILL_TILE", "arrivals", "decode_attention", "default_splits", "prefill_attention", "write_kv"]
