"""GPTQ of one weight: its columns are rounded one by one, and each error is compensated in the columns after it.

Source: https://arxiv.org/abs/2210.17323, algorithm 1 and section 3.3 (groups of columns, Cholesky, damping).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from langchain_quantllm.quantization.packing import RoundedLinear

_CHUNK = 128  # columns whose errors are applied to the rest of the weight at once
_SHRINKS, _LEAST_SHRINK = 16, 0.7  # ranges tried for a group: how many, down to which part of the whole
_MOST_DAMPING = 1.0


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Options of rounding a weight.

    Args:
        bits: Bits of a code: 2, 3, 4 or 8.
        group_size: Inputs that share a scale; -1 takes all of them.
        sym: Put the zero point in the middle of the codes.
        desc_act: Form groups of inputs in the order of their activations, largest first; some kernels are slow then.
            Otherwise neighbours form groups, and columns are only rounded in this order.
        damping: Number added to the diagonal of the statistics, as a share of its mean.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    damping: float


class InputStatistics:
    """Twice the mean of `x x^T` over the inputs of a layer, the Hessian of its squared error."""

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        """Start without inputs."""
        self.hessian = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs of shape `(..., in_features)`."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.rows += len(rows)
        if not len(rows):
            return
        self.hessian *= (self.rows - len(rows)) / self.rows
        self.hessian.addmm_(rows.t(), rows, alpha=2 / self.rows)


def solve(weight: torch.Tensor, statistics: InputStatistics | None, rounding: Rounding) -> RoundedLinear:
    """Round a weight so that the layer's outputs change little.

    Args:
        weight: Weight of shape `(out_features, in_features)`, on the device that computes.
        statistics: Statistics of its inputs; without any, weights are rounded to nearest.
        rounding: Options.

    Returns:
        The rounded layer, on the same device.
    """
    columns = weight.detach().float().t().contiguous()  # (in, out): a column of the weight is contiguous
    in_features = len(columns)
    group_size = in_features if rounding.group_size == -1 else rounding.group_size
    hessian = None if statistics is None or not statistics.rows else statistics.hessian
    order = torch.arange(in_features, device=weight.device)
    importance = torch.ones(in_features, dtype=torch.float32, device=weight.device)
    if hessian is not None:
        importance = hessian.diagonal().clone()
        order = torch.argsort(importance, descending=True, stable=True)
    group_of = torch.empty(in_features, dtype=torch.int64, device=weight.device)
    members = order if rounding.desc_act else torch.arange(in_features, device=weight.device)
    group_of[members] = torch.arange(in_features, device=weight.device) // group_size
    scales, zeros = _scales(columns[members], importance[members], group_size, rounding)
    factors = None if hessian is None else _inverse_factors(hessian[order][:, order], rounding.damping)
    codes = _round(columns[order], group_of[order], scales, zeros, factors, rounding.bits)
    unordered = torch.empty_like(codes)
    unordered[order] = codes
    return RoundedLinear(
        codes=unordered,
        zeros=zeros.to(torch.uint8),
        scales=scales.half(),
        g_idx=group_of.to(torch.int32),
        bits=rounding.bits,
    )


def _scales(
    columns: torch.Tensor, importance: torch.Tensor, group_size: int, rounding: Rounding
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the scales and zero points of groups of neighbours, float32 of shape `(groups, out_features)`.

    Of several ranges, the one with the least squared error weighted by the size of the inputs is taken. Scales are
    exact in both float16 and bfloat16, so that kernels of either dtype compute with the same ones.
    """
    padding = -len(columns) % group_size  # the last group may be smaller; zeros change no range
    grouped = torch.nn.functional.pad(columns, (0, 0, 0, padding)).view(-1, group_size, columns.shape[1])
    weights = torch.nn.functional.pad(importance, (0, padding)).view(-1, group_size, 1)
    top = 2**rounding.bits - 1
    low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
    if rounding.sym:
        high = torch.maximum(-low, high)
        low = -high
    best = torch.full_like(high, torch.inf)
    scales, zeros = torch.empty_like(high), torch.empty_like(high)
    for step in range(_SHRINKS):
        part = 1 - step * (1 - _LEAST_SHRINK) / (_SHRINKS - 1)
        tried = (part * (high - low) / top).clamp(min=1e-5).bfloat16().float()
        middle = torch.full_like(low, (top + 1) / 2)
        at = middle if rounding.sym else (-part * low / tried).round().clamp(1, top)
        codes = (grouped / tried.unsqueeze(1) + at.unsqueeze(1)).round_().clamp_(0, top)
        errors = ((codes - at.unsqueeze(1)) * tried.unsqueeze(1) - grouped).square_().mul_(weights).sum(1)
        better = errors < best
        best = torch.where(better, errors, best)
        scales, zeros = torch.where(better, tried, scales), torch.where(better, at, zeros)
    return scales, zeros


def _inverse_factors(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Compute the upper Cholesky factor of the damped inverse, with more damping where there is none otherwise."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp(min=1e-12)
    # The column of an input that was always 0 is rounded to nearest.
    hessian = hessian + torch.diag((diagonal == 0).float() * mean)
    unit = torch.eye(len(hessian), dtype=torch.float32, device=hessian.device)
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian + damping * mean * unit)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
        if damping >= _MOST_DAMPING:
            return unit  # rounding to nearest
        damping = min(10 * damping, _MOST_DAMPING)


def _round(
    columns: torch.Tensor,
    group_of: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    factors: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """Round columns of shape `(in_features, out_features)` to codes; without factors, each to nearest."""
    top = 2**bits - 1
    scales, zeros = scales[group_of], zeros[group_of]
    if factors is None:
        return (columns / scales + zeros).round().clamp(0, top).to(torch.uint8)
    codes = torch.empty_like(columns, dtype=torch.uint8)
    steps = factors / factors.diagonal().unsqueeze(1)
    for first in range(0, len(columns), _CHUNK):
        last = min(first + _CHUNK, len(columns))
        chunk = columns[first:last]
        errors = torch.empty_like(chunk)
        for i in range(last - first):
            at = first + i
            code = (chunk[i] / scales[at] + zeros[at]).round_().clamp_(0, top)
            codes[at] = code.to(torch.uint8)
            torch.sub(chunk[i], (code - zeros[at]) * scales[at], out=errors[i])
            if i + 1 < last - first:
                chunk[i + 1 :].addr_(steps[at, at + 1 : last], errors[i], alpha=-1)
        columns[last:].addmm_(steps[first:last, last:].t(), errors, alpha=-1)
    return codes
