"""GPTQ of a whole model: the blocks in their order, and the checkpoint that comes of them.

Owns which layers are quantized, the checks of their sizes, the loop over blocks, and what goes into config.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from langchain_quantllm._version import __version__
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.memory.estimate import build_on_meta
from langchain_quantllm.quantization.blocks import Blocks, Layout, find_layout
from langchain_quantllm.quantization.journal import Journal, digest, weights_of
from langchain_quantllm.quantization.packing import TENSORS, RoundedLinear
from langchain_quantllm.quantization.solver import InputStatistics, Rounding, solve
from langchain_quantllm.schemes import GPTQ

GROUP_SIZE = 128
"""Where nobody says otherwise, and it divides every layer."""

_COMMON_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_KNOWN_BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers")
"""Where transformers looks for blocks by itself. Source: BLOCK_PATTERNS in optimum/gptq/constants.py."""
_SHARD = "5GB"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a quantization is.

    Args:
        done: Finished blocks.
        total: All blocks.
        resumed: Of the finished ones, those that an earlier run had finished.
        elapsed_s: Seconds since the first block began.
        remaining_s: Seconds that are left, by the blocks so far; None before the first one.
    """

    done: int
    total: int
    resumed: int
    elapsed_s: float
    remaining_s: float | None


def check_layers(
    config: Any, scheme: GPTQ, skip_modules: Sequence[str], *, trust_remote_code: bool = False
) -> tuple[Layout, GPTQ]:
    """Find the layers that GPTQ quantizes and check their sizes, without any weight.

    Args:
        config: The model's transformers config.
        scheme: With bits; a group size of None takes 128, or the largest below that divides every layer.
        skip_modules: Endings of the names of layers that stay as they are.
        trust_remote_code: Run Python code that comes with the checkpoint.

    Returns:
        The layers to quantize, and the scheme with its group size.

    Raises:
        InvalidOptionError: If a group size does not divide a layer, a layer cannot be packed, or a name is of none.
        UnsupportedError: If the model has no blocks of linear layers.
    """
    bits = scheme.bits
    assert bits is not None
    model = build_on_meta(config, torch.float16, trust_remote_code, config.model_type)
    layout = find_layout(model)
    for ending in skip_modules:
        if not any(_ends_with(name, [ending]) for names in layout.layers for name in names):
            known = sorted({name for names in layout.layers for name in names})
            msg = f"skip_modules={ending!r} is the name of no linear layer; there are {', '.join(known)}."
            raise InvalidOptionError(msg)
    kept = tuple(tuple(name for name in names if not _ends_with(name, skip_modules)) for names in layout.layers)
    layout = Layout(prefix=layout.prefix, count=layout.count, layers=kept)
    modules = {
        f"{layout.prefix}.{i}.{name}": model.get_submodule(f"{layout.prefix}.{i}.{name}")
        for i, names in enumerate(kept)
        for name in names
    }
    if not modules:
        msg = "skip_modules leaves no layer to quantize; leave some names out."
        raise InvalidOptionError(msg)
    sizes = {name: module.in_features for name, module in modules.items()}
    even = [size for size in _COMMON_SIZES if not any(s % size for s in sizes.values())]
    if scheme.group_size is None:
        scheme = replace(scheme, group_size=max((size for size in even if size <= GROUP_SIZE), default=-1))
    assert scheme.group_size is not None
    _check_groups(sizes, scheme.group_size, even)
    for name, module in modules.items():
        _check_packable(name, module, bits)
    return layout, scheme


def _check_packable(name: str, module: Any, bits: int) -> None:
    for which in ("in_features", "out_features"):
        if (size := getattr(module, which)) * bits % 32:
            msg = (
                f"{which}={size} of layer {name!r} cannot be packed in {bits} bits: it takes a multiple of "
                f"{32 // bits if 32 % bits == 0 else 32}; name the layer in skip_modules."
            )
            raise InvalidOptionError(msg)


def _check_groups(sizes: dict[str, int], group_size: int, even: Sequence[int]) -> None:
    uneven = next(((name, size) for name, size in sizes.items() if group_size != -1 and size % group_size), None)
    if uneven is None:
        return
    msg = (
        f"group_size={group_size} does not divide in_features={uneven[1]} of layer {uneven[0]!r}; use "
        f"{', '.join([*map(str, even), '-1'])} (-1 is one group for all), or name the layer in skip_modules."
    )
    raise InvalidOptionError(msg)


