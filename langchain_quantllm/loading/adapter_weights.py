"""Loading the weights of adapters into a model, none of whose own tensors they may change.

peft and transformers copy every tensor of an adapter's file whose name the model has, so a file that holds the base's
embeddings would change the base for all others. Here each adapter's tensors are its own: a tensor of the base in a
file is left out if it is the base's, else the adapter is refused; and afterwards no tensor that was there before may
have changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from langchain_quantllm.compat.bitsandbytes import is_quantized
from langchain_quantllm.compat.library_logging import progress_bars
from langchain_quantllm.compat.peft import (
    clashing_module,
    copied_modules,
    copied_names,
    inject,
    peft_imported,
    plain_name,
    set_weights,
    settings_from,
)
from langchain_quantllm.engine.adapter_switch import activate
from langchain_quantllm.errors import CheckpointError, QuantLLMError, UnsupportedError
from langchain_quantllm.loading.adapters import MERGE_ADVICE, Adapter
from langchain_quantllm.loading.foreign_errors import reason_of
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.memory import model_build_lock

if TYPE_CHECKING:
    import torch

_ROWS = 4096
"""Rows of a matrix that are compared at once."""

_SUBNORMAL = 1e-7
"""Step of the smallest numbers of float16."""

_WRAPPER = "base_model.model."
"""Beginning of the names in an adapter's file, of peft's wrapper around the model."""


def load_adapters(model: Any, adapters: Sequence[Adapter], spec: LoadSpec) -> None:
    """Put adapters into a loaded model, and activate the spec's default.

    Raises:
        CheckpointError: If one does not belong to the model, or changes what is not its own. The model is of no use
            then.
    """
    if not adapters:
        return
    base = _tensors_of(model)
    with peft_imported(), progress_bars(spec.progress):
        for adapter in adapters:
            _load(model, adapter, base)
    model.eval()
    activate(model, spec.adapter)


def _load(model: Any, adapter: Adapter, base: Mapping[str, torch.Tensor]) -> None:
    before = _Tensors(model)
    loaded = list(getattr(model, "peft_config", ()))
    try:
        with model_build_lock(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            tensors = {key.removeprefix(_WRAPPER): tensor for key, tensor in read_tensors(adapter).items()}
            settings = settings_from(str(adapter.folder))
            _leave_out_experts(model, settings, tensors, adapter)
            inject(model, settings, adapter.name)
            if (name := clashing_module(model)) is not None:
                msg = f"another adapter changes {name!r} in another way"
                raise ValueError(msg)
            _check_copies(model, adapter)
            _leave_out_the_base(tensors, base, copied_names(model, adapter.name), adapter)
            missing, unexpected = set_weights(model, adapter.name, tensors)
    except QuantLLMError:
        raise
    except Exception as error:  # whatever peft raises for the settings and tensors of strangers
        beside = f" beside {', '.join(map(repr, loaded))}" if loaded else ""
        msg = f"{adapter} cannot be loaded onto this model{beside}; was it made for it? {reason_of(error)}"
        raise CheckpointError(msg) from error
    before.check_unchanged(model, adapter)
    own = {name: tensor for name, tensor in _tensors_of(model).items() if tensor not in before}
    filled = {id(tensor) for name, tensor in own.items() if name not in missing}
    if lost := sorted(name for name in own.keys() & set(missing) if id(own[name]) not in filled):
        msg = f"{adapter} has no weights for {len(lost)} tensors, such as {lost[0]!r}; was it made for this model?"
        raise CheckpointError(msg)
    if unexpected:
        msg = f"{adapter} has weights that this model has no place for, such as {min(unexpected)!r}; does it fit?"
        raise CheckpointError(msg)


def read_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Read all tensors of an adapter's file; from a pickle file only tensors and plain containers."""
    import torch
    from safetensors.torch import load_file

    if adapter.weights.is_file():
        tensors: dict[str, torch.Tensor] = load_file(adapter.weights)
        return tensors
    return dict(torch.load(adapter.pickled_weights, map_location="cpu", weights_only=True))


