"""The two ways to a quantized checkpoint: of a model that is loaded as a whole, and block by block."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

from langchain_quantllm.compat.library_logging import without_torchao
from langchain_quantllm.compat.packages import label_of
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError, first_line
from langchain_quantllm.loading.checkpoint import Checkpoint, reads_text
from langchain_quantllm.loading.devices import default_device_map
from langchain_quantllm.loading.pipeline import load_tokenizer
from langchain_quantllm.loading.registry import load
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.memory import estimate_config
from langchain_quantllm.memory.weights import expert_parameters, parameter_counts
from langchain_quantllm.quantization.calibration import named, read_texts, sequences
from langchain_quantllm.quantization.calibration_distance import compare_with_use, sequences_of_use
from langchain_quantllm.quantization.decoder_layers import Layout
from langchain_quantllm.quantization.gptq import SHARD, GPTQRun, Progress, check_layers
from langchain_quantllm.quantization.gptq_options import GPTQOptions
from langchain_quantllm.quantization.journal import Journal
from langchain_quantllm.quantization.mxfp4 import check_mxfp4, pack_mxfp4
from langchain_quantllm.quantization.output_dir import OutputDir
from langchain_quantllm.quantization.saving import check_reopened, expected_logits, save_checkpoint, stored_weights
from langchain_quantllm.schemes import AWQ, GPTQ, MXFP4, Scheme

logger = logging.getLogger(__name__)

_NAMED = 8
"""Experts that a warning names."""


def write_loaded(spec: LoadSpec, checkpoint: Checkpoint, scheme: Scheme, output: OutputDir) -> dict[str, Any]:
    """Load a model, quantized by bitsandbytes or to be packed in mxfp4, write it, and compare it with what was written.

    Returns:
        The fields of the `QuantizedCheckpoint` that are known of it.
    """
    is_mxfp4 = isinstance(scheme, MXFP4)
    if is_mxfp4:
        check_mxfp4(checkpoint.config, spec.model_id)
    output.check_space(stored_weights(checkpoint.config, scheme, spec).total_bytes)
    if not is_mxfp4:
        try:
            estimate = estimate_config(checkpoint.config, scheme, trust_remote_code=spec.trust_remote_code)
        except UnsupportedError:  # of a model without a formula, the loaded one is looked at below
            pass
        else:
            _check_share(spec, estimate.weights.quantized_bytes + estimate.weights.experts_bytes)
    loaded = load(spec, checkpoint.source)
    try:
        pipeline = loaded.pipeline
        share = _share_in_mxfp4(pipeline.model) if is_mxfp4 else _share_as_loaded(spec, pipeline.model)
        preprocessor = getattr(pipeline, "processor", None) or pipeline.tokenizer
        options: dict[str, Any] = {"progress": spec.progress, "trust_remote_code": spec.trust_remote_code}
        # Before the first forward, which repacks the weights on some CPUs.
        save_checkpoint(output, pipeline.model, preprocessor, max_shard_size=SHARD, **options)
        expected = expected_logits(pipeline.model, pipeline.tokenizer)
        del pipeline, preprocessor
    finally:
        loaded.close()
    check_reopened(output.part, spec, expected)
    output.publish()
    return {"scheme": scheme, "quantized_share": share}


def _share_in_mxfp4(model: Any) -> float:
    """Pack a model's experts; returns the share of its weights that these are."""
    total = parameter_counts(model)[1]
    return pack_mxfp4(model) / total


def _share_as_loaded(spec: LoadSpec, model: Any) -> float:
    quantized, total = parameter_counts(model)
    _check_share(spec, quantized)
    return _share(model, quantized, total)


def _check_share(spec: LoadSpec, quantized: int) -> None:
    if not quantized and spec.scheme is not None:
        msg = (
            f"{spec.model_id} has no linear layer that {label_of(spec.scheme)} quantizes: 0% of its weights would be "
            "smaller, so nothing was written."
        )
        raise UnsupportedError(msg)


def _share(model: Any, quantized: int, total: int, *, quantized_experts: int = 0) -> float:
    """Return the share of quantized parameters; logs if experts of a mixture are among the others."""
    share, experts = quantized / total, (expert_parameters(model) - quantized_experts) / total
    if experts:
        logger.warning(
            "Only %.0f%% of the weights are quantized: experts of this mixture, %.0f%%, stay as they are.",
            100 * share,
            100 * experts,
        )
    return share


