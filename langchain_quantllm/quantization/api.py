"""`quantize`: writes a quantized checkpoint made of an unquantized one."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.bitsandbytes import import_quietly
from langchain_quantllm.compat.library_logging import without_torchao
from langchain_quantllm.compat.packages import check_packages, label_of
from langchain_quantllm.engine.clean_thread import in_clean_thread
from langchain_quantllm.errors import CheckpointError, InvalidOptionError, UnsupportedError, first_line
from langchain_quantllm.loading.checkpoint import Checkpoint, find_checkpoint, find_source, reads_text
from langchain_quantllm.loading.devices import default_device_map, release_memory
from langchain_quantllm.loading.registry import load
from langchain_quantllm.loading.sources import check_sources
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.memory import estimate_config
from langchain_quantllm.memory.weights import expert_parameters, parameter_counts
from langchain_quantllm.quantization.calibration import Calibration, calibration_from, read_texts, sequences
from langchain_quantllm.quantization.gptq import SHARD, GPTQRun, Progress, check_layers
from langchain_quantllm.quantization.journal import ENDING, Journal
from langchain_quantllm.quantization.output_dir import OutputDir, claim_output
from langchain_quantllm.quantization.saving import check_reopened, expected_logits, save_checkpoint, stored_weights
from langchain_quantllm.schemes import GPTQ, Prequantized, Scheme, Unquantized, scheme_from

logger = logging.getLogger(__name__)

DAMPING = 0.01
"""Number added to the diagonal of GPTQ's statistics, as a share of its mean. Source: section 3.3 of the paper."""


@dataclass(frozen=True, kw_only=True)
class QuantizedCheckpoint:
    """A checkpoint that `quantize` wrote.

    Args:
        folder: Its folder.
        scheme: Scheme of its weights.
        weights_bytes: Size of the weight files.
        total_s: Seconds that quantizing took.
        calibration: Description of GPTQ's calibration; None for schemes that need none.
        calibration_tokens: Number of its tokens; 0 where weights were rounded to nearest.
        resumed_blocks: Number of blocks that came from an earlier run.
        quantized_share: Share of the model's parameters that are quantized, from 0 to 1. Embeddings, the output head
            and norms stay as they are, and so do routers and shared gates of a mixture of experts.
    """

    folder: Path
    scheme: Scheme
    weights_bytes: int
    total_s: float
    calibration: str | None = None
    calibration_tokens: int = 0
    resumed_blocks: int = 0
    quantized_share: float = 0.0


