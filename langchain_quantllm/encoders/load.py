"""Loading an encoder: its checks, its quantization, and the memory that it takes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from langchain_quantllm.compat.bitsandbytes import (
    filter_cast_warnings,
    four_bit_state,
    import_quietly,
    keep_odd_layers_unpacked,
)
from langchain_quantllm.compat.bitsandbytes_scales import refine_scales
from langchain_quantllm.compat.library_logging import progress_bars, quiet_logger, without_torchao
from langchain_quantllm.compat.packages import check_packages, label_of
from langchain_quantllm.compat.sentence_transformers import check_installed, keep_heads_in_float32, make_model
from langchain_quantllm.compat.sentence_transformers_scores import keep_scores_in_float32
from langchain_quantllm.encoders.source import EncoderSource, find_source
from langchain_quantllm.encoders.spec import EncoderSpec
from langchain_quantllm.engine.clean_thread import in_clean_thread
from langchain_quantllm.engine.process import note_loading
from langchain_quantllm.errors import CheckpointError, NotEnoughMemoryError, UnsupportedError
from langchain_quantllm.loading.choices import check_attention
from langchain_quantllm.loading.devices import release_memory, reset_peaks
from langchain_quantllm.loading.foreign_errors import as_checkpoint_error, reason_of
from langchain_quantllm.loading.stored_tensors import read_stored_tensors
from langchain_quantllm.memory import TrackedMemory, available_memory, format_bytes, model_build_lock, track_memory
from langchain_quantllm.memory.measure import device_name
from langchain_quantllm.schemes import FP4, NF4, Int8, Scheme, Unquantized, scheme_of_config

_CLASSIFIERS = (
    "classifier",
    "pre_classifier",
    "score",
    "head",
    "pooler.dense",
    "head.dense",
    "classifier.dense",
    "classifier.out_proj",
)
"""Ends of the names of modules of a cross-encoder that stay unquantized: they are small, and make the score."""


_NARROW = 512
"""Width below which an encoder in 4 bits keeps some layers in 16 bits, and gets scales of least error; docs/rag.md has
the measurement."""

_SENSITIVE = (
    *("self.value", "attention.output.dense", "attention.dense", "value_proj"),  # BERT and its kin
    *("attn.v", "attn.o", "v_lin", "out_lin", "v_proj", "o_proj", "out_proj", "Wqkv", "attn.Wo"),
)
"""Ends of the names of the layers that a narrow encoder keeps: values and outputs of attention, whose rounding moves a
vector the most for each byte."""


@dataclass(frozen=True, kw_only=True)
class ReadEncoder:
    """What loading gives.

    Args:
        model: The model of sentence-transformers.
        scheme: The scheme of its weights.
        tracked: The memory before, during and after loading.
    """

    model: Any
    scheme: Scheme
    tracked: TrackedMemory


def device_of(spec: EncoderSpec) -> str:
    """Return the device that a spec loads onto.

    Raises:
        InvalidOptionError: If the name is not understood.
        UnsupportedError: If the device is not there.
    """
    import torch

    if spec.device is not None:
        return device_name(spec.device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else device_name(accelerator.type)


@in_clean_thread
def load(spec: EncoderSpec) -> ReadEncoder:
    """Load an encoder.

    Args:
        spec: Which one and how.

    Raises:
        ModelNotFoundError: If there is no such model here or on the Hub.
        CheckpointError: If it cannot be loaded as asked.
        MissingPackageError: If a package is missing for it.
        UnsupportedError: If it is another kind of model, or this machine cannot run it.
        NotEnoughMemoryError: If it does not fit.
    """
    note_loading()
    check_installed()
    check_packages(spec.scheme)
    source = find_source(spec)
    with as_checkpoint_error(lambda error: _explain(spec, error)):
        return _load(spec, source)


def _explain(spec: EncoderSpec, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"{spec.model_id} comes with Python code of its own; read it, and if you trust it pass "
            "trust_remote_code=True."
        )
    return f"{spec.model_id} cannot be loaded: {reason_of(error)}"


def _load(spec: EncoderSpec, source: EncoderSource) -> ReadEncoder:
    import torch

    import_quietly()
    check_attention(spec)  # type: ignore[arg-type]  # it reads the name of the attention alone
    scheme = _scheme(spec, source)
    device = device_of(spec)
    dtype = getattr(torch, dtype_of(spec, source.config, scheme))
    _check_memory(spec, source, scheme, device, dtype)
    model_kwargs = {
        **({} if spec.model_kwargs is None else copy.deepcopy(dict(spec.model_kwargs))),
        "dtype": dtype,
        "use_safetensors": spec.use_safetensors or None,
        "attn_implementation": spec.attn_implementation,
        "quantization_config": None if spec.scheme is None else _quantization_config(spec, source, scheme, dtype),
        "device_map": {"": device},
    }
    with (
        without_torchao(),
        progress_bars(spec.progress),
        quiet_logger("sentence_transformers"),
        track_memory([device] if device != "cpu" else []) as tracked,
    ):
        with model_build_lock():
            model = _make(spec, source, model_kwargs)
            if _is_refined(scheme, source):
                _refine(model, _make(spec, source, {**model_kwargs, "quantization_config": None}))
        keep_heads_in_float32(model)
        if spec.kind == "cross_encoder":
            keep_scores_in_float32(model)
        model.eval()
        filter_cast_warnings(model)
        if device == "cpu":
            keep_odd_layers_unpacked(model)
        release_memory(collect=False)
    reset_peaks([device])
    return ReadEncoder(model=model, scheme=scheme, tracked=tracked)


def _make(spec: EncoderSpec, source: EncoderSource, model_kwargs: Mapping[str, Any]) -> Any:
    """Make the model of sentence-transformers; arguments of transformers that are None are left out."""
    options = {
        "trust_remote_code": spec.trust_remote_code,
        "model_kwargs": {name: value for name, value in model_kwargs.items() if value is not None},
    }
    return make_model(spec.kind, str(source.folder), options, spec.pooling if source.modules is None else None)


def _check_memory(spec: EncoderSpec, source: EncoderSource, scheme: Scheme, device: str, dtype: Any) -> None:
    """Check that the weights fit, as far as the number of their elements tells.

    Raises:
        NotEnoughMemoryError: If they take more memory than is free, even if all of them were quantized.
    """
    stored = read_stored_tensors(source.transformer)
    if stored is None or device == "mps":
        return
    is_stored = isinstance(source.config.get("quantization_config"), dict)
    bits = 8 * dtype.itemsize if isinstance(scheme, Unquantized) else scheme.weight_bits or 4
    needed_bytes = stored.size_bytes if is_stored else stored.elements * bits // 8
    free_bytes = available_memory(device)
    if needed_bytes > free_bytes:
        msg = (
            f"{spec.model_id} needs at least {format_bytes(needed_bytes)} for its weights in {label_of(scheme)!r}, and "
            f"{format_bytes(free_bytes)} are free on {device}; use a scheme of fewer bits, another device, or a "
            "smaller model."
        )
        raise NotEnoughMemoryError(msg)


def _scheme(spec: EncoderSpec, source: EncoderSource) -> Scheme:
    """Return the scheme of the loaded weights.

    Raises:
        CheckpointError: If the checkpoint is quantized already, and another scheme is asked for.
    """
    stored = source.config.get("quantization_config")
    if not isinstance(stored, dict):
        return spec.scheme or Unquantized()
    has = scheme_of_config(stored)
    if spec.scheme is not None and label_of(has) != label_of(spec.scheme):
        msg = (
            f"{spec.model_id} is already quantized ({label_of(has)}), so it cannot be loaded as "
            f"{label_of(spec.scheme)}; leave quantization out, or give the unquantized checkpoint."
        )
        raise CheckpointError(msg)
    check_packages(has)
    return has


def dtype_of(spec: EncoderSpec, config: Mapping[str, Any], scheme: Scheme) -> str:
    """Return the name of the dtype of what is not quantized.

    Args:
        spec: How the encoder is loaded.
        config: The config.json of its transformer.
        scheme: The scheme of its weights.
    """
    if spec.dtype != "auto":
        return spec.dtype
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if isinstance(scheme, Unquantized):
        return stored if stored in ("float16", "bfloat16") else "float32"
    return "float16" if stored == "float16" else "bfloat16"


def scheme_for(kind: str, scheme: Scheme, config: Mapping[str, Any]) -> Scheme:
    """Return a scheme with the layers of an encoder that stay unquantized.

    They are the classifier of a cross-encoder, and with 4 bits the sensitive layers of a narrow encoder. A list of the
    caller's own, `skip_modules`, stands in place of the latter.

    Args:
        kind: One of `spec.KINDS`.
        scheme: The scheme that is asked for.
        config: The config.json of the transformer.
    """
    if not isinstance(scheme, Int8 | NF4 | FP4):
        return scheme
    kept = scheme.skip_modules
    if not kept and _is_narrow(scheme, config):
        kept = _SENSITIVE
    if kind == "cross_encoder":
        kept = (*kept, *_CLASSIFIERS)
    return dataclasses.replace(scheme, skip_modules=tuple(dict.fromkeys(kept)))


def _is_narrow(scheme: Scheme, config: Mapping[str, Any]) -> bool:
    """Say whether an encoder is narrow, and is to have weights of 4 bits."""
    widths = (config.get(name) for name in ("hidden_size", "d_model", "dim"))
    width = next((size for size in widths if type(size) is int), _NARROW)
    return isinstance(scheme, NF4 | FP4) and width < _NARROW


def _is_refined(scheme: Scheme, source: EncoderSource) -> bool:
    """Say whether an encoder gets scales of least error."""
    return _is_narrow(scheme, source.config) and not isinstance(source.config.get("quantization_config"), dict)


def _refine(model: Any, plain: Any) -> None:
    """Quantize the 4-bit layers of a model anew, with scales of least error.

    Args:
        model: The quantized model.
        plain: The same before it was quantized.
    """
    from transformers import Conv1D

    for name, module in model.named_modules():
        if four_bit_state(getattr(module, "weight", None)) is None:
            continue
        before = plain.get_submodule(name)
        refine_scales(module.weight, before.weight.T if isinstance(before, Conv1D) else before.weight)


def _quantization_config(spec: EncoderSpec, source: EncoderSource, scheme: Scheme, dtype: Any) -> Any:
    """Return transformers' config of a scheme, for a checkpoint that is not quantized."""
    if isinstance(scheme, Unquantized):
        return None
    config = scheme_for(spec.kind, scheme, source.config).transformers_config(str(dtype).removeprefix("torch."))
    if config is None:
        msg = f"quantization={scheme.name!r} cannot be applied while an encoder loads; use 'int8', 'nf4' or 'fp4'."
        raise UnsupportedError(msg)
    return config