def write_by_block(
    spec: LoadSpec,
    checkpoint: Checkpoint,
    options: GPTQOptions,
    output: OutputDir,
    *,
    device: str | None,
    report: Callable[[Progress], None] | None,
    overwrite: bool,
) -> dict[str, Any]:
    """Calibrate a model on the CPU, quantize one block after another on a device, and write it.

    Returns:
        The fields of the `QuantizedCheckpoint` that are known of it.
    """
    config, calibration, use = checkpoint.config, options.calibration, options.for_texts
    if not reads_text(config):
        msg = f"{spec.model_id} also reads images, and GPTQ is supported for models of text alone; use nf4 or int8."
        raise UnsupportedError(msg)
    journal = Journal(output.folder)
    device = _usable_device(device)
    spec = dataclasses.replace(spec, dtype=_stored_dtype(spec, config))
    texts = read_texts(calibration)
    with named("for_texts"):
        texts_of_use = [] if use is None else read_texts(use)
    layout, scheme = _layers(spec, config, options)
    # The blocks are written one by one, and all of them once more into the checkpoint.
    stored = stored_weights(config, scheme, spec)
    output.check_space(stored.total_bytes + stored.quantized_bytes - journal.finished_bytes)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    tokenizer = load_tokenizer(spec, checkpoint)
    ids = sequences(calibration, texts, tokenizer, context) if texts else []
    ids_of_use = [] if use is None else sequences_of_use(use, texts_of_use, tokenizer, ids)
    tokens = sum(map(len, ids))
    loaded = load(spec, checkpoint.source)
    try:
        model, tokenizer = loaded.pipeline.model, loaded.pipeline.tokenizer
        share = _share_of_layers(model, layout)
        distance = None
        if use is not None:
            distance = compare_with_use(model, layout, ids, ids_of_use, use.source_label, device)
        settings: dict[str, Any] = {"damping": options.damping, "distill": options.distill, "method": options.method}
        run = GPTQRun(model, layout, scheme, device=device, journal=journal, report=report, **settings)
        resumed_blocks = run.run(ids, checkpoint.source, overwrite=overwrite)
        about: dict[str, Any] = {"calibration": calibration.source_label, "tokens": tokens, "progress": spec.progress}
        run.write(output, tokenizer, trust_remote_code=spec.trust_remote_code, **about)
        _warn_of_rare(run.rare_experts)
    finally:
        journal.remove_empty()
        loaded.close()
    return {
        "scheme": run.bits.scheme(scheme),
        "mean_bits": run.bits.mean,
        "calibration": calibration.label,
        "calibration_tokens": tokens,
        "resumed_blocks": resumed_blocks,
        "rare_experts": run.rare_experts,
        "left_out_layers": layout.left_out,
        "quantized_share": share,
        "calibration_distance": distance,
    }


def _layers(spec: LoadSpec, config: Any, options: GPTQOptions) -> tuple[Layout, GPTQ | AWQ]:
    """Find the layers to quantize, and the scheme with its group size, before any weight is loaded."""
    trusted = {"trust_remote_code": spec.trust_remote_code}
    with without_torchao():
        layout, scheme = check_layers(config, options.scheme, options.skip_modules, **trusted)
    if options.distill is not None and any(layout.experts):
        msg = f"{spec.model_id} is a mixture of experts, whose scales distill does not train; leave it out."
        raise UnsupportedError(msg)
    return layout, scheme


def _share_of_layers(model: Any, layout: Layout) -> float:
    """Return the share of a model's parameters that a layout has."""
    blocks = model.get_submodule(layout.prefix)
    linears = (blocks[i].get_submodule(name) for i, names in enumerate(layout.layers) for name in names)
    experts = sum(own.elements for found in layout.experts for own in found)
    quantized = experts + sum(linear.weight.numel() for linear in linears)
    return _share(model, quantized, parameter_counts(model)[1], quantized_experts=experts)


def _warn_of_rare(experts: Mapping[str, int]) -> None:
    """Log which experts the calibration hardly reached."""
    if not experts:
        return
    named = sorted(experts, key=lambda name: experts[name])[:_NAMED]
    logger.warning(
        "Fewer tokens of the calibration reached %d experts than they have inputs, so that other tokens of their "
        "layers stood in for the rest: %s%s. More calibration tokens, Calibration(samples=...), reach more of them.",
        len(experts),
        ", ".join(f"{name} ({experts[name]})" for name in named),
        " and others" if len(experts) > _NAMED else "",
    )


def _usable_device(device: str | None) -> str:
    """Check the device that computes; None chooses the first accelerator, else the CPU."""
    import torch

    if device is None:
        first = str(next(iter(default_device_map(LoadSpec(model_id="any")).values())))
        device = f"cuda:{first}" if first.isdigit() else first
    try:
        torch.empty(1, dtype=torch.uint8, device=device)
    except (RuntimeError, AssertionError) as error:
        msg = f"device={device!r} cannot be used here ({first_line(error)}); use 'cpu'."
        raise UnsupportedError(msg) from error
    return device


def _stored_dtype(spec: LoadSpec, config: Any) -> str:
    """Choose the dtype of the unquantized part: GPTQ's kernels take 16 bits only."""
    if spec.dtype == "float32":
        msg = "dtype='float32' is not supported by GPTQ's kernels; use 'float16' or 'bfloat16'."
        raise InvalidOptionError(msg)
    stored = str(getattr(config, "dtype", None) or config.get_text_config().dtype).removeprefix("torch.")
    return spec.dtype if spec.dtype != "auto" else stored if stored in ("float16", "bfloat16") else "float16"
