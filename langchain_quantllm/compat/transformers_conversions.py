"""transformers' weight conversions: which layers of single experts a checkpoint has for a parameter of all experts.

Checkpoints of most families name each expert's layers, such as `model.layers.0.mlp.experts.3.gate_proj`. transformers
puts their weights together by a list of conversions for each family.

Source: transformers/conversion_mapping.py; `WeightTransform` in transformers/core_model_loading.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

__all__ = ["ExpertLayer", "ExpertNames"]

_ORDINARY = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj")
"""Names that tools write for any family whose experts they have taken apart."""


@dataclass(frozen=True, kw_only=True)
class ExpertLayer:
    """A layer of one expert.

    Args:
        parameter: Name of the model's parameter that holds its weight.
        part: Which part of the parameter's outputs it is: of `gate_up_proj`, 0 is the gate and 1 the up-projection.
        parts: How many parts there are.
        expert: Number of the expert.
        template: The layer's name inside the model, with `{expert}` in place of the number.
    """

    parameter: str
    part: int
    parts: int
    expert: int
    template: str


class ExpertNames:
    """The names of single experts' layers in checkpoints of one model."""

    def __init__(self, model: Any, parameters: Collection[str]) -> None:
        """Look up the conversions of a model's family.

        Args:
            model: A model of transformers, on any device.
            parameters: Names of its parameters that hold the weights of all experts.
        """
        self._parameters = frozenset(parameters)
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
        conversions = _conversions(model)
        self._renamings = [c for c in conversions if not getattr(c, "operations", None)]
        self._converters = [c for c in conversions if getattr(c, "operations", None) and len(c.target_patterns) == 1]

    def renamed(self, name: str) -> str:
        """Return the name in the model of a tensor that no conversion puts together with others."""
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    def find(self, layer: str) -> ExpertLayer | None:
        """Return what a layer of a checkpoint is; None if it is no expert's.

        Args:
            layer: Its name, without `.weight`.
        """
        name = self.renamed(f"{layer}.weight")
        for converter in self._converters:
            target, source = converter.rename_source_key(name)
            parameter = None if source is None else self._known(target)
            number = None if source is None else _number(source, name)
            if parameter is not None and number is not None:
                return ExpertLayer(
                    parameter=parameter,
                    part=converter.source_patterns.index(source),
                    parts=len(converter.source_patterns),
                    expert=int(number[1]),
                    template=self._template(name, number),
                )
        return self._ordinary(name.removesuffix(".weight"))

    def templates(self, parameter: str) -> tuple[str, ...] | None:
        """Return the names of a parameter's layers in a checkpoint of its family, before the renamings of saving.

        Returns:
            For each part a name with `{expert}` in it; None if the family's checkpoints name no single experts.
        """
        for converter in self._converters:
            found = re.search(f"(?:{converter.target_patterns[0]})$", parameter)
            if found is None:
                continue
            endings = [pattern.removeprefix("^").replace("*", "{expert}") for pattern in converter.source_patterns]
            if all("{expert}" in ending and ending.endswith(".weight") for ending in endings):
                return tuple(parameter[: found.start()] + ending.removesuffix(".weight") for ending in endings)
        return None

    def _template(self, name: str, number: re.Match[str]) -> str:
        name = name[: number.start(1)] + "{expert}" + name[number.end(1) :]
        return name.removesuffix(".weight")

    def _known(self, name: str) -> str | None:
        """Return the parameter that a name means, with or without the prefix of the model without its head."""
        names = (name, self._prefix + name, name.removeprefix(self._prefix))
        return next((n for n in names if n in self._parameters), None)

    def _ordinary(self, name: str) -> ExpertLayer | None:
        found = _ORDINARY.fullmatch(name)
        if found is None:
            return None
        experts, number, kind = found.groups()
        gated = self._known(f"{experts}.gate_up_proj")
        own = gated if kind != "down" and gated is not None else self._known(f"{experts}.{kind}_proj")
        if own is None:
            return None
        parts = 2 if own is gated else 1
        return ExpertLayer(
            parameter=own,
            part=int(parts == 2 and kind == "up"),
            parts=parts,
            expert=int(number),
            template=f"{own.rpartition('.')[0]}.{{expert}}.{kind}_proj",
        )


def _conversions(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model, add_legacy=False))


def _number(pattern: str, name: str) -> re.Match[str] | None:
    """Find the number of the expert in a name that a pattern with one `*` matches."""
    if pattern.count("*") != 1:
        return None
    return re.search(pattern.removeprefix("^").replace("*", r"(\d+)"), name)
