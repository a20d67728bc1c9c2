"""Training of an adapter on a quantized model: time and memory of one step.

Knows no scheme: the layers of the weights say whether their kernels can train.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

from langchain_quantllm.bench.calls import synchronize
from langchain_quantllm.compat.gptqmodel import can_train
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.compat.peft import peft_imported
from langchain_quantllm.errors import GenerationError, MissingPackageError, UnsupportedError, pip_install
from langchain_quantllm.memory import track_memory

_ATTENTION = ("q_proj", "v_proj")
"""Projections that LoRA is usually put on. Source: https://arxiv.org/abs/2106.09685, section 4.2."""

_ALL_LINEAR = "all-linear"
_LOOK_S = 0.05


def check_peft() -> None:
    """Check that peft is installed.

    Raises:
        MissingPackageError: If it is not.
    """
    if not is_installed("peft"):
        msg = f"training an adapter needs peft: {pip_install('langchain-quantllm[bench]')}; or leave the training out."
        raise MissingPackageError(msg)


def measure_training(
    model: Any,
    *,
    device: str,
    batch: int = 2,
    tokens: int = 256,
    rank: int = 8,
    repeats: int = 3,
    limit_s: float = math.inf,
) -> dict[str, Any]:
    """Put a LoRA adapter on a model, measure forward and backward, and take it off again.

    Args:
        model: A causal language model of transformers. Layers of gptqmodel must be of a kernel that can train, and some
            stay slow after it: load those anew.
        device: Where its weights are, such as `"cuda:0"`.
        batch: Texts at once.
        tokens: Length of each.
        rank: Rank of the adapter.
        repeats: Most steps that are measured, after one to warm up.
        limit_s: No further step is begun after so many seconds.

    Returns:
        One step without the optimizer's, medians over the repeats: `targets`, names of the layers with an adapter or
        `"all-linear"`; `rank`, `batch` and `tokens`; `trainable_parameters` of the adapter; `forward_s` with the loss,
        `backward_s`, and `total_s` of both; `rate_tok_s`, tokens of the batch / `total_s`; `runs_s`, `total_s` of
        every repeat; `peak_bytes`, the most memory in use meanwhile, as the process counts it; `kernels`, classes of
        the quantized layers with commas in between, empty for plain ones.

    Raises:
        MissingPackageError: If peft is not installed.
        UnsupportedError: If the quantized layers cannot train.
        GenerationError: If no gradient reaches the adapter.
    """
    import torch

    check_peft()
    kernels = kernels_of(model)
    _check_kernels(model)
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    with _adapter(model, rank) as (adapted, targets), track_memory([device], interval_s=_LOOK_S) as tracked:
        parameters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        steps = _time_steps(adapted, ids, device, repeats, limit_s)
    runs_s = [forward_s + backward_s for forward_s, backward_s in steps]
    total_s = statistics.median(runs_s)
    return {
        "targets": targets,
        "rank": rank,
        "batch": batch,
        "tokens": tokens,
        "trainable_parameters": parameters,
        "forward_s": statistics.median(forward_s for forward_s, _ in steps),
        "backward_s": statistics.median(backward_s for _, backward_s in steps),
        "total_s": total_s,
        "rate_tok_s": batch * tokens / total_s,
        "runs_s": runs_s,
        "peak_bytes": tracked.peak[device],
        "kernels": kernels,
    }


def kernels_of(model: Any) -> str:
    """Name the classes of a model's quantized linear layers, with commas in between; empty where none are."""
    names = {
        type(m).__name__ for m in model.modules() if type(m).__module__.startswith(("bitsandbytes.", "gptqmodel."))
    }
    return ", ".join(sorted(name for name in names if "Linear" in name))


def _check_kernels(model: Any) -> None:
    for module in model.modules():
        if not can_train(module):
            msg = f"kernel {type(module).__name__} cannot train; load the checkpoint with kernel 'triton' or 'torch'."
            raise UnsupportedError(msg)


@contextlib.contextmanager
def _adapter(model: Any, rank: int) -> Iterator[tuple[Any, str]]:
    """Put a LoRA adapter on a model in training mode, and take it off again."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets: Any = list(_ATTENTION) if names.issuperset(_ATTENTION) else _ALL_LINEAR
    flags = [(p, p.requires_grad) for p in model.parameters()]
    with peft_imported():
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
        )
        adapted = get_peft_model(model, config)
    try:
        adapted.train()
        yield adapted, targets if isinstance(targets, str) else ", ".join(targets)
    finally:
        adapted.unload()
        model.eval()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _time_steps(adapted: Any, ids: Any, device: str, repeats: int, limit_s: float) -> list[tuple[float, float]]:
    """Time forward and backward of several steps after a warm-up, which checks that gradients reach the adapter."""
    began = time.perf_counter()
    _step(adapted, ids, device)
    if not any(p.grad is not None and bool(p.grad.any()) for p in adapted.parameters() if p.requires_grad):
        msg = f"no gradient reached the adapter through {kernels_of(adapted) or 'the layers'}."
        raise GenerationError(msg)
    steps: list[tuple[float, float]] = []
    while not steps or (len(steps) < repeats and time.perf_counter() - began < limit_s):
        adapted.zero_grad(set_to_none=True)
        steps.append(_step(adapted, ids, device))
    adapted.zero_grad(set_to_none=True)
    return steps


def _step(adapted: Any, ids: Any, device: str) -> tuple[float, float]:
    """Time forward and backward of one batch, in seconds."""
    synchronize(device)
    began = time.perf_counter()
    loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
    synchronize(device)
    forward_s = time.perf_counter() - began
    loss.backward()
    synchronize(device)
    return forward_s, time.perf_counter() - began - forward_s
