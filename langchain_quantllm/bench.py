"""Measuring memory, on a checkpoint or on random weights of a known shape.

Owns what is measured and in which order, and the random checkpoints that stand in for real
ones: memory does not depend on what the weights are. Prints nothing; the command line does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from langchain_quantllm.errors import InvalidOptionError, UnsupportedError, nearest
from langchain_quantllm.llms import QuantizedHuggingFaceLLM
from langchain_quantllm.loading import progress_bars, release_memory
from langchain_quantllm.memory import estimate_memory, take_snapshot
from langchain_quantllm.schemes import GPTQ

SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
    },
}
"""Llama configs by name, for random weights."""

GPTQ_GROUP_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """Memory of one scheme. Sizes in bytes, on the device that holds the weights; times in seconds.

    `report_bytes` is the difference that the memory report shows between before and after
    loading: PyTorch's allocator on a GPU, resident memory on the CPU. `driver_bytes` is the same
    difference in what `nvidia-smi` says, None where there is none. `generating_` figures are
    differences from before loading too, the report's at its peak.
    """

    scheme: str
    load_s: float
    estimate_bytes: int
    weights_bytes: int
    report_bytes: int
    driver_bytes: int | None
    generating_report_bytes: int | None
    generating_driver_bytes: int | None
    unloaded_report_bytes: int
    unloaded_driver_bytes: int | None
    rate_tok_s: float | None


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
        estimate = estimate_memory(folder, None if name == "gptq" else name, dtype=dtype)
        driver_before = driver_used_bytes(device)
        llm = QuantizedHuggingFaceLLM(
            model_id=folder,
            quantization=GPTQ(kernel=kernel) if name == "gptq" else name,
            device=device,
            dtype=dtype,
            batch_size=batch,
            progress=False,
        )
        began = time.monotonic()
        llm.load()
        load_s = time.monotonic() - began
        loaded = _readings(llm, device)
        driver_loaded = driver_used_bytes(device)
        prompts = [f"Text {i} begins so: " for i in range(batch)]
        result = llm.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)
        generated = _readings(llm, device)
        driver_generated = driver_used_bytes(device)
        info = result.generations[0][0].generation_info or {}
        weights_bytes = loaded["weights"]
        before = loaded["before"]
        llm.unload()
        del result
        yield MemoryRow(
            scheme=name,
            load_s=load_s,
            estimate_bytes=estimate.total_bytes,
            weights_bytes=weights_bytes,
            report_bytes=loaded["after_loading"] - before,
            driver_bytes=_difference(driver_loaded, driver_before),
            generating_report_bytes=_difference(generated["peak_generating"], before),
            generating_driver_bytes=_difference(driver_generated, driver_before),
            unloaded_report_bytes=_used_bytes(device) - before,
            unloaded_driver_bytes=_difference(driver_used_bytes(device), driver_before),
            rate_tok_s=info.get("timing", {}).get("rate_tok_s"),
        )


def _readings(llm: QuantizedHuggingFaceLLM, device: str) -> dict[str, Any]:
    """Pick the bytes in use on one device out of a memory report."""
    report = llm.memory_report()

    def used(snapshot: Any) -> int:
        reading = snapshot.reading(device)
        return int(reading.used_bytes)

    return {
        "weights": report.weights.total_bytes,
        "before": used(report.before),
        "after_loading": used(report.after_loading),
        "peak_generating": (report.peak_generating or {}).get(device),
    }


def _used_bytes(device: str) -> int:
    reading = take_snapshot([device]).reading(device)
    return reading.used_bytes if reading is not None else 0


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before


def touch_device(device: str) -> None:
    """Make the CUDA context and the matrix library's workspace exist, so that no difference holds them."""
    import torch

    a = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
    (a @ a).sum().item()


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


def random_checkpoint(shape: str, folder: Path, *, gptq: bool = False) -> Path:
    """Write a Llama of random weights, as an ordinary bfloat16 checkpoint or packed as GPTQ in 4 bits.

    Args:
        shape: A name of `SHAPES`.
        folder: Where to write it.
        gptq: Pack the linear layers, in groups of 128, as AutoGPTQ does; no calibration, no use but measuring.

    Returns:
        The folder.

    Raises:
        InvalidOptionError: If the shape is unknown.
    """
    if shape not in SHAPES:
        msg = f"shape={shape!r} is not known{nearest(shape, SHAPES)}"
        raise InvalidOptionError(msg)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], bos_token_id=0, eos_token_id=1, dtype="bfloat16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device), progress_bars(shown=False):
        model = LlamaForCausalLM(config).to(torch.float16 if gptq else torch.bfloat16)
        if not gptq:
            model.save_pretrained(folder)
        else:
            _save_random_gptq(model, folder)
    _tokenizer(SHAPES[shape]["vocab_size"]).save_pretrained(folder)
    del model
    release_memory()
    return folder


def _save_random_gptq(model: Any, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if tensor.dim() != 2 or layer.split(".")[-1] in ("embed_tokens", "lm_head"):
            tensors[name] = tensor.contiguous().cpu()
            continue
        rows, columns = tensor.shape  # out_features, in_features
        groups = columns // GPTQ_GROUP_SIZE
        words = {"dtype": torch.int32, "device": tensor.device}
        tensors[f"{layer}.qweight"] = torch.randint(-(2**31), 2**31 - 1, (columns // 8, rows), **words).cpu()
        tensors[f"{layer}.qzeros"] = torch.full((groups, rows // 8), 0x77777777, **words).cpu()
        tensors[f"{layer}.scales"] = torch.full((groups, rows), 0.002, dtype=torch.float16)
        tensors[f"{layer}.g_idx"] = torch.arange(columns, **words).div(GPTQ_GROUP_SIZE, rounding_mode="floor").cpu()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float16",
        "quantization_config": {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GPTQ_GROUP_SIZE,
            "desc_act": False,
            "sym": True,
            "checkpoint_format": "gptq",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str), encoding="utf-8")


def _tokenizer(vocab_size: int) -> Any:
    """Build a tokenizer of bytes with a vocabulary of any size, for random models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"Ġw{i}" for i in range(vocab_size - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")  # noqa: S106


def as_document(rows: Sequence[MemoryRow], **about: Any) -> str:
    """Put rows and what they were measured on into one line of JSON."""
    import torch
    import transformers

    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    return json.dumps({**about, **versions, "rows": [asdict(row) for row in rows]})


def check_device(device: str) -> str:
    """Check that a device is here.

    Raises:
        UnsupportedError: If it is not.
    """
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        msg = f"device={device!r} is not here: this PyTorch sees no CUDA GPU; use 'cpu'."
        raise UnsupportedError(msg)
    return device
