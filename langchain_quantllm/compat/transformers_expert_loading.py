"""transformers' loader: 4-bit scales of least error, and experts of mixtures that are quantized while they are read.

Its quantizers of bitsandbytes replace linear layers alone, so two quantizers over them, under names of this package's,
pass the weights of experts to an `ExpertReader`. The loader collects the files' tensors of one parameter as functions
that read them; a converter of its own class passes these on, so that one expert is in memory at a time.

Source: `convert_and_load_state_dict_in_model` in transformers/core_model_loading.py.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from langchain_quantllm.compat.bitsandbytes_matrices import FOUR_BIT_NAMES, INT8_NAMES
from langchain_quantllm.compat.bitsandbytes_scales import refine_scales

if TYPE_CHECKING:
    import torch

__all__ = [
    "ExpertReader",
    "NoExperts",
    "StoredMatrix",
    "missing_loading_api",
    "reading_config",
    "stored_reading_config",
]

METHODS = {4: "quantllm_bitsandbytes_4bit", 8: "quantllm_bitsandbytes_8bit"}
"""Names of our quantizers, by the bits of a weight."""

StoredMatrix: TypeAlias = "Mapping[str, Callable[[], torch.Tensor]]"
"""Functions that read the tensors of a matrix, by the ends of their names: `"weight"` and those of its scales."""


class ExpertReader(ABC):
    """Takes the weights of experts while the loader reads them; a deep copy is the reader itself."""

    @abstractmethod
    def start(self, model: Any, is_kept: Callable[[str], bool]) -> None:
        """Look at a model on the meta device.

        Args:
            model: The model.
            is_kept: Says of a module's name whether the module stays as it is.
        """

    @abstractmethod
    def takes(self, name: str) -> bool:
        """Say whether a parameter is one with the weights of experts to be quantized."""

    @abstractmethod
    def element_bytes(self, name: str) -> float:
        """Return the bytes of a weight of such a parameter, with its share of the scales."""

    @abstractmethod
    def read(self, model: Any, name: str, experts: Sequence[Sequence[StoredMatrix]]) -> None:
        """Read the weights of such a parameter.

        Args:
            model: The model.
            name: The parameter's name.
            experts: The matrices of each expert, to be put above each other.
        """

    @abstractmethod
    def take(self, model: Any, name: str, values: torch.Tensor) -> None:
        """Take the weights of such a parameter, all of them read, in its shape."""

    @abstractmethod
    def finish(self, model: Any) -> None:
        """Look at a model that is loaded."""

    @abstractmethod
    def state_dict(self, model: Any, sources: Mapping[str, Sequence[str]]) -> dict[str, torch.Tensor] | None:
        """Return the tensors of a model for a checkpoint; None if none of its experts are quantized.

        Args:
            model: The model.
            sources: Ends of the names of each expert's matrices, with `*` for its number, by the end of the
                parameter's name.
        """

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertReader:
        """Return the reader itself: the loader copies its operations for each parameter."""
        return self


class NoExperts(ExpertReader):
    """Takes nothing: the reader of a model that is no mixture, or whose experts stay as they are."""

    def start(self, model: Any, is_kept: Callable[[str], bool]) -> None:
        """Look at nothing."""

    def takes(self, name: str) -> bool:
        """Take no parameter."""
        return False

    def element_bytes(self, name: str) -> float:
        """Know of no parameter."""
        raise KeyError(name)

    def read(self, model: Any, name: str, experts: Sequence[Sequence[StoredMatrix]]) -> None:
        """Know of no parameter."""
        raise KeyError(name)

    def take(self, model: Any, name: str, values: torch.Tensor) -> None:
        """Know of no parameter."""
        raise KeyError(name)

    def finish(self, model: Any) -> None:
        """Look at nothing."""

    def state_dict(self, model: Any, sources: Mapping[str, Sequence[str]]) -> dict[str, torch.Tensor] | None:
        """Leave saving to transformers."""
        return None


def missing_loading_api() -> str | None:
    """Return what transformers lacks of the loading on which this module is built; None if all is there."""
    try:
        from transformers.core_model_loading import ConversionOps, WeightConverter
        from transformers.quantizers import register_quantization_config, register_quantizer  # noqa: F401
        from transformers.quantizers.base import HfQuantizer
    except ImportError as error:
        return str(error)
    needed = {
        WeightConverter: ("convert",),
        ConversionOps: ("convert",),
        HfQuantizer: ("update_weight_conversions", "get_state_dict_and_metadata", "param_element_size"),
    }
    lacking = [f"{cls.__name__}.{name}" for cls, names in needed.items() for name in names if not hasattr(cls, name)]
    return f"transformers has no {lacking[0]}" if lacking else None


def reading_config(config: Any, reader: ExpertReader) -> Any:
    """Make a `quantization_config` for `from_pretrained` of one of bitsandbytes, with a reader of experts."""
    _register()
    return _config_class(8 if config.load_in_8bit else 4)(bitsandbytes=copy.deepcopy(config), reader=reader)


def stored_reading_config(settings: Mapping[str, Any], reader: ExpertReader) -> dict[str, Any]:
    """Make the `quantization_config` of a checkpoint's config, in its dict form, of that of one with bitsandbytes."""
    _register()
    bits = 8 if settings.get("load_in_8bit") else 4
    return {"quant_method": METHODS[bits], "bitsandbytes": dict(settings), "reader": reader}


