"""The tensors in a checkpoint's safetensors files, by the files' headers; no tensor is read.

Finds the files that transformers reads, and checks that an index names only files of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from langchain_quantllm.errors import CheckpointError, first_line
from langchain_quantllm.loading.json_files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SAFE = ".safetensors"

_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""Torch's names of safetensors' dtypes, and the bytes of an element; others, of 8 bits or fewer, count as 1 byte."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file.

    Args:
        dtype: Its dtype by torch's name, or safetensors' own in lower case where it has none here.
        shape: Its shape.
        element_bytes: Bytes of one element.
    """

    dtype: str
    shape: tuple[int, ...]
    element_bytes: int

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of its content."""
        return self.elements * self.element_bytes


@dataclass(frozen=True, kw_only=True)
class StoredTensors:
    """The tensors of a checkpoint.

    Args:
        tensors: By their names, in the order of the files.
        index_dtype: The dtype that an index names in its metadata, which transformers prefers to that of the tensors.
    """

    tensors: Mapping[str, StoredTensor]
    index_dtype: str | None = None

    @property
    def elements(self) -> int:
        """Number of the elements of all tensors."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> str | None:
        """The dtype that transformers loads in if the config names none; None if that is no float dtype.

        It is the first float dtype, in the order of names, of the first file. Source: `_get_dtype` and
        `get_state_dict_dtype` in transformers/modeling_utils.py.
        """
        if self.index_dtype is not None:
            return self.index_dtype
        floats = (t.dtype for t in self.tensors.values() if t.dtype in ("float64", "float32", "float16", "bfloat16"))
        return next(floats, None)


def read_stored_tensors(folder: Path, weights_name: str | None = None) -> StoredTensors | None:
    """Read the headers of the files that transformers reads from a folder.

    Args:
        folder: The folder.
        weights_name: Name of the file, or of the index, where it is not the usual one.

    Returns:
        The tensors; None if there are no safetensors files, one is missing, or one is damaged, which loading reports.

    Raises:
        CheckpointError: If an index is damaged, or names a file outside the folder.
    """
    index_dtype = None
    name = weights_name or (SINGLE if (folder / SINGLE).is_file() else INDEX)
    check_inside(name, folder / "config.json")
    if name.endswith(".json"):
        if not (folder / name).is_file():
            return None
        content = read_index(folder / name)
        files = sorted(set(content["weight_map"].values()))
        dtype = content["metadata"].get("dtype")
        index_dtype = None if dtype is None else str(dtype).removeprefix("torch.")
    else:
        files = [name]
    tensors: dict[str, StoredTensor] = {}
    try:
        for file in files:
            tensors |= read_header(folder / file)
    except CheckpointError:
        return None
    return StoredTensors(tensors=tensors, index_dtype=index_dtype)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the names, shapes and dtypes of a safetensors file.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        if not file.is_file():
            msg = "it is no ordinary file"
            raise OSError(msg)
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (no dict)
                part = opened.get_slice(key)
                own = str(part.get_dtype())
                dtype, element_bytes = _DTYPES.get(own, (own.lower(), 1))
                found[key] = StoredTensor(dtype=dtype, shape=tuple(part.get_shape()), element_bytes=element_bytes)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        msg = f"{file} is not a safetensors file ({first_line(error)}); get the file again."
        raise CheckpointError(msg) from error
    return found


# Names of files.


def read_index(file: Path) -> dict[str, Any]:
    """Read the index of a checkpoint in several files.

    Returns:
        Its content: `weight_map`, the name of a file for each tensor, and `metadata`.

    Raises:
        CheckpointError: If it is damaged, or names a file outside its folder.
    """
    content = read_json(file)
    names, metadata = content.get("weight_map"), content.get("metadata", {})
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        msg = f"{file} has no weight_map with the name of a file for each tensor; get the file again."
        raise CheckpointError(msg)
    if not isinstance(metadata, dict):
        msg = f"{file} has metadata={metadata!r}, which is no JSON object; get the file again."
        raise CheckpointError(msg)
    for name in sorted(set(names.values())):
        check_inside(name, file)
    return {"weight_map": names, "metadata": metadata}


def check_inside(name: str, file: Path) -> None:
    """Check that a name in a file of a checkpoint is that of a file in the same folder, or below.

    Raises:
        CheckpointError: If it leads elsewhere.
    """
    paths = (PurePosixPath(name), PureWindowsPath(name))
    if not name or "\0" in name or any(path.is_absolute() or path.drive or ".." in path.parts for path in paths):
        msg = f"{file} names the file {name!r}, outside the checkpoint; only files inside it are read."
        raise CheckpointError(msg)


def check_not_pickled(files: Iterable[str], index: Path | None, model_id: str) -> None:
    """Check that the weights that transformers would read are in safetensors.

    Args:
        files: Names of the checkpoint's files.
        index: Its `model.safetensors.index.json`; None if it has none.
        model_id: Name of the checkpoint in errors.

    Raises:
        CheckpointError: If they are in pickle files, which can run code while they load.
    """
    found = set(files)
    pickled = next(_pickled_in(index), None) if index is not None and SINGLE not in found else None
    safe = [name for name in found if name.endswith((_SAFE, INDEX)) and not name.startswith("adapter_model")]
    if pickled is None and not safe:
        pickled = next((name for name in (_PICKLED, _PICKLED_INDEX) if name in found), None)
    if pickled is not None:
        msg = (
            f"{model_id} has weights in {pickled}, and no weights in safetensors for these; pickle files can run code "
            "while they load: convert it, or pass use_safetensors=False if you trust its maker."
        )
        raise CheckpointError(msg)


def _pickled_in(index: Path) -> Iterator[str]:
    names = sorted(set(read_index(index)["weight_map"].values()))
    return (name for name in names if not name.endswith(_SAFE))
