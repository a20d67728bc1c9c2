"""Adapters of peft: finding them, and checking them before any weight is read; `adapter_weights` loads them."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.name_patterns import may_take_long, texts_in
from langchain_quantllm.compat.peft import check_peft, peft_imported, settings_from, why_not_injected
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    ModelNotFoundError,
    UnsupportedError,
    first_line,
)
from langchain_quantllm.loading.checkpoint import Checkpoint
from langchain_quantllm.loading.hub import MissingFileError, Repository
from langchain_quantllm.loading.json_files import read_json
from langchain_quantllm.loading.sources import ADAPTER_CONFIG
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.loading.stored_tensors import StoredTensor, read_header
from langchain_quantllm.memory.estimate import build_on_meta

_WEIGHTS, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_CHANGES_BASE = ("pissa", "corda", "olora", "mica", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` with which peft changes the base's weights when it makes the adapter's layers."""

MERGE_ADVICE = "merge_adapter(model_id, adapter, output) writes a model of its own with it."
"""For adapters that cannot be loaded beside others."""

_REFUSED = {
    "megatron_config": "imports a module that it names",
    "alora_invocation_tokens": "starts at certain tokens, which only peft's own models look for",
    "arrow_config": "mixes other adapters",
}
"""Settings of peft that cannot be honoured: what an adapter with one does."""

_PATTERNS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "target_parameters",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
"""Settings whose texts peft matches with the names of modules as regular expressions."""

