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
from langchain_quantllm.memory.estimate import MemoryEstimate

_LAYERS = re.compile(r"(^|_)(layers?|depths?|blocks|n_layer)$")
"""Names of sizes for each of which transformers makes a module, or an entry of a list."""

_MOST_LAYERS, _FEWEST_LAYERS = 1024, 128
"""Largest such size of a checkpoint whose files are not here, and the smallest that is refused: some are no counts."""

_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
"""Names of entries for which transformers downloads and runs a kernel if they name a repository."""

_MOST_DEPTH = 8

_SLACK = 2
"""A head that is the input's embeddings, but is counted twice, at most doubles the parameters."""

_FEWEST_BITS = 2
"""Of a weight in a quantized checkpoint."""


def check_raw_config(
    content: Mapping[str, Any],
    file: Path,
    *,
    use_safetensors: bool,
    trust_remote_code: bool = False,
    stored: StoredTensors | None = None,
) -> None:
    """Check the content of a config.json.

    Args:
        content: The content.
        file: The file, whose folder holds the checkpoint's others.
        use_safetensors: Whether weights in pickle files are refused.
        trust_remote_code: Whether code of the checkpoint may run.
        stored: The tensors in its files; None if they are not known.

    Raises:
        CheckpointError: If it says sizes that no model has, names a file of weights outside the checkpoint or, if
            these are refused, a pickle file, or names a repository with code for its attention.
    """
    most = _MOST_LAYERS if stored is None else max(_FEWEST_LAYERS, len(stored.tensors))
    for name, value in _entries(content):
        if name.removeprefix("_") in _IMPLEMENTATIONS and "/" in str(value) and not trust_remote_code:
            msg = (
                f"{file} says {name}={value!r}, which is code from a repository; if you trust its maker pass "
                "trust_remote_code=True, else remove the entry."
            )
            raise CheckpointError(msg)
        if _LAYERS.search(name) and isinstance(value, int | float) and not value <= most:
            msg = (
                f"{file} says {name}={str(value)[:20]}, and no model of these files has more than {most}; get it again."
            )
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


def _entries(content: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the names and values in a config and in the configs inside it."""
    for name, value in content.items():
        yield name, value
        if isinstance(value, Mapping) and depth < _MOST_DEPTH:
            yield from _entries(value, depth + 1)


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
