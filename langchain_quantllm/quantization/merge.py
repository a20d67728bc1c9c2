"""`merge_adapter`: merges an adapter into its base model and writes the result, a checkpoint in full precision.

The logits of the merged model are compared with those of the base with its adapter, after subtracting each row's mean.
The relative difference may be 0.001 in float32, and 0.1 in 16 bits, where each sum of weight and adapter is rounded to
3 digits (float16) or 2 (bfloat16).
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.bitsandbytes import block_magnitudes
from langchain_quantllm.compat.library_logging import quiet_logger, without_torchao
from langchain_quantllm.compat.packages import label_of
from langchain_quantllm.compat.peft import peft_imported, set_weights
from langchain_quantllm.compat.transformers_quantizers import (
    BITSANDBYTES_LOGGER,
    forget_quantization,
    was_quantized,
)
from langchain_quantllm.engine.clean_thread import in_clean_thread
from langchain_quantllm.errors import CheckpointError, QuantLLMError, UnsupportedError
from langchain_quantllm.loading.adapter_weights import read_tensors
from langchain_quantllm.loading.adapters import Adapter, check_adapters_fit, find_adapters
from langchain_quantllm.loading.checkpoint import Checkpoint, find_checkpoint, find_source
from langchain_quantllm.loading.devices import release_memory
from langchain_quantllm.loading.foreign_errors import reason_of
from langchain_quantllm.loading.registry import load
from langchain_quantllm.loading.sources import check_sources
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.quantization.output_dir import claim_output
from langchain_quantllm.quantization.saving import (
    check_reopened,
    expected_logits,
    largest_difference,
    logits_of,
    save_checkpoint,
    stored_weights,
    tolerance_of,
)
from langchain_quantllm.schemes import FP4, GPTQ, NF4, Int8, Unquantized, scheme_of_config

_NAME = "merged"
_SCALE_TOLERANCE = 0.02  # of the largest weight of a block: bfloat16 rounds to 1/256


@in_clean_thread
def merge_adapter(
    model_id: str,
    adapter: str,
    output: str | Path,
    *,
    dtype: str = "auto",
    device: int | str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    use_safetensors: bool = True,
    local_files_only: bool | None = None,
    progress: bool = True,
) -> Path:
    """Write a model with an adapter merged into its weights.

    Args:
        model_id: Folder or repository of the base model: unquantized, or quantized by bitsandbytes, in which case it is
            dequantized first.
        adapter: Folder or repository of an adapter of peft.
        output: Folder to write; it appears when it is complete.
        dtype: Dtype of the result: `"auto"` (the checkpoint's), `"float16"`, `"bfloat16"` or `"float32"`.
        device: Device that computes, such as `"cpu"` or 0; None is the first GPU, else the CPU.
        overwrite: Replace a checkpoint in the folder. One that holds anything else is never replaced.
        revision: Branch, tag or commit of the base model.
        token: Access token of the Hub.
        cache_dir: Folder in which files of the Hub are kept.
        trust_remote_code: Run Python code that comes with the base model.
        use_safetensors: Refuse weights in pickle files, which can run code.
        local_files_only: True never asks the Hub, False always does; None does where files are missing here.
        progress: Show progress bars of loading and writing.

    Returns:
        The folder, with weights in safetensors, config, generation config, tokenizer and chat template.

    Raises:
        InvalidOptionError: If the folder is not empty, or an option has a value that is not allowed.
        UnsupportedError: If the base is quantized in a way that cannot be undone, or the adapter cannot be merged.
        CheckpointError: If base or adapter cannot be used, do not belong together, or the merged model does not compute
            the same as both.
        ModelNotFoundError: If one of them is not there.
        MissingPackageError: If peft, or a package of the base model's format, is not installed.
        OutputError: If the output cannot be written, has no room, or another run writes it.
    """
    check_sources(model_id, {_NAME: adapter})
    spec = LoadSpec(
        model_id=model_id,
        dtype=dtype,
        device_map=None if device is None else {"": device},
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
        use_safetensors=use_safetensors,
        local_files_only=local_files_only,
        progress=progress,
        adapters={_NAME: adapter},
    )
    with claim_output(output, (model_id, adapter), cache_dir=cache_dir, overwrite=overwrite) as claimed:
        found = find_adapters(spec)[0]
        source = find_source(spec)
        checkpoint = _check_base(spec, source, found)
        claimed.check_space(stored_weights(checkpoint.config, Unquantized(), spec).total_bytes)
        spec = dataclasses.replace(spec, adapters={})
        loaded = load(spec, source)
        try:
            pipeline = loaded.pipeline
            model = _merged(_dequantized(pipeline.model, model_id), pipeline.tokenizer, found)
            preprocessor = getattr(pipeline, "processor", None) or pipeline.tokenizer
            save_checkpoint(claimed, model, preprocessor, progress=progress, trust_remote_code=trust_remote_code)
            expected = expected_logits(model, pipeline.tokenizer)
            del pipeline, model, preprocessor
        finally:
            loaded.close()
            release_memory()
        check_reopened(claimed.part, spec, expected)
        claimed.publish()
    return claimed.folder


def _check_base(spec: LoadSpec, source: str, adapter: Adapter) -> Checkpoint:
    """Find the base, and check its format and that the adapter fits, before weights are read."""
    with without_torchao():
        checkpoint = find_checkpoint(spec, source)
        scheme = Unquantized() if checkpoint.quantization is None else scheme_of_config(checkpoint.quantization)
        if not isinstance(scheme, Unquantized | Int8 | NF4 | FP4):
            method = "GPTQ" if isinstance(scheme, GPTQ) else label_of(scheme)
            msg = (
                f"{spec.model_id} is quantized with {method}, into which no adapter can be merged; merge it into the "
                "unquantized model, and quantize the result."
            )
            raise UnsupportedError(msg)
        check_adapters_fit([adapter], checkpoint, trust_remote_code=spec.trust_remote_code)
    return checkpoint


# --- dequantizing ---


def _dequantized(model: Any, name: str) -> Any:
    """Undo the quantization of bitsandbytes, before the model's first forward.

    A forward on some CPUs repacks the weights, and dequantizing them gives garbage; so the largest weight of each block
    is compared with its scale in the checkpoint.
    """
    if not was_quantized(model):
        return model
    from langchain_quantllm.experts.module import restore_weights

    scales = {path: found for path, module in model.named_modules() if (found := block_magnitudes(module)) is not None}
    dtype = model.dtype
    with quiet_logger(BITSANDBYTES_LOGGER):
        model = model.dequantize(dtype=dtype)
    layers = dict(model.named_modules())
    for path, scale in scales.items():
        _check_scales(layers[path].weight, *scale, f"{path} of {name}")
    for layer in layers.values():
        restore_weights(layer, dtype)
    forget_quantization(model)
    return model


def _check_scales(weight: Any, scales: Any, block: int, name: str) -> None:
    import torch

    found = weight.detach().float().abs()
    if block:
        found = torch.nn.functional.pad(found.flatten(), (0, -found.numel() % block)).view(-1, block)
    largest = found.amax(1)
    scales = scales.to(largest.device).flatten()
    if largest.shape != scales.shape or not torch.allclose(largest, scales.abs(), rtol=_SCALE_TOLERANCE, atol=1e-6):
        msg = f"the dequantized weights of {name} do not match their scales in the checkpoint; nothing was written."
        raise CheckpointError(msg)


# --- merging ---


def _merged(model: Any, tokenizer: Any, adapter: Adapter) -> Any:
    """Merge an adapter into an unquantized model, and check that the result computes the same."""
    with peft_imported(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        _check_tied(model, adapter)
        try:
            from peft import PeftModel

            adapted = PeftModel.from_pretrained(model, str(adapter.folder), adapter_name=_NAME).eval()
            _check_loaded(adapted, adapter)
        except QuantLLMError:
            raise
        except Exception as error:  # whatever peft raises for the settings and tensors of strangers
            msg = f"the adapter {adapter.source} does not fit this model; was it made for it? {reason_of(error)}"
            raise CheckpointError(msg) from error
        expected = logits_of(adapted, tokenizer)
        try:
            merged = adapted.merge_and_unload(safe_merge=True)
        except Exception as error:  # as above
            msg = f"the adapter {adapter.source} cannot be merged: {reason_of(error)}"
            raise UnsupportedError(msg) from error
    for name, parameter in merged.named_parameters():
        if not parameter.isfinite().all():
            msg = f"the merged weights of {name!r} are not all finite; try dtype='float32'."
            raise CheckpointError(msg)
    _check_same(logits_of(merged, tokenizer), expected, merged.dtype)
    return merged


def _check_tied(model: Any, adapter: Adapter) -> None:
    """Refuse an adapter of the output head where the input embeddings are the same tensor."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight or adapter.config.get("peft_type") == "TRAINABLE_TOKENS":
        return
    names = {path.rpartition(".")[2] for path, module in model.named_modules() if module in (head, embeddings)}
    targets = adapter.config.get("target_modules")
    touched = {*(targets if isinstance(targets, list) else ()), *(adapter.config.get("modules_to_save") or ())}
    if names & touched:
        msg = (
            f"the adapter {adapter.source} changes {min(names & touched)!r}, whose weights this model uses twice, "
            "for its input and its output; they cannot be merged. Use it as adapter=."
        )
        raise UnsupportedError(msg)


def _check_loaded(adapted: Any, adapter: Adapter) -> None:
    """Check that every tensor of the adapter's layers is in its file; peft only warns otherwise."""
    missing = set(set_weights(adapted, _NAME, read_tensors(adapter))[0])
    own = {
        name: tensor for name, tensor in adapted.named_parameters(remove_duplicate=False) if _NAME in name.split(".")
    }
    filled = {id(tensor) for name, tensor in own.items() if name not in missing}  # tied ones have several names
    if lost := sorted(name for name in own.keys() & missing if id(own[name]) not in filled):
        msg = f"the adapter {adapter.source} has no weights for {lost[0]!r}; was it made for this model?"
        raise CheckpointError(msg)


def _check_same(found: list[Any], expected: list[Any], dtype: Any) -> None:
    difference, tolerance = largest_difference(found, expected), tolerance_of(dtype)
    if difference > tolerance:
        msg = (
            "the merged model does not compute the same as the model with its adapter: its logits differ by "
            f"{difference:.2g}, and {tolerance:g} is allowed; nothing was written. Try dtype='float32'."
        )
        raise CheckpointError(msg)
