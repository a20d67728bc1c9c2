"""AWQ's scaling of inputs beside GPTQ's rounding, alone and together, by the squared error of layers' outputs.

    python -m benchmarks.awq_scaling FOLDER

For some blocks of a model of Llama's layout, and three groups of layers in each (query, key and value; gate and up;
down), all in 4 bits with zero points: rounding to nearest; AWQ, which multiplies the weights of each input by a power
of its mean size, the best of ten powers, rounds to nearest and divides again; GPTQ; and GPTQ of AWQ's scaled weights.
Prints the error as a share of the outputs' squares, and the means. Source: https://arxiv.org/abs/2306.00978, section
3.2; the power is chosen by the error of the layers themselves, and each range by its squared error, as in GPTQ here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from langchain_quantllm.quantization.calibration import Calibration, read_texts, sequences
from langchain_quantllm.quantization.solver import InputStatistics, Rounding, _round, _scales, solve

_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_POWERS = [step / 10 for step in range(10)]
_LEAST_MEAN = 1e-4


class Inputs:
    """Statistics of a layer's inputs: the sum of squares, and the mean size of each."""

    def __init__(self, in_features: int) -> None:
        self.statistics = InputStatistics(in_features, "cpu")
        self._sizes = torch.zeros(in_features)

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs of shape `(..., in_features)`."""
        self.statistics.add(inputs)
        self._sizes += inputs.reshape(-1, inputs.shape[-1]).abs().sum(0)

    def scales(self, power: float) -> torch.Tensor:
        """Return AWQ's factor of each input."""
        found = (self._sizes / self.statistics.rows).clamp(min=_LEAST_MEAN) ** power
        return found / (found.max() * found.min()).sqrt()

    def scaled(self, scales: torch.Tensor) -> InputStatistics:
        """Return the statistics of the inputs divided by factors."""
        found = InputStatistics(len(scales), "cpu")
        found.rows, found.hessian = self.statistics.rows, self.statistics.hessian / scales[:, None] / scales
        return found


def errors_of(weight: torch.Tensor, inputs: Inputs, rounding: Rounding) -> list[float]:
    """Return the errors of rounding to nearest, AWQ, GPTQ, and both together."""
    hessian = inputs.statistics.hessian
    whole = float(((weight @ hessian) * weight).sum())

    def error(power: float, round_: Callable[[torch.Tensor, InputStatistics], torch.Tensor]) -> float:
        scales = inputs.scales(power)
        off = round_(weight * scales, inputs.scaled(scales)) / scales - weight
        return float(((off @ hessian) * off).sum()) / whole

    def nearest(own: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
        columns = own.t().contiguous()
        scales, zeros = _scales(columns, statistics.hessian.diagonal(), rounding.group_size, rounding)
        group_of = torch.arange(len(columns)) // rounding.group_size
        codes = _round(columns, group_of, scales, zeros, None, rounding.bits).float()
        return ((codes - zeros[group_of]) * scales[group_of]).t()

    def gptq(own: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
        return solve(own, statistics, rounding).dequantize()

    tried = {power: error(power, nearest) for power in _POWERS}
    best = min(tried, key=tried.__getitem__)
    return [tried[0.0], tried[best], error(0.0, gptq), error(best, gptq)]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an unquantized model")
    parser.add_argument("--blocks", type=int, default=6, help="blocks of the model, evenly from the first to the last")
    parser.add_argument("--samples", type=int, default=6, help="sequences of 512 tokens")
    parser.add_argument("--group-size", type=int, default=64)
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked.folder)
    model: Any = AutoModelForCausalLM.from_pretrained(asked.folder, dtype=torch.float32).eval()
    calibration = Calibration(samples=asked.samples)
    rounding = Rounding(bits=4, group_size=asked.group_size, sym=False, desc_act=False, damping=0.01)
    count = len(model.model.layers)
    blocks = sorted({round(i * (count - 1) / max(1, asked.blocks - 1)) for i in range(asked.blocks)})
    seen: dict[tuple[int, tuple[str, ...]], Inputs] = {}
    for block in blocks:
        for names in _GROUPS:
            layer = model.model.layers[block].get_submodule(names[0])
            own = seen[block, names] = Inputs(layer.in_features)
            layer.register_forward_pre_hook(lambda _, args, own=own: own.add(args[0]))
    with torch.no_grad():
        for ids in sequences(calibration, read_texts(calibration), tokenizer, None):
            model.model(torch.tensor([ids]), use_cache=False)
    print("| block | layers | nearest | AWQ | GPTQ | both |\n|---|---|---|---|---|---|", flush=True)
    rows = []
    for (block, names), inputs in seen.items():
        layers = [model.model.layers[block].get_submodule(name) for name in names]
        rows.append(errors_of(torch.cat([layer.weight.detach() for layer in layers]), inputs, rounding))
        print(f"| {block} | {', '.join(names)} | {' | '.join(f'{value:.5f}' for value in rows[-1])} |", flush=True)
    means = torch.tensor(rows).mean(0).tolist()
    print(f"| mean | | {' | '.join(f'{value:.5f}' for value in means)} |")


if __name__ == "__main__":
    main()
