"""The packed weights of experts in a checkpoint's files: which tensors there are, and whether they fit the model.

Knows the names and layouts of mxfp4 (gpt-oss), GPTQ and AWQ. Reads headers only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from langchain_quantllm.compat.gptqmodel_rules import settings_of
from langchain_quantllm.compat.transformers_conversions import ExpertLayer, ExpertNames
from langchain_quantllm.compat.transformers_experts import Projection, projections, unsupported_experts
from langchain_quantllm.errors import CheckpointError, UnsupportedError
from langchain_quantllm.loading.stored_tensors import StoredTensor

__all__ = ["ExpertFormat", "StoredProjection", "find_projections", "format_of"]

MXFP4_BLOCK = 32
_FLOATS = ("float16", "bfloat16", "float32")
_INTS = ("int32",)

Shapes = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
"""Shape and dtypes of a tensor, by the ending of its name."""


@dataclass(frozen=True, kw_only=True)
class ExpertFormat:
    """The format of packed experts.

    Args:
        kind: The format.
        bits: Bits of a weight.
        group_size: Inputs that share a scale; -1 for all.
        zeros_minus_one: Whether zero points are stored one too small.
        config: The checkpoint's `quantization_config`, if it has rules for single layers.
    """

    kind: Literal["mxfp4", "gptq", "awq"]
    bits: int
    group_size: int
    zeros_minus_one: bool = False
    config: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def of(self, layer: str) -> ExpertFormat:
        """Return the format of a packed layer, which may have a rule."""
        own = None if self.config is None else settings_of(self.config, layer)
        return self if own is None else replace(self, bits=own["bits"], group_size=own["group_size"])

    def groups(self, in_features: int) -> int:
        """Count the groups of a number of inputs."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)


@dataclass(frozen=True, kw_only=True)
class StoredProjection:
    """Where a checkpoint has the packed weights of one projection of all experts of a layer.

    Args:
        module: Name of the module with the experts.
        name: Name of its parameter, such as `gate_up_proj`.
        projection: The parameter's layout.
        format: The format of the weights.
        layers: Names of the packed layers: for each part of the outputs, of each expert; one of one for a tensor of
            all experts.
        templates: For each part, the name of its layers in the model, with `{expert}` in it; empty for a tensor of all
            experts.
        interleaved: Whether the outputs of parts alternate.
        biases: Names of the tensors of biases, as in `layers`; empty if there are none.
    """

    module: str
    name: str
    projection: Projection
    format: ExpertFormat
    layers: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...] = ()
    interleaved: bool = False
    biases: tuple[tuple[str, ...], ...] = ()

    @property
    def fused(self) -> bool:
        """Whether one tensor holds the weights of all experts."""
        return not self.templates

    @property
    def has_whole_bias(self) -> bool:
        """Whether one tensor holds the biases of all experts."""
        return any(name.endswith(f".{self.projection.bias}") for part in self.biases for name in part)

    @property
    def tensors(self) -> frozenset[str]:
        """Names of all tensors that may belong to it."""
        layers = (layer for part in self.layers for layer in part)
        join = "_" if self.format.kind == "mxfp4" else "."
        names = (f"{layer}{join}{ending}" for layer in layers for ending in _ENDINGS[self.format.kind])
        return frozenset([*names, *(name for part in self.biases for name in part)])


