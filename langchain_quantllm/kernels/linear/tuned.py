"""Configs of linear layers that were measured on the GPU of this machine: a table on the disk, one for a kind of GPU.

`langchain-quantllm bench FOLDER --tune` writes it; `dispatch` takes its configs before those of the rule in `config`. A
file may come from anywhere: its size, types and ranges are checked, and one that does not fit is not used at all.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from langchain_quantllm._version import __version__
from langchain_quantllm.compat.versions import installed_version
from langchain_quantllm.data.user_cache import cache_folder
from langchain_quantllm.errors import InvalidOptionError, OutputError
from langchain_quantllm.kernels.linear.config import LinearConfig
from langchain_quantllm.kernels.linear.weights import FourBitWeight, GPTQWeight, Int8Weight, Weight

VARIABLE = "QUANTLLM_TUNED"
"""Environment variable with another folder for tables."""

_KIND, _VERSION = "tuned linear layers", 1
_MOST_BYTES = 4 * 2**20
_MOST_ENTRIES = 10_000
_MOST_NAME = 200
_MOST_ROWS, _MOST_FEATURES = 4096, 2**22
_MOST_TILE_WORDS = 2**14
_AGAIN = "tune again with `langchain-quantllm bench FOLDER --tune`, or delete it"

_log = logging.getLogger(__name__)


class Gpu(NamedTuple):
    """A kind of GPU."""

    name: str
    multiprocessors: int


class Product(NamedTuple):
    """What a config is chosen for, apart from the number of rows.

    Args:
        format: Format of the weight: what its kernels are compiled for; see `product_of`.
        in_features: Inputs.
        out_features: Outputs of all weights that are multiplied in one launch.
        dtype: Dtype of the activations: "float16", "bfloat16" or "float32".
    """

    format: str
    in_features: int
    out_features: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What was measured for a product.

    Args:
        product: The product.
        rows: Rows of activations.
        config: The config to use; None for the rule's.
        rule_us: Microseconds with the rule's config; None if that does not run on this GPU.
        best_us: Microseconds with the best one.
    """

    product: Product
    rows: int
    config: LinearConfig | None
    rule_us: float | None
    best_us: float

    def check(self) -> None:
        """Raise an InvalidOptionError if no kernel can be run so."""
        product, config = self.product, self.config
        if not _FORMATS.fullmatch(product.format) or product.dtype not in _DTYPES:
            raise InvalidOptionError(f"there is no product of {product.format[:50]!r} with {product.dtype[:50]!r}.")
        _check_range("rows", self.rows, range(1, _MOST_ROWS + 1))
        for name in ("in_features", "out_features"):
            _check_range(name, getattr(product, name), range(1, _MOST_FEATURES + 1))
        for taken in (self.best_us, self.rule_us):
            if taken is not None and not (math.isfinite(taken) and taken > 0):
                raise InvalidOptionError(f"{taken} is no time in microseconds.")
        if config is None:
            return
        config.check(self.rows, getattr(torch, product.dtype))
        for name, allowed in _SIZES.items():
            _check_range(name, getattr(config, name), allowed)
        if config.outputs * config.words > _MOST_TILE_WORDS:
            raise InvalidOptionError(f"a tile of {config.outputs} times {config.words} words is too large.")
        for name, least, most in _TILES[config.regime]:
            if not least <= getattr(config, name) <= most:
                raise InvalidOptionError(f"the regime {config.regime!r} has no {name} {getattr(config, name)}.")
        if config.regime == "matrix" and "act-order" in product.format:
            raise InvalidOptionError("the regime 'matrix' takes no weights with act-order.")
        if product.dtype == "float32" and config.decode not in _EXACT_DECODES[config.regime]:
            raise InvalidOptionError(f"float32 is not decoded by {config.decode!r} in the regime {config.regime!r}.")


_FORMATS = re.compile(r"(nf4|fp4)-\d{1,6}(-nested)?|int8|gptq[2348]-(\d{1,6}|act-order)(-asymmetric)?")
_DTYPES = ("float16", "bfloat16", "float32")
_EXACT_DECODES = {"vector": ("table", "shuffle"), "tile": ("table",), "matrix": ()}
_SIZES: Mapping[str, Any] = {
    "outputs": [2**i for i in range(2, 10)],
    "words": [2**i for i in range(2, 11)],
    "splits": range(1, 65),
    "warps": [1, 2, 4, 8, 16, 32],
    "stages": range(1, 9),
    "tile_rows": [0, 16, 32, 64, 128, 256],
    "ahead": [0, *(2**i for i in range(11))],
    "registers": [0, *range(24, 256)],
}
_TILES = {
    "vector": [("tile_rows", 0, 0)],
    "tile": [("outputs", 16, 512), ("words", 16, 1024), ("tile_rows", 0, 64)],
    "matrix": [("outputs", 64, 512), ("words", 8, 1024)],
}
"""Least and most of a size, by regime; see `LinearConfig`."""


