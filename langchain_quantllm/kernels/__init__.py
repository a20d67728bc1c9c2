"""Kernels in Triton and for CPUs, with references in plain torch.

Attention over paged keys and values, linear layers with quantized weights, norms, rotary positions, and sampling.
"""
