"""The operations of a model's forward, computed so that a row's results do not depend on the rows beside it.

Inside `InvariantOps`, every operation of PyTorch is one of four kinds: exact ones, which run as they are; functions of
single numbers; sums along rows; products. An operation of no kind is refused, as nothing says that it is invariant.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from langchain_quantllm.compat.torch_dispatch import ThreadMode
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels.invariant import products
from langchain_quantllm.kernels.invariant.tiles import run_in_tiles, run_in_vectors

_MOVES = """
    _reshape_alias _to_copy _unsafe_view alias arange as_strided cat clone constant_pad_nd contiguous copy copy_ detach
    diagonal embedding empty empty_like empty_strided expand expand_as eye fill fill_ flip full full_like gather index
    index_copy index_copy_ index_fill_ index_put index_put_ index_select lift_fresh lift_fresh_copy linspace
    masked_scatter narrow new_empty new_empty_strided new_full new_ones new_zeros ones ones_like permute repeat reshape
    resize_ roll scalar_tensor scatter scatter_ select slice slice_scatter split split_with_sizes squeeze stack t take
    transpose tril triu unbind unfold unsqueeze view view_as_complex view_as_real where zero_ zeros zeros_like
"""
"""Operations that move numbers, or make constant ones."""

_EXACT = """
    __and__ __or__ __xor__ __lshift__ __rshift__ abs bitwise_and bitwise_left_shift bitwise_not bitwise_or
    bitwise_right_shift bitwise_xor ceil clamp clamp_max clamp_min div eq floor floor_divide ge gt hardtanh isfinite
    isinf isnan le logical_and logical_not logical_or logical_xor lt masked_fill maximum minimum mul ne neg reciprocal
    relu remainder round sign sqrt trunc
"""
"""Functions of numbers whose result IEEE 754 defines to the last bit, in place as well."""

_WHOLE = ("aten::add", "aten::sub", "aten::rsub", "aten::pow")
"""Functions that make whole numbers of whole numbers."""

_CHOICES = """
    _local_scalar_dense all amax amin any argmax argmin bincount count_nonzero equal histc is_nonzero isin item kthvalue
    max min nonzero one_hot searchsorted sort unique_consecutive _unique2
"""
"""Comparisons along rows, and counts, which do not round."""

_OF_WEIGHTS = ("bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise")
"""Operations of other packages that see weights only."""

_FREE = frozenset(f"{_MOVES} {_CHOICES}".split())
_EXACT_NAMES = frozenset(_EXACT.split())

_thread = threading.local()

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Computes an operation from the operation itself, its arguments and its keyword arguments."""


class InvariantOps(ThreadMode):
    """Computes the operations of this thread independently of the rows beside each row.

    Raises:
        UnsupportedError: At an operation of which that is not known.
    """

    def __enter__(self) -> Any:
        """Begin."""
        _thread.active = self
        self.push()
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        _thread.active = None
        self.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute one operation."""
        return _handler(func)(func, args, kwargs or {})


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Run code of this thread that is invariant by itself, operation by operation as PyTorch does."""
    active: InvariantOps | None = getattr(_thread, "active", None)
    if active is None:
        yield
        return
    active.__exit__(None, None, None)
    try:
        yield
    finally:
        active.__enter__()


@functools.cache
def _handler(func: Any) -> Handler:
    """Find how an operation is computed."""
    namespace, _, name = func.name().partition("::")
    name = name.partition(".")[0]
    plain = name[:-1] if name.endswith("_") and not name.startswith("__") else name
    if namespace == "aten" and name in _HANDLERS:
        return _HANDLERS[name]
    is_exact = namespace == "aten" and (func.is_view or name in _FREE or plain in _EXACT_NAMES)
    if is_exact or namespace == "prim" or func.name().partition(".")[0] in _OF_WEIGHTS:
        return _as_it_is
    if namespace == "aten" and torch.Tag.pointwise in func.tags:
        return _number_by_number
    return _refuse