@functools.cache
def _config_class(bits: int) -> Any:
    from transformers import BitsAndBytesConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class ExpertsConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not followed
        """The config of bitsandbytes, with a reader of experts; it stands in for that while a model is loaded."""

        def __init__(self, bitsandbytes: Any, reader: ExpertReader, quant_method: str = METHODS[bits]) -> None:
            self.quant_method = quant_method
            is_dict = isinstance(bitsandbytes, Mapping)
            self.bitsandbytes = BitsAndBytesConfig.from_dict(dict(bitsandbytes)) if is_dict else bitsandbytes
            self.reader = reader

        def to_dict(self) -> dict[str, Any]:
            return dict(self.bitsandbytes.to_dict())

    return ExpertsConfig


@functools.cache
def _register() -> None:
    """Register our quantizers beside those of transformers, which stay as they are."""
    from transformers.quantizers import register_quantization_config, register_quantizer

    for bits, method in METHODS.items():
        register_quantization_config(method)(_config_class(bits))
        register_quantizer(method)(_quantizer_class(bits))


@functools.cache
def _quantizer_class(bits: int) -> Any:
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    base: Any = Bnb8BitHfQuantizer if bits == 8 else Bnb4BitHfQuantizer

    class ExpertQuantizer(base):  # type: ignore[misc]
        """A quantizer of bitsandbytes that passes the weights of experts to a reader."""

        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            super().__init__(quantization_config.bitsandbytes, **kwargs)
            self.reader = quantization_config.reader
            self.sources: dict[str, list[str]] = {}

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            found = super()._process_model_before_weight_loading(model, **kwargs)
            kept = self.modules_to_not_convert
            self.reader.start(model, lambda name: not should_convert_module(name, kept))
            return found

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            is_linear = super().param_needs_quantization(model, param_name, **kwargs)
            return bool(self.reader.takes(param_name) or is_linear)

        def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
            if self.reader.takes(param_name):
                return float(self.reader.element_bytes(param_name))
            return float(super().param_element_size(model, param_name, param))

        def get_quantize_ops(self) -> Any:
            return _quantizing(self, super().get_quantize_ops())

        def update_weight_conversions(self, weight_conversions: Any, *args: Any) -> Any:
            found = [_reading(self, conversion) for conversion in weight_conversions]
            if self.pre_quantized:
                found += [_reading_single(self, name) for name in ("gate_up_proj", "up_proj", "down_proj")]
            return super().update_weight_conversions(found, *args)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            found = super()._process_model_after_weight_loading(model, **kwargs)
            self.reader.finish(model)
            _restore_conversions(model)
            return found

        def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, Any]]:
            state, metadata = super().get_state_dict_and_metadata(model)
            return (self.reader.state_dict(model, self.sources) if state is None else state), metadata

        def __reduce__(self) -> tuple[Any, ...]:
            """Pickle by the bits: the class is made while a program runs."""
            return _unpickled, (bits,), self.__dict__.copy()

    ExpertQuantizer.__qualname__ = ExpertQuantizer.__name__ = f"ExpertQuantizer{bits}bit"
    return ExpertQuantizer


def _unpickled(bits: int) -> Any:
    made = _quantizer_class(bits)
    return made.__new__(made)


def _restore_conversions(model: Any) -> None:
    """Put the model's own conversions in the place of ours, which read a checkpoint and write none."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        own = [getattr(conversion, "replaced", conversion) for conversion in conversions]
        model._weight_conversions = [conversion for conversion in own if conversion is not None]


# --- what the loader calls ---


def _quantizing(quantizer: Any, linear: Any) -> Any:
    """Make the operation that quantizes a parameter which is read whole."""
    from transformers.core_model_loading import ConversionOps

    class Quantizing(ConversionOps):  # type: ignore[misc]
        def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            rest = dict(input_dict)
            for name, value in input_dict.items():
                if quantizer.reader.takes(name):
                    values = rest.pop(name)
                    quantizer.reader.take(kwargs["model"], name, values[0] if isinstance(value, list) else values)
                    kwargs["missing_keys"].discard(name)
            found = linear.convert(dict(rest), **kwargs) if rest else {}
            config = quantizer.quantization_config
            if getattr(config, "least_error", False):
                for name, weight in found.items():
                    refine_scales(weight, _as_quantized(rest[name], kwargs["model"], name))
            return dict(found)

    return Quantizing()


def _as_quantized(value: Any, model: Any, name: str) -> torch.Tensor:
    """Return a weight as the operation of transformers quantizes it. Source: `Bnb4bitQuantize` in bitsandbytes.py."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import get_module_from_name

    plain: torch.Tensor = value[0] if isinstance(value, list) else value
    return plain.T if issubclass(get_module_from_name(model, name)[0].source_cls, Conv1D) else plain


