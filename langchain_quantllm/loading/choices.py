"""How a checkpoint is loaded: its scheme and attention, from what was asked for and what it is; what cannot be."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from langchain_quantllm.compat.packages import is_installed, label_of
from langchain_quantllm.compat.transformers_experts import is_experts
from langchain_quantllm.errors import CheckpointError, MissingPackageError, UnsupportedError, pip_install
from langchain_quantllm.loading.checkpoint import Checkpoint
from langchain_quantllm.loading.devices import default_device_map, devices_named
from langchain_quantllm.loading.experts import EXPERT_STATE
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.memory.estimate import build_on_meta
from langchain_quantllm.memory.experts import unfit_reason
from langchain_quantllm.schemes import AWQ, GPTQ, MXFP4, Prequantized, Scheme, Unquantized, scheme_of_config

_FLASH_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_3", "flash-attn-3"),
    "flash_attention_4": ("flash_attn_4", "flash-attn-4"),
}


def reconcile(spec: LoadSpec, checkpoint: Checkpoint) -> tuple[Scheme, Any]:
    """Combine the scheme asked for with that of the checkpoint.

    Returns:
        The scheme to load in, and the `quantization_config` for `from_pretrained`, or None.

    Raises:
        CheckpointError: If the checkpoint is quantized in another scheme, or not quantized although it has to be.
    """
    given = spec.quantization_config
    asked = spec.scheme
    if given is not None:
        asked = scheme_of_config(given if isinstance(given, Mapping) else given.to_dict())
    if checkpoint.quantization is None:
        if asked is not None and asked.calibrated and isinstance(asked, GPTQ):
            msg = (
                f"{spec.model_id} is not quantized, and GPTQ takes calibration data, so it is not made while loading; "
                "give a GPTQ checkpoint, or use quantization='nf4' or 'int8', which need none."
            )
            raise CheckpointError(msg)
        if isinstance(asked, AWQ | MXFP4):
            msg = (
                f"{spec.model_id} is not quantized, and {asked.name} is not made while loading; write a checkpoint in "
                f"it once with quantize(model_id, {asked.name!r}), or use quantization='nf4'."
            )
            raise CheckpointError(msg)
        asked = asked or Unquantized()
        return asked, given if given is not None else asked.transformers_config(_dtype_name(spec, checkpoint.config))
    stored = scheme_of_config(checkpoint.quantization)
    if asked is None:
        return stored, None
    if type(asked) is not type(stored) or (isinstance(asked, Prequantized) and asked.method != stored.method):  # type: ignore[attr-defined]
        msg = (
            f"{spec.model_id} is already quantized ({label_of(stored)}), so it cannot be loaded as {label_of(asked)}; "
            "leave quantization out, or give the unquantized checkpoint."
        )
        raise CheckpointError(msg)
    for option, want in asked.to_dict().items():
        has = getattr(stored, option)
        if option not in ("name", "kernel") and want != (list(has) if isinstance(has, tuple) else has):
            msg = (
                f"{spec.model_id} was quantized with {option}={has!r}, not {want!r}; leave {option} out, or give "
                "another checkpoint."
            )
            raise CheckpointError(msg)
    if isinstance(asked, GPTQ) and isinstance(stored, GPTQ):
        return dataclasses.replace(stored, kernel=asked.kernel), None
    return stored, None


def choose_dtype(spec: LoadSpec, checkpoint: Checkpoint) -> str:
    """Choose the dtype of the unquantized weights of a model for speech.

    A third of a small Whisper is its embeddings, which are not quantized. In the float32 in which these models are
    stored, the quantized model would be larger than the plain one in 16 bits. In float16 a CPU takes three times as
    long as in bfloat16.

    Returns:
        The dtype of the spec, or `"bfloat16"`.
    """
    if spec.task != "speech" or spec.dtype != "auto" or checkpoint.quantization is not None:
        return spec.dtype
    stored = str(getattr(checkpoint.config, "dtype", None)).removeprefix("torch.")
    if stored == "float16":
        on_cpu = devices_named(default_device_map(spec), spec.max_memory)[:1] == ["cpu"]
        return "bfloat16" if on_cpu else "auto"
    is_quantized = spec.quantization_config is not None or spec.scheme not in (None, Unquantized())
    return "bfloat16" if is_quantized and stored in ("None", "float32") else "auto"


def _dtype_name(spec: LoadSpec, config: Any) -> str:
    """Return the name of the dtype for the unquantized part of the model."""
    if spec.dtype != "auto":
        return spec.dtype
    text_config = config.get_text_config()
    dtype = getattr(config, "dtype", None) or getattr(text_config, "dtype", None) or "float32"
    return str(dtype).removeprefix("torch.")


def check_expert_layout(spec: LoadSpec, checkpoint: Checkpoint) -> None:
    """Refuse experts that were quantized layer by layer, where the model has them in one tensor of another layout.

    transformers would put the packed weights together as if they were plain ones, and drop their scales.

    Raises:
        CheckpointError: If the checkpoint has such experts.
    """
    if checkpoint.stored is None:
        return
    lists = {found[1] for name in checkpoint.stored.tensors if (found := EXPERT_STATE.fullmatch(name))}
    if not lists:
        return
    import torch

    config = copy.deepcopy(checkpoint.config)
    config.__dict__.pop("quantization_config", None)
    try:
        model = build_on_meta(config, torch.float16, spec.trust_remote_code, spec.model_id)
    except UnsupportedError:
        return
    modules = dict(model.named_modules())
    if {f"{name}.0" for name in lists} <= modules.keys():
        return
    bits = 8 if (checkpoint.quantization or {}).get("load_in_8bit") else 4
    reasons = [reason for module in modules.values() if (reason := unfit_reason(module, bits)) is not None]
    if reasons or not any(map(is_experts, modules.values())):
        msg = (
            f"{spec.model_id} is a mixture of experts that was quantized expert by expert, and this transformers has "
            f"all experts of a layer in one tensor, into which these cannot be put"
            f"{f' ({reasons[0]})' if reasons else ''}; load the unquantized checkpoint, with quantization= if you like."
        )
        raise CheckpointError(msg)


def check_attention(spec: LoadSpec) -> None:
    """Check that the attention asked for can run here.

    Raises:
        MissingPackageError: If its package is not installed.
        UnsupportedError: If it needs a GPU and there is none.
    """
    name = spec.attn_implementation
    if name not in _FLASH_PACKAGES:
        return
    import torch

    module, package = _FLASH_PACKAGES[name]
    if not torch.cuda.is_available():
        msg = (
            f"attn_implementation={name!r} runs on CUDA GPUs only, and there is none here; use 'sdpa', which runs "
            "everywhere."
        )
        raise UnsupportedError(msg)
    if not is_installed(module):
        msg = (
            f"attn_implementation={name!r} needs {package}: {pip_install(package)}; or use 'sdpa', which needs nothing."
        )
        raise MissingPackageError(msg)
