"""Learned rounding of a decoder block: its codes and scales are trained to compute as the unquantized one does.

The inputs are those that the quantized blocks before it give, the outputs to learn those of the unquantized model, so a
block also makes good for the ones before it. The solver's codes are the start.

Source: Cheng et al., Optimize weight rounding via signed gradient descent, https://arxiv.org/abs/2309.05516, which
starts from rounding to nearest; Shao et al., EfficientQAT, https://arxiv.org/abs/2407.11062, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from langchain_quantllm.kernels.linear.cpu import has_16_bit_products
from langchain_quantllm.quantization.decoder_layers import DecoderLayers
from langchain_quantllm.quantization.packing import RoundedLinear
from langchain_quantllm.quantization.trained_linear import TrainedLinear

BATCH_TOKENS = 1024
"""Tokens of a step."""

_EPOCHS, _LEAST_STEPS = 8, 12
_MANY_STEPS, _FEWEST_EPOCHS = 96, 2  # long calibrations are seen less often, down to twice
_CODE_RATE, _SCALE_RATE = 5e-3, 2e-3


def steps_of(batches: int) -> int:
    """Return the steps of a block's training, of a calibration of so many batches."""
    return min(max(_EPOCHS * batches, _LEAST_STEPS), max(_FEWEST_EPOCHS * batches, _MANY_STEPS))


class BlockTraining:
    """The training of a model's blocks, one after the other."""

    def __init__(self, blocks: DecoderLayers) -> None:
        """Start before the first block."""
        self._blocks = blocks
        self._exact = blocks.states
        self._wanted: list[torch.Tensor] = []

    def observe(self, index: int) -> None:
        """Run a block that is on the device and not yet rounded, to learn its outputs."""
        self._wanted = self._blocks.outputs(index, self._exact)
        self._exact = self._wanted

    def train(
        self, index: int, rounded: Mapping[str, RoundedLinear], weights: Mapping[str, torch.Tensor]
    ) -> dict[str, RoundedLinear]:
        """Train the rounded layers of a block that was observed.

        Args:
            index: The block.
            rounded: Its rounded layers by their names in it.
            weights: Their unquantized weights, of shape `(out_features, in_features)`.

        Returns:
            The trained layers, on the CPU.
        """
        block = self._blocks.block(index)
        plain = {name: block.get_submodule(name) for name in rounded}
        device = next(block.parameters()).device
        options = {"product_dtype": torch.bfloat16 if device.type == "cpu" and has_16_bit_products() else None}
        layers = {
            name: TrainedLinear(layer, bias=plain[name].bias, weight=weights[name], **options).to(device)
            for name, layer in rounded.items()
        }
        for name, layer in layers.items():
            block.set_submodule(name, layer)
        try:
            self._train(index, layers)
        finally:
            for name, module in plain.items():
                block.set_submodule(name, module)
        return {name: layer.rounded() for name, layer in layers.items()}

    def _train(self, index: int, layers: Mapping[str, TrainedLinear]) -> None:
        optimizer = torch.optim.Adam([layer.change for layer in layers.values()], betas=(0.9, 0.95))
        count = len(self._wanted)
        steps = steps_of(count)
        for step in range(steps):
            if not step % count:
                order = torch.randperm(count, generator=torch.Generator().manual_seed(step)).tolist()
            left = 1 - step / steps
            for layer in layers.values():
                layer.step = _CODE_RATE * left
            optimizer.param_groups[0]["lr"] = _SCALE_RATE * left
            chosen = order[step % count]
            found = self._blocks.predict(index, chosen)
            loss = nn.functional.mse_loss(found, self._wanted[chosen].to(found))
            optimizer.zero_grad(set_to_none=True)
            loss.backward(inputs=[layer.change for layer in layers.values()])
            optimizer.step()
