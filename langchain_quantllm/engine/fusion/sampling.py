"""The sampling kernel, compared with sampling in plain torch before an engine uses it."""

from __future__ import annotations

from typing import Any

import torch

from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.sampler import SAMPLES, SORTS, BatchSampler
from langchain_quantllm.options import GenerationOptions

_OPTIONS = (
    GenerationOptions(),
    GenerationOptions(do_sample=True, temperature=0.7, top_p=0.9),
    GenerationOptions(do_sample=True, top_k=40),
    GenerationOptions(do_sample=True, min_p=0.05),
)
_SPREAD = 3.0


def find_sampling_kernel(vocab_size: int, device: torch.device) -> Any:
    """Return the module of the sampling kernel, if it works here.

    Args:
        vocab_size: Width of the logits.
        device: Their device.

    Returns:
        `kernels.sampling`; None if it does not run, or samples other tokens than plain torch.
    """
    if device.type != "cuda":
        return None
    try:
        from langchain_quantllm.kernels import sampling

        with torch.cuda.device(device):
            return sampling if samples_alike(sampling, vocab_size, device) else None
    except torch.OutOfMemoryError:
        raise
    except Exception:  # Triton is not installed, or has no compiler on this machine
        return None


def samples_alike(kernel: Any, vocab_size: int, device: torch.device) -> bool:
    """Whether the kernel samples the same tokens as plain torch: greedily, and at random with all kinds of options."""
    rows = len(_OPTIONS)
    requests = [
        Request(
            prompt_ids=(0,),
            max_new_tokens=1,
            min_new_tokens=1,
            options=options,
            sample_index=0,
            seed=0,
            eos_token_ids=(vocab_size - 1,),
        )
        for options in _OPTIONS
    ]
    generator = torch.Generator().manual_seed(0)
    logits = (_SPREAD * torch.randn(rows, vocab_size, generator=generator, dtype=torch.float32)).to(device)
    uniforms = torch.rand(rows, generator=generator, dtype=torch.float32).to(device)
    slots, may_not_end = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.bool, device=device)
    sampled = []
    for implementation in (None, kernel):
        sampler = BatchSampler(rows, vocab_size, device, kernels=implementation)
        sampler.set(range(rows), requests, [(0,)] * rows)
        sampled.append([sampler.sample(logits, slots, uniforms, may_not_end, need) for need in (0, SAMPLES | SORTS)])
    return all(torch.equal(one, other) for one, other in zip(*sampled, strict=True))
