"""Writing a checkpoint, and reading it again before it takes its place: tensors, tokenizer, and what it computes.

Reading the tensors again takes as long as reading the files, which the system mostly still has in memory; one tensor is
in memory at a time. `check_reopened` loads the checkpoint once more, after the model that was written has left.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from langchain_quantllm.compat.library_logging import progress_bars, without_torchao
from langchain_quantllm.compat.transformers_auto import processor_parts
from langchain_quantllm.compat.transformers_saving import saved_tensors
from langchain_quantllm.errors import NotEnoughMemoryError, OutputError, QuantLLMError, UnsupportedError, first_line
from langchain_quantllm.loading.checkpoint import find_checkpoint
from langchain_quantllm.loading.devices import release_memory
from langchain_quantllm.loading.registry import load
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.memory import WeightBytes, estimate_config
from langchain_quantllm.quantization.output_dir import OutputDir
from langchain_quantllm.schemes import Scheme

_logger = logging.getLogger(__name__)

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "SELECT name, age FROM people WHERE",
    "1, 2, 3, 5, 8, 13,",
)
"""Texts on which models are compared."""

_TOLERANCE, _TOLERANCE_16BIT = 1e-3, 0.1


def save_checkpoint(
    output: OutputDir,
    model: Any,
    preprocessor: Any,
    *,
    progress: bool = True,
    trust_remote_code: bool = False,
    **options: Any,
) -> None:
    """Write a model and its tokenizer or processor into the new folder of an output, and check what was written.

    Args:
        output: The output, to be published afterwards.
        model: A transformers model.
        preprocessor: Its tokenizer or processor.
        progress: Show progress bars, unless they are switched off.
        trust_remote_code: Run Python code that comes with the checkpoint.
        **options: Further options of the model's `save_pretrained`.

    Raises:
        OutputError: If it cannot be written, or is not what was to be written.
    """
    with output.writing() as part, progress_bars(progress):
        model.save_pretrained(part, **options)
        _save_preprocessor(preprocessor, part)
    check_written(part, model, preprocessor, trust_remote_code=trust_remote_code)


def _save_preprocessor(preprocessor: Any, folder: Path) -> None:
    """Save a tokenizer or a processor; of one without its part for videos, which needs torchvision, the other parts."""
    is_processor = getattr(preprocessor, "tokenizer", None) is not None
    parts = [getattr(preprocessor, name) for name in processor_parts(type(preprocessor))] if is_processor else []
    if None not in parts:
        preprocessor.save_pretrained(folder)
        return
    for part in parts:
        if part is not None:
            part.save_pretrained(folder)
    if isinstance(preprocessor.chat_template, str):
        (folder / "chat_template.jinja").write_text(preprocessor.chat_template, encoding="utf-8")


def stored_weights(config: Any, scheme: Scheme, spec: LoadSpec) -> WeightBytes:
    """Estimate the size of the weights that will be written; 0 for a format without a formula.

    Args:
        config: The model's config; a quantization in it does not count.
        scheme: How they are stored.
        spec: How the model is loaded.
    """
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)
    try:
        return estimate_config(config, scheme, dtype=spec.dtype, trust_remote_code=spec.trust_remote_code).weights
    except UnsupportedError as error:
        _logger.info("the free space is not compared with what will be written: %s", error)
        return WeightBytes(quantized_bytes=0, unquantized_bytes=0, buffers_bytes=0)


def check_written(folder: Path, model: Any, preprocessor: Any, *, trust_remote_code: bool = False) -> None:
    """Compare the files of a checkpoint with the model and the tokenizer that were to be written.

    Args:
        folder: The checkpoint.
        model: The model that was saved there, and has not run since it was saved.
        preprocessor: Its tokenizer or processor.
        trust_remote_code: Run Python code that comes with the checkpoint.

    Raises:
        OutputError: If a tensor is missing, too much, or different, or the tokenizer or the config cannot be read.
    """
    expected = saved_tensors(model)
    if any(tensor.is_meta for tensor in expected.values()):
        _logger.info("parts of the model lie on the disk, so its tensors are not compared with %s", folder)
    else:
        _check_tensors(folder, expected)
    _check_config(folder, model, trust_remote_code)
    _check_tokenizer(folder, getattr(preprocessor, "tokenizer", preprocessor), trust_remote_code)


def _check_tensors(folder: Path, expected: Mapping[str, torch.Tensor]) -> None:
    found: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118  (it is not a mapping)
                    if name in found or name not in expected:
                        raise not_as_written(
                            f"{file.name} holds {name!r}, which is no tensor of the model or is there twice"
                        )
                    found.add(name)
                    _check_equal(name, stored.get_tensor(name), expected[name].detach().cpu().contiguous())
        except (OSError, SafetensorError) as error:
            raise not_as_written(f"{file.name} cannot be read again: {first_line(error)}") from error
    written = {_place(expected[name]) for name in found}
    if missing := [name for name, tensor in expected.items() if name not in found and _place(tensor) not in written]:
        raise not_as_written(f"{missing[0]!r} is missing")
    index = folder / "model.safetensors.index.json"
    if index.exists() and set(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) != found:
        raise not_as_written(f"{index.name} does not list the tensors of the files")


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return the same value for two names of one tensor."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def _check_equal(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        what = f"{found.dtype} {tuple(found.shape)} in place of {expected.dtype} {tuple(expected.shape)}"
        raise not_as_written(f"{name!r} is {what}")
    # As bytes: a weight that is no number is no number in the file either.
    if not torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (found, expected))):
        raise not_as_written(f"the values of {name!r} are others")


def _check_config(folder: Path, model: Any, trust_remote_code: bool) -> None:
    try:
        with without_torchao():
            checkpoint = find_checkpoint(_spec_of(folder, trust_remote_code), str(folder))
    except QuantLLMError as error:
        raise not_as_written(f"its config cannot be read again: {first_line(error)}") from error
    own = getattr(model.config, "quantization_config", None)
    if checkpoint.config.model_type != model.config.model_type or (own is None) != (checkpoint.quantization is None):
        raise not_as_written("its config describes another model")


def _check_tokenizer(folder: Path, tokenizer: Any, trust_remote_code: bool) -> None:
    from transformers import AutoTokenizer

    try:
        again = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        same = all(_ids(again, text) == _ids(tokenizer, text) for text in TEXTS)
    except Exception as error:
        raise not_as_written(f"its tokenizer cannot be read again: {first_line(error)}") from error
    if not same or again.chat_template != tokenizer.chat_template:
        raise not_as_written("its tokenizer writes other tokens, or has another chat template")


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def _spec_of(folder: Path, trust_remote_code: bool) -> LoadSpec:
    return LoadSpec(model_id=str(folder), local_files_only=True, trust_remote_code=trust_remote_code, progress=False)


def not_as_written(what: str) -> OutputError:
    """Make the error for a checkpoint whose files are not what was to be written."""
    msg = (
        f"what was written is not what was to be written: {what}. Nothing has taken its place; check the disk, and run "
        "it again."
    )
    return OutputError(msg)


# --- what it computes ---


def logits_of(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    """Compute a model's logits of `TEXTS`, without the mean of each row, in float32 on the CPU."""
    device = model.get_input_embeddings().weight.device
    found = []
    with torch.no_grad():
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].to(device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float().cpu()
            found.append(logits - logits.mean(-1, keepdim=True))
    return found


def largest_difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest relative difference of two models' logits; infinite for numbers that are none."""
    pairs = zip(found, expected, strict=True)
    differences = [(ours - theirs).norm() / theirs.norm().clamp(min=1e-12) for ours, theirs in pairs]
    largest = float(torch.stack(differences).max())
    return largest if largest == largest else float("inf")


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the relative difference of logits that the rounding of a dtype explains."""
    return _TOLERANCE if dtype in (torch.float32, torch.float64) else _TOLERANCE_16BIT


def expected_logits(model: Any, tokenizer: Any) -> tuple[list[torch.Tensor], torch.dtype] | None:
    """Compute the logits for `check_reopened`, with the model's dtype; None where it takes no plain text."""
    try:
        return logits_of(model, tokenizer), model.dtype
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        _logger.info("what was written is not compared by what it computes: %s", first_line(error))
        return None


def check_reopened(folder: Path, spec: LoadSpec, expected: tuple[list[torch.Tensor], torch.dtype] | None) -> None:
    """Load a checkpoint that was written, and compare what it computes.

    Args:
        folder: The checkpoint.
        spec: How the model was loaded of which it was made.
        expected: Result of `expected_logits` for the model that was written.

    Raises:
        OutputError: If it cannot be loaded, or computes something else.
    """
    own: dict[str, Any] = {"scheme": None, "adapters": {}, "revision": None, "local_files_only": True}
    try:
        loaded = load(dataclasses.replace(spec, model_id=str(folder), progress=False, **own), str(folder))
    except NotEnoughMemoryError as error:
        _logger.info("what was written is not loaded again: %s", error)
        return
    except QuantLLMError as error:
        raise not_as_written(f"it cannot be loaded: {first_line(error)}") from error
    try:
        if expected is not None:
            logits, dtype = expected
            difference = largest_difference(logits_of(loaded.pipeline.model, loaded.pipeline.tokenizer), logits)
            if difference > tolerance_of(dtype):
                raise not_as_written(f"its logits differ by {difference:.2g}, and {tolerance_of(dtype):g} is allowed")
    finally:
        loaded.close()
        release_memory()
