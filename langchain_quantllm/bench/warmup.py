"""What happens once in a process or on a machine, brought about before anything is measured.

Owns which libraries load something at their first use, and which kernels are compiled then. Measures nothing.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from langchain_quantllm.bench.plain_generation import time_generate
from langchain_quantllm.bench.random_models import random_checkpoint
from langchain_quantllm.bench.training import measure_training
from langchain_quantllm.llms import QuantizedHuggingFaceLLM
from langchain_quantllm.loading.devices import release_memory
from langchain_quantllm.schemes import GPTQ


def touch_libraries(device: str, *, trains: bool) -> None:
    """Generate, and train, with a tiny model, so that what libraries load once is not put down to the first row.

    Args:
        device: Such as `"cuda:0"`.
        trains: Whether an adapter will be trained.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(random_checkpoint("tiny", Path(scratch)))
        llm = QuantizedHuggingFaceLLM(model_id=folder, quantization="none", device=device, progress=False)
        time_generate(llm.pipeline, ["a"], 2)
        if trains:
            measure_training(llm.pipeline.model, device=device, batch=1, tokens=2, repeats=1)
        llm.unload()


def touch_kernel(kernel: str, device: str) -> float:
    """Run a kernel for GPTQ once on a tiny model: gptqmodel compiles some, which takes minutes.

    Args:
        kernel: Its name, or `"auto"`.
        device: Such as `"cuda:0"`.

    Returns:
        Seconds until it had run, or had failed: whoever loads a real model with it is told why.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(random_checkpoint("tiny", Path(scratch), gptq=True))
        llm = QuantizedHuggingFaceLLM(model_id=folder, quantization=GPTQ(kernel=kernel), device=device, progress=False)
        try:
            time_generate(llm.pipeline, ["a"], 2)
        except Exception:  # noqa: S110  (as above)
            pass
        finally:
            llm.unload()
    release_memory()
    return time.perf_counter() - began
