"""Whether tokens can be drawn by one kernel: found out by drawing with it and in plain torch, side by side.

Owns what is tried. The kernel is `kernels.drawing`'s; what it has to give, `batch_sampler`'s.
"""

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


def find_drawing(vocab_size: int, device: torch.device) -> Any:
    """Find what draws in one kernel.

    Args:
        vocab_size: Width of the logits.
        device: Where they are.

    Returns:
        `kernels.drawing`; None where it does not run, or draws other tokens than plain torch does.
    """
    if device.type != "cuda":
        return None
    try:
        from langchain_quantllm.kernels import sampling as drawing

        with torch.cuda.device(device):
            return drawing if draws_alike(drawing, vocab_size, device) else None
    except torch.OutOfMemoryError:
        raise
    except Exception:  # Triton is not installed, or has nothing here to compile with
        return None


def draws_alike(drawing: Any, vocab_size: int, device: torch.device) -> bool:
    """Whether the kernel draws the tokens that plain torch draws: at random with all kinds of options, and the best."""
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
    logits = (_SPREAD * torch.randn(rows, vocab_size, generator=generator)).to(device)
    uniforms = torch.rand(rows, generator=generator).to(device)
    slots, may_not_end = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.bool, device=device)
    found = []
    for way in (None, drawing):
        sampler = BatchSampler(rows, vocab_size, device, drawing=way)
        sampler.set(range(rows), requests, [(0,)] * rows)
        found.append([sampler.sample(logits, slots, uniforms, may_not_end, need) for need in (0, SAMPLES | SORTS)])
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True))
