"""GPTQ of the experts of a block: each with the tokens that are routed to it.

Experts that few tokens reach are calibrated with other tokens of the layer as well: as many as an expert has inputs in
all, which its statistics need to have full rank. With fewer, errors would go where no input was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from langchain_quantllm.compat.transformers_conversions import ExpertNames
from langchain_quantllm.compat.transformers_experts import Projection, projections
from langchain_quantllm.quantization.packing import TENSORS, RoundedLinear
from langchain_quantllm.quantization.solver import InputStatistics, Rounding, solve

__all__ = ["TOKENS", "ExpertLayers", "PackedLinear", "RoutedTokens", "find_experts"]

TOKENS = "tokens"
"""Name of the tensor with the number of tokens that reached each expert."""

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class ExpertLayers:
    """The experts of one block, and the names of their layers in a checkpoint.

    Args:
        path: Name of the module with the experts, inside the block.
        parts: For each projection, the names of its parts inside that module, with `{expert}` in place of the number.
        projections: The layouts of the projections.
        interleaved: Whether the outputs of a projection's parts alternate.
    """

    path: str
    parts: Mapping[str, tuple[str, ...]]
    projections: Mapping[str, Projection]
    interleaved: bool

    @property
    def count(self) -> int:
        """How many experts there are."""
        return next(iter(self.projections.values())).experts

    @property
    def least_tokens(self) -> int:
        """Tokens with which the statistics of an expert can have full rank: as many as it has inputs."""
        return max(projection.in_features for projection in self.projections.values())

    @property
    def elements(self) -> int:
        """Number of their weights."""
        return sum(projection.elements for projection in self.projections.values())

    def layers(self, expert: int) -> Iterator[tuple[str, str, int]]:
        """Yield each packed layer of an expert: its name inside the block, its projection, and its part."""
        for projection, names in self.parts.items():
            for part, name in enumerate(names):
                yield f"{self.path}.{name.replace('{expert}', str(expert))}", projection, part

    def sizes(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, inputs and outputs of the packed layers of the first expert."""
        for name, projection, _ in self.layers(0):
            own = self.projections[projection]
            yield name, own.in_features, own.out_features // len(self.parts[projection])

    def rounded(self, expert: int, packed: Mapping[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
        """Compute the weights of an expert, of shape `(out_features, in_features)`, from its packed layers."""
        found: dict[str, list[torch.Tensor]] = {}
        for name, projection, _ in self.layers(expert):
            own = {key: packed[f"{name}.{key}"] for key in TENSORS}
            found.setdefault(projection, []).append(RoundedLinear.unpack(own, bits).dequantize())
        return {name: self._joined(weights) for name, weights in found.items()}

    def set_weight(self, experts: Any, projection: str, expert: int, weight: torch.Tensor) -> None:
        """Set the weight of an expert in the module that computes."""
        own = weight.t() if self.projections[projection].transposed else weight
        getattr(experts, projection).data[expert].copy_(own)

    def weight(self, experts: Any, projection: str, expert: int) -> torch.Tensor:
        """Return the weight of an expert, of shape `(out_features, in_features)`."""
        own: torch.Tensor = getattr(experts, projection)[expert].detach()
        return own.t() if self.projections[projection].transposed else own

    def rows(self, projection: str, part: int) -> slice:
        """Return the outputs of a part."""
        parts, outputs = len(self.parts[projection]), self.projections[projection].out_features
        if self.interleaved and parts > 1:
            return slice(part, outputs, parts)
        return slice(part * outputs // parts, (part + 1) * outputs // parts)

    def bias(self, experts: Any, projection: str, expert: int) -> torch.Tensor | None:
        """Return the biases of an expert."""
        name = self.projections[projection].bias
        return None if name is None else getattr(experts, name)[expert].detach()

    def _joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(parts) == 1:
            return parts[0]
        return torch.stack(list(parts), dim=1).flatten(0, 1) if self.interleaved else torch.cat(list(parts))

    def quantize(self, experts: Any, tokens: RoutedTokens | None, rounding: Rounding) -> dict[str, torch.Tensor]:
        """Round the experts, one after the other.

        Args:
            experts: The module, on the device that computes; its weights become the rounded ones.
            tokens: The inputs of the experts; without any, weights are rounded to nearest.
            rounding: Options.

        Returns:
            The packed layers by their names inside the block, and how many tokens reached each expert.
        """
        packed: dict[str, torch.Tensor] = {}
        counts = []
        for expert in range(self.count):
            inputs = None
            if tokens is not None:
                inputs, count = tokens.of(expert, self.least_tokens)
                counts.append(count)
            for projection, names in self.parts.items():
                weight = self.weight(experts, projection, expert)
                rounded = solve(weight, _statistics(inputs, weight), rounding)
                self.set_weight(experts, projection, expert, rounded.dequantize())
                for part, name in enumerate(names):
                    own = rounded.outputs(self.rows(projection, part)).pack()
                    layer = f"{self.path}.{name.replace('{expert}', str(expert))}"
                    packed |= {f"{layer}.{key}": tensor for key, tensor in own.items()}
                if inputs is not None and projection != "down_proj":
                    inputs = self._inner(experts, projection, expert, inputs)
        if tokens is not None:
            packed[f"{self.path}.{TOKENS}"] = torch.tensor(counts)
        return packed

    def _inner(self, experts: Any, projection: str, expert: int, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Compute the inputs of an expert's last projection with its rounded first one."""
        weight, bias = self.weight(experts, projection, expert), self.bias(experts, projection, expert)
        found = []
        with torch.no_grad():
            for rows in inputs:
                y = nn.functional.linear(rows.to(weight), weight, bias)
                found.append(experts._apply_gate(y) if experts.has_gate else experts.act_fn(y))
        return found

    def pack(
        self, experts: Any, packed: Mapping[str, torch.Tensor], written: Callable[..., dict[str, torch.Tensor]]
    ) -> nn.Module:
        """Make the module that takes the experts' place in a finished block: the packed layers by their names.

        Args:
            experts: The module.
            packed: The packed layers.
            written: Puts the tensors of a layer into the checkpoint's format.
        """
        root = nn.Module()
        for expert in range(self.count):
            for name, projection, part in self.layers(expert):
                bias = self.bias(experts, projection, expert)
                own = {key: packed[f"{name}.{key}"] for key in TENSORS}
                layer = PackedLinear(written(own), None if bias is None else bias[self.rows(projection, part)].clone())
                _add(root, name.removeprefix(f"{self.path}."), layer)
        return root


class PackedLinear(nn.Module):  # type: ignore[misc]  # torch is not followed
    """The packed tensors of a layer, in its place in a finished block."""

    def __init__(self, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None) -> None:
        """Hold the tensors."""
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        if bias is not None:
            self.register_buffer("bias", bias)


class RoutedTokens:
    """The inputs of a block's experts, and the experts of each token."""

    def __init__(self) -> None:
        """Start without tokens."""
        self._batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, hidden: torch.Tensor, experts: torch.Tensor) -> None:
        """Add tokens.

        Args:
            hidden: Inputs of shape `(tokens, hidden)`.
            experts: The experts of each token, of shape `(tokens, k)`.
        """
        self._batches.append((hidden.cpu(), experts.cpu()))

    def of(self, expert: int, least: int) -> tuple[list[torch.Tensor], int]:
        """Return the tokens of an expert; if there are fewer than `least`, then others of the layer with them.

        Returns:
            The tokens in parts, and how many were routed to the expert.
        """
        if len(self._batches) > 1:
            hidden, experts = zip(*self._batches, strict=True)
            self._batches = [(torch.cat(hidden), torch.cat(experts))]
        [(every, chosen)] = self._batches
        routed = (chosen == expert).any(dim=-1)
        rows, others = every[routed], (~routed).nonzero()[:, 0]
        count = len(rows)
        wanted = min(max(least - count, 0), len(others))
        if wanted:
            places = others[torch.arange(wanted) * len(others) // wanted]
            rows = torch.cat([rows, every[places]])
        return [part for part in rows.split(_ROWS_AT_ONCE) if len(part)], count


def find_experts(model: Any, prefix: str) -> tuple[tuple[ExpertLayers, ...], ...]:
    """Find the experts of each block of a model, on any device.

    Args:
        model: The model.
        prefix: Name of the list of blocks.
    """
    blocks = [
        (f"{prefix}.{i}.", {path: module for path, module in block.named_modules() if projections(module)})
        for i, block in enumerate(model.get_submodule(prefix))
    ]
    known = [f"{b}{path}.{name}" for b, found in blocks for path in found for name in projections(found[path])]
    names = ExpertNames(model, known)
    return tuple(tuple(_layers(names, b, path, module) for path, module in found.items()) for b, found in blocks)


def _layers(names: ExpertNames, block: str, path: str, module: Any) -> ExpertLayers:
    own, parts = projections(module), {}
    for name in own:
        templates = names.templates(f"{block}{path}.{name}") or _ordinary(f"{block}{path}", name)
        parts[name] = tuple(template.removeprefix(f"{block}{path}.") for template in templates)
    interleaved = not getattr(module, "is_concatenated", True)
    return ExpertLayers(path=path, parts=parts, projections=own, interleaved=interleaved)


def _ordinary(path: str, name: str) -> tuple[str, ...]:
    """Return the names of layers in checkpoints of families that have none of their own."""
    kinds = ("gate", "up") if name == "gate_up_proj" else (name.removesuffix("_proj"),)
    return tuple(f"{path}.{{expert}}.{kind}_proj" for kind in kinds)


def _statistics(inputs: Sequence[torch.Tensor] | None, weight: torch.Tensor) -> InputStatistics | None:
    if inputs is None:
        return None
    statistics = InputStatistics(weight.shape[1], weight.device)
    for rows in inputs:
        statistics.add(rows.to(weight.device))
    return statistics


def _add(root: nn.Module, name: str, layer: nn.Module) -> None:
    """Add a module under a name with dots."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, layer)