_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT", "XLORA")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter that was found.

    Args:
        name: Its name in calls.
        source: The folder or repository that the user gave.
        folder: The folder of its files.
        config: Content of its adapter_config.json.
    """

    name: str
    source: str
    folder: Path
    config: Mapping[str, Any]

    def __str__(self) -> str:
        return f"adapter {self.name!r} ({self.source})"

    @property
    def weights(self) -> Path:
        """The path of its weights in safetensors."""
        return self.folder / _WEIGHTS

    @property
    def pickled_weights(self) -> Path:
        """The path of its weights in a pickle file."""
        return self.folder / _PICKLE


def find_adapters(spec: LoadSpec) -> list[Adapter]:
    """Find the adapters of a spec, and download those of repositories. `check_sources` must have passed.

    Raises:
        MissingPackageError: If peft is not installed, or too old.
        ModelNotFoundError: If there is no such folder or repository, or no adapter in it.
        CheckpointError: If it cannot be used: a damaged config, weights in a pickle file, prompts instead of weights.
        InvalidOptionError: If peft cannot use its name.
    """
    if not spec.adapters:
        return []
    check_peft()
    return [_find(name, source, spec) for name, source in spec.adapters.items()]


def _find(name: str, source: str, spec: LoadSpec) -> Adapter:
    from torch.nn import ModuleDict

    if hasattr(ModuleDict(), name) or name in ("weight", "bias"):  # peft keeps adapters in a ModuleDict by name
        msg = (
            f"{name!r} cannot be the name of an adapter, because PyTorch modules already have an attribute of "
            "that name; choose another."
        )
        raise InvalidOptionError(msg)
    path = Path(source).expanduser()
    folder = path.resolve() if path.is_dir() else _fetch(name, source, spec)
    try:
        config = read_json(folder / ADAPTER_CONFIG)
    except CheckpointError as error:
        msg = f"the {ADAPTER_CONFIG} of adapter {name!r} ({source}) cannot be read: {error}"
        raise CheckpointError(msg) from error
    adapter = Adapter(name=name, source=source, folder=folder, config=config)
    _check_settings(adapter)
    if not adapter.weights.is_file() and (spec.use_safetensors or not (folder / _PICKLE).is_file()):
        msg = f"{adapter} has no weights: there is no {_WEIGHTS} in it"
        if spec.use_safetensors:
            msg += (
                f", and a {_PICKLE} is not read, as pickle files can run code while they load; save it anew with peft, "
                "or pass use_safetensors=False if you trust its maker"
            )
        raise CheckpointError(f"{msg}.")
    if adapter.weights.is_file():
        _check_ranks(adapter)
    return adapter


def _check_settings(adapter: Adapter) -> None:
    """Check that an adapter is of a kind that changes weights, and that peft takes its settings."""
    config, kind = adapter.config, adapter.config.get("peft_type")
    if not isinstance(kind, str):
        msg = f"the {ADAPTER_CONFIG} of {adapter} cannot be read: peft_type={kind!r} is no name such as 'LORA'."
        raise CheckpointError(msg)
    if kind in _PROMPTS:
        msg = (
            f"{adapter} is of the kind {kind}, which transformers cannot put into a model; give LoRA, or another kind "
            "that changes weights."
        )
        raise CheckpointError(msg)
    if config.get("bias", "none") != "none":
        msg = (
            f"{adapter} was trained with bias={config['bias']!r}, which changes the base model for all others too; "
            "train it with bias='none', or give a model into which it was merged."
        )
        raise CheckpointError(msg)
    for option, does in _REFUSED.items():
        if config.get(option):
            msg = f"{adapter} {does} ({option} in its {ADAPTER_CONFIG}), which is not supported; train it without."
            raise CheckpointError(msg)
    for option in _PATTERNS:
        if slow := next((text for text in texts_in(config.get(option)) if may_take_long(text)), None):
            msg = (
                f"the {ADAPTER_CONFIG} of {adapter} has {option}={slow[:80]!r}, a regular expression that may take "
                "forever to match a name; write it without repetitions in repetitions, or list the names."
            )
            raise CheckpointError(msg)
    try:
        with peft_imported(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that this peft does not know
            settings_from(str(adapter.folder))
    except Exception as error:  # whatever peft raises for the settings of strangers
        msg = f"the {ADAPTER_CONFIG} of {adapter} cannot be read by peft (peft_type={kind!r}): {first_line(error)}"
        raise CheckpointError(msg) from error


def check_adapters_share(adapters: Sequence[Adapter]) -> None:
    """Check that adapters leave the base as it is for others, as far as their settings tell.

    Raises:
        CheckpointError: If one changes the base's weights or layers, or lies outside the model.
    """
    for adapter in adapters:
        start = str(adapter.config.get("init_lora_weights", True)).lower()
        if start.startswith(_CHANGES_BASE):
            msg = (
                f"{adapter} was trained with init_lora_weights={start!r}, which changes the base's weights for all "
                f"others too; {MERGE_ADVICE}"
            )
            raise CheckpointError(msg)
        if adapter.config.get("layer_replication"):
            msg = f"{adapter} repeats layers of the base (layer_replication), for all others too; {MERGE_ADVICE}"
            raise CheckpointError(msg)
        with peft_imported(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reason = why_not_injected(settings_from(str(adapter.folder)))
        if reason is not None:
            msg = f"{adapter} is of the kind {adapter.config['peft_type']}: {reason}; {MERGE_ADVICE}"
            raise CheckpointError(msg)


def _fetch(name: str, source: str, spec: LoadSpec) -> Path:
    """Download an adapter's files from the Hub, or find them in its cache; return their folder."""
    repository = Repository(
        name=source, token=spec.token, cache_dir=spec.cache_dir, local_files_only=bool(spec.local_files_only)
    )
    try:
        folder = repository.fetch(ADAPTER_CONFIG, if_missing="it is not a peft adapter").parent
        for file in (_WEIGHTS,) if spec.use_safetensors else (_WEIGHTS, _PICKLE):
            with contextlib.suppress(MissingFileError):
                repository.fetch(file)
                break
    except ModelNotFoundError as error:
        msg = f"adapter {name!r}: {error}"
        raise ModelNotFoundError(msg) from error.__cause__
    return folder


# Shapes.