def _check_range(name: str, value: int, allowed: Any) -> None:
    if value not in allowed:
        raise InvalidOptionError(f"{name} {value} is not possible.")


class TunedTable:
    """The entries of a kind of GPU, by product and rows."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        """Make a table; of entries for the same product and rows, the last one counts."""
        self.entries = {(entry.product, entry.rows): entry for entry in entries}
        rows: dict[Product, list[int]] = {}
        for product, count in sorted(self.entries):
            rows.setdefault(product, []).append(count)
        self._found = {
            product: (counts, [self.entries[product, count].config for count in counts])
            for product, counts in rows.items()
        }

    def __len__(self) -> int:
        """Count the products."""
        return len(self._found)

    def config(self, product: Product, rows: int) -> LinearConfig | None:
        """Return the config of the smallest number of rows, from `rows` on, that was measured; None for the rule's."""
        found = self._found.get(product)
        if found is None:
            return None
        counts, configs = found
        place = bisect_left(counts, rows)
        return configs[place] if place < len(counts) else None


def product_of(weight: Weight, out_features: int, dtype: torch.dtype) -> Product | None:
    """Name the product of a weight, or of a group of that layout; None for formats that are not tuned."""
    if isinstance(weight, Int8Weight):
        name = "int8"
    elif isinstance(weight, FourBitWeight):
        name = f"{weight.kind}-{weight.block_size}{'-nested' if weight.nested else ''}"
    elif isinstance(weight, GPTQWeight):
        zeros = "-asymmetric" if weight.zero_point < 0 else ""
        name = f"gptq{weight.bits}-{weight.group_size or 'act-order'}{zeros}"
    else:
        return None
    return Product(name, weight.in_features, out_features, str(dtype).removeprefix("torch."))


def tuned_config(
    weight: Weight, rows: int, out_features: int, dtype: torch.dtype, device: torch.device
) -> LinearConfig | None:
    """Return the config that was the fastest on this GPU.

    Args:
        weight: The weight, or one of a group.
        rows: Rows of activations.
        out_features: Outputs of all weights of the group.
        dtype: Dtype of the activations.
        device: Their device.

    Returns:
        The config; None if the rule's is to be used.
    """
    table = table_for(device)
    if table is None or (product := product_of(weight, out_features, dtype)) is None:
        return None
    return table.config(product, rows)


