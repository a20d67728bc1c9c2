"""Measurements of memory: a device's use at one moment, and while generating."""

from __future__ import annotations

import subprocess
from dataclasses import asdict, dataclass, replace
from typing import Any

from langchain_quantllm.compat.bitsandbytes import import_quietly
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.llms import QuantizedHuggingFaceLLM
from langchain_quantllm.memory import take_snapshot


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes in use on a device at one moment, or the differences of two moments.

    Args:
        allocated_bytes: Given to tensors by PyTorch's allocator; on the CPU resident memory.
        reserved_bytes: Held by that allocator, free blocks included; None on the CPU.
        driver_bytes: In use as `nvidia-smi` counts it; None where there is none.
    """

    allocated_bytes: int
    reserved_bytes: int | None
    driver_bytes: int | None

    def since(self, before: Sizes) -> dict[str, int | None]:
        """The differences from an earlier moment, by name: the values of a record."""
        earlier = asdict(before)
        return {
            name: None if size is None or earlier[name] is None else size - earlier[name]
            for name, size in asdict(self).items()
        }


def measure_sizes(device: str) -> Sizes:
    """Read the memory in use on a device now, as the memory report and as `nvidia-smi` count it."""
    reading = take_snapshot([device]).reading(device)
    if reading is None:
        msg = f"device={device!r} cannot be measured; use 'cpu' or 'cuda:0'."
        raise UnsupportedError(msg)
    return Sizes(
        allocated_bytes=reading.used_bytes,
        reserved_bytes=getattr(reading, "reserved_bytes", None),
        driver_bytes=driver_used_bytes(device),
    )


def measure_generating(
    llm: QuantizedHuggingFaceLLM, *, device: str, batch: int, new_tokens: int, before: Sizes
) -> dict[str, Any]:
    """Generate texts and measure the memory in use.

    Args:
        llm: A loaded model.
        device: Device of its weights.
        batch: Texts at once.
        new_tokens: Length of each, in tokens.
        before: Sizes before it was loaded.

    Returns:
        `allocated_bytes` at the peak where the device counts one, else afterwards, `reserved_bytes` and `driver_bytes`
        afterwards, all above those before loading; `weights_bytes`, counted; `rate_tok_s` of the first text.
    """
    prompts = [f"Text {i} begins so: " for i in range(batch)]
    result = llm.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)
    peak_bytes = (llm.memory_report().peak_generating or {}).get(device)
    sizes = measure_sizes(device)
    if peak_bytes is not None:
        sizes = replace(sizes, allocated_bytes=peak_bytes)
    info = result.generations[0][0].generation_info or {}
    weights_bytes = llm.memory_report().weights.total_bytes
    return {**sizes.since(before), "weights_bytes": weights_bytes, "rate_tok_s": info["timing"]["rate_tok_s"]}


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
