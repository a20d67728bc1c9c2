"""`quantize`: writes a quantized checkpoint made of an unquantized one."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.bitsandbytes import import_quietly
from langchain_quantllm.compat.library_logging import without_torchao
from langchain_quantllm.compat.packages import check_packages, label_of
from langchain_quantllm.engine.clean_thread import in_clean_thread
from langchain_quantllm.errors import CheckpointError, InvalidOptionError
from langchain_quantllm.loading.checkpoint import Checkpoint, find_checkpoint, find_source
from langchain_quantllm.loading.devices import release_memory
from langchain_quantllm.loading.sources import check_sources
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.quantization.calibration import Calibration
from langchain_quantllm.quantization.distill import Distillation
from langchain_quantllm.quantization.gptq import Progress
from langchain_quantllm.quantization.gptq_options import DAMPING, gptq_options
from langchain_quantllm.quantization.journal import ENDING
from langchain_quantllm.quantization.output_dir import claim_output
from langchain_quantllm.quantization.writers import write_by_block, write_loaded
from langchain_quantllm.schemes import AWQ, GPTQ, MXFP4, SCHEMES, Prequantized, Scheme, Unquantized, scheme_from


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
        mean_bits: Bits of a weight of GPTQ on average, without scales and zero points.
        calibration_distance: How far `for_texts` is from the calibration: about 1 if it is alike, far from 1.5 on; None
            if there was no such sample.
        rare_experts: Experts of a mixture that fewer tokens of GPTQ's calibration reached than an expert has inputs,
            with how many; other tokens of their layer stood in for the rest.
        left_out_layers: Names inside a block of layers that GPTQ's and AWQ's formats cannot hold, such as a gate with
            one output; they stay unquantized, without having been named in `skip_modules`.
    """

    folder: Path
    scheme: Scheme
    weights_bytes: int
    total_s: float
    calibration: str | None = None
    calibration_tokens: int = 0
    resumed_blocks: int = 0
    quantized_share: float = 0.0
    mean_bits: float = 0.0
    calibration_distance: float | None = None
    rare_experts: Mapping[str, int] = field(default_factory=dict)
    left_out_layers: tuple[str, ...] = ()


@in_clean_thread
def quantize(
    model_id: str | os.PathLike[str],
    scheme: str | Mapping[str, Any] | Scheme,
    calibration: Calibration | str | os.PathLike[str] | Sequence[Any] | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    method: str = "gptq",
    distill: Distillation | bool | None = None,
    for_texts: Calibration | str | os.PathLike[str] | Sequence[Any] | None = None,
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
        scheme: `"gptq"` or `GPTQ(bits=..., group_size=..., sym=..., desc_act=...)`, where `bits="auto:4.25"` chooses
            the bits of each layer by the calibration; `"awq"` or `AWQ(group_size=...)`, for which all else holds that
            is said of GPTQ, as its format holds the same codes; `"int8"`, `"nf4"`, `"nf4-double"`, `"fp4"`,
            `"fp4-double"`, or such a scheme with its options; `"mxfp4"` for gpt-oss.
        calibration: For GPTQ: a `Calibration`, or its source: texts, conversations, documents, traced runs, a file, a
            data set's name, a mix, `"none"` for rounding to nearest; None is the text that comes with the package. It
            is not written into the checkpoint.
        output: Folder to write; None is one in the current folder, named after model and scheme.
        method: For GPTQ's format: `"gptq"` rounds by the calibration; `"autoround"` also trains scales and codes of
            each block afterwards, until it computes as the unquantized one; `"rtn"` rounds each weight to nearest, with
            scales of least squared error, and takes no calibration.
        distill: For GPTQ: train the scales after rounding, so that the whole model predicts the calibration as it did
            before; True, or a `Distillation` with options. The model must fit on the device as a whole, with what
            training needs. Bits, format and speed stay the same.
        for_texts: For GPTQ: a sample of what the model will be asked, from the same sources as a calibration. A warning
            says if the calibration is far from it, before the long work starts.
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
    options = gptq_options(
        wanted,
        calibration=calibration,
        method=method,
        distill=distill,
        for_texts=for_texts,
        skip_modules=skip_modules,
        damping=damping,
    )
    in_place = isinstance(wanted, GPTQ | AWQ | MXFP4)
    spec = LoadSpec(
        model_id=os.fspath(model_id),
        scheme=Unquantized() if in_place else wanted,
        dtype=dtype,
        device_map={"": "cpu"} if in_place else device,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    check_packages(spec.scheme)
    check_sources(spec.model_id)
    folder = output or _named_after(spec.model_id, wanted)
    files, beside = ([], []) if options is None else (options.calibration.files, [ENDING])
    place: dict[str, Any] = {"overwrite": overwrite, "cache_dir": cache_dir, "beside": beside}
    with claim_output(folder, [spec.model_id], files, **place) as claimed:
        checkpoint = _find_unquantized(spec)
        if options is None:
            about = write_loaded(spec, checkpoint, wanted, claimed)
        else:
            run: dict[str, Any] = {"device": device, "report": report, "overwrite": overwrite}
            about = write_by_block(spec, checkpoint, options, claimed, **run)
    release_memory()
    weights_bytes = sum(file.stat().st_size for file in claimed.folder.glob("*.safetensors"))
    total_s = time.perf_counter() - began
    return QuantizedCheckpoint(folder=claimed.folder, weights_bytes=weights_bytes, total_s=total_s, **about)


def _wanted(scheme: Any) -> Scheme:
    """Return the scheme, with GPTQ's defaults filled in."""
    wanted = scheme_from(scheme)
    if wanted is None or isinstance(wanted, Unquantized | Prequantized):
        name = "none" if wanted is None else label_of(wanted)
        msg = f"scheme={name!r} cannot be written; use one of {', '.join(repr(n) for n in SCHEMES if n != 'none')}."
        raise InvalidOptionError(msg)
    if not isinstance(wanted, GPTQ):
        return wanted
    if wanted.kernel != "auto":
        msg = f"kernel={wanted.kernel!r} is chosen while loading, not while quantizing; leave it out."
        raise InvalidOptionError(msg)
    defaults: dict[str, Any] = {"bits": 4, "sym": True, "desc_act": False}
    missing = {name: value for name, value in defaults.items() if getattr(wanted, name) is None}
    return dataclasses.replace(wanted, **missing)


def _find_unquantized(spec: LoadSpec) -> Checkpoint:
    """Find the checkpoint to quantize.

    Raises:
        CheckpointError: If it is quantized already.
    """
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
    return checkpoint


def _named_after(model_id: str, scheme: Scheme) -> str:
    bits = f"-{scheme.mean_bits:g}bit" if isinstance(scheme, GPTQ) else ""
    return f"{Path(model_id).name}-{label_of(scheme)}{bits}"
