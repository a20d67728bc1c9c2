"""Speed of other libraries' linear layers with quantized weights on a GPU, for `linear_speed` to compare with.

    python -m benchmarks.linear_peers --of marlin --shapes llama-2-7b --rows 1,8,32,64

Each library runs in a process of its own, as a failed capture makes all later ones fail. Prints lines of JSON as they
come: microseconds of one call in a CUDA graph over more distinct weights than the L2 cache holds.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import product as pairs
from pathlib import Path
from typing import Any, TypeAlias

import torch

from benchmarks.timing import LINEAR_SHAPES, random_weight
from langchain_quantllm.bench.graph_timing import copies_beyond_l2, graph_us

DTYPE = torch.bfloat16
Linear: TypeAlias = Callable[[torch.Tensor], Any]


def dense(inputs: int, outputs: int, copies: int) -> list[Linear]:
    """Torch's bfloat16 product."""
    weights = [torch.randn(outputs, inputs, device="cuda", dtype=DTYPE) for _ in range(copies)]
    return [lambda x, w=weight: torch.nn.functional.linear(x, w) for weight in weights]


def four_bit(inputs: int, outputs: int, copies: int) -> list[Linear]:
    """Bitsandbytes' nf4."""
    import bitsandbytes
    from bitsandbytes.functional import QuantState

    found: list[Linear] = []
    for _ in range(copies):
        weight: Any = random_weight("nf4", inputs, outputs)
        shape = torch.Size((outputs, inputs))
        state = QuantState(weight.scales, shape=shape, code=weight.code, blocksize=64, quant_type="nf4", dtype=DTYPE)
        packed = weight.words.view(torch.uint8).view(-1, 1).t()
        found.append(lambda x, w=packed, s=state: bitsandbytes.matmul_4bit(x, w, quant_state=s))
    return found


def int8(inputs: int, outputs: int, copies: int) -> list[Linear]:
    """Bitsandbytes' LLM.int8() without a threshold, which cannot be captured."""
    import bitsandbytes

    found: list[Linear] = []
    for _ in range(copies):
        weight: Any = random_weight("int8", inputs, outputs)
        state = bitsandbytes.MatmulLtState()
        state.CB, state.SCB = weight.words.view(torch.int8).view(outputs, inputs), weight.scales
        state.threshold, state.has_fp16_weights, state.is_training = 0.0, False, False
        found.append(lambda x, s=state: bitsandbytes.matmul(x.half(), s.CB, state=s))
    return found


