"""GPTQModel: its kernels, whether a kernel takes a checkpoint, and the tensors of its layers.

Call `backend_names` and `unsupported_reason` inside `gptqmodel_import.gptqmodel_imported()`. Layers are recognized by
their attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from langchain_quantllm.errors import first_line

if TYPE_CHECKING:
    import torch

BACKEND_PREFIX = "gptq_"
"""Prefix of the names of backends for GPTQ."""

_AS_STORED = ("torch", "tritonv2")
"""`QUANT_TYPE` of layers that keep the tensors of the checkpoint, with zero points of format v2."""

_FOR_CPU = "torch_aten_kernel"
"""`QUANT_TYPE` of layers that their first forward packs for PyTorch's product with 4 bits on a CPU."""


def backend_names() -> list[str]:
    """List the backends for GPTQ, such as `"gptq_marlin"`, sorted."""
    from gptqmodel import BACKEND

    return sorted(backend.value for backend in BACKEND if backend.value.startswith(BACKEND_PREFIX))


def unsupported_reason(backend: str, config: Mapping[str, Any], device_kind: str) -> str | None:
    """Ask GPTQModel, as optimum does while loading, whether a backend takes a checkpoint; return the reason if not.

    Args:
        backend: One of `backend_names`, or `"auto"`.
        config: The checkpoint's settings.
        device_kind: Such as `"cuda"`.

    Source: optimum/gptq/quantizer.py, `select_quant_linear`; gptqmodel/utils/importer.py.
    """
    from gptqmodel import BACKEND
    from gptqmodel.quantization import FORMAT, METHOD
    from gptqmodel.utils.importer import get_kernel_for_backend, hf_select_quant_linear_v2

    if backend != "auto":
        try:
            kernel = get_kernel_for_backend(BACKEND(backend), METHOD.GPTQ, FORMAT(config["checkpoint_format"]))
        except (ValueError, KeyError) as error:
            return f"it does not read checkpoint_format={config['checkpoint_format']!r} ({error})"
        for attribute, value, sentence in (
            ("SUPPORTS_BITS", config["bits"], "it takes bits {}"),
            ("SUPPORTS_GROUP_SIZE", config["group_size"], "it takes group sizes {}"),
            ("SUPPORTS_SYM", config["sym"], "it takes sym {}"),
            ("SUPPORTS_DESC_ACT", config["desc_act"], "it takes desc_act {}"),
            ("SUPPORTS_DEVICES", device_kind, "it runs on {}"),
        ):
            allowed = [getattr(a, "value", a) for a in cast(Iterable[Any], getattr(kernel, attribute, None) or ())]
            if allowed and "all" not in allowed and value not in allowed:
                return sentence.format(", ".join(map(str, allowed)))
    try:
        hf_select_quant_linear_v2(
            bits=config["bits"],
            group_size=config["group_size"],
            desc_act=config["desc_act"],
            sym=config["sym"],
            format=config["checkpoint_format"],
            quant_method=METHOD.GPTQ,
            device_map={"": device_kind},
            backend=backend,
            pack=False,
        )
    except (ValueError, NotImplementedError, ImportError, RuntimeError) as error:
        return first_line(error)
    return None


def uncompile_gptq_model(model: Any) -> str:
    """Keep the `torch` kernel of a loaded model from compiling, and name the model's kernels.

    That kernel compiles its dequantization once for each layer at the first forward pass: minutes, with a C++ compiler,
    and up to torch's limit of recompilations. Other kernels are left alone.

    Args:
        model: The loaded transformers model.

    Returns:
        The names of the kernel classes in the model, such as `TorchAtenLinear`, joined by commas.
    """
    kernels = set()
    for module in model.modules():
        kernel = type(module)
        if kernel.__module__.startswith("gptqmodel.") and kernel.__name__.endswith("Linear"):
            kernels.add(kernel.__name__)
            module.__dict__.pop("dequantize_weight", None)  # the compiled function hides the method of the class
    return ", ".join(sorted(kernels))


def hides_product(module: Any) -> bool:
    """Whether a layer multiplies by a kernel that PyTorch's dispatch modes do not see.

    Those whose names begin with Torch call PyTorch's operations.
    Source: the modules of gptqmodel/nn_modules/qlinear.
    """
    kind = type(module)
    return kind.__module__.startswith("gptqmodel.nn_modules.qlinear") and not kind.__name__.startswith("Torch")


def can_train(module: Any) -> bool:
    """Say whether gradients go through a layer; True for layers of other libraries."""
    return getattr(module, "SUPPORTS_TRAINING", None) is not False


@dataclass(frozen=True, kw_only=True)
class StoredTensors:
    """The tensors of a layer in the checkpoint's layout, with zero points of format v2.

    Args:
        bits: Bits of a code.
        words: The codes, packed along the inputs, of shape `(in_features * bits / 32, out_features)`, int32.
        zeros: The zero points, packed along the outputs.
        scales: Scales of shape `(groups, out_features)`.
        groups: The group of each input, of shape `(in_features,)`.
        in_features: The layer's attribute of this name; None if it has none.
    """

    bits: int
    words: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor
    in_features: int | None


def stored_tensors(module: Any) -> StoredTensors | None:
    """Return a layer's tensors; None if it is no layer of GPTQModel, or has another layout than the checkpoint."""
    import torch

    tensors = [getattr(module, name, None) for name in ("qweight", "qzeros", "scales", "g_idx")]
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return None
    if getattr(module, "QUANT_TYPE", None) not in _AS_STORED:  # others use the same names for another layout
        return None
    words, zeros, scales, groups = cast("list[torch.Tensor]", tensors)
    return StoredTensors(
        bits=int(getattr(module, "bits", 0)),
        words=words,
        zeros=zeros,
        scales=scales,
        groups=groups,
        in_features=getattr(module, "in_features", None),
    )


@dataclass(frozen=True, kw_only=True)
class PackedTensors:
    """The tensors of a layer that GPTQModel has packed for PyTorch's product with 4 bits on a CPU.

    Args:
        words: The codes, as `_convert_weight_to_int4pack_for_cpu` packs them, of shape `(out_features,
            in_features / 2)`, uint8.
        scales_and_zeros: Scales and offsets of shape `(groups, out_features, 2)`, bfloat16.
        group_size: Inputs of a group.
        order: The input that each packed one is, of shape `(in_features,)`.
    """

    words: torch.Tensor
    scales_and_zeros: torch.Tensor
    group_size: int
    order: torch.Tensor


def packed_tensors(module: Any) -> PackedTensors | None:
    """Return a layer's packed tensors; None if it is another layer, or its first forward has not packed them yet.

    Source: `TorchAtenLinear` in gptqmodel/nn_modules/qlinear/torch_aten_kernel.py.
    """
    import torch

    if getattr(module, "QUANT_TYPE", None) != _FOR_CPU or getattr(module, "linear_mode", None) != "inference":
        return None
    tensors = [getattr(module, name, None) for name in ("qweight", "scales_and_zeros", "ret_idx")]
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors) or getattr(module, "adapter", None) is not None:
        return None
    words, scales_and_zeros, order = cast("list[torch.Tensor]", tensors)
    size = int(getattr(module, "group_size", 0))
    if words.dtype != torch.uint8 or scales_and_zeros.dtype != torch.bfloat16 or size <= 0:
        return None
    return PackedTensors(words=words, scales_and_zeros=scales_and_zeros, group_size=size, order=order)
