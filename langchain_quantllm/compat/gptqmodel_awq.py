"""transformers' loader of AWQ checkpoints, with GPTQModel's layers of GPTQ in place of its layers of AWQ.

A quantizer over that of transformers, under a name of this package's, makes each layer of GPTQ with empty tensors in
AWQ's shapes, which the loader fills. Afterwards they are repacked, one layer after the other, in the same module: the
hooks of a device map stay on it.

Source: `AwqQuantizer` in transformers/quantizers/quantizer_awq.py; `replace_with_awq_linear` in
transformers/integrations/awq.py; `GPTQQuantizer` in optimum/gptq/quantizer.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from langchain_quantllm.compat.gptqmodel import StoredTensors, stored_tensors
from langchain_quantllm.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

METHOD = "quantllm_awq"
"""Name of the quantizer."""

PackedLayer: TypeAlias = "Mapping[str, torch.Tensor]"
"""The tensors of a layer by their names in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class AWQLayers:
    """How layers of AWQ become layers of GPTQ, of 4 bits and in format v2, and back.

    Args:
        choose_kernel: Returns GPTQModel's backend for a layer of so many inputs and outputs; None to leave the layer to
            transformers.
        repack: Turns `qweight`, `qzeros` and `scales` of AWQ, and the size of its groups, into the tensors of GPTQ.
        restore: The reverse of `repack`, without the size.
        scaled_activations: Whether the checkpoint has scales of activations, as AutoAWQ writes them for some families.
    """

    choose_kernel: Callable[[int, int], str | None]
    repack: Callable[[PackedLayer, int], PackedLayer]
    restore: Callable[[PackedLayer], PackedLayer]
    scaled_activations: bool


def awq_reading_config(settings: Mapping[str, Any], layers: AWQLayers) -> dict[str, Any]:
    """Make the `quantization_config` of a checkpoint's config, in its dict form, of AWQ's.

    The loaded model has AWQ's. Load it inside `gptqmodel_import.gptqmodel_imported()`.
    """
    _register()
    return {"quant_method": METHOD, "awq": dict(settings), "layers": layers}


@functools.cache
def _register() -> None:
    """Register the quantizer beside those of transformers, which stay as they are."""
    from transformers.quantizers import register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class AWQLayersConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not followed
        """The config of AWQ, with what turns its layers; it stands in for that while a model is loaded."""

        def __init__(self, awq: Mapping[str, Any], layers: AWQLayers, quant_method: str = METHOD) -> None:
            self.quant_method, self.awq, self.layers = quant_method, awq, layers

    register_quantization_config(METHOD)(AWQLayersConfig)
    register_quantizer(METHOD)(_quantizer_class())


@functools.cache
def _quantizer_class() -> Any:
    from transformers import AwqConfig
    from transformers.integrations import replace_quantization_scales, replace_with_awq_linear
    from transformers.quantizers.quantizer_awq import AwqQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    class AWQLayersQuantizer(AwqQuantizer):  # type: ignore[misc]
        """AWQ's quantizer that makes layers of GPTQ, and layers of AWQ where a layer fits no kernel of GPTQ."""

        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            super().__init__(AwqConfig.from_dict(dict(quantization_config.awq)), **kwargs)
            self.layers = quantization_config.layers
            self.made: list[str] = []

        def update_dtype(self, dtype: Any) -> Any:
            return dtype  # AWQ's own kernels for GPUs take float16 alone

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            config = self.quantization_config
            kept = self.get_modules_to_not_convert(
                model, config.modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
            )
            rest = False
            for name, module in [*model.named_modules()]:
                if not _is_linear(module) or not should_convert_module(name, kept):
                    continue
                kernel = self.layers.choose_kernel(module.in_features, module.out_features)
                if kernel is None:
                    rest = True
                else:
                    self.made.append(name)
                    model.set_submodule(name, _empty_layer(module, kernel, config.group_size, kwargs.get("device_map")))
            if rest:
                replace_with_awq_linear(model, kept, config, kwargs.get("device_map"))
            if self.layers.scaled_activations:
                replace_quantization_scales(model, model.config.model_type)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
            for name in self.made:
                _repack(name, model.get_submodule(name), self.layers.repack)
            super()._process_model_after_weight_loading(model, **kwargs)

        def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            state = model.state_dict()
            for name, module in model.named_modules():
                if hasattr(module, "qzero_format"):  # a layer of GPTQ
                    state |= {f"{name}.{key}": value for key, value in _restored(module, self.layers.restore).items()}
                    del state[f"{name}.g_idx"]
            return state, {}

        def __reduce__(self) -> tuple[Any, ...]:
            """Pickle by the function: the class is made while a program runs."""
            return _unpickled, (), self.__dict__.copy()

    AWQLayersQuantizer.__qualname__ = AWQLayersQuantizer.__name__
    return AWQLayersQuantizer


def _unpickled() -> Any:
    made = _quantizer_class()
    return made.__new__(made)


def _is_linear(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear)


def _empty_layer(linear: Any, kernel: str, group_size: int, device_map: Any) -> Any:
    """Make a layer of GPTQ on the meta device whose tensors have the shapes of AWQ's."""
    import torch
    from gptqmodel.quantization import METHOD as METHODS
    from gptqmodel.utils.importer import hf_select_quant_linear_v2

    options = {"bits": 4, "group_size": group_size, "desc_act": False, "sym": False}
    kind = hf_select_quant_linear_v2(
        **options, format="gptq_v2", quant_method=METHODS.GPTQ, device_map=device_map, backend=kernel, pack=False
    )
    inputs, outputs, dtype = linear.in_features, linear.out_features, linear.weight.dtype
    with torch.device("meta"):
        layer = kind(
            **options, in_features=inputs, out_features=outputs, bias=linear.bias is not None, weight_dtype=dtype
        )
        layer.qzero_format(format=2)
        layer.qweight = torch.empty(inputs, outputs // 8, dtype=torch.int32)
        layer.qzeros = torch.empty(len(layer.scales), outputs // 8, dtype=torch.int32)
        del layer.g_idx
    return layer


def _repack(name: str, layer: Any, repack: Callable[[PackedLayer, int], PackedLayer]) -> None:
    if layer.qweight.is_meta:
        msg = (
            f"offload_buffers=True with this device_map puts the layer {name!r} on the disk, and layers of AWQ are "
            "repacked in memory; leave offload_buffers out, or put the layer on a device."
        )
        raise UnsupportedError(msg)
    stored = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales")}
    for key, tensor in repack(stored, layer.group_size).items():
        layer.register_buffer(key, tensor)


def _restored(layer: Any, restore: Callable[[PackedLayer], PackedLayer]) -> PackedLayer:
    found: StoredTensors | None = stored_tensors(layer)
    if found is None:
        msg = (
            f"a layer of kind {type(layer).__name__} keeps its weight in its kernel's order and is not saved; copy the "
            "checkpoint's folder."
        )
        raise UnsupportedError(msg)
    return restore({"qweight": found.words, "qzeros": found.zeros, "scales": found.scales, "g_idx": found.groups})
