"""From an unquantized checkpoint to a quantized one on the disk.

Owns the order of checks, the work block by block with its progress, and what is written. Knows no LangChain.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.bitsandbytes import import_quietly
from langchain_quantllm.compat.library_logging import progress_bars, without_torchao
from langchain_quantllm.compat.packages import check_packages, label_of
from langchain_quantllm.errors import CheckpointError, InvalidOptionError, UnsupportedError, first_line
from langchain_quantllm.loading.checkpoint import Checkpoint, find_checkpoint, find_source, reads_text
from langchain_quantllm.loading.devices import default_device_map, release_memory
from langchain_quantllm.loading.registry import load
from langchain_quantllm.loading.sources import check_sources
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.quantization.calibration import Calibration, calibration_from, read_texts, sequences
from langchain_quantllm.quantization.gptq import GPTQRun, Progress, check_layers
from langchain_quantllm.quantization.output_dir import free_folder, written
from langchain_quantllm.schemes import GPTQ, Prequantized, Scheme, Unquantized, scheme_from

DAMPING = 0.01
"""What is added to the diagonal of GPTQ's statistics, as a share of its mean. Source: section 3.3 of the paper."""
_SHARD = "5GB"


@dataclass(frozen=True, kw_only=True)
class QuantizedCheckpoint:
    """What `quantize` wrote.

    Args:
        folder: Where.
        scheme: How its weights are held.
        weights_bytes: Of the weight files.
        total_s: Seconds that it took.
        calibration: What GPTQ was calibrated with, in words; None for schemes that need none.
        calibration_tokens: Tokens of it; 0 where weights were rounded to nearest.
        resumed_blocks: Blocks that an earlier run had finished.
    """

    folder: Path
    scheme: Scheme
    weights_bytes: int
    total_s: float
    calibration: str | None = None
    calibration_tokens: int = 0
    resumed_blocks: int = 0


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

    GPTQ goes through the blocks one by one, each with the inputs that the quantized ones before it give. Only one block
    is on the device at a time, so that a GPU needs room for one block and its inputs. Finished blocks are kept beside
    the output, in a folder that ends in `.partial`: the same call goes on there after it was broken off.

    Args:
        model_id: A folder, or the name of a repository on the Hub, with an unquantized decoder-only model.
        scheme: `"gptq"` or `GPTQ(bits=..., group_size=..., sym=..., desc_act=...)`; `"int8"`, `"nf4"`, `"nf4-double"`,
            `"fp4"`, `"fp4-double"`, or such a scheme with its options.
        calibration: For GPTQ: a `Calibration`, or its source: texts, a file, a data set's name, `"none"` for rounding
            to nearest; None is the text that comes with the package. It is not written into the checkpoint.
        output: The folder to write; None is one in the current folder, named after model and scheme.
        skip_modules: For GPTQ: endings of the names of layers that stay as they are, such as `"mlp.down_proj"`.
        damping: For GPTQ: added to the diagonal of the statistics, as a share of its mean.
        device: What computes: `"cpu"`, `"cuda"`, `"cuda:1"`; None is the first accelerator, else the CPU.
        dtype: Of what is not quantized; `"auto"` is the checkpoint's, but float16 in the place of float32.
        overwrite: Replace an output that is there, and blocks of another run beside it.
        report: Called after each block of GPTQ.
        progress: Show how far loading is.
        revision: Branch, tag or commit.
        token: Access token of the Hub.
        cache_dir: Where files of the Hub are kept.
        local_files_only: True never asks the Hub, False always does; None does where files are missing here.
        trust_remote_code: Run Python code that comes with the checkpoint.

    Returns:
        What was written, and how.

    Raises:
        InvalidOptionError: If an option is not allowed, or a group size does not divide a layer.
        CheckpointError: If the checkpoint is quantized already, or cannot be read.
        ModelNotFoundError: If there is no such checkpoint.
        MissingPackageError: If the scheme needs a package that is not installed.
        UnsupportedError: If the model cannot be quantized so.
        NotEnoughMemoryError: If it does not fit.
    """
    began = time.perf_counter()
    wanted = _wanted(scheme)
    is_gptq = isinstance(wanted, GPTQ)
    if not is_gptq:
        _refuse_gptq_options(wanted, calibration, skip_modules, damping)
        check_packages(wanted)
    if not 0 < damping < 1:
        msg = f"damping={damping!r} is not allowed; it must lie between 0 and 1, and 0.01 is usual."
        raise InvalidOptionError(msg)
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
    check_sources(spec.model_id)
    folder = free_folder(output or _named_after(spec.model_id, wanted), [spec.model_id], overwrite=overwrite)
    source = find_source(spec)
    import_quietly()
    with without_torchao():
        checkpoint = find_checkpoint(spec, source)
    if checkpoint.quantization is not None:
        msg = (
            f"{spec.model_id} is quantized already, and what that lost cannot be had back; give the unquantized "
            "checkpoint."
        )
        raise CheckpointError(msg)
    about: dict[str, Any] = {}
    if isinstance(wanted, GPTQ):
        options: dict[str, Any] = {"skip_modules": skip_modules, "damping": damping, "device": device, "report": report}
        wanted, about = _write_gptq(spec, checkpoint, wanted, calibration, folder, overwrite=overwrite, **options)
    else:
        _write_bitsandbytes(spec, folder)
    release_memory()
    return QuantizedCheckpoint(
        folder=folder,
        scheme=wanted,
        weights_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        total_s=time.perf_counter() - began,
        **about,
    )


def _write_bitsandbytes(spec: LoadSpec, folder: Path) -> None:
    model = load(spec)
    with written(folder) as unfinished, progress_bars(spec.progress):
        model.pipeline.model.save_pretrained(unfinished, max_shard_size=_SHARD)  # before the first forward repacks it
        (getattr(model.pipeline, "processor", None) or model.pipeline.tokenizer).save_pretrained(unfinished)
    model.close()


def _write_gptq(
    spec: LoadSpec,
    checkpoint: Checkpoint,
    scheme: GPTQ,
    calibration: Any,
    folder: Path,
    *,
    skip_modules: Sequence[str],
    damping: float,
    device: str | None,
    report: Callable[[Progress], None] | None,
    overwrite: bool,
) -> tuple[GPTQ, dict[str, Any]]:
    """Calibrate, quantize and write; gives the scheme with its group size, and what is to be told of it."""
    if not reads_text(checkpoint.config):
        msg = f"{spec.model_id} reads images, too, and GPTQ here knows models of text alone; use nf4 or int8."
        raise UnsupportedError(msg)
    compute = device or _first_device()
    _check_device(compute)
    dtype = _stored_dtype(spec, checkpoint.config)
    calibrated = calibration_from(calibration)
    texts = read_texts(calibrated)
    with without_torchao():
        layout, scheme = check_layers(checkpoint.config, scheme, skip_modules, trust_remote_code=spec.trust_remote_code)
    model = load(dataclasses.replace(spec, dtype=dtype))
    context = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    ids = sequences(calibrated, texts, model.pipeline.tokenizer, context) if texts else []
    run = GPTQRun(model.pipeline.model, layout, scheme, damping=damping, device=compute, report=report)
    resumed = run.run(ids, checkpoint.source, folder, overwrite=overwrite)
    tokens = sum(map(len, ids))
    with written(folder) as unfinished, progress_bars(spec.progress):
        run.write(unfinished, calibration=calibrated.source_label, tokens=tokens)
        model.pipeline.tokenizer.save_pretrained(unfinished)
    run.journal.remove()
    model.close()
    return scheme, {"calibration": calibrated.label, "calibration_tokens": tokens, "resumed_blocks": resumed}


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        msg = f"device={device!r} cannot be used here ({first_line(error)}); use 'cpu'."
        raise UnsupportedError(msg) from error


def _wanted(scheme: Any) -> Scheme:
    """Give the scheme, with GPTQ's defaults filled in."""
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


