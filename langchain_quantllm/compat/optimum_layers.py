"""optimum's quantizer with settings of single layers, which it ignores: each layer is made with its own.

Source: optimum/gptq/quantizer.py, `GPTQQuantizer.convert_model`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from langchain_quantllm.compat.gptqmodel_rules import SETTINGS, rule_of


@contextlib.contextmanager
def layers_by_rules(config: Any) -> Iterator[None]:
    """Let models that are loaded inside the block have the settings of a checkpoint's rules.

    Use it inside `gptqmodel_import.gptqmodel_imported()`, which keeps other threads from loading meanwhile.

    Args:
        config: The checkpoint's `quantization_config` as a dictionary; without rules, nothing changes.
    """
    if not isinstance(config, Mapping) or not config.get("dynamic"):
        yield
        return
    import optimum.gptq

    before = optimum.gptq.GPTQQuantizer  # transformers looks it up there, by this name, when a model is loaded
    optimum.gptq.GPTQQuantizer = _by_rules(before, config)
    try:
        yield
    finally:
        optimum.gptq.GPTQQuantizer = before


def _by_rules(quantizer: Any, config: Mapping[str, Any]) -> Any:
    from optimum.gptq.utils import get_block_name_with_pattern, get_layers

    class ByRules(quantizer):  # type: ignore[misc]
        """Replaces the layers of each rule in a pass of its own."""

        def convert_model(self, model: Any, **kwargs: Any) -> Any:
            prefix = self.block_name_to_quantize or get_block_name_with_pattern(model)
            kept = [name for group in self.modules_in_block_to_quantize or () for name in group]
            layers: dict[str | None, list[str]] = {}
            for name in get_layers(model, prefix=prefix):
                if not kept or name.endswith(tuple(kept)):
                    layers.setdefault(rule_of(config, name), []).append(name)
            own = (*SETTINGS, "backend", "modules_in_block_to_quantize")
            before = {name: getattr(self, name) for name in own}
            for rule, names in layers.items():
                if rule is not None and rule.startswith("-:"):
                    continue
                settings = {**before, **({} if rule is None else config["dynamic"][rule])}
                self.__dict__.update(settings, modules_in_block_to_quantize=[names])
                model = super().convert_model(model, **kwargs)
            self.__dict__.update(before)
            return model

        def post_init_model(self, model: Any) -> Any:
            model = super().post_init_model(model)
            # transformers' config drops the rules, and a copy of the model is saved with them.
            model.config.quantization_config.dynamic = {
                rule: {name: own[name] for name in own if name in SETTINGS} for rule, own in config["dynamic"].items()
            }
            return model

    return ByRules
