"""GPTQ of a whole model: its blocks in order, kept on the disk as they are finished, and the resulting checkpoint."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from langchain_quantllm._version import __version__
from langchain_quantllm.compat.transformers_conversions import ExpertNames
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.loading.expert_stacks import OpenFiles
from langchain_quantllm.loading.stored_tensors import read_header
from langchain_quantllm.memory.estimate import build_on_meta
from langchain_quantllm.quantization.block_rounding import BATCH_TOKENS, BlockTraining
from langchain_quantllm.quantization.decoder_layers import DecoderLayers, Layout, find_layout
from langchain_quantllm.quantization.distill import Distillation, ModelTraining, Teacher
from langchain_quantllm.quantization.expert_layers import TOKENS, ExpertLayers, PackedLinear
from langchain_quantllm.quantization.formats import format_of_scheme, rounding_of
from langchain_quantllm.quantization.journal import Journal
from langchain_quantllm.quantization.layer_bits import LayerBits
from langchain_quantllm.quantization.output_dir import OutputDir
from langchain_quantllm.quantization.packing import TENSORS, RoundedLinear
from langchain_quantllm.quantization.saving import not_as_written, save_checkpoint
from langchain_quantllm.quantization.sensitivity import Sensitivity
from langchain_quantllm.quantization.solver import InputStatistics, Rounding, solve
from langchain_quantllm.quantization.unpackable import without_unpackable
from langchain_quantllm.schemes import AWQ, GPTQ

GROUP_SIZE = 128
"""The default group size, where it divides every layer."""

_COMMON_SIZES = (16, 32, 64, 128, 256, 512, 1024)
SHARD = "5GB"

_SAMPLED_ROWS = 32
"""Rows of each layer that are compared after writing; of any number of bits, they fill whole words."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a quantization.

    Args:
        done: Finished blocks, each also when its bits were chosen, and then epochs of a distillation.
        total: All of them.
        resumed: Finished blocks and epochs that came from an earlier run.
        elapsed_s: Seconds since the first block began.
        remaining_s: Estimated seconds for the other blocks, or once these are done, for the other epochs; None before
            one was done.
    """

    done: int
    total: int
    resumed: int
    elapsed_s: float
    remaining_s: float | None


# --- checks ---


def check_layers(
    config: Any, scheme: GPTQ | AWQ, skip_modules: Sequence[str], *, trust_remote_code: bool = False
) -> tuple[Layout, GPTQ | AWQ]:
    """Find the layers that GPTQ quantizes and check their sizes, without any weight.

    Args:
        config: The model's transformers config.
        scheme: The scheme, with bits; a group size of None takes 128, or the largest below that divides every layer.
        skip_modules: Endings of the names of layers that stay unquantized.
        trust_remote_code: Run Python code that comes with the checkpoint.

    Returns:
        The layers to quantize, and the scheme with its group size.

    Raises:
        InvalidOptionError: If a group size does not divide a layer, more than small layers cannot be packed, or a name
            is unknown.
        UnsupportedError: If the model has no blocks of linear layers.
    """
    model = build_on_meta(config, torch.float16, trust_remote_code, config.model_type)
    layout = without_unpackable(model, _without(find_layout(model), skip_modules), scheme.layer_bits)
    blocks = model.get_submodule(layout.prefix)
    linears = {
        f"{layout.prefix}.{i}.{name}": blocks[i].get_submodule(name)
        for i, names in enumerate(layout.layers)
        for name in names
    }
    sizes = {name: linear.in_features for name, linear in linears.items()}
    of_experts = {
        f"{layout.prefix}.{i}.{name}": (inputs, outputs)
        for i, found in enumerate(layout.experts)
        for experts in found
        for name, inputs, outputs in experts.sizes()
    }
    sizes |= {name: inputs for name, (inputs, _) in of_experts.items()}
    even = [size for size in _COMMON_SIZES if not any(s % size for s in sizes.values())]
    if scheme.group_size is None:
        scheme = replace(scheme, group_size=max((size for size in even if size <= GROUP_SIZE), default=-1))
    group_size = scheme.group_size
    if group_size != -1 and (uneven := next((name for name, size in sizes.items() if size % group_size), None)):
        msg = (
            f"group_size={group_size} does not divide in_features={sizes[uneven]} of layer {uneven!r}; use "
            f"{', '.join([*map(str, even), '-1'])} (-1 is one group for all), or name the layer in skip_modules."
        )
        raise InvalidOptionError(msg)
    shapes = {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}
    for bits in scheme.layer_bits:
        for name, (inputs, outputs) in {**shapes, **of_experts}.items():
            _check_packable(name, "in_features", inputs, bits)
            _check_packable(name, "out_features", outputs, bits)
    return layout, scheme


def _without(layout: Layout, skip_modules: Sequence[str]) -> Layout:
    """Remove the layers whose names end in one of `skip_modules`; experts are skipped as a whole."""
    paths = {experts.path for found in layout.experts for experts in found}
    known = sorted({name for names in layout.layers for name in names} | paths)
    skipped: set[str] = set()
    for ending in [skip_modules] if isinstance(skip_modules, str) else skip_modules:
        ending_so = [name for name in known if f".{name}".endswith(f".{ending}")]
        if not ending_so:
            msg = f"skip_modules={ending!r} is not the name of a linear layer; there are {', '.join(known)}."
            raise InvalidOptionError(msg)
        skipped.update(ending_so)
    if not set(known) - skipped:
        msg = "skip_modules leaves no layer to quantize; leave some names out."
        raise InvalidOptionError(msg)
    kept = tuple(tuple(name for name in names if name not in skipped) for names in layout.layers)
    experts = tuple(tuple(own for own in found if own.path not in skipped) for found in layout.experts)
    return replace(layout, layers=kept, experts=experts)


def _check_packable(name: str, which: str, size: int, bits: int) -> None:
    if size * bits % 32:
        msg = (
            f"{which}={size} of layer {name!r} cannot be packed in {bits} bits: it must be a multiple of "
            f"{32 // bits if 32 % bits == 0 else 32}; name the layer in skip_modules."
        )
        raise InvalidOptionError(msg)


# --- the run ---


class GPTQRun:
    """The quantization of one model, whose layers are replaced block by block."""

    def __init__(
        self,
        model: Any,
        layout: Layout,
        scheme: GPTQ | AWQ,
        *,
        damping: float,
        device: str,
        journal: Journal,
        report: Callable[[Progress], None] | None = None,
        distill: Distillation | None = None,
        method: str = "gptq",
    ) -> None:
        """Take over a model on the CPU.

        Args:
            model: The model, which is changed.
            layout: Its layers to quantize.
            scheme: The scheme, with bits and a group size.
            damping: Added to the diagonal of the statistics, as a share of its mean.
            device: Where its blocks go, one at a time.
            journal: Keeps the finished blocks.
            report: Called after each block.
            method: `"autoround"` trains the rounding of each block; any other leaves it.
            distill: How its scales and codes are trained after that; None leaves them.
        """
        self._model = model
        self._distill = distill
        self._method = method
        self._layout = layout
        self._scheme = scheme
        self._rounding, self._format = rounding_of(scheme, damping), format_of_scheme(scheme)
        self.bits = LayerBits(usual=self._rounding.bits, mean=self._rounding.bits)
        """The bits of the layers; where they are chosen, known after the run."""
        self._device = device
        self._journal = journal
        self._report = report
        self._samples: dict[str, torch.Tensor] = {}
        self._unquantized: dict[str, torch.Tensor] = {}
        self.rare_experts: dict[str, int] = {}
        """Experts that fewer tokens reached than they have inputs, with how many; others stood in for the rest."""

    def run(self, sequences: Sequence[Sequence[int]], source: str, *, overwrite: bool) -> int:
        """Quantize the blocks, except the ones from an interrupted run.

        Args:
            sequences: Token ids to calibrate with; without any, weights are rounded to nearest.
            source: Folder or repository of the checkpoint.
            overwrite: Delete the blocks of a run with other settings.

        Returns:
            Number of blocks from an earlier run.
        """
        files = sorted(Path(source).glob("*.safetensors"))
        about = {
            "version": __version__,
            "source": source,
            "weights": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
            "bits": self._scheme.bits,
            "rounding": vars(self._rounding),
            "layers": self._layout.layers,
            "experts": [[own.path for own in found] for found in self._layout.experts],
            "dtype": str(self._model.dtype),
            "calibration": hashlib.sha256(json.dumps([list(ids) for ids in sequences]).encode()).hexdigest(),
            "distill": self._distill and vars(self._distill),
            "method": self._method,
        }
        self._journal.open(about, overwrite=overwrite)
        self._choose_bits(sequences)
        teacher = None if self._distill is None else Teacher(self._model, sequences, self._device)
        is_trained = self._method == "autoround"
        of_training: dict[str, Any] = {"batch_tokens": BATCH_TOKENS, "holds_gradients": True} if is_trained else {}
        blocks = DecoderLayers(self._model, self._layout, sequences, self._device, **of_training)
        training = BlockTraining(blocks) if is_trained else None
        began = time.perf_counter()
        resumed, solved_s = 0, 0.0
        for index, names in enumerate(self._layout.layers):
            started = time.perf_counter()
            found = self._journal.read(index)
            self._keep(index, names)
            with blocks.on_device(index) as block:
                if training is not None:
                    training.observe(index)
                if found is None:
                    found = self._quantize(blocks, block, index, names, training)
                    found |= self._quantize_experts(blocks, block, index)
                    self._journal.write(index, found)
                    solved_s += time.perf_counter() - started
                else:
                    self._restore(block, index, names, found)
                    resumed += 1
                if index + 1 < self._layout.count:
                    blocks.advance(index)
            self._pack(index, block, names, found)
            done = index + 1
            left_s = (self._layout.count - done) * solved_s / (done - resumed) if done > resumed else None
            self._tell(done, resumed, began, left_s)
        if teacher is not None:
            self._train(teacher, sequences, resumed, began)
        return resumed

    def _keep(self, index: int, names: Sequence[str]) -> None:
        """Keep the weights of a block, if codes are to be trained from them."""
        if self._distill is not None and self._distill.code_rate:
            block = self._model.get_submodule(f"{self._layout.prefix}.{index}")
            weights = {name: block.get_submodule(name).weight.detach().clone() for name in names}
            self._unquantized |= {f"{self._layout.prefix}.{index}.{name}": weight for name, weight in weights.items()}

    def _choose_bits(self, sequences: Sequence[Sequence[int]]) -> None:
        """Choose the bits of the layers, where the scheme names only their mean."""
        mean_bits, resumed, began = self._scheme.mean_bits, 0, time.perf_counter()
        if not isinstance(self._scheme.bits, str) or mean_bits is None:
            return

        def finished(done: int, was_kept: bool) -> None:
            nonlocal resumed
            resumed += was_kept
            self._tell(done - self._layout.count, resumed, began, None)

        own = self._scheme.layer_bits
        measured = Sensitivity(self._model, self._layout, sequences, own, self._rounding, self._device)
        self.bits = LayerBits.chosen(measured.measure(self._journal, finished), own, mean_bits)

    def _tell(self, done: int, resumed: int, began: float, remaining_s: float | None) -> None:
        """Report finished blocks and epochs; blocks whose bits are chosen come before the first, and count up to 0."""
        if self._report is None:
            return
        before = self._layout.count if isinstance(self._scheme.bits, str) else 0
        total = before + self._layout.count + (0 if self._distill is None else self._distill.epochs)
        elapsed_s = time.perf_counter() - began
        numbers = {"done": before + done, "total": total, "resumed": resumed}
        self._report(Progress(**numbers, elapsed_s=elapsed_s, remaining_s=remaining_s))

    def _rounding_of(self, index: int, name: str) -> Rounding:
        return replace(self._rounding, bits=self.bits.of(index, name))

    def _train(self, teacher: Teacher, sequences: Sequence[Sequence[int]], resumed: int, began: float) -> None:
        """Train the scales and codes of the packed layers, and keep the training after each epoch."""
        assert self._distill is not None
        places = [(i, name) for i, own in enumerate(self._layout.layers) for name in own]
        bits = {f"{self._layout.prefix}.{i}.{name}": self.bits.of(i, name) for i, name in places}
        packed = {name: dict(self._model.get_submodule(name).named_buffers()) for name in bits}
        layers = {name: self._format.read(tensors, bits[name]) for name, tensors in packed.items()}
        training = ModelTraining(self._model, layers, self._distill, device=self._device, weights=self._unquantized)
        self._unquantized = {}
        if (kept := self._journal.read(None)) is not None:
            training.restore(kept)
        first, started = training.done_epochs, time.perf_counter()

        def finished(epoch: int, _: float) -> None:
            self._journal.write(None, training.state())
            left_s = (training.options.epochs - epoch) * (time.perf_counter() - started) / (epoch - first)
            self._tell(self._layout.count + epoch, resumed + first, began, left_s)

        training.run(teacher, sequences, finished=finished)
        for name, rounded in training.results().items():
            for key, tensor in self._format.written(rounded.pack()).items():
                packed[name][key].copy_(tensor)
            self._samples[name] = rounded.dequantize()[:_SAMPLED_ROWS].to(self._model.dtype)

    def _quantize(
        self, blocks: DecoderLayers, block: Any, index: int, names: Sequence[str], training: BlockTraining | None
    ) -> dict[str, torch.Tensor]:
        """Round the layers of a block group by group, each with the outputs of the rounded groups before it."""
        found: dict[str, RoundedLinear] = {}
        weights = {name: block.get_submodule(name).weight.detach().clone() for name in names if training is not None}
        for group in blocks.groups(index, names) if blocks.states else [[name] for name in names]:
            linears = [block.get_submodule(name) for name in group]
            weight = torch.cat([linear.weight for linear in linears])
            statistics = None
            if blocks.states:
                statistics = InputStatistics(weight.shape[1], weight.device)
                blocks.observe(index, group, statistics.add)
            rounded = solve(weight, statistics, self._rounding_of(index, group[0]))
            first = 0
            for name, linear in zip(group, linears, strict=True):
                found[name] = rounded.outputs(slice(first, first + linear.out_features))
                linear.weight.data.copy_(found[name].dequantize())
                first += linear.out_features
        if training is not None:
            found = training.train(index, found, weights)
            for name, layer in found.items():
                block.get_submodule(name).weight.data.copy_(layer.dequantize())
        return {f"{name}.{key}": tensor for name, layer in found.items() for key, tensor in layer.pack().items()}

    def _quantize_experts(self, blocks: DecoderLayers, block: Any, index: int) -> dict[str, torch.Tensor]:
        """Round the experts of a block, whose other layers are rounded."""
        packed: dict[str, torch.Tensor] = {}
        for experts in self._layout.experts[index]:
            tokens = blocks.routed(index, experts.path) if blocks.states else None
            rounding = self._rounding_of(index, experts.path)
            packed |= experts.quantize(block.get_submodule(experts.path), tokens, rounding)
        return packed

    def _restore(self, block: Any, index: int, names: Sequence[str], packed: dict[str, torch.Tensor]) -> None:
        """Set the weights of a block to the ones from an earlier run."""
        for name in names:
            rounded = RoundedLinear.unpack(_tensors_of(name, packed), self.bits.of(index, name))
            block.get_submodule(name).weight.data.copy_(rounded.dequantize())
        for experts in self._layout.experts[index]:
            module = block.get_submodule(experts.path)
            for expert in range(experts.count):
                for projection, weight in experts.rounded(expert, packed, self.bits.of(index, experts.path)).items():
                    experts.set_weight(module, projection, expert, weight)

    def _pack(self, index: int, block: Any, names: Sequence[str], packed: dict[str, torch.Tensor]) -> None:
        """Replace the layers of a finished block by their packed tensors, and keep some rows of what they stand for."""
        for name in names:
            linear = block.get_submodule(name)
            self._samples[f"{self._layout.prefix}.{index}.{name}"] = (
                linear.weight[:_SAMPLED_ROWS].detach().cpu().clone()
            )
            bias = None if linear.bias is None else linear.bias.detach()
            block.set_submodule(name, PackedLinear(self._format.written(_tensors_of(name, packed)), bias))
        for experts in self._layout.experts[index]:
            self._pack_experts(index, block, experts, packed)

    def _pack_experts(self, index: int, block: Any, experts: ExpertLayers, packed: dict[str, torch.Tensor]) -> None:
        """Replace the experts of a finished block; of one of them, keep some rows."""
        module = block.get_submodule(experts.path)
        prefix = f"{self._layout.prefix}.{index}."
        for name, projection, part in experts.layers(index % experts.count):
            weight = experts.weight(module, projection, index % experts.count)[experts.rows(projection, part)]
            self._samples[prefix + name] = weight[:_SAMPLED_ROWS].cpu().clone()
        counts = packed.get(f"{experts.path}.{TOKENS}")
        if counts is not None:
            least = experts.least_tokens
            rare = {e: int(count) for e, count in enumerate(counts) if count < least}
            self.rare_experts |= {f"{prefix}{experts.path}.{e}": count for e, count in rare.items()}
        block.set_submodule(experts.path, experts.pack(module, packed, self._format.written))

    def write(self, output: OutputDir, tokenizer: Any, *, calibration: str, tokens: int, **options: Any) -> None:
        """Write the checkpoint and check it, put it in its place, and remove the journal.

        Args:
            output: The output.
            tokenizer: The model's tokenizer.
            calibration: Name of the calibration.
            tokens: Number of its tokens.
            **options: Further options of `save_checkpoint`.

        Raises:
            OutputError: If it cannot be written, or is not what was to be written; the journal stays.
        """
        quantized = None
        blocks = self._model.get_submodule(self._layout.prefix)
        if any(isinstance(module, nn.Linear) for module in blocks.modules()):  # layers that were skipped
            quantized = {name for names in self._layout.layers for name in names}
            quantized |= {
                name
                for found in self._layout.experts
                for experts in found
                for expert in range(experts.count)
                for name, *_ in experts.layers(expert)
            }
        config = self._format.config(self._model, self._layout.prefix, self._rounding, self.bits, quantized)
        config["meta"] = {
            "quantizer": [f"langchain-quantllm:{__version__}"],
            "calibration": calibration,
            "calibration_tokens": tokens,
            **({"bits": self._scheme.bits, "mean_bits": round(self.bits.mean, 4)} if self.bits.groups else {}),
            **({"method": self._method} if self._method == "autoround" else {}),
            **({} if self._distill is None else {"distill": vars(self._distill)}),
        }
        self._model.config.quantization_config = config
        save_checkpoint(output, self._model, tokenizer, max_shard_size=SHARD, **options)
        self._check_samples(output.part)
        output.publish()
        self._journal.remove()

    def _check_samples(self, folder: Path) -> None:
        """Check that the packed layers of a checkpoint stand for the weights with which the blocks were computed."""
        renamed = ExpertNames(self._model, ()).renamed
        files = {key: file for file in folder.glob("*.safetensors") for key in read_header(file)}
        layers = {renamed(key): key.removesuffix(".qweight") for key in files if key.endswith(".qweight")}
        with OpenFiles(files) as stored:
            for name, expected in self._samples.items():
                layer = layers.get(f"{name}.qweight")
                if layer is None:
                    raise not_as_written(f"the packed weights of {name!r} are missing")
                index, _, own = name.removeprefix(f"{self._layout.prefix}.").partition(".")
                bits = self.bits.of(int(index), own)
                whole = {key: stored.tensor(f"{layer}.{key}") for key in self._format.tensors}
                parts = {key: self._format.first_outputs(key, t, len(expected), bits) for key, t in whole.items()}
                found = self._format.read(parts, bits).dequantize().to(expected.dtype)
                if not torch.equal(found, expected):
                    raise not_as_written(f"the packed weights of {layer!r} stand for others")


def _tensors_of(name: str, packed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: packed[f"{name}.{key}"] for key in TENSORS}