def check_adapters_fit(adapters: Sequence[Adapter], checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> None:
    """Check that LoRA adapters have the layers and sizes of a model, from its config and their files' headers.

    Args:
        adapters: The adapters; other kinds than LoRA are skipped.
        checkpoint: The model's checkpoint.
        trust_remote_code: Whether the model may be built by code that comes with it.

    Raises:
        CheckpointError: If a layer is missing or has another size.
    """
    adapters = [adapter for adapter in adapters if adapter.config["peft_type"] == "LORA"]
    if not adapters or (layers := _layers_of(checkpoint, trust_remote_code)) is None:
        return
    for adapter in adapters:
        if adapter.weights.is_file():
            _check_adapter_fits(adapter, layers)


def _check_adapter_fits(adapter: Adapter, layers: Mapping[str, tuple[int, int] | None]) -> None:
    kinds = {name.rpartition(".")[2] for name in layers}
    patterns = {re.sub(r"\d+", "*", name) for name in layers}
    sizes = _sizes_of(adapter)
    if sizes and not any(name.rpartition(".")[2] in kinds for name in sizes):
        msg = f"{adapter} was made for another architecture: the model has no layer such as {min(sizes)!r}."
        raise CheckpointError(msg)
    for name, (inputs, outputs) in sizes.items():
        if name not in layers and re.sub(r"\d+", "*", name) in patterns:
            msg = f"{adapter} was made for another model: it changes {name!r}, which this model does not have."
            raise CheckpointError(msg)
        size = layers.get(name)
        if size is not None and any(a is not None and a != b for a, b in zip((inputs, outputs), size, strict=True)):
            msg = (
                f"{adapter} was made for another model: its {name!r} takes {inputs} "
                f"and gives {outputs} numbers, where this model's takes {size[0]} and gives {size[1]}."
            )
            raise CheckpointError(msg)


def _sizes_of(adapter: Adapter) -> dict[str, tuple[int | None, int | None]]:
    """Read (in_features, out_features) of each layer off the header of an adapter's weights."""
    found: dict[str, tuple[int | None, int | None]] = {}
    for key, tensor in _header(adapter).items():
        layer, mark, matrix = key.removeprefix("base_model.model.").rpartition(".lora_")
        if not mark or matrix not in ("A.weight", "B.weight") or len(tensor.shape) != 2:
            continue
        inputs, outputs = found.get(layer, (None, None))
        found[layer] = (tensor.shape[1], outputs) if matrix[0] == "A" else (inputs, tensor.shape[0])
    return found


def _header(adapter: Adapter) -> Mapping[str, StoredTensor]:
    try:
        return read_header(adapter.weights)
    except CheckpointError as error:
        msg = f"the weights of {adapter} are damaged: {error}"
        raise CheckpointError(msg) from error


def _check_ranks(adapter: Adapter) -> None:
    """Check that an adapter's ranks are in its file, before peft makes matrices of their size."""
    pattern = adapter.config.get("rank_pattern")
    ranks = [adapter.config.get("r"), *(pattern.values() if isinstance(pattern, Mapping) else ())]
    widest = max((size for tensor in _header(adapter).values() for size in tensor.shape), default=0)
    for rank in ranks:
        if isinstance(rank, int | float) and not rank <= widest:
            msg = f"{adapter} says r={str(rank)[:20]}, and its largest tensor has {widest} rows or columns."
            raise CheckpointError(msg)


def _layers_of(checkpoint: Checkpoint, trust_remote_code: bool) -> dict[str, tuple[int, int] | None] | None:
    """List a model's modules with (in_features, out_features), None for modules that are not linear.

    Returns None if the model cannot be built without weights; loading reports what does not fit then.
    """
    import torch
    from transformers import Conv1D

    config = copy.deepcopy(checkpoint.config)
    try:
        model = build_on_meta(config, torch.float16, trust_remote_code, checkpoint.source)
    except UnsupportedError:
        return None
    layers: dict[str, tuple[int, int] | None] = {}
    for name, module in model.named_modules():
        layers[name] = None
        if isinstance(module, torch.nn.Linear):
            layers[name] = module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            layers[name] = module.nx, module.nf
    return layers