_ENDINGS = {
    "mxfp4": ("blocks", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
}


def format_of(quantization: Mapping[str, Any] | None) -> ExpertFormat | None:
    """Return the format that a checkpoint's config names; None if it is none of those with packed experts.

    Raises:
        CheckpointError: If its numbers are none of AWQ's.
    """
    method = (quantization or {}).get("quant_method", "")
    method = str(getattr(method, "value", method)).lower()
    if quantization is None or method not in _ENDINGS:
        return None
    if method == "mxfp4":
        return ExpertFormat(kind="mxfp4", bits=4, group_size=MXFP4_BLOCK)
    if method == "gptq":
        is_v1 = str(quantization.get("checkpoint_format", "gptq")) != "gptq_v2"
        bits, size = quantization["bits"], quantization["group_size"]
        ruled = quantization if quantization.get("dynamic") else None
        return ExpertFormat(kind="gptq", bits=bits, group_size=size, zeros_minus_one=is_v1, config=ruled)
    bits, size = quantization.get("bits", 4), quantization.get("group_size", 128)
    if bits != 4 or type(size) is not int or (size != -1 and size < 1):
        msg = f"the config says bits={bits!r} and group_size={size!r}, and AWQ has 4 bits and groups of inputs."
        raise CheckpointError(msg)
    return ExpertFormat(kind="awq", bits=4, group_size=size)


def find_projections(
    model: Any, stored: Mapping[str, StoredTensor], form: ExpertFormat
) -> tuple[StoredProjection, ...]:
    """Find the experts that a checkpoint has packed, and check their tensors.

    Args:
        model: The checkpoint's model with unquantized weights, on any device.
        stored: The tensors in the checkpoint's files by their names.
        form: The format of the checkpoint.

    Returns:
        The projections; empty if no experts are packed.

    Raises:
        CheckpointError: If a tensor is missing, or has another shape or dtype than the model and the format say.
        UnsupportedError: If experts are packed that the model keeps in a layout of its own.
    """
    modules = {name: module for name, module in model.named_modules() if projections(module)}
    known = {f"{path}.{name}": (path, name) for path, module in modules.items() for name in projections(module)}
    names = ExpertNames(model, known)
    found = _fused(stored, known, names, form) | _single(stored, names, form)
    if not found:
        _refuse_others(model, stored, form)
        return ()
    for path in {known[parameter][0] for parameter in found}:
        absent = [name for name in projections(modules[path]) if f"{path}.{name}" not in found]
        if absent:
            msg = f"the experts {path!r} are packed, but the files have no packed weights of {absent[0]!r}; "
            raise CheckpointError(msg + "is the checkpoint complete?")
    return tuple(_checked(parameter, found, known, modules, stored, form) for parameter in known if parameter in found)


_Layers = dict[str, dict[tuple[int, int], tuple[str, ExpertLayer | None]]]
"""For each parameter: part and expert → name of the layer in the files, and what it is; None for all experts."""


def _fused(
    stored: Mapping[str, StoredTensor], known: Collection[str], names: ExpertNames, form: ExpertFormat
) -> _Layers:
    """Find tensors that hold the weights of all experts."""
    ending = "_blocks" if form.kind == "mxfp4" else ".qweight"
    layers = {name.removesuffix(ending): name for name in stored if name.endswith(ending)}
    own = {names.renamed(layer): layer for layer in layers}
    return {parameter: {(0, 0): (own[parameter], None)} for parameter in known if parameter in own}


def _single(stored: Mapping[str, StoredTensor], names: ExpertNames, form: ExpertFormat) -> _Layers:
    """Find layers of single experts."""
    found: _Layers = {}
    if form.kind == "mxfp4":
        return found
    for name in stored:
        layer = names.find(name.removesuffix(".qweight")) if name.endswith(".qweight") else None
        if layer is not None:
            found.setdefault(layer.parameter, {})[layer.part, layer.expert] = (name.removesuffix(".qweight"), layer)
    return found


def _refuse_others(model: Any, stored: Mapping[str, StoredTensor], form: ExpertFormat) -> None:
    """Refuse packed experts of a model whose experts are not known here, which would be random."""
    modules = dict(model.named_modules())
    packed = (n for n in stored if n.endswith(("_blocks", ".qweight")) and ".experts." in n)
    for name in packed:
        path = name.partition(".experts.")[0] + ".experts"
        if (reason := unsupported_experts(modules.get(path))) is not None:
            msg = (
                f"the checkpoint has packed experts ({form.kind}, for example {name!r}), but {reason}, so they cannot "
                "be loaded; give the unquantized checkpoint."
            )
            raise UnsupportedError(msg)


def _checked(
    parameter: str,
    found: _Layers,
    known: Mapping[str, tuple[str, str]],
    modules: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    form: ExpertFormat,
) -> StoredProjection:
    """Check the tensors of a projection against its layout."""
    path, name = known[parameter]
    module = modules[path]
    projection = projections(module)[name]
    own = found[parameter]
    templates: tuple[str, ...] = ()
    if any(layer is not None for _, layer in own.values()):
        layers, templates = _complete(parameter, own, projection)
    else:
        layers = ((own[0, 0][0],),)
    biases = _biases(parameter, projection, layers, stored)
    forms = {form.of(layer) for part in layers for layer in part}
    if len(forms) > 1:
        bits = ", ".join(sorted({f"{own.bits} bits in groups of {own.group_size}" for own in forms}))
        msg = f"experts of {parameter!r} are packed in {bits}, and here all experts of a layer have the same."
        raise UnsupportedError(msg)
    [form] = forms
    made = StoredProjection(
        module=path,
        name=name,
        projection=projection,
        format=form,
        layers=layers,
        templates=templates,
        interleaved=bool(templates) and not getattr(module, "is_concatenated", True),
        biases=biases,
    )
    for tensor, shape, dtypes in _expected(made):
        _check(tensor, shape, dtypes, stored)
    inputs = (projection.experts, projection.in_features) if made.fused else (projection.in_features,)
    for tensor in (f"{layer}.g_idx" for part in layers for layer in part):
        if tensor in stored:  # without act-order it may be left out
            _check(tensor, inputs, _INTS, stored)
    return made


def _complete(
    parameter: str, own: Mapping[tuple[int, int], tuple[str, ExpertLayer | None]], projection: Projection
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Arrange the layers of single experts by parts and numbers."""
    example, layer = next(iter(own.values()))
    assert layer is not None
    # A config may say any number of experts: the search ends at the first that is missing.
    wanted = ((part, expert) for part in range(layer.parts) for expert in range(projection.experts))
    missing = next((place for place in wanted if place not in own), None)
    if missing is not None:
        msg = (
            f"the checkpoint lacks a packed layer of expert {missing[1]} for {parameter!r} (part {missing[0] + 1} of "
            f"{layer.parts}; it has {example + '.qweight'!r}); is it complete?"
        )
        raise CheckpointError(msg)
    extra = next((name for (_, expert), (name, _) in own.items() if expert >= projection.experts), None)
    if extra is not None:
        msg = f"the checkpoint has {extra + '.qweight'!r}, and its config says {projection.experts} experts."
        raise CheckpointError(msg)
    templates = (own[part, 0][1] for part in range(layer.parts))
    layers = tuple(tuple(own[part, e][0] for e in range(projection.experts)) for part in range(layer.parts))
    return layers, tuple(found.template for found in templates if found is not None)


def _biases(
    parameter: str, projection: Projection, layers: tuple[tuple[str, ...], ...], stored: Mapping[str, StoredTensor]
) -> tuple[tuple[str, ...], ...]:
    """Find the names of the biases: of all experts, or of each."""
    if projection.bias is None:
        return ()
    whole = f"{parameter.rpartition('.')[0]}.{projection.bias}"
    if whole in stored or len(layers[0]) == 1:
        return ((whole,),)
    return tuple(tuple(f"{layer}.bias" for layer in part) for part in layers)


def _expected(found: StoredProjection) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Yield the name, shape and dtypes of each tensor of a projection."""
    p, form = found.projection, found.format
    outputs = p.out_features // len(found.layers)
    axis = (p.experts,) if found.fused else ()
    shapes = _mxfp4_shapes(p) if form.kind == "mxfp4" else _layer_shapes(p.in_features, outputs, form)
    join = "_" if form.kind == "mxfp4" else "."
    for part in found.layers:
        for layer in part:
            for ending, (shape, dtypes) in shapes.items():
                yield f"{layer}{join}{ending}", (*axis, *shape), dtypes
    for name in (name for part in found.biases for name in part):
        yield name, (p.experts, p.out_features) if found.has_whole_bias else (outputs,), _FLOATS


def _mxfp4_shapes(projection: Projection) -> Shapes:
    inputs, outputs = projection.in_features, projection.out_features
    if inputs % MXFP4_BLOCK:
        msg = f"experts with {inputs} inputs cannot be in mxfp4, which has blocks of {MXFP4_BLOCK}."
        raise CheckpointError(msg)
    blocks = inputs // MXFP4_BLOCK
    return {"blocks": ((outputs, blocks, 16), ("uint8",)), "scales": ((outputs, blocks), ("uint8",))}


def _layer_shapes(inputs: int, outputs: int, form: ExpertFormat) -> Shapes:
    """Return the shapes of a packed layer of GPTQ or AWQ; a `g_idx` is optional, and not among them."""
    bits = form.bits
    for size in (inputs, outputs):
        if size * bits % 32:  # of 3 bits, 32 codes fill 3 words
            msg = f"experts of {inputs} inputs and {outputs} outputs cannot be packed in {bits} bits; words have 32."
            raise CheckpointError(msg)
    groups = form.groups(inputs)
    words = (inputs, outputs // 8) if form.kind == "awq" else (inputs * bits // 32, outputs)
    return {
        "qweight": (words, _INTS),
        "qzeros": ((groups, outputs * bits // 32), _INTS),
        "scales": ((groups, outputs), _FLOATS),
    }


def _check(name: str, shape: tuple[int, ...], dtypes: tuple[str, ...], stored: Mapping[str, StoredTensor]) -> None:
    tensor = stored.get(name)
    if tensor is None:
        msg = f"the checkpoint lacks the tensor {name!r} of its packed experts; is it complete?"
        raise CheckpointError(msg)
    if tensor.shape != shape or tensor.dtype not in dtypes:
        msg = (
            f"the tensor {name!r} is {tensor.dtype} of shape {tensor.shape}, and the model and its "
            f"quantization_config require {' or '.join(dtypes)} of shape {shape}; get the checkpoint again."
        )
        raise CheckpointError(msg)
