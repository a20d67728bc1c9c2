"""Loading experts that a checkpoint has packed: mxfp4, GPTQ and AWQ, each kept in its bits.

transformers loads the rest of the model. Its model is made with empty stacks in place of the experts' parameters, which
are filled from the files afterwards. So nothing is dequantized, and a device map counts the packed bytes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.transformers_conversions import ExpertNames
from langchain_quantllm.compat.transformers_loading import mark_initialized, model_class_with
from langchain_quantllm.errors import CheckpointError, UnsupportedError
from langchain_quantllm.loading.checkpoint import Checkpoint
from langchain_quantllm.loading.expert_tensors import ExpertFormat, StoredProjection, find_projections, format_of
from langchain_quantllm.loading.experts import is_mixture
from langchain_quantllm.loading.hub import MissingFileError, Repository
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.loading.stored_tensors import INDEX, SINGLE, StoredTensor, read_header, read_index
from langchain_quantllm.memory.estimate import build_on_meta

__all__ = ["PackedExperts", "find_packed_experts"]

_NUMBERED = re.compile(r"\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class PackedExperts:
    """The packed experts of one checkpoint.

    Args:
        model_class: The class of its model.
        projections: Their projections.
        format: Their format.
        stored: The tensors in the checkpoint's files.
        files: The file of each tensor.
        quantization: The checkpoint's quantization config.
        packed_linears: Names in the model of its packed linear layers; None if all of its decoder layers are packed.
    """

    model_class: type
    projections: tuple[StoredProjection, ...]
    format: ExpertFormat
    stored: Mapping[str, StoredTensor]
    files: Mapping[str, Path]
    quantization: Mapping[str, Any]
    packed_linears: tuple[str, ...] | None

    @property
    def layers(self) -> frozenset[str]:
        """Names of the packed layers in the files."""
        return frozenset(layer for found in self.projections for part in found.layers for layer in part)

    def from_pretrained(self, source: str, *, config: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Load the model.

        Args:
            source: The folder or repository.
            config: Its config.
            **options: Options of transformers' `from_pretrained`, `output_loading_info=True` among them.

        Returns:
            The model, and transformers' loading info without the experts.

        Raises:
            CheckpointError: If a tensor cannot be read.
            UnsupportedError: If experts would lie outside the memory.
        """
        config = copy.deepcopy(config)
        if self.packed_linears == ():
            config.__dict__.pop("quantization_config", None)
        elif self.packed_linears is not None and self.format.kind == "gptq":
            own = dict(config.quantization_config)
            own.setdefault("modules_in_block_to_quantize", [list(self.packed_linears)])
            config.quantization_config = own
        ignored = [name for found in self.projections for name in found.tensors]
        filled = [f"{found.module}.{found.name}" for found in self.projections]
        kind: Any = model_class_with(self.model_class, self._replace, ignored=ignored, filled=filled)
        model, info = kind.from_pretrained(source, config=config, **options)
        model.__class__ = self.model_class
        self._fill(model)
        if self.packed_linears == ():
            model.config.quantization_config = dict(self.quantization)
        return model, info

    def _replace(self, model: Any) -> None:
        """Put empty stacks in place of the experts' parameters of a model on the meta device."""
        import torch

        from langchain_quantllm.experts.module import replace_weights
        from langchain_quantllm.experts.stacked import StackedLinear
        from langchain_quantllm.loading.expert_stacks import empty_stack

        by_module: dict[str, dict[str, StackedLinear]] = {}
        for found in self.projections:
            module = model.get_submodule(found.module)
            scales = self.stored.get(f"{found.layers[0][0]}.scales")
            dtype = torch.uint8 if scales is None else getattr(torch, scales.dtype)
            bias = None if found.projection.bias is None else getattr(module, found.projection.bias).detach()
            by_module.setdefault(found.module, {})[found.name] = StackedLinear(empty_stack(found, dtype, bias))
        for path, weights in by_module.items():
            replace_weights(model.get_submodule(path), weights)
            mark_initialized([model.get_submodule(path), *weights.values()])

    def _fill(self, model: Any) -> None:
        """Fill the stacks from the files, projection by projection."""
        from langchain_quantllm.experts.stacked import StackedLinear
        from langchain_quantllm.loading.expert_stacks import OpenFiles, SavedNames, fill, read_stack

        with OpenFiles(self.files) as files:
            for found in self.projections:
                module = model.get_submodule(found.module)
                empty: Any = getattr(module, found.name).stack
                if empty.words.device.type == "meta":
                    msg = (
                        f"device_map puts the experts {found.module!r} on the disk, and packed experts stay in memory; "
                        "put them on a device, or use a smaller model."
                    )
                    raise UnsupportedError(msg)
                setattr(module, found.name, StackedLinear(fill(empty, read_stack(found, files))))
        for path in dict.fromkeys(found.module for found in self.projections):
            own = [found for found in self.projections if found.module == path]
            model.get_submodule(path).register_state_dict_post_hook(SavedNames(own))