def _reading(quantizer: Any, conversion: Any) -> Any:
    """Return the converter that reads the experts of one that puts their matrices together; others as they are."""
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in getattr(conversion, "operations", ())]
    merges = operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
    if not merges or len(conversion.target_patterns) != 1:
        return conversion
    sources, target = list(conversion.source_patterns), conversion.target_patterns[0]
    if not all(source.count("*") == 1 and source.endswith(".weight") for source in sources):
        return conversion
    quantizer.sources[target] = [source.removesuffix("weight") for source in sources]
    found = _converter(quantizer, sources, target, list(conversion.operations), conversion)
    for name in ("scope_prefix", "base_model_prefix"):
        if hasattr(conversion, name):
            setattr(found, name, getattr(conversion, name))
    return found


def _reading_single(quantizer: Any, name: str) -> Any:
    """Return the converter for experts of which a model's own files have no matrix of one expert."""
    from transformers.core_model_loading import MergeModulelist

    return _converter(quantizer, [f"experts.*.{name}.weight"], f"experts.{name}", [MergeModulelist(dim=0)], None)


def _converter(quantizer: Any, sources: list[str], target: str, operations: list[Any], replaced: Any) -> Any:
    """Make a converter that passes functions which read tensors to an operation, in place of tensors."""
    patterns = {source: (number, "weight") for number, source in enumerate(sources)}
    if quantizer.pre_quantized:
        names = INT8_NAMES if quantizer.quantization_config.load_in_8bit else FOUR_BIT_NAMES
        patterns = {
            source.removesuffix("weight") + name: (number, name)
            for number, source in enumerate(sources)
            for name in names
        }
    ordered = sorted(patterns, key=len, reverse=True)  # a name is matched by the first
    return _converter_class()(ordered, [target], operations, quantizer=quantizer, patterns=patterns, replaced=replaced)


@functools.cache
def _converter_class() -> Any:
    from transformers.core_model_loading import WeightConverter

    class ExpertConverter(WeightConverter):  # type: ignore[misc]  # transformers is not followed
        """Passes the matrices of experts to the reader; those that stay as they are are put together as ever.

        Args:
            args: As of its base.
            quantizer: The quantizer.
            patterns: Number of a matrix of an expert and end of a tensor's name, by the pattern of the name.
            replaced: The converter in whose place this one is, or None.
        """

        def __init__(self, *args: Any, quantizer: Any, patterns: Mapping[str, tuple[int, str]], replaced: Any) -> None:
            sources, targets, self.merging = args
            # The loader casts no tensor of an operation with a quantizer.
            super().__init__(sources, targets, [_Marked(quantizer)])
            self.quantizer, self.patterns, self.replaced = quantizer, patterns, replaced

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            found = copy.copy(self)
            for name in ("collected_tensors", "layer_targets"):
                setattr(found, name, copy.copy(getattr(self, name)))
            return found

        def convert(self, layer_name: str, model: Any = None, loading_info: Any = None, **kwargs: Any) -> Any:
            collected = {name: list(map(_reader_of, found)) for name, found in self.collected_tensors.items()}
            self.collected_tensors.clear()
            is_packed = any(self.patterns[pattern][1] != "weight" for pattern in collected)
            reader = self.quantizer.reader
            if not reader.takes(layer_name) or (self.quantizer.pre_quantized and not is_packed):
                return {layer_name: self._merged(collected, model.get_parameter(layer_name).dtype)}
            reader.read(model, layer_name, self._experts(collected))
            loading_info.missing_keys.discard(layer_name)
            return {}

        def _experts(self, collected: Mapping[str, list[Any]]) -> list[list[StoredMatrix]]:
            count = max(map(len, collected.values()))
            parts = 1 + max(number for number, _ in self.patterns.values())
            experts: list[list[dict[str, Any]]] = [[{} for _ in range(parts)] for _ in range(count)]
            for pattern, tensors in collected.items():
                number, name = self.patterns[pattern]
                for expert, tensor in enumerate(tensors):
                    experts[expert][number][name] = tensor
            return experts  # type: ignore[return-value]  # a dict is a mapping

        def _merged(self, collected: Mapping[str, list[Any]], dtype: Any) -> Any:
            sources = sorted(collected, key=lambda pattern: self.patterns[pattern][0])
            found: dict[str, Any] = {source: [read().to(dtype) for read in collected[source]] for source in sources}
            for operation in self.merging:
                found = operation.convert(found, source_patterns=sources, target_patterns=self.target_patterns)
            return next(iter(found.values()))

    return ExpertConverter


@dataclass(frozen=True)
class _Marked:
    hf_quantizer: Any


def _reader_of(tensor: Any) -> Callable[[], Any]:
    """Return a function that reads a tensor which the loader collected: a function, a future, or itself."""
    if callable(getattr(tensor, "result", None)):
        read: Callable[[], Any] = tensor.result
        return read
    return tensor if callable(tensor) else lambda: tensor