def gpu_of(device: torch.device) -> Gpu | None:
    """Return the kind of a CUDA device; None for others."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return Gpu(str(properties.name), int(properties.multi_processor_count))


@cache
def table_for(device: torch.device) -> TunedTable | None:
    """Return the table for a device, read once; None, after a warning if there is a file, where none can be used."""
    try:
        gpu = gpu_of(device)
        return None if gpu is None else read_table(gpu)
    except InvalidOptionError as error:
        _log.warning("%s", error)
        return None


def describe(device: torch.device) -> str | None:
    """Say in words which table the products on a device follow; None if they follow the rule."""
    table = table_for(device)
    return None if not table else f"{len(table)} products that were measured on this kind of GPU"


def state_of(device: torch.device) -> str:
    """Say in words whether there is a table for a device and it can be used."""
    gpu = gpu_of(device)
    if gpu is None:
        return "-"
    try:
        table = read_table(gpu)
    except InvalidOptionError as error:
        return f"no: {error}"
    return "no" if not table else f"{len(table)} products"


def table_file(gpu: Gpu) -> Path:
    """Return the place of the table for a kind of GPU."""
    given = os.environ.get(VARIABLE)
    folder = Path(given) if given else cache_folder() / "tuned"
    return folder / f"{re.sub('[^a-z0-9]+', '-', gpu.name.lower())[:100].strip('-') or 'gpu'}.json"


def read_table(gpu: Gpu) -> TunedTable | None:
    """Read the table for a kind of GPU; None if there is none.

    Raises:
        InvalidOptionError: If the file is damaged, for something else, or has an entry that cannot be used.
    """
    file = table_file(gpu)
    try:
        if not file.exists():
            return None
        if not file.is_file():  # a pipe would never end
            raise InvalidOptionError("it is no file.")
        with file.open("rb") as stream:
            text = stream.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise InvalidOptionError(f"it has more than {_MOST_BYTES} bytes.")
        return _table(json.loads(text), gpu)
    except InvalidOptionError as error:
        why = str(error)
    except OSError as error:
        why = f"it cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        why = "it is no JSON that can be read"
    msg = f"the table of tuned products {file} is not used: {why.rstrip('.')}; {_AGAIN}."
    raise InvalidOptionError(msg)


def write_table(gpu: Gpu, entries: Iterable[Entry]) -> Path:
    """Write entries into the table for a kind of GPU, beside those that are there, in one step.

    A file that cannot be used is replaced.

    Raises:
        OutputError: If the file cannot be written.
    """
    try:
        old = read_table(gpu)
    except InvalidOptionError:
        old = None
    table = TunedTable([*(old.entries.values() if old else ()), *entries])
    document = {
        "kind": _KIND,
        "version": _VERSION,
        "device": gpu.name,
        "multiprocessors": gpu.multiprocessors,
        "package": __version__,
        "triton": _triton_version(),
        "entries": [_row(entry) for entry in table.entries.values()],
    }
    file, scratch = table_file(gpu), None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".part", encoding="utf-8", delete=False) as made:
            scratch = Path(made.name)
            json.dump(document, made, indent=1)
        scratch.replace(file)
    except OSError as error:
        if scratch is not None:
            scratch.unlink(missing_ok=True)
        msg = f"the table of tuned products {file} cannot be written: {error}; name another folder in {VARIABLE}."
        raise OutputError(msg) from error
    table_for.cache_clear()
    return file


def _triton_version() -> str:
    return installed_version("triton") or installed_version("triton-windows") or "none"


def _row(entry: Entry) -> dict[str, Any]:
    row = {"rows": entry.rows, "config": None if entry.config is None else asdict(entry.config)}
    return {**entry.product._asdict(), **row, "rule_us": entry.rule_us, "best_us": entry.best_us}


def _table(document: Any, gpu: Gpu) -> TunedTable:
    """Make a table of a document, all of whose values are still to be checked."""
    if not isinstance(document, dict) or document.get("kind") != _KIND:
        raise InvalidOptionError("it is no table of tuned products.")
    for name, expected in {"version": _VERSION, "device": gpu.name, "multiprocessors": gpu.multiprocessors}.items():
        found = document.get(name)
        if type(found) is not type(expected) or found != expected:
            raise InvalidOptionError(f"its {name} is {_short(found)}, not {expected!r}.")
    made, here = document.get("triton"), _triton_version()
    if not isinstance(made, str) or made.split(".")[:2] != here.split(".")[:2]:
        raise InvalidOptionError(f"it was measured with Triton {_short(made)}, and {here} is installed.")
    entries = document.get("entries")
    if not isinstance(entries, list) or len(entries) > _MOST_ENTRIES:
        raise InvalidOptionError(f"its entries are no list of up to {_MOST_ENTRIES}.")
    return TunedTable(_entry(row, place) for place, row in enumerate(entries))


def _short(value: Any) -> str:
    return repr(value)[:_MOST_NAME]


_COLUMNS: Mapping[str, tuple[type, ...]] = {
    "format": (str,), "in_features": (int,), "out_features": (int,), "dtype": (str,), "rows": (int,),
    "config": (dict, type(None)), "rule_us": (float, int, type(None)), "best_us": (float, int),
}  # fmt: skip
_OPTIONS: Mapping[str, type] = {
    field.name: str if field.name in ("regime", "decode") else int for field in fields(LinearConfig)
}


def _entry(row: Any, place: int) -> Entry:
    """Make an entry of a row."""
    try:
        values = _typed(row, _COLUMNS)
        options = values.pop("config")
        config = None
        if options is not None:
            config = LinearConfig(**_typed(options, {name: (kind,) for name, kind in _OPTIONS.items()}))
        product = Product(*(values.pop(name) for name in Product._fields))
        entry = Entry(product=product, config=config, **values)
        entry.check()
    except (InvalidOptionError, OverflowError) as error:
        raise InvalidOptionError(f"its entry {place} cannot be used: {error}") from None
    return entry


def _typed(row: Any, columns: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """Check that a row has just these columns, of these types."""
    if not isinstance(row, dict) or set(row) != set(columns):
        raise InvalidOptionError(f"it has not just {', '.join(columns)}.")
    for name, kinds in columns.items():
        if type(row[name]) not in kinds:  # a bool is no int here
            raise InvalidOptionError(f"its {name} is {_short(row[name])}.")
    return dict(row)