def find_packed_experts(spec: LoadSpec, checkpoint: Checkpoint) -> PackedExperts | None:
    """Find the packed experts of a checkpoint; None if it has none.

    The weights of a mixture on the Hub are downloaded.

    Raises:
        CheckpointError: If their tensors are incomplete, or not those of the model.
        UnsupportedError: If the model keeps its experts in a layout of its own.
    """
    form = format_of(checkpoint.quantization)
    if form is None or not is_mixture(checkpoint.config):
        return None
    if checkpoint.local and checkpoint.stored is None:  # loading reports damaged files
        return None
    import torch

    config = copy.deepcopy(checkpoint.config)
    config.__dict__.pop("quantization_config", None)
    try:
        model = build_on_meta(config, torch.bfloat16, spec.trust_remote_code, spec.model_id)
    except UnsupportedError:  # as above
        return None
    stored: dict[str, StoredTensor] = {}
    places: dict[str, Path] = {}
    try:
        files = _weight_files(spec, checkpoint)
    except MissingFileError:  # as above
        return None
    for file in files:
        header = read_header(file)
        stored |= header
        places |= dict.fromkeys(header, file)
    found = find_projections(model, stored, form)
    if not found and form.kind == "mxfp4":
        msg = f"{spec.model_id} says quant_method='mxfp4', and its files have no packed experts; is it complete?"
        raise CheckpointError(msg)
    if not found:
        return None
    return PackedExperts(
        model_class=type(model),
        projections=found,
        format=form,
        stored=stored,
        files=places,
        quantization=dict(checkpoint.quantization or {}),
        packed_linears=_packed_linears(model, stored),
    )


def _packed_linears(model: Any, stored: Mapping[str, StoredTensor]) -> tuple[str, ...] | None:
    """Return the names of a model's packed linear layers; None if no linear layer of its decoder layers is plain.

    GPTQ's quantizer replaces all linear layers, and so looks for the packed tensors of each.
    """
    import torch

    names = ExpertNames(model, ())
    packed = {names.renamed(name).removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    found = tuple(name for name in linears if name in packed)
    plain = [name for name in linears if name not in packed and _NUMBERED.search(name)]
    return found if plain or not found else None


def _weight_files(spec: LoadSpec, checkpoint: Checkpoint) -> list[Path]:
    """Return the weight files that transformers reads, after a download where needed."""
    repository, folder = Repository.of(spec), Path(checkpoint.source)
    name = None if checkpoint.gptq is None else checkpoint.gptq.weights_name
    name = name or getattr(checkpoint.config, "transformers_weights", None)
    if name is None:
        is_single = (folder / SINGLE).is_file() if checkpoint.local else SINGLE in repository.list_files()
        name = SINGLE if is_single else INDEX
    first = folder / name if checkpoint.local else repository.fetch(name)
    if not name.endswith(".json"):
        return [first]
    shards = sorted(set(read_index(first)["weight_map"].values()))
    return [folder / shard if checkpoint.local else repository.fetch(shard) for shard in shards]