def _refuse_gptq_options(scheme: Scheme, calibration: Any, skip_modules: Sequence[str], damping: float) -> None:
    hint = f" {label_of(scheme)}(skip_modules=...) takes names." if skip_modules else ""
    given = {"calibration": calibration is not None, "skip_modules": bool(skip_modules), "damping": damping != DAMPING}
    for name, is_given in given.items():
        if is_given:
            msg = f"{name} is for GPTQ, and quantization {label_of(scheme)!r} needs none; leave it out.{hint}"
            raise InvalidOptionError(msg)


def _first_device() -> str:
    device = str(next(iter(default_device_map(LoadSpec(model_id="any")).values())))
    return f"cuda:{device}" if device.isdigit() else device


def _stored_dtype(spec: LoadSpec, config: Any) -> str:
    """Name the dtype that the unquantized part is written in: GPTQ's kernels know 16 bits only."""
    if spec.dtype == "float32":
        msg = "dtype='float32' is not known to GPTQ's kernels; use 'float16' or 'bfloat16'."
        raise InvalidOptionError(msg)
    stored = str(getattr(config, "dtype", None) or config.get_text_config().dtype).removeprefix("torch.")
    return spec.dtype if spec.dtype != "auto" else stored if stored in ("float16", "bfloat16") else "float16"


def _named_after(model_id: str, scheme: Scheme) -> str:
    return Path(model_id).name + f"-{label_of(scheme)}" + (f"-{scheme.bits}bit" if isinstance(scheme, GPTQ) else "")
