"""Compile the products that the rule chooses for a chip, without one, up to where its shared memory is known.

A process of its own, as the driver of the process is replaced:

    python -m tests.support.compile_rules A100 1,16,128

Prints, for each format and number of rows, the bytes of shared memory of each kernel as JSON.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler
from triton.runtime import driver, jit

from langchain_quantllm.kernels import launch
from langchain_quantllm.kernels.linear import dispatch
from langchain_quantllm.kernels.linear.bit_packing import pack_bits
from langchain_quantllm.kernels.linear.codebook import CODEBOOKS
from langchain_quantllm.kernels.linear.config import config_for
from langchain_quantllm.kernels.linear.weights import FloatWeight, FourBitWeight, GPTQWeight, Int8Weight, Weight
from tests.support.chips import CHIPS
from tests.support.compile_kernels import CompiledError, NoGPU, use_early_launches

INPUTS, OUTPUTS = 4096, 11008
"""The features that the rule is asked for; the compiled weights are smaller."""


def weights() -> Iterator[tuple[str, Weight]]:
    """Make a small weight of each format, with the constants of large ones."""
    inputs, outputs = 512, 128
    common: dict[str, Any] = {"in_features": inputs, "out_features": outputs, "bias": None}
    code = torch.tensor(CODEBOOKS["nf4"])
    words = torch.zeros(outputs * inputs // 8, dtype=torch.int32)
    plain = FourBitWeight(
        kind="nf4", words=words, code=code, scales=torch.ones(len(words) // 8), block_size=64, nested=False,
        nested_code=code, nested_scales=code, nested_block_size=1, offset=code, **common,
    )  # fmt: skip
    yield "nf4", plain
    yield "nf4 nested", replace(plain, nested=True, scales=plain.scales.to(torch.uint8), nested_block_size=256)
    yield "int8", Int8Weight(words=torch.zeros(outputs * inputs // 4, dtype=torch.int32), scales=code, **common)
    yield "float", FloatWeight(words=torch.zeros(outputs, inputs, dtype=torch.bfloat16), **common)
    for bits, symmetric in itertools.product((2, 3, 4, 8), (True, False)):
        zeros = pack_bits(torch.zeros(inputs // 128, outputs, dtype=torch.uint8), bits)
        yield (
            f"gptq{bits}{'' if symmetric else ' asymmetric'}",
            GPTQWeight(
                bits=bits, words=torch.zeros(inputs * bits // 32, outputs, dtype=torch.int32), zeros=zeros,
                scales=torch.ones(inputs // 128, outputs, dtype=torch.float16),
                groups=torch.zeros(inputs, dtype=torch.int32), group_size=128,
                zero_point=1 << bits - 1 if symmetric else -1, **common,
            ),
        )  # fmt: skip


def main(name: str, counts: list[int], kinds: list[str]) -> None:
    """Compile for a chip, and print the shared memory of each kernel."""
    chip = CHIPS[name]
    target = GPUTarget("cuda", chip.capability, 32)

    class ThisGPU(NoGPU):
        def get_current_target(self) -> GPUTarget:
            return target

    driver.set_active(ThisGPU(chip.capability))
    shared: list[int] = []
    stop_before_ptx(target, shared)
    torch.set_num_threads(1)
    start = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        try:
            start(self, *args, grid=grid, warmup=True, **options)
        except CompiledError:
            found.setdefault(self.__name__, []).append(shared.pop())

    jit.JITFunction.run = compile_only
    if chip.capability >= launch._HOPPER[0] * 10:
        use_early_launches()
    report: dict[str, dict[str, list[int]]] = {}
    for (kind, weight), rows in itertools.product(weights(), counts):
        if (kinds and kind not in kinds) or (kind == "float" and rows > dispatch.MOST_FLOAT_ROWS):
            continue
        found: dict[str, list[int]] = {}
        large = replace(weight, in_features=INPUTS, out_features=OUTPUTS)
        config = config_for(large, rows, chip.multiprocessors, is_roomy=chip.is_roomy)
        x = torch.zeros(rows, weight.in_features, dtype=torch.bfloat16)
        dispatch.quantized_linear(x, weight, config=config)
        report[f"{kind}, {rows} rows"] = found
    print(json.dumps(report))


def stop_before_ptx(target: GPUTarget, shared: list[int]) -> None:
    """Compile up to LLVM's representation, and note the shared memory that was allocated."""
    backend = type(compiler.make_backend(target))
    add_stages = backend.add_stages

    def stop(source: Any, metadata: Any) -> None:
        shared.append(metadata["shared"])
        raise CompiledError

    def add_first(self: Any, stages: dict[str, Any], *args: Any) -> None:
        add_stages(self, stages, *args)
        stages["ptx"] = stop

    backend.add_stages = add_first


if __name__ == "__main__":
    main(sys.argv[1], [int(count) for count in sys.argv[2].split(",")], sys.argv[3].split(",") if sys.argv[3:] else [])
