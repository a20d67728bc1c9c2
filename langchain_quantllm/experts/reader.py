"""Experts in bitsandbytes' formats: quantized while transformers reads them, read quantized, and written."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from langchain_quantllm.compat.bitsandbytes_matrices import (
    quantize_four_bit,
    quantize_int8,
    read_four_bit,
    read_int8,
    stored_four_bit,
    stored_int8,
)
from langchain_quantllm.compat.transformers_expert_loading import ExpertReader, StoredMatrix
from langchain_quantllm.compat.transformers_experts import Projection, projections
from langchain_quantllm.errors import CheckpointError
from langchain_quantllm.experts import bitsandbytes
from langchain_quantllm.experts.module import replace_weights
from langchain_quantllm.experts.stacked import StackedLinear
from langchain_quantllm.kernels.experts.weights import FourBitStack, Int8Stack, Stack
from langchain_quantllm.memory.experts import expert_bytes, unfit_reason

__all__ = ["BitsAndBytesExperts"]

logger = logging.getLogger(__name__)


class BitsAndBytesExperts(ExpertReader):
    """Reads the experts of one model.

    Args:
        bits: Bits of a weight, 4 or 8.
        kind: "nf4" or "fp4"; of no meaning in 8 bits.
        nested: Whether scales in 4 bits are quantized too.
        stored: Whether a checkpoint's own experts are quantized; None for a checkpoint that is not quantized.
        storage: Dtype in which bytes of 4-bit weights are written.
        least_error: Whether blocks of 4-bit weights get the scale of the least squared error; see `schemes.NF4`.
    """

    def __init__(
        self,
        *,
        bits: int,
        kind: str = "nf4",
        nested: bool = False,
        stored: bool | None = None,
        storage: torch.dtype = torch.uint8,
        least_error: bool = False,
    ) -> None:
        """Take the format."""
        self._bits, self._kind, self._nested, self._stored, self._storage = bits, kind, nested, stored, storage
        self._least_error = least_error
        self._projections: dict[str, Projection] = {}

    def start(self, model: Any, is_kept: Callable[[str], bool]) -> None:
        """Find the experts to be quantized; log those that cannot be."""
        reasons: Counter[str] = Counter()
        for path, module in model.named_modules():
            if (reason := unfit_reason(module, self._bits)) is not None:
                reasons[reason] += 1
                continue
            found = projections(module)
            if not found or any(map(is_kept, (path, *(f"{path}.{name}" for name in found)))):
                continue
            if self._stored is False:
                reasons["the checkpoint has them unquantized"] += 1
            else:
                self._projections |= {f"{path}.{name}": projection for name, projection in found.items()}
        for reason, count in reasons.items():
            what = f"The experts of {count} layers of {type(model).__name__} are not quantized: {reason}."
            logger.warning("%s They stay in the dtype of the model.", what)

    def takes(self, name: str) -> bool:
        """As `ExpertReader` says."""
        return name in self._projections

    def element_bytes(self, name: str) -> float:
        """As `ExpertReader` says."""
        projection = self._projections[name]
        return sum(expert_bytes(projection, self._bits, nested=self._nested)) / projection.elements

    def read(self, model: Any, name: str, experts: Sequence[Sequence[StoredMatrix]]) -> None:
        """Read, or read and quantize, one expert after the other."""
        projection = self._projections[name]
        if len(experts) != projection.experts:
            msg = f"{name} has matrices of {len(experts)} experts, and {projection.experts} are needed."
            raise CheckpointError(msg)
        if any(part.keys() != experts[0][0].keys() for parts in experts for part in parts):
            msg = f"{name} lacks tensors of some experts, each of which needs {', '.join(sorted(experts[0][0]))}."
            raise CheckpointError(msg)
        if self._stored is None:
            dtype = model.get_parameter(name).dtype
            self._put(model, name, self._quantized(_matrices(experts, dtype)))
        elif self._bits == 8:
            rows = (
                _read(name, number, parts, read_int8, bitsandbytes.int8_fault) for number, parts in enumerate(experts)
            )
            self._put(model, name, bitsandbytes.int8_stack([bitsandbytes.join_int8(parts) for parts in rows]))
        else:
            read = (
                _read(name, n, parts, read_four_bit, bitsandbytes.four_bit_fault) for n, parts in enumerate(experts)
            )
            self._put(model, name, bitsandbytes.four_bit_stack([bitsandbytes.join(parts) for parts in read]))

    def take(self, model: Any, name: str, values: torch.Tensor) -> None:
        """Quantize one expert after the other."""
        turned = values.transpose(1, 2) if self._projections[name].transposed else values
        self._put(model, name, self._quantized(matrix.contiguous() for matrix in turned))

    def finish(self, model: Any) -> None:
        """Move the biases of experts into their stacks."""
        for module in {path.rpartition(".")[0]: None for path in self._projections}:
            experts = model.get_submodule(module)
            for name, stacked in experts.named_children():
                bias = experts._parameters.pop(f"{name}_bias", None) if isinstance(stacked, StackedLinear) else None
                if bias is not None:
                    stacked.bias = bias.detach()

    def state_dict(self, model: Any, sources: Mapping[str, Sequence[str]]) -> dict[str, torch.Tensor] | None:
        """Return the tensors with those of each expert's matrices, as transformers 4 wrote them."""
        found = {path: m for path, m in model.named_modules() if isinstance(m, StackedLinear)}
        if not found:
            return None
        state = {}
        for name, tensor in model.state_dict().items():
            path, _, part = name.rpartition(".")
            if path not in found:
                state[name] = tensor
            elif part == "bias":
                state[f"{path}_bias"] = tensor
        for path, stacked in found.items():
            target = next((target for target in sources if path.endswith(target)), None)
            if target is None:
                parent, _, name = path.rpartition(".")
                patterns = [f"{parent}.*.{name}."]
            else:
                patterns = [path.removesuffix(target) + source for source in sources[target]]
            state |= self._stored_matrices(stacked.stack, patterns, model.dtype)
        return state

    def _stored_matrices(self, stack: Stack, patterns: Sequence[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the tensors of all matrices of a stack by their names, of patterns with `*` for the expert."""
        found: dict[str, torch.Tensor] = {}
        for expert in range(stack.experts):
            if isinstance(stack, FourBitStack):
                parts = [
                    stored_four_bit(octets, state, dtype=dtype, storage=self._storage)
                    for octets, state in bitsandbytes.split_four_bit(stack.weight(expert), len(patterns))
                ]
            else:
                assert isinstance(stack, Int8Stack)
                parts = [stored_int8(*part) for part in bitsandbytes.split_int8(stack.weight(expert), len(patterns))]
            for pattern, tensors in zip(patterns, parts, strict=True):
                found |= {pattern.replace("*", str(expert)) + name: tensor for name, tensor in tensors.items()}
        return found

    def _quantized(self, matrices: Iterable[torch.Tensor]) -> Stack:
        """Quantize matrices of shape `(out_features, in_features)`, each of which is freed before the next is read."""
        if self._bits == 8:
            return bitsandbytes.int8_stack([quantize_int8(matrix) for matrix in matrices])
        return bitsandbytes.four_bit_stack(
            [quantize_four_bit(m, self._kind, nested=self._nested, least_error=self._least_error) for m in matrices]
        )

    def _put(self, model: Any, name: str, stack: Stack) -> None:
        """Put a stack in the place of a parameter; the experts change once all of theirs are there."""
        projection = self._projections[name]
        if (stack.out_features, stack.in_features) != (projection.out_features, projection.in_features):
            msg = (
                f"{name} has matrices of {stack.in_features} inputs and {stack.out_features} outputs, and "
                f"{projection.in_features} and {projection.out_features} are needed."
            )
            raise CheckpointError(msg)
        path, _, own = name.rpartition(".")
        experts, stacked = model.get_submodule(path), StackedLinear(stack)
        del experts._parameters[own]
        setattr(experts, own, stacked)
        # The loader would fill in random numbers otherwise.
        stacked._is_hf_initialized = experts._is_hf_initialized = True
        if not projections(experts):
            replace_weights(experts, {})


def _matrices(experts: Sequence[Sequence[StoredMatrix]], dtype: torch.dtype) -> Iterable[torch.Tensor]:
    for parts in experts:
        yield torch.cat([part["weight"]().to(dtype) for part in parts])


def _read(
    name: str,
    expert: int,
    parts: Sequence[StoredMatrix],
    read: Callable[[Mapping[str, torch.Tensor]], Any],
    fault_of: Callable[..., str | None],
) -> list[Any]:
    """Read the matrices of an expert from a checkpoint.

    Raises:
        CheckpointError: If the tensors of one do not fit each other.
    """
    found = [read({ending: tensor() for ending, tensor in part.items()}) for part in parts]
    for matrix in found:
        if (fault := fault_of(*matrix)) is not None:
            msg = f"a matrix of expert {expert} of {name} is damaged: {fault}; get the checkpoint again."
            raise CheckpointError(msg)
    return found
