"""Checks of a config.json before transformers builds anything of it: sizes that no file has, and names of files.

A config may say any number. Layers are counted against the tensors in the checkpoint's files, and all of its parameters
against their elements, so that a wrong number is an error and takes neither minutes nor memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from langchain_quantllm.errors import CheckpointError
from langchain_quantllm.loading.stored_tensors import StoredTensors, check_inside
from langchain_quantllm.memory import MemoryEstimate

_COUNTS = re.compile(r"(^|_)(layers?|depths?|blocks|n_layer|num_experts|n_routed_experts|num_local_experts)$")
"""Names of sizes for each of which transformers makes a module, or an entry of a list."""

_MOST = 4096
"""Largest such size of a checkpoint whose files are not known: a multiple of any model's."""

_SLACK = 2
"""A head that is the input's embeddings, but is counted twice, at most doubles the parameters."""

_FEWEST_BITS = 2
"""Of a weight in a quantized checkpoint."""


def check_raw_config(content: Mapping[str, Any], file: Path, *, use_safetensors: bool) -> None:
    """Check the content of a config.json.

    Args:
        content: The content.
        file: The file, whose folder holds the checkpoint's others.
        use_safetensors: Whether weights in pickle files are refused.

    Raises:
        CheckpointError: If it says sizes that no model has, or names a file of weights outside the checkpoint or, if
            these are refused, a pickle file.
    """
    for name, size in _sizes(content):
        if not size <= _MOST:
            msg = f"{file} says {name}={size!r}, and no model has more than {_MOST}; get the file again."
            raise CheckpointError(msg)
    weights = content.get("transformers_weights")
    if weights is None:
        return
    if not isinstance(weights, str):
        msg = f"{file} says transformers_weights={weights!r}, which is no name of a file; get the file again."
        raise CheckpointError(msg)
    check_inside(weights, file)
    if use_safetensors and not weights.endswith((".safetensors", ".safetensors.index.json")):
        msg = (
            f"{file} names weights in {weights}, which is not in safetensors; pickle files can run code while they "
            "load: convert it, or pass use_safetensors=False if you trust its maker."
        )
        raise CheckpointError(msg)


def _sizes(content: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, int | float]]:
    """Yield the sizes in a config and in the configs inside it."""
    for name, value in content.items():
        if isinstance(value, Mapping) and depth < 8:
            yield from _sizes(value, depth + 1)
        elif isinstance(value, int | float) and not isinstance(value, bool) and _COUNTS.search(name):
            yield name, value


def check_parameters(estimate: MemoryEstimate, stored: StoredTensors, *, quantized: bool) -> None:
    """Check that the files of a checkpoint can hold the parameters of the model that its config describes.

    Args:
        estimate: Estimate of that model.
        stored: The tensors in the files.
        quantized: Whether the checkpoint is quantized.

    Raises:
        CheckpointError: If the config describes a much larger model.
    """
    most = stored.size_bytes * 8 // _FEWEST_BITS if quantized else stored.elements
    if estimate.parameters > _SLACK * most:
        msg = (
            f"the config of {estimate.model_id} describes a model of {estimate.parameters:,} parameters, but its files "
            f"hold {stored.elements:,} numbers; is the checkpoint complete, and its config.json its own?"
        )
        raise CheckpointError(msg)
