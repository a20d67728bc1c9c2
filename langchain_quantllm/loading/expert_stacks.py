"""The stacks of packed experts: empty ones of a checkpoint's shapes, read from its files, and named as in its files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from langchain_quantllm.errors import CheckpointError, UnsupportedError, first_line
from langchain_quantllm.experts.gptq import from_awq, gptq_layers, gptq_stack, join_outputs, split_outputs, to_awq
from langchain_quantllm.experts.mxfp4 import mxfp4_blocks, mxfp4_stack
from langchain_quantllm.kernels.experts.weights import MXFP4_BLOCK, GPTQStack, Mxfp4Stack, Stack
from langchain_quantllm.loading.expert_tensors import StoredProjection

__all__ = ["OpenFiles", "SavedNames", "empty_stack", "fill", "read_stack"]


class OpenFiles:
    """The weight files of a checkpoint, opened as they are needed. Used as a context manager."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """Take the file of each tensor."""
        self._files = files
        self._opened: dict[Path, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> OpenFiles:
        """Open no file yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all."""
        self._stack.close()

    def has(self, name: str) -> bool:
        """Say whether there is a tensor of a name."""
        return name in self._files

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor.

        Raises:
            CheckpointError: If it cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        file = self._files[name]
        try:
            if file not in self._opened:
                self._opened[file] = self._stack.enter_context(safe_open(file, framework="pt"))
            read: torch.Tensor = self._opened[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            msg = f"the tensor {name!r} in {file} cannot be read ({first_line(error)}); get the file again."
            raise CheckpointError(msg) from error
        return read


# Reading.


def empty_stack(found: StoredProjection, scales_dtype: torch.dtype, bias: torch.Tensor | None) -> Stack:
    """Make a stack of the shapes of a projection on the meta device.

    Args:
        found: The projection.
        scales_dtype: Dtype of the scales of GPTQ and AWQ.
        bias: The biases that the model has, on the meta device, or None.
    """
    p, form = found.projection, found.format
    inputs, outputs = p.in_features, p.out_features

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(p.experts, *shape, dtype=dtype, device="meta")

    if form.kind == "mxfp4":
        scales, words = empty(outputs, inputs // MXFP4_BLOCK, dtype=torch.uint8), empty(outputs, inputs // 8)
        return Mxfp4Stack(in_features=inputs, out_features=outputs, words=words, scales=scales, bias=bias)
    count = form.groups(inputs)
    return GPTQStack(
        in_features=inputs,
        out_features=outputs,
        bits=form.bits,
        words=empty(inputs * form.bits // 32, outputs),
        zeros=empty(count, outputs * form.bits // 32),
        scales=empty(count, outputs, dtype=scales_dtype),
        groups=empty(inputs),
        group_size=0,
        zero_point=-1,
        bias=bias,
    )


def read_stack(found: StoredProjection, files: OpenFiles) -> Stack:
    """Read the stack of a projection, on the CPU.

    Raises:
        CheckpointError: If a tensor cannot be read, or names groups that there are not.
    """
    form, bias = found.format, _read_bias(found, files)
    if form.kind == "mxfp4":
        layer = found.layers[0][0]
        return mxfp4_stack(files.tensor(f"{layer}_blocks"), files.tensor(f"{layer}_scales"), bias)
    parts = [_read_part(found, part, files) for part in found.layers]
    if form.kind == "awq":
        parts = [from_awq(part) for part in parts]
    minus_one = form.zeros_minus_one
    return gptq_stack(parts, bits=form.bits, zeros_minus_one=minus_one, interleaved=found.interleaved, bias=bias)


def _read_part(found: StoredProjection, layers: Sequence[str], files: OpenFiles) -> dict[str, torch.Tensor]:
    """Read the tensors of one part of a projection, with the experts as their first axis."""

    def read(ending: str) -> torch.Tensor:
        tensors = [files.tensor(f"{layer}.{ending}") for layer in layers]
        return tensors[0] if found.fused else torch.stack(tensors)

    part = {name: read(name) for name in ("qweight", "qzeros", "scales")}
    if found.format.kind == "awq":
        return part
    inputs, groups = found.projection.in_features, part["scales"].shape[1]
    if not all(files.has(f"{layer}.g_idx") for layer in layers):
        index = torch.arange(inputs, dtype=torch.int32) // -(-inputs // groups)
        return {**part, "g_idx": index.expand(found.projection.experts, -1).contiguous()}
    index = read("g_idx")
    if int(index.min()) < 0 or int(index.max()) >= groups:
        msg = f"{layers[0] + '.g_idx'!r}, or that of another expert, names a group that is none of {groups}."
        raise CheckpointError(msg)
    return {**part, "g_idx": index}


def _read_bias(found: StoredProjection, files: OpenFiles) -> torch.Tensor | None:
    if not found.biases:
        return None
    if found.has_whole_bias:
        return files.tensor(found.biases[0][0])
    parts = [torch.stack([files.tensor(name) for name in names]) for names in found.biases]
    return join_outputs(parts, interleaved=found.interleaved)


def fill(empty: Stack, read: Stack) -> Stack:
    """Copy tensors that were read into an empty stack on a device, and take over the numbers beside them."""
    own: dict[str, torch.Tensor] = {}
    for field in fields(read):
        tensor, place = getattr(read, field.name), getattr(empty, field.name)
        if isinstance(tensor, torch.Tensor):
            # Parts with other groups of inputs have more groups in common than each of its own.
            own[field.name] = place.copy_(tensor) if tensor.shape == place.shape else tensor.to(place.device)
    filled: Any = read
    stack: Stack = replace(filled, **own)
    return stack


# Saving.


class SavedNames:
    """A hook that gives experts in a state dict the names and the layout of their checkpoint."""

    def __init__(self, found: Sequence[StoredProjection]) -> None:
        """Take the projections of one module."""
        self._found = tuple(found)

    def __call__(self, module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
        """Rename the tensors of the module in a state dict."""
        for found in self._found:
            stacked = getattr(module, found.name)
            for name in stacked._buffers:
                state.pop(f"{prefix}{found.name}.{name}", None)
            state.update({prefix + name: tensor for name, tensor in _saved(found, stacked.stack)})


def _saved(found: StoredProjection, stack: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a stack as its checkpoint has them, with their names inside the experts' module."""
    if found.has_whole_bias:
        yield f"{found.projection.bias}", stack.bias
    if found.format.kind == "mxfp4":
        blocks, scales = mxfp4_blocks(stack)
        yield f"{found.name}_blocks", blocks
        yield f"{found.name}_scales", scales
        return
    parts = _layers_of(found, stack)
    if found.fused:
        yield from ((f"{found.name}.{ending}", tensor) for ending, tensor in parts[0].items())
        return
    for template, part in zip(found.templates, parts, strict=True):
        name = template.removeprefix(f"{found.module}.")
        for expert in range(stack.experts):
            own = name.replace("{expert}", str(expert))
            yield from ((f"{own}.{ending}", tensor[expert].contiguous()) for ending, tensor in part.items())


def _layers_of(found: StoredProjection, stack: GPTQStack) -> list[dict[str, torch.Tensor]]:
    form = found.format
    if stack.scales.shape[1] != form.groups(stack.in_features):
        msg = (
            f"the experts {found.module!r} cannot be saved: their parts had groups of their own, which are joined; "
            "copy the checkpoint instead."
        )
        raise UnsupportedError(msg)
    count, minus_one = len(found.layers), form.zeros_minus_one
    parts = gptq_layers(stack, parts=count, zeros_minus_one=minus_one, interleaved=found.interleaved)
    if form.kind == "awq":
        parts = [to_awq(part) for part in parts]
    if stack.bias is not None and not found.has_whole_bias:
        biases = split_outputs(stack.bias, count, interleaved=found.interleaved)
        parts = [{**part, "bias": bias} for part, bias in zip(parts, biases, strict=True)]
    return parts
