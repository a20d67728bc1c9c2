"""GPTQ checkpoints: their settings and weight files, and the kernel of gptqmodel that runs them on a device.

Reads the shapes of tensors, not the tensors.

Kernels on the CPU (gptqmodel 7.6, torch 2.13; symmetric or not, `desc_act` or not):

| bits | group size | kernel chosen | other kernels |
|---|---|---|---|
| 4 | 32, 64, 128, dividing every layer | `torch_aten` | `torch`, `torch_fused`, `torch_int8` |
| 4 | any other | `torch` | `torch_int8` up to 128 |
| 8 | -1, 16, 32, 64, 128 | `torch_int8` | `torch` |
| 8 | 256, 512, 1024 | `torch` | |
| 2 | -1, 16 to 1024 | `torch` | `torch_int8` up to 128 |
| 3 | -1, 16 to 1024 | `torch` | |

`torch` dequantizes each layer in each forward pass: correct, and ten times slower than the others.
Use bfloat16 on the CPU, where most of these kernels are ten times slower in float16.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.gptqmodel import BACKEND_PREFIX, backend_names, unsupported_reason
from langchain_quantllm.compat.gptqmodel_import import gptqmodel_imported
from langchain_quantllm.compat.gptqmodel_rules import checked_rules, rule_of, settings_of
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    UnsupportedError,
    nearest,
)
from langchain_quantllm.loading.json_files import read_json
from langchain_quantllm.loading.stored_tensors import read_header
from langchain_quantllm.schemes import GPTQ, GPTQ_BITS

FORMATS = ("gptq", "gptq_v2")
"""Formats of packed tensors that load; the zero points of v1 are one too small, those of v2 are exact."""

_INT4_BACKENDS, _INT4_GROUP_SIZES = ("gptq_torch_aten", "gptq_torch_fused"), (32, 64, 128)
"""Kernels with torch's int4 product, and its group sizes on the CPU."""

_INT4_OUTPUTS = 16
"""What its number of outputs is a multiple of on the CPU. Source: `_convert_weight_to_int4pack_for_cpu` of torch."""

_STANDARD_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_WEIGHT_SUFFIXES = (".safetensors.index.json", ".safetensors")
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth")


# Checkpoints.


@dataclass(frozen=True, kw_only=True)
class GPTQCheckpoint:
    """The settings of a GPTQ checkpoint.

    Args:
        quantization_config: For transformers' `config.quantization_config`.
        weights_name: For transformers' `config.transformers_weights`: the name of the weight file, or of the index of
            its shards; None if it is the usual one.
        found_in: Name of the file with the settings.
    """

    quantization_config: dict[str, Any]
    weights_name: str | None
    found_in: str


def read_gptq_checkpoint(file_names: Collection[str], fetch: Callable[[str], Path | None]) -> GPTQCheckpoint | None:
    """Read the settings of a GPTQ checkpoint.

    Args:
        file_names: Names of the files of the folder or Hub repository.
        fetch: Returns the local path of one of them, after a download if needed. Called for small JSON files only.

    Returns:
        The settings; None if neither config.json nor quantize_config.json says that the checkpoint is GPTQ.

    Raises:
        CheckpointError: If a file is not JSON, the settings are not readable, or the weights are
            not in safetensors.
    """
    for name in ("config.json", "quantize_config.json"):
        path = fetch(name) if name in file_names else None
        if path is None:
            continue
        content = read_json(path)
        if name == "config.json":
            content = content.get("quantization_config") or {}
            if not isinstance(content, dict):
                msg = f"{path} says quantization_config={content!r}, which is no JSON object; get the file again."
                raise CheckpointError(msg)
            if content and content.get("quant_method", "gptq") != "gptq":
                return None
        # Other tools write files of these names too; those of GPTQ have at least the number of bits.
        if isinstance(content.get("bits"), int) and content.get("quant_method", "gptq") == "gptq":
            config = _normalized(content, name)
            return GPTQCheckpoint(
                quantization_config=config,
                weights_name=_weights_name(file_names, content, config),
                found_in=name,
            )
    return None


