"""Fused steps in tests: kernels in plain torch with counted calls, and models with and without fused steps."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch.nn.functional import linear

from langchain_quantllm.engine.continuous import ContinuousEngine
from langchain_quantllm.engine.forward_context import ForwardContext, forward_context
from langchain_quantllm.engine.fusion.fuse import Fusion
from langchain_quantllm.engine.request import plan_requests
from langchain_quantllm.kernels import reference
from langchain_quantllm.kernels.linear import reference as linear_reference
from langchain_quantllm.kernels.linear.weights import weight_of
from langchain_quantllm.options import GenerationOptions


class Counted:
    """The kernels in plain torch, with the names of the calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(reference, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return function(*args, **kwargs)

        return call


class CountedLinear:
    """The linear layers in plain torch, with the number of weights and rows of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def quantized_linear(self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        self.calls.append((1, x.numel() // x.shape[-1]))
        return linear_reference.quantized_linear(x, weight, bias, dtype=torch.float32)

    def grouped_linear(self, x: torch.Tensor, weights: Any) -> list[torch.Tensor]:
        self.calls.append((len(weights), x.numel() // x.shape[-1]))
        return linear_reference.grouped_linear(x, weights, dtype=torch.float32)


def in_engine(fusion: Fusion) -> contextlib.AbstractContextManager[None]:
    """Run a model as the engine's forwards do: with its fused steps."""
    return forward_context(ForwardContext(steps=fusion.steps))


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


def write(engine: ContinuousEngine, prompts: list[list[int]], tokens: int, **options: Any) -> list[list[int]]:
    """Continue prompts beside each other."""
    asked = GenerationOptions(max_new_tokens=tokens, eos_token_id=(), **options)
    streams = [engine.submit(plan_requests(prompt, asked, engine.limits, shares_prefix=True)) for prompt in prompts]
    return [[i for chunk in stream for i in chunk.token_ids] for stream in streams]


def forwards_in(model: Any) -> list[Any]:
    """List the replaced `forward` of the modules of a model."""
    return [module.__dict__["forward"] for module in model.modules() if "forward" in module.__dict__]


def dense_twin(model: Any) -> Any:
    """Copy a model with dequantized weights: the same model without any rounding of activations."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        weight = weight_of(module)
        if weight is not None:
            dense, bias = linear_reference.dequantize(weight, torch.float32), weight.bias
            module.forward = lambda x, dense=dense, bias=bias: linear(x, dense, bias)
    return twin
