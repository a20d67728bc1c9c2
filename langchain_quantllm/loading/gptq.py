"""GPTQ: the checkpoints as they are found, and the kernels that can run them.

Owns where a GPTQ checkpoint says what it is, the names of its weight files, and which
kernel of gptqmodel runs it on which kind of device. Loads no model: the loader does, inside
`gptqmodel_imported()`. Reads no tensor, only their shapes.

What runs on the CPU (gptqmodel 7.6, torch 2.13; symmetric or not, `desc_act` or not):

| bits | group size | kernel chosen | other kernels |
|---|---|---|---|
| 4 | 32, 64, 128, dividing every layer | `torch_aten` | `torch`, `torch_fused`, `torch_int8` |
| 4 | any other | `torch` | `torch_int8` up to 128 |
| 8 | -1, 16, 32, 64, 128 | `torch_int8` | `torch` |
| 8 | 256, 512, 1024 | `torch` | |
| 2 | -1, 16 to 1024 | `torch` | `torch_int8` up to 128 |
| 3 | -1, 16 to 1024 | `torch` | |

`torch` dequantizes each layer in each forward pass: right, and ten times slower than the others.
Use bfloat16 on the CPU: there float16 products run ten times slower in most of these kernels.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.gptqmodel import BACKEND_PREFIX, backend_names, unsupported_reason
from langchain_quantllm.compat.gptqmodel_import import gptqmodel_imported
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    UnsupportedError,
    nearest,
)
from langchain_quantllm.schemes import GPTQ, GPTQ_BITS

EXTRA = "langchain-quantllm[gptq]"
"""What to install for GPTQ."""

FORMATS = ("gptq", "gptq_v2")
"""Formats of packed tensors that load; v1 stores the zero points one too small, v2 as they are."""

_STANDARD_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_WEIGHT_SUFFIXES = (".safetensors.index.json", ".safetensors")
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth")


# --- checkpoints ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GPTQCheckpoint:
    """A GPTQ checkpoint as it was found.

    Args:
        quantization_config: What transformers takes as `config.quantization_config`.
        weights_name: What transformers takes as `config.transformers_weights`: the file name, or
            that of the index of its shards, where it is not the usual one; else None.
        found_in: Name of the file that said so.
    """

    quantization_config: dict[str, Any]
    weights_name: str | None
    found_in: str


def read_gptq_checkpoint(file_names: Collection[str], fetch: Callable[[str], Path | None]) -> GPTQCheckpoint | None:
    """Find out whether a checkpoint is GPTQ, and how to load it.

    Args:
        file_names: Names of the files of the folder or Hub repository.
        fetch: Gives the local path of one of them, downloading it if need be. Called for
            small JSON files only, never for weights.

    Returns:
        The checkpoint; None if neither config.json nor quantize_config.json says that it is GPTQ.

    Raises:
        CheckpointError: If a file is no JSON, the settings are not readable, or the weights are
            not in safetensors.
    """
    for name in ("config.json", "quantize_config.json"):
        path = fetch(name) if name in file_names else None
        if path is None:
            continue
        content = _read_json(path)
        if name == "config.json":
            content = content.get("quantization_config") or {}
            if content and content.get("quant_method", "gptq") != "gptq":
                return None
        # Other tools write files of these names too: a GPTQ one says at least how many bits.
        if isinstance(content.get("bits"), int) and content.get("quant_method", "gptq") == "gptq":
            config = _normalized(content, name)
            return GPTQCheckpoint(
                quantization_config=config,
                weights_name=_weights_name(file_names, content, config),
                found_in=name,
            )
    return None


def read_gptq_folder(folder: Path) -> GPTQCheckpoint | None:
    """Find out whether a local folder, or a snapshot in the Hub's cache, is GPTQ.

    Args:
        folder: The folder that holds config.json.

    Returns:
        As `read_gptq_checkpoint`.

    Raises:
        CheckpointError: As `read_gptq_checkpoint`.
    """
    return read_gptq_checkpoint(os.listdir(folder), lambda name: folder / name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} is no JSON: {error}; download the checkpoint again."
        raise CheckpointError(msg) from error
    if not isinstance(content, dict):
        msg = f"{path} holds no JSON object; download the checkpoint again."
        raise CheckpointError(msg)
    return content


def _normalized(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Keep what loading depends on, under the names that transformers' `GPTQConfig` reads.

    Left out is what only quantizing needs, such as calibration texts, and what would make
    transformers warn: `act_group_aware` beside `desc_act`.
    """
    bits, group_size = content["bits"], content.get("group_size", 128)
    packed = content.get("checkpoint_format") or content.get("format") or "gptq"
    packed = str(getattr(packed, "value", packed)).lower()
    if content.get("is_marlin_format"):
        packed = "marlin"
    if bits not in GPTQ_BITS:
        msg = f"bits={bits!r} in {source} is not known to GPTQ; transformers loads {', '.join(map(str, GPTQ_BITS))}."
        raise CheckpointError(msg)
    if group_size is None:
        group_size = -1
    if not isinstance(group_size, int) or (group_size != -1 and group_size < 1):
        msg = f"group_size={group_size!r} in {source} must be -1 or positive."
        raise CheckpointError(msg)
    if packed not in FORMATS:
        msg = (
            f"checkpoint_format={packed!r} in {source} does not load through transformers; "
            f"use a checkpoint in the format {' or '.join(map(repr, FORMATS))}."
        )
        raise CheckpointError(msg)
    for option, meaning in (("dynamic", "settings of single layers"), ("lm_head", "a quantized output head")):
        if content.get(option):
            msg = f"{option!r} in {source} asks for {meaning}, which transformers ignores while loading GPTQ."
            raise CheckpointError(msg)
    desc_act = bool(content.get("desc_act", False))
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": bool(content.get("sym", True)),
        "true_sequential": bool(content.get("true_sequential", True)),
        "act_group_aware": not desc_act,
        "checkpoint_format": packed,
    }
    for option in ("modules_in_block_to_quantize", "block_name_to_quantize", "backend"):
        if content.get(option):
            config[option] = content[option]
    return config


