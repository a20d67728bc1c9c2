"""Subjects of a bench: models in their schemes, each one row of the tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.loading.gptq import read_gptq_folder
from langchain_quantllm.loading.sources import stored_quantization
from langchain_quantllm.schemes import GPTQ, scheme_from


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model in one scheme.

    Args:
        label: Name of its row.
        model_id: Folder or repository.
        quantization: A scheme or its name; None takes the checkpoint as it is.
    """

    label: str
    model_id: str
    quantization: Any = None


def subjects_of(
    schemes: Mapping[str, str], checkpoints: Mapping[str, str] | None = None, *, kernel: str = "auto"
) -> list[Subject]:
    """List the subjects of a bench: schemes of a model, and checkpoints that are quantized already.

    Args:
        schemes: Folder or repository for each scheme's name; `"gptq"` needs one of its own.
        checkpoints: Folder or repository for each label.
        kernel: Kernel for GPTQ, or several with commas: a row for each, whose label ends with the kernel's name.

    Raises:
        InvalidOptionError: If a scheme or kernel is not known, or a label stands for two.
    """
    given: list[tuple[str, str, str | None, bool]] = [
        (name, folder, name, isinstance(scheme_from(name), GPTQ)) for name, folder in schemes.items()
    ]
    given += [(label, folder, None, _is_gptq(folder)) for label, folder in (checkpoints or {}).items()]
    kernels = kernel.split(",")
    subjects: dict[str, Subject] = {}
    for name, folder, scheme, is_gptq in given:
        for one in kernels if is_gptq else ("",):
            label = f"{name}-{one.strip()}" if is_gptq and len(kernels) > 1 else name
            if label in subjects:
                msg = f"the label {label!r} stands for two rows; call the checkpoint {folder} something else."
                raise InvalidOptionError(msg)
            quantization = GPTQ(kernel=one.strip()) if is_gptq else scheme
            subjects[label] = Subject(label=label, model_id=folder, quantization=quantization)
    return list(subjects.values())


def _is_gptq(model_id: str) -> bool:
    if Path(model_id).is_dir():
        return read_gptq_folder(Path(model_id)) is not None
    return (stored_quantization(model_id) or {}).get("quant_method") == "gptq"
