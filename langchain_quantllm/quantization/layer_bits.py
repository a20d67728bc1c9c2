"""Bits by layer: each group's own, so that the model loses least within a mean, and the rules that say so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from langchain_quantllm.compat.gptqmodel_rules import bits_rules
from langchain_quantllm.quantization.sensitivity import LayerGroup
from langchain_quantllm.schemes import AWQ, GPTQ

_MOST_UNITS = 100_000
"""Largest number of sums of bits that are told apart; above it, sizes are rounded up to parts of the budget."""


@dataclass(frozen=True, kw_only=True)
class LayerBits:
    """The bits of a model's layers.

    Args:
        usual: Bits of most weights.
        groups: The bits of each group of layers, by its block and its names inside the block, where one that ends in a
            dot stands for all layers below; empty if all layers have the usual ones.
        mean: Bits of a quantized weight on average.
    """

    usual: int
    groups: tuple[tuple[tuple[int, tuple[str, ...]], int], ...] = ()
    mean: float

    @classmethod
    def chosen(cls, groups: Sequence[LayerGroup], bits: Sequence[int], mean_bits: float) -> LayerBits:
        """Choose them by what they cost; see `choose_bits`."""
        found = choose_bits(groups, bits, mean_bits)
        weights = [group.weights for group in groups]
        mean = sum(count * own for count, own in zip(weights, found, strict=True)) / sum(weights)
        share = {b: sum(count for count, own in zip(weights, found, strict=True) if own == b) for b in bits}
        named = sorted(((group.block, group.names), own) for group, own in zip(groups, found, strict=True))
        return cls(usual=max(bits, key=lambda b: share[b]), groups=tuple(named), mean=mean)

    def of(self, block: int, name: str) -> int:
        """Return the bits of a layer, or of experts, by its name inside its block."""
        for (index, names), bits in self.groups:
            if index == block and any(name == own or (own[-1] == "." and f"{name}.".startswith(own)) for own in names):
                return bits
        return self.usual

    @property
    def others(self) -> tuple[int, ...]:
        """Bits that layers have beside the usual ones, sorted."""
        return tuple(sorted({bits for _, bits in self.groups} - {self.usual}))

    def scheme(self, asked: GPTQ | AWQ) -> GPTQ | AWQ:
        """Return the scheme of the checkpoint; `asked` may leave bits open."""
        return replace(asked, bits=self.usual, other_bits=self.others) if isinstance(asked, GPTQ) else asked

    def config(self, prefix: str) -> dict[str, Any]:
        """Return the keys of `quantization_config` that say them; `prefix` is the name of the list of blocks."""
        rules = bits_rules(prefix, dict(self.groups), self.usual)
        return {"bits": self.usual, **({"dynamic": rules} if rules else {})}


def choose_bits(groups: Sequence[LayerGroup], bits: Sequence[int], mean_bits: float) -> list[int]:
    """Choose the bits of each group.

    Args:
        groups: The groups, with a cost for each number of bits.
        bits: Numbers of bits, ascending.
        mean_bits: Most bits of a weight, on average; at least the first of `bits`.

    Returns:
        Bits of each group, with the least sum of costs.
    """
    # Above the fewest bits, each group takes a multiple of a unit.
    unit: float = math.gcd(*(group.weights for group in groups))
    room = int((mean_bits - bits[0]) * sum(group.weights for group in groups) / unit + 1e-6)
    if room > _MOST_UNITS:
        unit, room = unit * room / _MOST_UNITS, _MOST_UNITS
    sizes = [[math.ceil((b - bits[0]) * group.weights / unit - 1e-9) for b in bits] for group in groups]
    least = torch.zeros(room + 1, dtype=torch.float64)  # the least cost within each room
    choices = []
    for group, own in zip(groups, sizes, strict=True):
        tried = torch.full((len(bits), room + 1), torch.inf, dtype=torch.float64)
        for row, size, cost in zip(tried, own, group.costs, strict=True):
            if size <= room:
                row[size:] = least[: room + 1 - size] + cost
        least, chosen = tried.min(0)
        choices.append(chosen.to(torch.uint8))
    found = []
    for own, chosen in zip(reversed(sizes), reversed(choices), strict=True):
        which = int(chosen[room])
        found.append(bits[which])
        room -= own[which]
    return found[::-1]
