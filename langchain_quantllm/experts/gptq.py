"""Experts in GPTQ's format: from the packed layers of a checkpoint to a stack, and back.

A checkpoint has a packed layer for each expert of a part of a projection, such as the gates. Here the layers of all
experts are one tensor of each name, with the experts as the first axis: `qweight` of shape `(experts, in_features *
bits / 32, out_features)`, `qzeros` of `(experts, groups, out_features * bits / 32)`, `scales` of `(experts, groups,
out_features)` and `g_idx` of `(experts, in_features)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from langchain_quantllm.kernels.experts.weights import GPTQStack
from langchain_quantllm.kernels.linear.bit_packing import pack_awq, pack_bits, pack_inputs, unpack_awq, unpack_bits
from langchain_quantllm.kernels.linear.weights import codes_per_word, group_size_of

__all__ = ["from_awq", "gptq_layers", "gptq_stack", "join_outputs", "split_outputs", "to_awq"]


def gptq_stack(
    parts: Sequence[Mapping[str, torch.Tensor]],
    *,
    bits: int,
    zeros_minus_one: bool,
    interleaved: bool = False,
    bias: torch.Tensor | None = None,
) -> GPTQStack:
    """Join the packed layers of a projection.

    Args:
        parts: The parts of the projection, such as gates and up-projections, with the same inputs.
        bits: Bits of a code.
        zeros_minus_one: Whether the stored zero points are one too small (format v1).
        interleaved: Whether outputs of the parts alternate, instead of following each other.
        bias: Biases of shape `(experts, out_features)`, or None.
    """
    groups, indices = _common_groups([part["g_idx"] for part in parts])
    top = (1 << bits) - 1
    zeros_of, scales_of = [], []
    for part, index in zip(parts, indices, strict=True):
        own = _unpack(part["qzeros"], bits)
        zeros_of.append(_rows((own + 1) & top if zeros_minus_one else own, index))
        scales_of.append(_rows(part["scales"], index))
    zeros = join_outputs(zeros_of, interleaved=interleaved)
    scales = join_outputs(scales_of, interleaved=interleaved)
    words = join_outputs([part["qweight"] for part in parts], interleaved=interleaved)
    sizes = {group_size_of(row, scales.shape[1], codes_per_word(bits)) for row in groups}
    first = int(zeros.flatten()[0])
    return GPTQStack(
        in_features=groups.shape[1],
        out_features=words.shape[2],
        bits=bits,
        words=words,
        zeros=_pack(zeros, bits),
        scales=scales,
        groups=groups,
        group_size=sizes.pop() if len(sizes) == 1 else 0,
        zero_point=first if bool((zeros == first).all()) else -1,
        bias=bias,
    )


def gptq_layers(
    stack: GPTQStack, *, parts: int, zeros_minus_one: bool, interleaved: bool = False
) -> list[dict[str, torch.Tensor]]:
    """Split a stack into the packed layers of its parts; the reverse of `gptq_stack` for parts with the same groups.

    Args:
        stack: The stack; its bias is left out.
        parts: How many parts it has, of the same size.
        zeros_minus_one: Whether to store zero points one smaller (format v1).
        interleaved: Whether outputs of the parts alternate.
    """
    zeros = _unpack(stack.zeros, stack.bits)
    zeros = (zeros - 1) & ((1 << stack.bits) - 1) if zeros_minus_one else zeros
    split = [split_outputs(tensor, parts, interleaved=interleaved) for tensor in (stack.words, zeros, stack.scales)]
    return [
        {"qweight": words, "qzeros": _pack(own_zeros, stack.bits), "scales": scales, "g_idx": stack.groups.clone()}
        for words, own_zeros, scales in zip(*split, strict=True)
    ]


def from_awq(layer: Mapping[str, torch.Tensor], group_size: int | None = None) -> dict[str, torch.Tensor]:
    """Repack layers of AWQ, of 4 bits, into GPTQ's layout with zero points as they are (v2); no number changes.

    Args:
        layer: `qweight` of shape `(experts, in_features, out_features / 8)`, `qzeros` of `(experts, groups,
            out_features / 8)` and `scales` of `(experts, groups, out_features)`.
        group_size: Inputs of a group; None if all groups have the same size.
    """
    experts, in_features = layer["qweight"].shape[:2]
    size = group_size or -(-in_features // layer["scales"].shape[1])
    index = torch.arange(in_features, dtype=torch.int32, device=layer["qweight"].device) // size
    return {
        "qweight": pack_inputs(unpack_awq(layer["qweight"])),
        "qzeros": _pack(unpack_awq(layer["qzeros"]), 4),
        "scales": layer["scales"],
        "g_idx": index.expand(experts, -1).contiguous(),
    }


def to_awq(layer: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Repack layers into AWQ's layout; the reverse of `from_awq`."""
    codes = _unpack(layer["qweight"].transpose(1, 2).contiguous(), 4).transpose(1, 2)
    qzeros = pack_awq(_unpack(layer["qzeros"], 4))
    return {"qweight": pack_awq(codes), "qzeros": qzeros, "scales": layer["scales"]}


def _common_groups(indices: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Find groups in which no group of any part is divided.

    Returns:
        The common group of each input, of shape `(experts, in_features)`, int32; and for each part the part's own group
        of each common one, of shape `(experts, common groups)`, or None if these are the same.
    """
    first = indices[0].to(torch.int32).contiguous()
    if all(torch.equal(first, index.to(torch.int32)) for index in indices[1:]):
        return first, [None] * len(indices)
    together = torch.stack(list(indices), dim=-1).long()  # (experts, in_features, parts)
    found = [rows.unique(dim=0, return_inverse=True) for rows in together]
    most = max(len(combinations) for combinations, _ in found)
    # Experts with fewer groups get further ones, which no input has.
    padded = [torch.cat([own, own[:1].expand(most - len(own), -1)]) for own, _ in found]
    own = torch.stack(padded)
    groups = torch.stack([inverse for _, inverse in found]).to(torch.int32)
    return groups, [own[..., i].contiguous() for i in range(len(indices))]


def _rows(values: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Take each expert's rows at an index of shape `(experts, rows)`."""
    if index is None:
        return values
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[2]))


def join_outputs(parts: Sequence[torch.Tensor], *, interleaved: bool) -> torch.Tensor:
    """Put the outputs of parts together along the last axis: one part after the other, or in turns."""
    if len(parts) == 1:
        return parts[0].contiguous()
    return torch.stack(list(parts), dim=-1).flatten(-2) if interleaved else torch.cat(list(parts), dim=-1)


def split_outputs(whole: torch.Tensor, parts: int, *, interleaved: bool) -> list[torch.Tensor]:
    """Take outputs apart again; the reverse of `join_outputs`."""
    found = whole.unflatten(-1, (-1, parts)).unbind(-1) if interleaved else whole.chunk(parts, dim=-1)
    return [part.contiguous() for part in found]


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return pack_bits(codes.reshape(-1, codes.shape[-1]), bits).view(*codes.shape[:-1], -1)


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    return unpack_bits(words.reshape(-1, words.shape[-1]), bits).view(*words.shape[:-1], -1)
