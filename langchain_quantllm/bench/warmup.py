"""The warm-up of a bench: first uses of libraries and kernels happen before anything is measured."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from langchain_quantllm.bench.calls import time_generate
from langchain_quantllm.bench.memory import touch_device
from langchain_quantllm.bench.random_models import random_checkpoint
from langchain_quantllm.bench.training import measure_training
from langchain_quantllm.llms import QuantizedHuggingFaceLLM
from langchain_quantllm.loading.devices import release_memory
from langchain_quantllm.schemes import GPTQ


def warm_up(device: str, schemes: Iterable[Any], *, trains: bool, report: Callable[[str], None]) -> None:
    """Use the libraries and GPTQ's kernels once on a tiny model, so that start-up costs are in no scheme's figures.

    gptqmodel compiles some kernels, which takes minutes. A kernel that fails here fails again with a real model, and
    there its error is recorded.

    Args:
        device: Such as `"cuda:0"`.
        schemes: The schemes that will be measured.
        trains: Whether an adapter will be trained.
        report: Called with a line for each kernel.
    """
    touch_device(device)
    _run_tiny(device, "none", trains=trains)
    for kernel in sorted({scheme.kernel for scheme in schemes if isinstance(scheme, GPTQ)}):
        began = time.perf_counter()
        with contextlib.suppress(Exception):
            _run_tiny(device, GPTQ(kernel=kernel))
        release_memory()
        report(f"kernel {kernel} of GPTQ was ready after {time.perf_counter() - began:.1f} s")


def _run_tiny(device: str, scheme: Any, *, trains: bool = False) -> None:
    """Load a tiny model of random weights, generate with it, and train it where asked for."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(random_checkpoint("tiny", Path(scratch), gptq=isinstance(scheme, GPTQ)))
        llm = QuantizedHuggingFaceLLM(model_id=folder, quantization=scheme, device=device, progress=False)
        try:
            time_generate(llm.pipeline, ["a"], 2)
            if trains:
                measure_training(llm.pipeline.model, device=device, batch=1, tokens=2, repeats=1)
        finally:
            llm.unload()
