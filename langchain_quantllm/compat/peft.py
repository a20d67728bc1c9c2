"""peft: its version, its import without side effects, and the adapters in its layers.

The oldest version is this package's own lower bound, not that of transformers: 5.24 asks for a version that was never
released, while older ones have all that it calls.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from packaging.version import Version

from langchain_quantllm.compat.gptqmodel_import import gptqmodel_imported
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.compat.versions import TRIED
from langchain_quantllm.errors import MissingPackageError, pip_install


def check_peft() -> None:
    """Check that peft is installed, and new enough.

    Raises:
        MissingPackageError: If it is missing or too old.
    """
    command = pip_install("langchain-quantllm[adapters]")
    if not is_installed("peft"):
        msg = f"adapters need peft: {command}"
        raise MissingPackageError(msg)
    found, oldest = metadata.version("peft"), TRIED["peft"].oldest
    if Version(Version(found).base_version) < Version(oldest):
        msg = f"adapters need peft {oldest} or newer, and {found} is installed: {command}"
        raise MissingPackageError(msg)


@contextlib.contextmanager
def peft_imported() -> Iterator[None]:
    """Undo the side effects of importing peft, which imports gptqmodel if that is installed."""
    if is_installed("gptqmodel") and is_installed("optimum"):
        with gptqmodel_imported():
            yield
    else:
        yield


# Loading.

_STANDS_FOR_BASE = ("base_layer", "original_module", "token_adapter")
"""Parts of names under which peft's layers hold the model's own modules."""


def settings_from(folder: str) -> Any:
    """Read the settings of an adapter, for inference.

    Args:
        folder: Folder with its adapter_config.json.

    Raises:
        Exception: Whatever peft raises for settings that it does not take.
    """
    from peft import PeftConfig

    settings = PeftConfig.from_pretrained(folder)
    settings.inference_mode = True
    return settings


def why_not_injected(settings: Any) -> str | None:
    """Return why peft cannot put the layers of an adapter into a model of transformers; None if it can."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(settings.peft_type)
    if tuner is None or settings.is_prompt_learning:
        return "it has no layers that could be put into a model"
    if getattr(tuner, "uses_shared_state", False):
        return "its layers share matrices, which lie outside the model"
    return None


def inject(model: Any, settings: Any, name: str) -> None:
    """Put the layers of an adapter into a model of transformers, whose own methods about adapters work from then on."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(settings, model, name)
    model._hf_peft_config_loaded = True


def set_weights(model: Any, name: str, tensors: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Copy the tensors of an adapter's file into its layers.

    Args:
        model: The model, with the layers of the adapter.
        name: The adapter.
        tensors: Its tensors by the model's names, without the prefix of peft's wrapper.

    Returns:
        The names of the model's tensors that are not in the file, those of the base among them, and the names in the
        file that the model has no place for.
    """
    import torch
    from peft import set_peft_model_state_dict

    # peft looks for each adapter's tensors in the modules that only others have copied.
    others = _copied(model, name, by_it=False)
    given = {**dict.fromkeys(others, torch.empty(0, dtype=torch.float32)), **tensors}
    result = set_peft_model_state_dict(model, given, adapter_name=name)
    return list(result.missing_keys), [key for key in result.unexpected_keys if key not in others.values()]


def plain_name(name: str) -> str:
    """Return the name that a tensor of a model has without peft's layers around its module."""
    return ".".join(part for part in name.split(".") if part not in _STANDS_FOR_BASE)


def copied_names(model: Any, name: str) -> set[str]:
    """List the names in an adapter's file of the tensors of its copies of whole modules, and of tokens."""
    return set(_copied(model, name, by_it=True))


def _copied(model: Any, name: str, *, by_it: bool) -> dict[str, str]:
    """Map names in an adapter's file to the model's, for modules that it copies, or else for those that it does not."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    return {
        f"{path}.{key}": f"{path}.{to}"
        for path, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) and _has_adapter(module, name) == by_it
        for key, to in module.adapter_state_dict_load_map(name).items()
    }


def copied_modules(model: Any, name: str) -> dict[str, Any]:
    """Return the modules of a model that an adapter replaces as a whole (`modules_to_save`), by their names."""
    from peft.utils.other import ModulesToSaveWrapper

    return {
        path: module.original_module
        for path, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save
    }


def clashing_module(model: Any) -> str | None:
    """Return the name of a module of which one adapter changes rows, and another the whole: such a module fails."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    found = ((path, module) for path, module in model.named_modules() if isinstance(module, TrainableTokensLayer))
    return next((plain_name(path) for path, module in found if is_peft_layer_class(type(module.base_layer))), None)