def _weights_name(file_names: Collection[str], content: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """Name the weight file where it is not the one that transformers looks for."""
    if any(name in file_names for name in _STANDARD_WEIGHTS):
        return None
    bases = [content.get("model_file_base_name"), content.get("model_basename")]
    bases.append(f"gptq_model-{config['bits']}bit-{config['group_size']}g")
    for base in filter(None, bases):
        for suffix in _WEIGHT_SUFFIXES:
            if f"{base}{suffix}" in file_names:
                return f"{base}{suffix}"
    found = [name for suffix in _WEIGHT_SUFFIXES for name in sorted(file_names) if name.endswith(suffix)]
    if len(found) == 1:
        return found[0]
    if found:
        msg = f"Several weight files, {', '.join(found)}, and none is named in quantize_config.json; keep one of them."
        raise CheckpointError(msg)
    pickled = sorted(name for name in file_names if name.endswith(_PICKLED_SUFFIXES))
    if pickled:
        msg = (
            f"The weights are pickled, in {', '.join(pickled)}: loading them could run any code, "
            f"so only safetensors are read; convert them, or use a newer upload of the model."
        )
        raise CheckpointError(msg)
    msg = f"No weight file among {', '.join(sorted(file_names)) or 'no files at all'}; download the checkpoint again."
    raise CheckpointError(msg)


# --- layers -----------------------------------------------------------------------------------


def read_layer_sizes(weight_files: Iterable[Path], config: Mapping[str, Any]) -> dict[str, int]:
    """Read how many inputs each quantized layer has, and check that it is packed as the config says.

    Args:
        weight_files: All safetensors files of the checkpoint; only their headers are read.
        config: `GPTQCheckpoint.quantization_config`.

    Returns:
        Name of each quantized layer → its in_features; empty if no layer is quantized.

    Raises:
        CheckpointError: If a file is no safetensors file, or a layer has other bits or groups.
    """
    shapes: dict[str, list[int]] = {}
    for path in weight_files:
        shapes |= _read_shapes(path)
    sizes = {}
    for key, (words, _) in ((k, v) for k, v in shapes.items() if k.endswith(".qweight")):
        layer = key.removesuffix(".qweight")
        bits = config["bits"]
        in_features = shapes[f"{layer}.g_idx"][0] if f"{layer}.g_idx" in shapes else words * 32 // bits
        if words * 32 != in_features * bits:
            msg = f"Layer {layer!r} is packed in {words * 32 / in_features:g} bits, but the config says bits={bits}."
            raise CheckpointError(msg)
        size = in_features if config["group_size"] == -1 else config["group_size"]
        groups = shapes.get(f"{layer}.scales", [0])[0]
        if groups != -(-in_features // size):
            msg = (
                f"Layer {layer!r} has {groups} groups of scales for in_features={in_features}, "
                f"but the config says group_size={config['group_size']}."
            )
            raise CheckpointError(msg)
        sizes[layer] = in_features
    return sizes


def _read_shapes(path: Path) -> dict[str, list[int]]:
    """Read the shapes of a safetensors file. Source: safetensors' README, section Format."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, MemoryError, OverflowError, KeyError, TypeError, AttributeError) as error:
        msg = f"{path} is no safetensors file; download the checkpoint again."
        raise CheckpointError(msg) from error


# --- kernels ----------------------------------------------------------------------------------


def check_gptq(
    config: Mapping[str, Any],
    scheme: GPTQ,
    device_kind: str,
    layer_sizes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Check before any weight is read that a checkpoint can be loaded as asked, and choose its kernel.

    Args:
        config: `GPTQCheckpoint.quantization_config`.
        scheme: What was asked for.
        device_kind: `"cpu"`, `"cuda"`, `"xpu"` or `"mps"`; where most of the layers go.
        layer_sizes: What `read_layer_sizes` gave, where the weights are at hand.

    Returns:
        The config with the kernel filled in as `backend`.

    Raises:
        CheckpointError: If the checkpoint has other bits than the scheme asks for.
        MissingPackageError: If gptqmodel, optimum or accelerate is not installed.
        InvalidOptionError: If gptqmodel has no kernel of that name.
        UnsupportedError: If the kernel cannot run this checkpoint on that device.
    """
    if scheme.bits is not None and scheme.bits != config["bits"]:
        msg = (
            f"quantization asks for GPTQ with bits={scheme.bits}, but the checkpoint has bits={config['bits']}; "
            f"use bits={config['bits']}, bits=None, or another checkpoint."
        )
        raise CheckpointError(msg)
    uneven = _uneven_layer(config["group_size"], layer_sizes or {})
    with gptqmodel_imported():
        backend = _backend(scheme.kernel)
        if backend == "auto":
            fits = not any(size % 32 for size in (layer_sizes or {}).values())
            backend = _choose_backend(config, device_kind, uneven=uneven is not None, fits=fits)
        elif backend == "gptq_torch_aten" or backend == "gptq_torch_fused":
            _check_int4pack(backend, config["group_size"], device_kind)
        if uneven is not None and backend not in ("gptq_torch", "gptq_torch_int8"):
            msg = (
                f"group_size={config['group_size']} does not divide in_features={uneven[1]} of layer {uneven[0]!r}, "
                f"which kernel {_short(backend)!r} cannot run; use kernel 'torch', or another checkpoint."
            )
            raise UnsupportedError(msg)
        reason = unsupported_reason(backend, config, device_kind)
    if reason is not None:
        msg = (
            f"Kernel {_short(backend)!r} cannot run this checkpoint ({config['bits']} bits, "
            f"group_size={config['group_size']}, sym={config['sym']}) on {device_kind}: {reason}; use kernel='auto'."
        )
        raise UnsupportedError(msg)
    return {**config, "backend": backend}


def kernel_names() -> list[str]:
    """List what `kernel=` takes: gptqmodel's GPTQ backends without their prefix, and `auto`.

    Returns:
        The names, sorted.

    Raises:
        MissingPackageError: If gptqmodel, optimum or accelerate is not installed.
    """
    with gptqmodel_imported():
        return sorted({"auto", *map(_short, backend_names())})


def _short(backend: str) -> str:
    return backend.removeprefix(BACKEND_PREFIX)


def _backend(kernel: str) -> str:
    """Turn a kernel's name, with or without its prefix, into gptqmodel's name of it."""
    name = _short(kernel.lower().replace("-", "_"))
    known = kernel_names()
    if name not in known:
        msg = f"kernel={kernel!r} is not a GPTQ kernel of gptqmodel{nearest(name, known)}"
        raise InvalidOptionError(msg)
    return name if name == "auto" else BACKEND_PREFIX + name


def _uneven_layer(group_size: int, layer_sizes: Mapping[str, int]) -> tuple[str, int] | None:
    """Give the first layer whose last group is smaller than the others."""
    if group_size == -1:
        return None
    return next(((name, size) for name, size in layer_sizes.items() if size % group_size), None)


def _choose_backend(config: Mapping[str, Any], device_kind: str, *, uneven: bool, fits: bool) -> str:
    """Choose as gptqmodel does, but where its choice fails or crawls."""
    if uneven:
        return "gptq_torch"  # the others fail in the first forward pass
    if device_kind == "cpu":
        if config["bits"] == 4 and config["group_size"] not in (32, 64, 128):
            return "gptq_torch"  # the int4 product of torch takes no other; gptqmodel chooses it all the same
        if config["bits"] == 8 and config["group_size"] in (-1, 16, 32, 64, 128):
            # Ten times faster than 'torch', which gptqmodel prefers; both err like bfloat16 does.
            return "gptq_torch_int8"
    if device_kind == "cuda" and config["bits"] == 3:
        return "gptq_torch"  # no other takes 3 bits; the fast engine's own kernels take its place
    if device_kind == "cuda" and fits and _runs_triton() and not unsupported_reason("gptq_triton", config, "cuda"):
        # It keeps the weights as the checkpoint has them, for the fast engine's own kernels, and compiles no CUDA.
        return "gptq_triton"
    return "auto"


def _runs_triton() -> bool:
    """Whether Triton runs on every GPU here: not on those before Turing, and GPTQModel's was not tried with ROCm."""
    import torch

    if importlib.util.find_spec("triton") is None or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return all(torch.cuda.get_device_capability(i) >= (7, 5) for i in range(torch.cuda.device_count()))


def _check_int4pack(backend: str, group_size: int, device_kind: str) -> None:
    if device_kind == "cpu" and group_size not in (32, 64, 128):
        msg = (
            f"Kernel {_short(backend)!r} takes group_size 32, 64 or 128 on the CPU, not {group_size}; "
            f"use kernel 'torch' or 'auto'."
        )
        raise UnsupportedError(msg)