def tinygemm(inputs: int, outputs: int, copies: int) -> list[Linear]:
    """Torch's int4 product, groups of 128; what torchao's weight-only int4 runs."""
    found: list[Linear] = []
    for _ in range(copies):
        words = torch.randint(-(2**31), 2**31, (outputs // 8, inputs // 128, 32, 4), dtype=torch.int64, device="cuda")
        packed = words.int()
        scales = torch.rand(inputs // 128, outputs, 2, device="cuda", dtype=DTYPE)
        found.append(lambda x, w=packed, s=scales: torch.ops.aten._weight_int4pack_mm(x, w, 128, s))
    return found


def gemlite_int8(inputs: int, outputs: int, copies: int) -> list[Linear]:
    """gemlite, int8 with a scale for each output; it tunes itself first."""
    from gemlite.helper import A16W8  # type: ignore[import-not-found]  # a neighbour, and no dependency

    make = A16W8(device="cuda:0", dtype=DTYPE)
    weights = [torch.randn(outputs, inputs, device="cuda", dtype=DTYPE) for _ in range(copies)]
    return [make.from_weights(weight) for weight in weights]


def gemlite_int4(inputs: int, outputs: int, copies: int) -> list[Linear]:
    """gemlite, 4 bits in groups of 128; it tunes itself first."""
    from gemlite.helper import A16Wn

    make, found = A16Wn(device="cuda:0", dtype=DTYPE), []
    for _ in range(copies):
        codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, device="cuda")
        scales = torch.rand(outputs * inputs // 128, 1, device="cuda", dtype=DTYPE)
        found.append(make.from_weights(codes, scales, torch.full_like(scales, 8), 4, 128))
    return found


def marlin(inputs: int, outputs: int, copies: int) -> list[Linear]:
    """GPTQModel's Marlin, float16; compiled for some minutes where it has not been."""
    module = _marlin_layers()[inputs, outputs]
    modules = [copy.deepcopy(module) for _ in range(copies)]
    return [lambda x, m=m: m(x.half()) for m in modules]


_layers: dict[tuple[int, int], Any] = {}


def _marlin_layers() -> dict[tuple[int, int], Any]:
    """Load one layer of Llama-2-7B, once; returns its linear layers by their sizes."""
    if not _layers:
        from langchain_quantllm import GPTQ, QuantizedHuggingFaceLLM
        from langchain_quantllm.bench import random_models

        random_models.SHAPES["one layer"] = {**random_models.SHAPES["llama-2-7b"], "num_hidden_layers": 1}
        folder = random_models.random_checkpoint("one layer", Path(tempfile.mkdtemp()), gptq=True)
        llm = QuantizedHuggingFaceLLM(model_id=str(folder), quantization=GPTQ(kernel="marlin"), progress=False)
        for module in llm.pipeline.model.modules():
            if hasattr(module, "qweight"):
                _layers[module.in_features, module.out_features] = module
    return _layers


NEIGHBOURS: dict[str, tuple[int, Callable[[int, int, int], list[Linear]]]] = {
    "bfloat16": (16, dense),
    "bitsandbytes nf4": (4, four_bit),
    "bitsandbytes int8": (8, int8),
    "tinygemm int4": (4, tinygemm),
    "gemlite int8": (8, gemlite_int8),
    "gemlite int4": (4, gemlite_int4),
    "marlin": (4, marlin),
}
"""Bits of a weight, and the function that makes the layers."""


def measured(name: str, shapes: Sequence[str], counts: Sequence[int], timeout_s: float) -> dict[str, Any]:
    """Measure a library in a process of its own; returns its results, and its error message if it fails."""
    given = ["--of", name, "--shapes", ",".join(shapes), "--rows", ",".join(map(str, counts))]
    found: dict[str, Any] = {"of": name}
    try:
        done = subprocess.run(  # this very file
            [sys.executable, "-m", "benchmarks.linear_peers", *given],
            capture_output=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        printed, errors = done.stdout, done.stderr.decode()
        if done.returncode:
            found["failed"] = errors.strip().splitlines()[-1][-200:] if errors else "no reason"
    except subprocess.TimeoutExpired as late:
        printed, found["failed"] = late.stdout or b"", f"not done after {timeout_s:.0f} s"
    lines = printed.decode().splitlines()
    return found | {"products": [json.loads(line) for line in lines if line.startswith('{"inputs"')]}


def main() -> None:
    """Measure one library, and print lines of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", required=True, choices=list(NEIGHBOURS))
    parser.add_argument("--shapes", default="llama-2-7b")
    parser.add_argument("--rows", default="1,8,32,64")
    asked = parser.parse_args()
    bits, make = NEIGHBOURS[asked.of]
    sizes = dict.fromkeys(
        (inputs, width)
        for name in asked.shapes.split(",")
        for inputs, widths in LINEAR_SHAPES[name]
        for width in widths
    )
    with torch.no_grad():
        for (inputs, outputs), rows in pairs(sizes, map(int, asked.rows.split(","))):
            products = make(inputs, outputs, copies_beyond_l2(inputs * outputs * bits // 8))
            x = torch.randn(rows, inputs, device="cuda", dtype=DTYPE)
            us = graph_us([lambda product=product, x=x: product(x) for product in products])
            found = {"inputs": inputs, "outputs": outputs, "rows": rows, "us": round(us, 2)}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