def _tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a model by all of their names; tied ones have several."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


class _Tensors:
    """The tensors of a model at one time, to see whether any was changed or replaced later."""

    def __init__(self, model: Any) -> None:
        self._tensors = _tensors_of(model)  # kept, so that no later tensor has one of their ids
        self._marks = {id(tensor): (tensor._version, _address(tensor)) for tensor in self._tensors.values()}

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._marks

    def check_unchanged(self, model: Any, adapter: Adapter) -> None:
        """Check that each tensor is still there, with the content that it had.

        Raises:
            CheckpointError: If an adapter changed one.
        """
        now = {id(tensor): tensor for tensor in _tensors_of(model).values()}
        for name, tensor in self._tensors.items():
            if id(tensor) not in now or self._marks[id(tensor)] != (tensor._version, _address(tensor)):
                msg = (
                    f"{adapter} would change {plain_name(name)!r}, which is not its own, for the base model and all "
                    f"other adapters too; {MERGE_ADVICE}"
                )
                raise CheckpointError(msg)


def _address(tensor: torch.Tensor) -> int:
    return 0 if tensor.device.type == "meta" else tensor.data_ptr()


def _leave_out_experts(model: Any, settings: Any, tensors: Mapping[str, torch.Tensor], adapter: Adapter) -> None:
    """Keep an adapter's layers off quantized experts, which have the names of linear layers and are none.

    Raises:
        UnsupportedError: If the adapter has weights for them.
    """
    from langchain_quantllm.experts.stacked import StackedLinear

    experts = [name for name, module in model.named_modules() if isinstance(module, StackedLinear)]
    if not experts:
        return
    if getattr(settings, "target_parameters", None) or any(".experts." in name for name in tensors):
        msg = (
            f"{adapter} changes the experts of this mixture, which are quantized; load the model unquantized, or keep "
            f"its experts so, such as NF4(skip_modules=['experts']), or {MERGE_ADVICE}"
        )
        raise UnsupportedError(msg)
    excluded = getattr(settings, "exclude_modules", None) or []
    if not isinstance(excluded, str):  # a text is a regular expression
        settings.exclude_modules = [*excluded, *experts]


def _check_copies(model: Any, adapter: Adapter) -> None:
    """Refuse an adapter that replaces a whole module of the model which is quantized there."""
    for name, module in copied_modules(model, adapter.name).items():
        if any(is_quantized(parameter) for parameter in module.parameters()):
            msg = (
                f"{adapter} replaces the whole module {name!r} (modules_to_save), which is quantized in this model; "
                "load the model unquantized, or keep the module out of quantization, such as NF4(skip_modules=[...])."
            )
            raise CheckpointError(msg)


def _leave_out_the_base(
    tensors: dict[str, torch.Tensor], base: Mapping[str, torch.Tensor], copied: set[str], adapter: Adapter
) -> None:
    """Take the base's own tensors out of an adapter's.

    Raises:
        CheckpointError: If one has other values than the base has.
    """
    for key in list(tensors):
        own = base.get(plain_name(key))
        if own is None or key in copied:
            continue
        found = tensors.pop(key)
        if not _same_up_to_rounding(found, own):
            msg = (
                f"{adapter} has weights of its own for {plain_name(key)!r} of the base model, such as embeddings that "
                f"were trained or resized with it, which would change the base for all others too; {MERGE_ADVICE}"
            )
            raise CheckpointError(msg)


def _same_up_to_rounding(found: torch.Tensor, own: torch.Tensor) -> bool:
    """Say whether a tensor is one of the base's: by its shape, and by its values in the coarser dtype of the two."""
    import torch

    if found.shape != own.shape or not (found.is_floating_point() and own.is_floating_point()):
        return False
    step = max(torch.finfo(found.dtype).eps, torch.finfo(own.dtype).eps)
    return all(
        torch.allclose(a.float(), b.float().cpu(), rtol=step, atol=_SUBNORMAL)
        for a, b in zip(found.split(_ROWS), own.split(_ROWS), strict=True)
    )
