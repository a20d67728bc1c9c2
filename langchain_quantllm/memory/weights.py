"""What the weights of a model take, by kind, measured on the loaded model.

Owns the kinds and the walk over a loaded model. Knows nothing of schemes, devices' total
memory or loading; `layout` gives the same kinds for a model that is not loaded yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Kind = Literal["quantized", "unquantized", "buffers", "offloaded"]

CUDA_BLOCK_BYTES = 512
"""Source: `kMinBlockSize` of torch's c10/cuda/CUDACachingAllocator: every allocation is rounded up to it."""

_PACKED_NAMES = {"qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "blocks"}
"""Tensors of which GPTQ, AWQ, compressed-tensors, fp8 and mxfp4 linears have at least one, and no other module has."""


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Bytes that the weights of one model take, by kind.

    Args:
        quantized_bytes: Packed weights with their scales, codes and zero points.
        unquantized_bytes: Parameters left in a float dtype: embeddings, output head, norms, biases.
        buffers_bytes: Buffers of modules that are not quantized, such as rotary frequencies.
        offloaded_bytes: Parameters that lie outside the model (accelerate's offload); not in the total.
        padding_bytes: What rounding every tensor up to 512 bytes adds in CUDA's allocator; not in the total.
    """

    quantized_bytes: int
    unquantized_bytes: int
    buffers_bytes: int
    offloaded_bytes: int = 0
    padding_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors that lie in memory, without padding."""
        return self.quantized_bytes + self.unquantized_bytes + self.buffers_bytes

    @property
    def cuda_bytes(self) -> int:
        """Bytes that CUDA's allocator counts for them at the least: the total with the padding."""
        return self.total_bytes + self.padding_bytes

    def to_dict(self) -> dict[str, int]:
        """Give the kinds and their total, ready for JSON."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def sum_by_kind(sizes: Iterable[tuple[Kind, int]]) -> WeightBytes:
    """Add up the sizes of single tensors, given as (kind, bytes)."""
    totals = {"quantized": 0, "unquantized": 0, "buffers": 0, "offloaded": 0, "padding": 0}
    for kind, size_bytes in sizes:
        totals[kind] += size_bytes
        if kind != "offloaded":
            totals["padding"] += -size_bytes % CUDA_BLOCK_BYTES
    return WeightBytes(**{f"{kind}_bytes": total for kind, total in totals.items()})


def weights_by_kind(model: torch.nn.Module) -> WeightBytes:
    """Measure what the weights of a loaded model take, shared memory counted once.

    Unlike transformers' `get_memory_footprint`, this counts the quantization state of bitsandbytes
    (absmax, codes, nested state, row scales) and looks into tensor subclasses (torchao).

    Args:
        model: Any loaded model; on which devices its tensors lie does not matter.

    Returns:
        The bytes by kind. On CUDA they are what the allocator was asked for
        (`torch.cuda.memory_stats()["requested_bytes.all.current"]`); `memory_allocated` also counts the rounding
        up to 512 bytes a tensor, and up to 1 MB a tensor where a cached block was not worth splitting.
    """
    return sum_by_kind(_sizes(model))


def _sizes(model: torch.nn.Module) -> Iterator[tuple[Kind, int]]:
    """Give (kind, bytes) of every distinct tensor of the model."""
    left_bytes: dict[tuple[Any, int], int] = {}  # what of each storage is not yet counted
    seen: set[tuple[Any, ...]] = set()
    for kind, tensor in _tensors(model):
        meta = tensor.device.type == "meta"
        storage = None if meta else tensor.untyped_storage()
        place = (tensor.device, id(tensor) if storage is None else storage.data_ptr())
        view = (*place, tensor.storage_offset(), tensor.nbytes)
        if view in seen:
            continue
        seen.add(view)
        if storage is None:
            yield "offloaded", tensor.nbytes
            continue
        size_bytes = min(tensor.nbytes, left_bytes.setdefault(place, storage.nbytes()))  # views may overlap
        left_bytes[place] -= size_bytes
        yield kind, size_bytes


def _tensors(model: torch.nn.Module) -> Iterator[tuple[Kind, torch.Tensor]]:
    """Give every plain tensor of the model with its kind, shared ones as often as they occur."""
    for module in model.modules():
        parameters = {name: p for name, p in module._parameters.items() if p is not None}
        buffers = {name: b for name, b in module._buffers.items() if b is not None}
        packed = bool(_PACKED_NAMES & {*parameters, *buffers}) or any(map(_is_packed, parameters.values()))
        for name, tensor in {**buffers, **parameters}.items():
            kind: Kind = "buffers" if name in buffers else "unquantized"
            if packed:
                kind = "unquantized" if name == "bias" else "quantized"
            for inner in _inner_tensors(tensor):
                yield kind, inner
        if packed:  # state that lies beside the parameters: Linear8bitLt.state, repacked weights of GPTQ kernels
            for name, value in vars(module).items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    for inner in _state_tensors(value):
                        yield "quantized", inner


def _is_packed(tensor: torch.Tensor) -> bool:
    """Whether a parameter is of a class that holds quantized weights, and holds them already."""
    from langchain_quantllm.compat.bitsandbytes import is_quantized

    return is_quantized(tensor) or _is_wrapper(tensor)


def _is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a subclass over other tensors, as torchao's are; its own storage is empty then."""
    return type(tensor).__module__.startswith("torchao.") and hasattr(tensor, "__tensor_flatten__")


def _inner_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Give the plain tensors that one parameter or buffer consists of, quantization state included."""
    if _is_wrapper(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _inner_tensors(getattr(tensor, name))
        return
    from langchain_quantllm.compat.bitsandbytes import states_of

    yield tensor
    for state in states_of(tensor):
        yield from _state_tensors(state)


def _state_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Give the tensors in a tensor, a list of them, or a state object of bitsandbytes, nested ones too."""
    import torch

    from langchain_quantllm.compat.bitsandbytes import is_state

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _state_tensors(item)
    elif is_state(value):
        for item in vars(value).values():
            yield from _state_tensors(item)