@in_clean_thread
def quantize(
    model_id: str | os.PathLike[str],
    scheme: str | Mapping[str, Any] | Scheme,
    calibration: Calibration | str | os.PathLike[str] | Sequence[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    skip_modules: Sequence[str] = (),
    damping: float = DAMPING,
    device: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    report: Callable[[Progress], None] | None = None,
    progress: bool = True,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool | None = None,
    trust_remote_code: bool = False,
) -> QuantizedCheckpoint:
    """Quantize a checkpoint and write it as one that transformers, vLLM and this package load.

    GPTQ quantizes the blocks one by one, each with the outputs of the quantized ones before it as its inputs. Only one
    block is on the device at a time, so a GPU needs room for one block and its inputs. Finished blocks are kept beside
    the output, in a folder that ends in `.partial`: the same call resumes there after an interruption.

    What was written is read again and compared before it takes its place, and whatever fails leaves the old content of
    the output there. Models of bitsandbytes' schemes are also loaded once more, after the first one has left the
    memory, to compare what they compute.

    Args:
        model_id: A folder, or the name of a repository on the Hub, with an unquantized decoder-only model.
        scheme: `"gptq"` or `GPTQ(bits=..., group_size=..., sym=..., desc_act=...)`; `"int8"`, `"nf4"`, `"nf4-double"`,
            `"fp4"`, `"fp4-double"`, or such a scheme with its options.
        calibration: For GPTQ: a `Calibration`, or its source: texts, a file, a data set's name, `"none"` for rounding
            to nearest; None is the text that comes with the package. It is not written into the checkpoint.
        output: Folder to write; None is one in the current folder, named after model and scheme.
        skip_modules: For GPTQ: endings of the names of layers that stay unquantized, such as `"mlp.down_proj"`.
        damping: For GPTQ: added to the diagonal of the statistics, as a share of its mean.
        device: Device that computes: `"cpu"`, `"cuda"`, `"cuda:1"`; None is the first accelerator, else the CPU.
        dtype: Dtype of the unquantized part; `"auto"` is the checkpoint's, but float16 in place of float32.
        overwrite: Replace a checkpoint that is there, and blocks of another run beside it. A folder that holds anything
            else is never replaced.
        report: Called after each block of GPTQ, in the thread that quantizes.
        progress: Show progress bars of loading and writing.
        revision: Branch, tag or commit.
        token: Access token of the Hub.
        cache_dir: Folder in which files of the Hub are kept.
        local_files_only: True never asks the Hub, False always does; None does where files are missing here.
        trust_remote_code: Run Python code that comes with the checkpoint.

    Returns:
        The checkpoint that was written.

    Raises:
        InvalidOptionError: If an option is not allowed, or a group size does not divide a layer.
        CheckpointError: If the checkpoint is quantized already, or cannot be read.
        ModelNotFoundError: If there is no such checkpoint.
        MissingPackageError: If the scheme needs a package that is not installed.
        UnsupportedError: If the model cannot be quantized in this scheme, or has no layer that it quantizes.
        NotEnoughMemoryError: If the model does not fit into the memory.
        OutputError: If the output cannot be written, has no room, or another run writes it.
    """
    began = time.perf_counter()
    wanted = _wanted(scheme)
    is_gptq = isinstance(wanted, GPTQ)
    _check_gptq_options(wanted, calibration, skip_modules, damping)
    spec = LoadSpec(
        model_id=os.fspath(model_id),
        scheme=Unquantized() if is_gptq else wanted,
        dtype=dtype,
        device_map={"": "cpu"} if is_gptq else device,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    check_packages(spec.scheme)
    check_sources(spec.model_id)
    output = output or _named_after(spec.model_id, wanted)
    files = [calibration_from(calibration).file] if is_gptq else []
    place: dict[str, Any] = {"cache_dir": cache_dir, "beside": [ENDING] if is_gptq else []}
    with claim_output(output, [spec.model_id], filter(None, files), overwrite=overwrite, **place) as claimed:
        source = find_source(spec)
        import_quietly()
        with without_torchao():
            checkpoint = find_checkpoint(spec, source)
        if checkpoint.quantization is not None:
            msg = (
                f"{spec.model_id} is quantized already, and the precision that this lost cannot be restored; give the "
                "unquantized checkpoint."
            )
            raise CheckpointError(msg)
        about: dict[str, Any] = {"scheme": wanted}
        if isinstance(wanted, GPTQ):
            options: dict[str, Any] = {"skip_modules": skip_modules, "damping": damping, "report": report}
            options |= {"device": device, "overwrite": overwrite}
            about = _write_gptq(spec, checkpoint, wanted, calibration, claimed, **options)
        else:
            claimed.check_space(stored_weights(checkpoint.config, wanted, spec).total_bytes)
            about |= _write_bitsandbytes(spec, checkpoint, claimed)
    release_memory()
    weights_bytes = sum(file.stat().st_size for file in claimed.folder.glob("*.safetensors"))
    total_s = time.perf_counter() - began
    return QuantizedCheckpoint(folder=claimed.folder, weights_bytes=weights_bytes, total_s=total_s, **about)


def _write_bitsandbytes(spec: LoadSpec, checkpoint: Checkpoint, output: OutputDir) -> dict[str, Any]:
    """Quantize while loading, and write; returns the shares of the `QuantizedCheckpoint`."""
    with contextlib.suppress(UnsupportedError):  # of a model without a formula, the loaded one is looked at below
        estimate = estimate_config(checkpoint.config, spec.scheme, trust_remote_code=spec.trust_remote_code)
        _check_share(spec, estimate.weights.quantized_bytes + estimate.weights.experts_bytes)
    loaded = load(spec, checkpoint.source)
    try:
        pipeline = loaded.pipeline
        quantized, total = parameter_counts(pipeline.model)
        _check_share(spec, quantized)
        preprocessor = getattr(pipeline, "processor", None) or pipeline.tokenizer
        options: dict[str, Any] = {"progress": spec.progress, "trust_remote_code": spec.trust_remote_code}
        # Before the first forward, which repacks the weights on some CPUs.
        save_checkpoint(output, pipeline.model, preprocessor, max_shard_size=SHARD, **options)
        shares = _shares(pipeline.model, quantized, total)
        expected = expected_logits(pipeline.model, pipeline.tokenizer)
        del pipeline, preprocessor
    finally:
        loaded.close()
    check_reopened(output.part, spec, expected)
    output.publish()
    return shares


def _check_share(spec: LoadSpec, quantized: int) -> None:
    if not quantized and spec.scheme is not None:
        msg = (
            f"{spec.model_id} has no linear layer that {label_of(spec.scheme)} quantizes: 0% of its weights would be "
            "smaller, so nothing was written."
        )
        raise UnsupportedError(msg)


def _shares(model: Any, quantized: int, total: int) -> dict[str, Any]:
    """Return the share of quantized parameters; logs if experts of a mixture are among the others."""
    share, experts = quantized / total, expert_parameters(model) / total
    if experts:
        logger.warning(
            "Only %.0f%% of the weights are quantized: experts of this mixture, %.0f%%, stay as they are.",
            100 * share,
            100 * experts,
        )
    return {"quantized_share": share}


def _write_gptq(
    spec: LoadSpec,
    checkpoint: Checkpoint,
    scheme: GPTQ,
    calibration: Any,
    output: OutputDir,
    *,
    skip_modules: Sequence[str],
    damping: float,
    device: str | None,
    report: Callable[[Progress], None] | None,
    overwrite: bool,
) -> dict[str, Any]:
    """Calibrate, quantize and write; returns the fields of the `QuantizedCheckpoint`."""
    config = checkpoint.config
    if not reads_text(config):
        msg = f"{spec.model_id} also reads images, and GPTQ is supported for models of text alone; use nf4 or int8."
        raise UnsupportedError(msg)
    journal = Journal(output.folder)
    device = _usable_device(device)
    spec = dataclasses.replace(spec, dtype=_stored_dtype(spec, config))
    calibration = calibration_from(calibration)
    texts = read_texts(calibration)
    with without_torchao():
        layout, scheme = check_layers(config, scheme, skip_modules, trust_remote_code=spec.trust_remote_code)
    # The blocks are written one by one, and all of them once more into the checkpoint.
    stored = stored_weights(config, scheme, spec)
    output.check_space(stored.total_bytes + stored.quantized_bytes - journal.finished_bytes)
    loaded = load(spec, checkpoint.source)
    try:
        tokenizer = loaded.pipeline.tokenizer
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        ids = sequences(calibration, texts, tokenizer, context) if texts else []
        tokens = sum(map(len, ids))
        model = loaded.pipeline.model
        blocks = model.get_submodule(layout.prefix)
        linears = (blocks[i].get_submodule(name) for i, names in enumerate(layout.layers) for name in names)
        shares = _shares(model, sum(linear.weight.numel() for linear in linears), parameter_counts(model)[1])
        run = GPTQRun(model, layout, scheme, damping=damping, device=device, journal=journal, report=report)
        resumed_blocks = run.run(ids, checkpoint.source, overwrite=overwrite)
        about: dict[str, Any] = {"calibration": calibration.source_label, "tokens": tokens, "progress": spec.progress}
        run.write(output, tokenizer, trust_remote_code=spec.trust_remote_code, **about)
    finally:
        journal.remove_empty()
        loaded.close()
    return {
        "scheme": scheme,
        "calibration": calibration.label,
        "calibration_tokens": tokens,
        "resumed_blocks": resumed_blocks,
        **shares,
    }


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


def _check_gptq_options(scheme: Scheme, calibration: Any, skip_modules: Sequence[str], damping: float) -> None:
    """Check the options that are for GPTQ alone, as far as they need no checkpoint."""
    if not 0 < damping < 1:
        msg = f"damping={damping!r} is not allowed; it must lie between 0 and 1, and 0.01 is usual."
        raise InvalidOptionError(msg)
    given = {"calibration": calibration is not None, "skip_modules": bool(skip_modules), "damping": damping != DAMPING}
    wrong = next((name for name, is_given in given.items() if is_given), None)
    if wrong is not None and not isinstance(scheme, GPTQ):
        hint = f" {label_of(scheme)}(skip_modules=...) takes names." if skip_modules else ""
        msg = f"{wrong} is for GPTQ, and quantization {label_of(scheme)!r} needs none; leave it out.{hint}"
        raise InvalidOptionError(msg)


def _wanted(scheme: Any) -> Scheme:
    """Return the scheme, with GPTQ's defaults filled in."""
    wanted = scheme_from(scheme)
    if wanted is None or isinstance(wanted, Unquantized | Prequantized):
        name = "none" if wanted is None else label_of(wanted)
        msg = f"scheme={name!r} cannot be written; use 'gptq', 'int8', 'nf4', 'nf4-double', 'fp4' or 'fp4-double'."
        raise InvalidOptionError(msg)
    if not isinstance(wanted, GPTQ):
        return wanted
    if wanted.kernel != "auto":
        msg = f"kernel={wanted.kernel!r} is chosen while loading, not while quantizing; leave it out."
        raise InvalidOptionError(msg)
    defaults: dict[str, Any] = {"bits": 4, "sym": True, "desc_act": False}
    missing = {name: value for name, value in defaults.items() if getattr(wanted, name) is None}
    return dataclasses.replace(wanted, **missing)


def _stored_dtype(spec: LoadSpec, config: Any) -> str:
    """Choose the dtype of the unquantized part: GPTQ's kernels take 16 bits only."""
    if spec.dtype == "float32":
        msg = "dtype='float32' is not supported by GPTQ's kernels; use 'float16' or 'bfloat16'."
        raise InvalidOptionError(msg)
    stored = str(getattr(config, "dtype", None) or config.get_text_config().dtype).removeprefix("torch.")
    return spec.dtype if spec.dtype != "auto" else stored if stored in ("float16", "bfloat16") else "float16"


def _named_after(model_id: str, scheme: Scheme) -> str:
    return Path(model_id).name + f"-{label_of(scheme)}" + (f"-{scheme.bits}bit" if isinstance(scheme, GPTQ) else "")
