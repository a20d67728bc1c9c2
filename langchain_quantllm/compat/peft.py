"""peft: its version, its import without side effects, and the adapters in its layers.

The oldest version is this package's own lower bound, not that of transformers: 5.24 asks for a version that was never
released, while older ones have all that it calls.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
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
    has_it = name is not None
    if has_it and hasattr(module, "check_set_adapter"):  # a copy of a whole module, which only some adapters have
        has_it = module.check_set_adapter([name]) is not None
    if has_it:
        module.set_adapter(name)
    module.enable_adapters(has_it)
    for parameter in module.parameters():
        parameter.requires_grad_(False)


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