def _as_it_is(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _refuse(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    msg = f"nothing is known about its operation {func.name()}, whose results may depend on the rest of the batch"
    raise UnsupportedError(msg)


# Numbers.


def _number_by_number(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute a function of numbers, of one tensor or of several that are expanded to one shape."""
    places = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and arg.dim()]
    if not places or any(args[i].device.type != "cpu" for i in places):
        return func(*args, **kwargs)  # kernels of GPUs compute each number by the same formula
    if not args[places[0]].is_floating_point():
        gives_whole = func.name().partition(".")[0].removesuffix("_") in _WHOLE
        return func(*args, **kwargs) if gives_whole else _refuse(func, args, kwargs)
    in_place = func.name().partition(".")[0].endswith("_")
    if len(places) == 1:
        [place] = places
        before, after = args[:place], args[place + 1 :]
        found = run_in_vectors(lambda x: func(*before, x.clone() if in_place else x, *after, **kwargs), args[place])
    else:
        expanded = dict(zip(places, torch.broadcast_tensors(*(args[i] for i in places)), strict=True))
        found = _of_several(func, args, kwargs, expanded)
    return args[0].copy_(found) if in_place else found


def _of_several(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], expanded: dict[int, torch.Tensor]
) -> torch.Tensor:
    """Compute a function of several tensors of one shape: their numbers as the columns of one tensor."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in expanded.values()))
    columns = torch.stack([t.to(dtype).reshape(-1) for t in expanded.values()])
    parts, size = [], 1 << 12
    padded = torch.nn.functional.pad(columns, (0, -columns.shape[1] % size))
    for part in padded.split(size, 1):
        given = list(args)
        for place, column in zip(expanded, part.contiguous(), strict=True):
            given[place] = column.clone()
        parts.append(func(*given, **kwargs))
    return torch.cat(parts)[: columns.shape[1]].view(next(iter(expanded.values())).shape)


def _add(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Add or subtract: exact, unless one part is scaled before."""
    alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    return func(*args, **kwargs) if alpha in (1, -1) else _number_by_number(func, args, kwargs)


def _power(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Raise to a power: the square is one exact product."""
    is_exact = isinstance(args[1], int | float) and args[1] in (1, 2)
    return func(*args, **kwargs) if is_exact else _number_by_number(func, args, kwargs)


# Rows.


def _reduce(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Add up along some dimensions; the others are those of the rows."""
    names = [argument.name for argument in func._schema.arguments]
    rest = {**dict(zip(names, args, strict=False)), **kwargs}
    x, dims, keeps = rest.pop("self"), rest.pop("dim", None), rest.pop("keepdim", False)
    if not x.is_floating_point():  # whole numbers
        return func(*args, **kwargs) if rest.get("dtype") is None else _refuse(func, args, kwargs)
    wanted = sorted(d % x.dim() for d in dims or ()) if x.dim() else []
    if not wanted:
        return _refuse(func, args, kwargs)
    kept = [d for d in range(x.dim()) if d not in wanted]
    rows = x.permute(*kept, *wanted).reshape(-1, *(x.shape[d] for d in wanted))
    found = _by_rows(func, rows, (list(range(1, rows.dim())),), rest)
    shape = [1 if d in wanted else x.shape[d] for d in range(x.dim())] if keeps else [x.shape[d] for d in kept]
    return tuple(part.view(shape) for part in found) if isinstance(found, tuple) else found.view(shape)


def _softmax(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute a softmax, or its logarithm, or sums of all numbers so far, along one dimension."""
    x, dim = args[0], args[1]
    if not x.is_floating_point():
        return func(*args, **kwargs)
    moved = x.movedim(dim, -1)
    found = _by_rows(func, moved.reshape(-1, moved.shape[-1]), (1, *args[2:]), kwargs)
    return found.view(moved.shape).movedim(-1, dim)


def _by_rows(func: Any, rows: torch.Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if rows.device.type != "cpu":
        return _on_gpu().by_rows(func, rows, rest, kwargs)
    key = (func.name(), repr(rest), repr(kwargs))
    return run_in_tiles(lambda tile: func(tile, *rest, **kwargs), rows, key)


def _norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Normalize over the last dimensions: `native_layer_norm`, `_fused_rms_norm`."""
    x, normalized = args[0], len(args[1])
    if x.device.type != "cpu":
        return func(*args, **kwargs)  # one block of threads for each row, of a size that depends on the row's
    rows = x.reshape(-1, *x.shape[x.dim() - normalized :])
    key = (func.name(), args[-1], tuple(arg is None for arg in args))
    found = run_in_tiles(lambda tile: func(tile, *args[1:], **kwargs), rows, key)
    leading = x.shape[: x.dim() - normalized]
    ones = [1] * normalized
    return (found[0].view(x.shape), *(part.view(*leading, *ones) for part in found[1:]))


def _topk(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Find the largest numbers; on a GPU, where equal ones come in any order, by sorting them."""
    names = [argument.name for argument in func._schema.arguments]
    given = {"dim": -1, "largest": True, **dict(zip(names, args, strict=False)), **kwargs}
    x, dim = given["self"], given["dim"]
    if x.device.type == "cpu":
        return func(*args, **kwargs)
    values, indices = torch.sort(x, dim=dim, descending=given["largest"], stable=True)
    return values.narrow(dim, 0, given["k"]), indices.narrow(dim, 0, given["k"])


def _add_rows(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Add rows to others, by their indices: in order on a CPU, in any order on a GPU."""
    return func(*args, **kwargs) if args[0].device.type == "cpu" else _refuse(func, args, kwargs)


# Products.


def _mm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _product(args[0], args[1])


def _addmm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    added, left, right = args[:3]
    factors = [kwargs.get(name, 1) for name in ("beta", "alpha")]
    return _product(left, right, added) if factors == [1, 1] else _refuse(func, args, kwargs)


def _mv(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _product(args[0], args[1][:, None])[:, 0]


def _bmm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    left, right = args[:2]
    if left.shape[2] == 1:  # no sum: positions times frequencies, for example
        return left * right
    return (products if left.device.type == "cpu" else _on_gpu()).batched_product(left, right)


def _baddbmm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    factors = [kwargs.get(name, 1) for name in ("beta", "alpha")]
    return args[0] + _bmm(func, args[1:], {}) if factors == [1, 1] else _refuse(func, args, kwargs)


def _grouped_mm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rows, matrices = args[:2]
    ends = args[2] if len(args) > 2 else kwargs.get("offs")
    is_known = rows.dim() == 2 and matrices.dim() == 3 and ends is not None
    if not is_known or kwargs.get("bias") is not None:
        return _refuse(func, args, kwargs)
    return (products if rows.device.type == "cpu" else _on_gpu()).grouped_product(rows, matrices, ends)


def _packed_mm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Multiply rows by a packed weight: one of PyTorch's products for quantized weights on CPUs."""
    if args[0].device.type != "cpu":
        return _refuse(func, args, kwargs)
    rest = args[1:]
    key = (func.name(), tuple(arg.shape if isinstance(arg, torch.Tensor) else arg for arg in rest))
    return run_in_tiles(lambda tile: func(tile, *rest, **kwargs), args[0], key)


def _product(left: torch.Tensor, right: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
    if left.device.type == "cpu":
        return products.product(left, right, added)
    found: torch.Tensor = _on_gpu().product(left, right, added)
    return found


def _on_gpu() -> Any:
    from langchain_quantllm.kernels.invariant import gpu

    return gpu


_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("add", "add_", "sub", "sub_", "rsub"), _add),
    **dict.fromkeys(("pow", "pow_"), _power),
    **dict.fromkeys(("mean", "sum", "var", "var_mean", "std", "std_mean", "logsumexp"), _reduce),
    **dict.fromkeys(("_softmax", "_log_softmax", "cumsum"), _softmax),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _norm),
    **dict.fromkeys(("index_add", "index_add_", "scatter_add", "scatter_add_"), _add_rows),
    "topk": _topk,
    "mm": _mm,
    "addmm": _addmm,
    "mv": _mv,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "_grouped_mm": _grouped_mm,
    **dict.fromkeys(("_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm"), _packed_mm),
}