def read_gptq_folder(folder: Path) -> GPTQCheckpoint | None:
    """Read the settings of a GPTQ checkpoint in a local folder; see `read_gptq_checkpoint`."""
    return read_gptq_checkpoint(os.listdir(folder), lambda name: folder / name)


def _normalized(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Check the settings and keep those for loading, under the names of transformers' `GPTQConfig`.

    Drops those that only quantizing needs, such as calibration texts, and `act_group_aware` beside `desc_act`, of which
    transformers would warn.
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
    if content.get("lm_head"):
        msg = f"'lm_head' in {source} asks for a quantized output head, which transformers ignores while loading GPTQ."
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
    if content.get("dynamic"):
        config["dynamic"] = checked_rules(content["dynamic"], source)
    return config


def _weights_name(file_names: Collection[str], content: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """Return the name of the weight file; None if it is the one that transformers looks for."""
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


# Layers.


def read_layer_sizes(weight_files: Iterable[Path], config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Read the sizes of each quantized layer, and check that its packing agrees with the config.

    Args:
        weight_files: All safetensors files of the checkpoint; only their headers are read.
        config: `GPTQCheckpoint.quantization_config`.

    Returns:
        Name of each quantized layer → its in_features and out_features; empty if no layer is quantized.

    Raises:
        CheckpointError: If a file is not a safetensors file, or a layer has other bits or groups.
    """
    shapes = {name: tensor.shape for path in weight_files for name, tensor in read_header(path).items()}
    sizes = {}
    for key, (words, out_features) in ((k, v) for k, v in shapes.items() if k.endswith(".qweight") and len(v) == 2):
        layer = key.removesuffix(".qweight")
        own = settings_of(config, layer)
        if own is None:
            msg = (
                f"Layer {layer!r} is packed, but the rule {rule_of(config, layer)!r} of dynamic leaves it unquantized."
            )
            raise CheckpointError(msg)
        bits = own["bits"]
        in_features = shapes[f"{layer}.g_idx"][0] if f"{layer}.g_idx" in shapes else words * 32 // bits
        if words * 32 != in_features * bits:
            msg = f"Layer {layer!r} is packed in {words * 32 / in_features:g} bits, but the config says bits={bits}."
            raise CheckpointError(msg)
        size = in_features if own["group_size"] == -1 else own["group_size"]
        groups = shapes.get(f"{layer}.scales", [0])[0]
        if groups != -(-in_features // size):
            msg = (
                f"Layer {layer!r} has {groups} groups of scales for in_features={in_features}, "
                f"but the config says group_size={own['group_size']}."
            )
            raise CheckpointError(msg)
        sizes[layer] = (in_features, out_features)
    return sizes


# Kernels.


def check_gptq(
    config: Mapping[str, Any],
    scheme: GPTQ,
    device_kind: str,
    layer_sizes: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """Check that a checkpoint can be loaded as a scheme, and choose its kernel, before any weight is read.

    Args:
        config: `GPTQCheckpoint.quantization_config`.
        scheme: The scheme asked for.
        device_kind: Kind of the device of most layers: `"cpu"`, `"cuda"`, `"xpu"` or `"mps"`.
        layer_sizes: Result of `read_layer_sizes`; None if the weights are not on this machine.

    Returns:
        The config with the kernel filled in as `backend`, in its rules for single layers as well.

    Raises:
        CheckpointError: If the checkpoint has other bits than the scheme asks for.
        MissingPackageError: If gptqmodel, optimum or accelerate is not installed.
        InvalidOptionError: If gptqmodel has no kernel of that name.
        UnsupportedError: If the kernel cannot run this checkpoint on that device.
    """
    if scheme.bits not in (None, config["bits"]):
        msg = (
            f"quantization asks for GPTQ with bits={scheme.bits}, but the checkpoint has bits={config['bits']}; "
            f"use bits={config['bits']}, bits=None, or another checkpoint."
        )
        raise CheckpointError(msg)
    sizes: dict[str | None, dict[str, tuple[int, int]]] = {}
    for name, size in (layer_sizes or {}).items():
        sizes.setdefault(rule_of(config, name), {})[name] = size
    rules = {
        rule: own
        if rule.startswith("-:")
        else {**own, "backend": choose_kernel({**config, **own}, scheme, device_kind, sizes.get(rule, {}))}
        for rule, own in (config.get("dynamic") or {}).items()
    }
    found = {**config, "backend": choose_kernel(config, scheme, device_kind, sizes.get(None, {}))}
    return {**found, "dynamic": rules} if rules else found


def choose_kernel(
    config: Mapping[str, Any], scheme: GPTQ, device_kind: str, sizes: Mapping[str, tuple[int, int]]
) -> str:
    """Choose the kernel of the layers with the same settings; arguments and errors as of `check_gptq`."""
    uneven = None
    if config["group_size"] != -1:  # the first layer whose last group is smaller than the others
        uneven = next(((name, n) for name, (n, _) in sizes.items() if n % config["group_size"]), None)
    odd = next(((name, n) for name, (_, n) in sizes.items() if n % _INT4_OUTPUTS), None)
    with gptqmodel_imported():
        backend = _backend(scheme.kernel)
        if backend == "auto":
            fits = not any(inputs % 32 for inputs, _ in sizes.values())
            shape = {"uneven": uneven is not None, "fits": fits, "odd": odd is not None}
            backend = _choose_backend(config, device_kind, **shape)
        elif backend in _INT4_BACKENDS and device_kind == "cpu" and config["group_size"] not in _INT4_GROUP_SIZES:
            msg = (
                f"Kernel {_short(backend)!r} takes group_size 32, 64 or 128 on the CPU, not {config['group_size']}; "
                "use kernel 'torch' or 'auto'."
            )
            raise UnsupportedError(msg)
        elif backend in _INT4_BACKENDS and device_kind == "cpu" and odd is not None:
            msg = (
                f"Kernel {_short(backend)!r} takes out_features that are multiples of {_INT4_OUTPUTS} on the CPU, not "
                f"{odd[1]} of layer {odd[0]!r}; use kernel 'torch' or 'auto'."
            )
            raise UnsupportedError(msg)
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
    return backend


def _short(backend: str) -> str:
    return backend.removeprefix(BACKEND_PREFIX)


def _backend(kernel: str) -> str:
    """Return gptqmodel's name of a kernel, from its name with or without the prefix."""
    name = _short(kernel.lower().replace("-", "_"))
    known = ["auto", *map(_short, backend_names())]
    if name not in known:
        msg = f"kernel={kernel!r} is not a GPTQ kernel of gptqmodel{nearest(name, known)}"
        raise InvalidOptionError(msg)
    return name if name == "auto" else BACKEND_PREFIX + name


def _choose_backend(config: Mapping[str, Any], device_kind: str, *, uneven: bool, fits: bool, odd: bool) -> str:
    """Choose as gptqmodel does, except where its choice fails or is slow."""
    if uneven:
        return "gptq_torch"  # the others fail in the first forward pass
    if device_kind == "cpu":
        if config["bits"] == 4 and (odd or config["group_size"] not in _INT4_GROUP_SIZES):
            return "gptq_torch"  # gptqmodel would choose torch's int4 product, which fails for other sizes
        if config["bits"] == 8 and config["group_size"] in (-1, 16, 32, 64, 128):
            # Ten times faster than 'torch', which gptqmodel prefers; both err like bfloat16 does.
            return "gptq_torch_int8"
    if device_kind == "cuda" and config["bits"] == 3:
        return "gptq_torch"  # the only one for 3 bits; the fast engine replaces it by its own kernels
    if device_kind == "cuda" and fits and _runs_triton() and not unsupported_reason("gptq_triton", config, "cuda"):
        # It keeps the checkpoint's layout, which the fast engine's own kernels need, and compiles no CUDA.
        return "gptq_triton"
    return "auto"


def _runs_triton() -> bool:
    """Say whether Triton runs on every GPU here: Turing or newer; GPTQModel's kernel was not tried with ROCm."""
    import torch

    if importlib.util.find_spec("triton") is None or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return all(torch.cuda.get_device_capability(i) >= (7, 5) for i in range(torch.cuda.device_count()))