def _ends_with(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


class PackedLinear(nn.Module):  # type: ignore[misc]
    """Stands in a finished block for the layer that it was, and holds what a checkpoint has of it."""

    def __init__(self, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None) -> None:
        """Hold the tensors."""
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        if bias is not None:
            self.register_buffer("bias", bias)


class GPTQRun:
    """One model on its way to a GPTQ checkpoint."""

    def __init__(
        self,
        model: Any,
        layout: Layout,
        scheme: GPTQ,
        *,
        damping: float,
        device: str,
        report: Callable[[Progress], None] | None = None,
    ) -> None:
        """Take a model over; it is used up.

        Args:
            model: With its weights on the CPU.
            layout: What to quantize.
            scheme: How, with nothing left open.
            damping: Added to the diagonal of the statistics, as a share of its mean.
            device: What computes.
            report: Called after each block.
        """
        assert scheme.bits is not None
        assert scheme.group_size is not None
        self._model = model
        self._layout = layout
        self._device = device
        self._report = report
        self._rounding = Rounding(
            bits=scheme.bits,
            group_size=scheme.group_size,
            sym=bool(scheme.sym),
            desc_act=bool(scheme.desc_act),
            damping=damping,
        )

    def run(self, sequences: Sequence[Sequence[int]], source: str, output: Path, *, overwrite: bool) -> int:
        """Quantize the blocks, from the one at which an earlier run stopped.

        Args:
            sequences: Token ids to calibrate with; none rounds to nearest.
            source: Where the checkpoint was read from.
            output: The folder that will be written; the journal is beside it.
            overwrite: Throw away the blocks of another run.

        Returns:
            Blocks that an earlier run had finished.
        """
        about = {
            "version": __version__,
            "source": source,
            "weights": weights_of(Path(source)),
            "rounding": vars(self._rounding),
            "layers": self._layout.layers,
            "dtype": str(self._model.dtype),
            "calibration": digest(sequences),
        }
        self.journal = Journal(output, about, overwrite=overwrite)
        blocks = Blocks(self._model, self._layout, sequences, self._device)
        began = time.perf_counter()
        resumed, solved_s = 0, 0.0
        for index, names in enumerate(self._layout.layers):
            started = time.perf_counter()
            found = self.journal.read(index)
            with blocks.on_device(index) as block:
                if found is None:
                    found = self._quantize(blocks, block, index, names)
                    self.journal.write(index, found)
                    solved_s += time.perf_counter() - started
                else:
                    self._put(block, names, found)
                    resumed += 1
                if index + 1 < self._layout.count:
                    blocks.advance(index)
            self._pack(index, names, found)
            if self._report is not None:
                solved = index + 1 - resumed
                left_s = (self._layout.count - index - 1) * solved_s / solved if solved else None
                self._report(
                    Progress(
                        done=index + 1,
                        total=self._layout.count,
                        resumed=resumed,
                        elapsed_s=time.perf_counter() - began,
                        remaining_s=left_s,
                    )
                )
        return resumed

    def _quantize(self, blocks: Blocks, block: Any, index: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Round the layers of a block, group by group: each group reads what the rounded ones before it give."""
        packed: dict[str, torch.Tensor] = {}
        for group in blocks.groups(index, names) if blocks.states else [[name] for name in names]:
            linears = [block.get_submodule(name) for name in group]
            weight = torch.cat([linear.weight for linear in linears])
            statistics = None
            if blocks.states:
                statistics = InputStatistics(weight.shape[1], weight.device)
                blocks.observe(index, group, statistics.add)
            rounded = solve(weight, statistics, self._rounding)
            first = 0
            for name, linear in zip(group, linears, strict=True):
                part = rounded.rows(first, first + linear.out_features)
                linear.weight.data.copy_(part.dequantize())
                packed |= {f"{name}.{key}": tensor for key, tensor in part.pack().items()}
                first += linear.out_features
        return packed

    def _put(self, block: Any, names: Sequence[str], packed: dict[str, torch.Tensor]) -> None:
        """Give layers the weights that an earlier run found."""
        for name in names:
            tensors = {key: packed[f"{name}.{key}"] for key in TENSORS}
            linear = block.get_submodule(name)
            linear.weight.data.copy_(RoundedLinear.unpack(tensors, self._rounding.bits).dequantize())

    def _pack(self, index: int, names: Sequence[str], packed: dict[str, torch.Tensor]) -> None:
        """Put what the checkpoint holds into the place of a finished block's layers."""
        block = self._model.get_submodule(f"{self._layout.prefix}.{index}")
        for name in names:
            bias = block.get_submodule(name).bias
            tensors = {key: packed[f"{name}.{key}"] for key in TENSORS}
            block.set_submodule(name, PackedLinear(tensors, None if bias is None else bias.detach()))

    def write(self, folder: Path, *, calibration: str, tokens: int) -> None:
        """Write weights and config.

        Args:
            folder: Where.
            calibration: What was calibrated with, in words.
            tokens: Tokens of it.
        """
        rounding = self._rounding
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": rounding.bits,
            "group_size": rounding.group_size,
            "sym": rounding.sym,
            "desc_act": rounding.desc_act,
            "checkpoint_format": "gptq",
            "damp_percent": rounding.damping,
            "true_sequential": True,
            "lm_head": False,
            "meta": {
                "quantizer": [f"langchain-quantllm:{__version__}"],
                "calibration": calibration,
                "calibration_tokens": tokens,
            },
        }
        quantized = sorted({name for names in self._layout.layers for name in names})
        everything = sorted({name for names in find_linears(self._model, self._layout) for name in names})
        if everything:  # some layers stay as they are: whoever loads must know which do not
            config["modules_in_block_to_quantize"] = [quantized]
        if self._layout.prefix not in _KNOWN_BLOCKS:
            config["block_name_to_quantize"] = self._layout.prefix
        self._model.config.quantization_config = config
        self._model.save_pretrained(folder, max_shard_size=_SHARD)


def find_linears(model: Any, layout: Layout) -> list[list[str]]:
    """Name the linear layers that are left in each block."""
    blocks = model.get_submodule(layout.prefix)
    return [[name for name, module in block.named_modules() if isinstance(module, nn.Linear)] for block in blocks]
