"""Measuring memory: what each scheme takes when loaded, generating and unloaded, beside its estimate.

Owns what is measured and in which order. Prints nothing; the command line does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from langchain_quantllm.compat.bitsandbytes import import_quietly
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.llms import QuantizedHuggingFaceLLM
from langchain_quantllm.loading.devices import release_memory
from langchain_quantllm.loading.estimate import estimate_memory
from langchain_quantllm.memory import take_snapshot
from langchain_quantllm.schemes import GPTQ

_LEAST_CACHE_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """Memory of one scheme. Sizes in bytes, on the device that holds the weights; times in seconds.

    All but the estimate and the weights are differences from before loading, when the CUDA context
    and the libraries were there already. On a GPU `allocated` is what PyTorch's allocator has given
    to tensors, `reserved` what it holds of the driver, free blocks included, and `driver` what
    `nvidia-smi` says. On the CPU `allocated` is resident memory and the others are None.
    """

    scheme: str
    load_s: float
    estimate_bytes: int
    weights_bytes: int
    loaded: Sizes
    generating: Sizes
    unloaded: Sizes
    rate_tok_s: float | None


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes in use at one moment, or the differences of two."""

    allocated_bytes: int
    reserved_bytes: int | None
    driver_bytes: int | None

    def since(self, before: Sizes) -> Sizes:
        """Give the differences from an earlier moment."""
        return Sizes(
            allocated_bytes=self.allocated_bytes - before.allocated_bytes,
            reserved_bytes=_difference(self.reserved_bytes, before.reserved_bytes),
            driver_bytes=_difference(self.driver_bytes, before.driver_bytes),
        )


def measure_memory(
    checkpoints: dict[str, str],
    *,
    device: str,
    dtype: str = "auto",
    new_tokens: int = 128,
    batch: int = 1,
    kernel: str = "auto",
) -> Iterator[MemoryRow]:
    """Load a model in one scheme after another and measure what it takes.

    Args:
        checkpoints: Folder or repository for each scheme's name; `"gptq"` needs one of its own.
        device: Device for the weights, such as `"cuda:0"`.
        dtype: Dtype of what is not quantized.
        new_tokens: Length of the texts that are generated, in tokens.
        batch: Texts at once.
        kernel: Kernel for GPTQ.

    Yields:
        A row for each scheme.
    """
    touch_device(device)
    for name, folder in checkpoints.items():
        release_memory()
        before = measure_sizes(device)
        estimate = estimate_memory(folder, None if name == "gptq" else name, dtype=dtype)
        cache_tokens = batch * max(_LEAST_CACHE_TOKENS, new_tokens + 64)
        llm = QuantizedHuggingFaceLLM(
            model_id=folder,
            quantization=GPTQ(kernel=kernel) if name == "gptq" else name,
            device=device,
            dtype=dtype,
            batch_size=batch,
            kv_cache_memory=estimate.kv_cache_bytes(cache_tokens),  # by itself it would grow with the device
            progress=False,
        )
        try:
            began = time.monotonic()
            llm.load()
            load_s = time.monotonic() - began
            loaded = measure_sizes(device)
            prompts = [f"Text {i} begins so: " for i in range(batch)]
            result = llm.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)
            peak_bytes = (llm.memory_report().peak_generating or {}).get(device)
            generating = measure_sizes(device)
            if peak_bytes is not None:
                generating = replace(generating, allocated_bytes=peak_bytes)
            weights_bytes = llm.memory_report().weights.total_bytes
        finally:
            llm.unload()
        info = result.generations[0][0].generation_info or {}
        yield MemoryRow(
            scheme=name,
            load_s=load_s,
            estimate_bytes=estimate.total_bytes,
            weights_bytes=weights_bytes,
            loaded=loaded.since(before),
            generating=generating.since(before),
            unloaded=measure_sizes(device).since(before),
            rate_tok_s=info["timing"]["rate_tok_s"],
        )


def measure_sizes(device: str) -> Sizes:
    """Read what is in use on a device now, as the memory report and as `nvidia-smi` see it."""
    reading = take_snapshot([device]).reading(device)
    if reading is None:
        msg = f"device={device!r} cannot be measured; use 'cpu' or 'cuda:0'."
        raise UnsupportedError(msg)
    return Sizes(
        allocated_bytes=reading.used_bytes,
        reserved_bytes=getattr(reading, "reserved_bytes", None),
        driver_bytes=driver_used_bytes(device),
    )


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before


def touch_device(device: str) -> None:
    """Make the CUDA context and the libraries' kernels and workspaces exist, so that no difference holds them."""
    import torch

    import_quietly()
    layers: list[Any] = [torch.nn.Linear(64, 64)]
    if is_installed("bitsandbytes"):
        import bitsandbytes as bnb

        layers.append(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0))
        options = {"compute_dtype": torch.float16}
        layers += [bnb.nn.Linear4bit(64, 64, quant_type=kind, **options) for kind in ("nf4", "fp4")]
    for layer in layers:
        layer.to(torch.float16).to(device)(torch.ones(1, 64, device=device, dtype=torch.float16))


def driver_used_bytes(device: str) -> int | None:
    """Ask `nvidia-smi` for the memory in use on a CUDA device; None for others, or where it is missing."""
    if not device.startswith("cuda"):
        return None
    import torch

    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={uuid}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603  (fixed arguments)
    except (OSError, subprocess.CalledProcessError):
        return None
    return int(done.stdout.strip()) * 1024 * 1024


def as_document(rows: Sequence[MemoryRow], **about: Any) -> str:
    """Put rows and what they were measured on into one line of JSON."""
    import torch
    import transformers

    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    return json.dumps({**about, **versions, "rows": [asdict(row) for row in rows]})
