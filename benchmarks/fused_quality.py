"""Perplexity of a text by a model's own modules, and by its fused steps.

    python -m benchmarks.fused_quality FOLDER --schemes none,int8 --max-tokens 4000

Runs on a CPU with the kernels in plain torch; linear layers multiply by dequantized weights in float32. A folder
with a GPTQ checkpoint is measured with `--schemes gptq`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from langchain_quantllm import GPTQ, QuantizedHuggingFaceLLM
from langchain_quantllm.bench.quality import evaluation_text, perplexity
from langchain_quantllm.engine.forward_context import ForwardContext, forward_context
from langchain_quantllm.engine.fusion.fuse import LINEAR, Fusion
from langchain_quantllm.kernels import reference
from langchain_quantllm.kernels.linear import reference as linear_reference
from langchain_quantllm.kernels.linear.weights import Weight


class DenseLinear:
    """Quantized linear layers in float32, over weights that are dequantized once."""

    def __init__(self) -> None:
        """Start with no dequantized weight."""
        self._dense: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def quantized_linear(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply; see `linear_reference.quantized_linear`."""
        key = weight.words.data_ptr()
        if key not in self._dense:
            # Kept with its words: their memory must not be reused while the pointer is the key.
            self._dense[key] = weight.words, linear_reference.dequantize(weight, torch.float32)
        return torch.nn.functional.linear(x.float(), self._dense[key][1], None if bias is None else bias.float())

    def grouped_linear(self, x: torch.Tensor, weights: Sequence[Weight]) -> list[torch.Tensor]:
        """Multiply by several; see `linear_reference.grouped_linear`."""
        return [self.quantized_linear(x, weight, weight.bias) for weight in weights]


def main() -> None:
    """Measure, and print a line for each scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--schemes", default="none,int8")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-tokens", type=int, default=4000)
    asked = parser.parse_args()
    text = evaluation_text()
    for scheme in asked.schemes.split(","):
        llm = QuantizedHuggingFaceLLM(
            model_id=str(asked.folder),
            quantization=GPTQ(kernel="torch") if scheme == "gptq" else None if scheme == "none" else scheme,
            dtype=asked.dtype,
            device="cpu",
            progress=False,
        )
        model, tokenizer = llm.pipeline.model, llm.pipeline.tokenizer
        own = perplexity(model, tokenizer, text, max_tokens=asked.max_tokens)
        fusion = Fusion(model, kernels=reference, linear_kernels=DenseLinear())
        with forward_context(ForwardContext(steps=fusion.steps)):
            fused = perplexity(model, tokenizer, text, max_tokens=asked.max_tokens)
        products = sum(kind.fused for kind in fusion.summary if kind.kind == LINEAR)
        print(
            f"{scheme}: {own.perplexity:.3f} by the model's modules, {fused.perplexity:.3f} by fused steps "
            f"({products} products), {own.tokens} tokens",
            flush=True,
        )
        fusion.close()
        llm.unload()


if __name__ == "__main__":
    main()