# Modules with adapters.


def adapter_modules(model: Any) -> list[Any]:
    """List the modules that peft has put into a model: layers with adapters, and copies of whole modules."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def choose_adapter(module: Any, name: str | None) -> None:
    """Activate an adapter in a module of peft if it has it, else none; no parameter of the module is trained."""
    has_it = name is not None and _has_adapter(module, name)
    if has_it:
        module.set_adapter(name)
    module.enable_adapters(has_it)
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def _has_adapter(module: Any, name: str) -> bool:
    """Say whether a module of peft has weights of an adapter; active without them, some kinds of layers fail."""
    if (tokens := getattr(module, "token_adapter", None)) is not None:  # around a module some of whose rows change
        return _has_adapter(tokens, name)
    return any(name in getattr(module, attribute, ()) for attribute in module.adapter_layer_names)


def choice_of(module: Any) -> tuple[list[str], bool]:
    """Return the active adapters of a module of peft, and whether they are disabled; see `restore_choice`."""
    return list(module.active_adapters), module.disable_adapters


def restore_choice(module: Any, choice: tuple[list[str], bool]) -> None:
    """Restore the result of `choice_of`."""
    names, is_disabled = choice
    module.set_adapter(names)
    module.enable_adapters(not is_disabled)


def merged_adapter(module: Any) -> str | None:
    """Return the name of an adapter that is merged into the weights of a module; None if none is."""
    return next(iter(module.merged_adapters), None)


def is_peft_layer_class(kind: type) -> bool:
    """Say whether a class is a layer of peft, without importing peft."""
    return isinstance(getattr(kind, "disable_adapters", None), property)


def state_of(module: Any, *, names_adapters: bool) -> list[Any]:
    """List all that changes the output of a module of peft, beside its tensors.

    Args:
        module: The module.
        names_adapters: Whether every request names its adapter, so that the active one does not matter.
    """
    parts: list[Any] = [tuple(module.merged_adapters)]
    if not names_adapters:
        parts += [tuple(module.active_adapters), module.disable_adapters]
    scaling = getattr(module, "scaling", None)
    return [*parts, tuple(scaling.items())] if isinstance(scaling, dict) else parts


# LoRA.

_PLAIN_LORA = ("Linear", "Linear4bit", "Linear8bitLt", "GPTQLoraLinear", "AwqLoraLinear")
"""Layers of peft.tuners.lora that add B(A(x)) to the output of their base layer."""

_LORA_PARTS = ("base_layer", "lora_A", "lora_B", "lora_variant", "scaling")


def unsupported_lora_reason(module: Any, names: Sequence[str]) -> str | None:
    """Return why a module of peft does more than add `scaling * B(A(x))` to its base layer; None if it does not."""
    kind, package = type(module).__name__, type(module).__module__
    if not package.startswith("peft.tuners.lora.") or kind not in _PLAIN_LORA:
        what = package.removeprefix("peft.").removeprefix("tuners.").partition(".")[0]
        return f"they have modules of kind {kind} ({what}), and only LoRA of linear layers runs that way"
    if lost := [name for name in _LORA_PARTS if not hasattr(module, name)]:
        return f"layers of this peft have no {lost[0]}"
    if isinstance(module.base_layer, type(module)) or hasattr(module.base_layer, "base_layer"):
        return "a layer has adapters of two kinds"
    for name in names:
        if name in module.lora_variant:
            return f"{name!r} is a variant of LoRA ({type(module.lora_variant[name]).__name__})"
        if name in module.lora_B and module.lora_B[name].bias is not None:
            return f"{name!r} has biases"
    return None


def base_layer_of(module: Any) -> Any:
    """Return the layer of the model that is inside a module of peft."""
    return module.base_layer


def lora_matrices(module: Any, name: str) -> tuple[Any, Any, float] | None:
    """Return A, `(rank, in_features)`, B, `(out_features, rank)`, and scaling of an adapter; None if it is not here."""
    if name not in module.lora_A:
        return None
    return module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
