"""Attention over compressed keys and values (multi-head latent attention), as one head that all query heads share.

A layer caches, for each token, a latent and a rotated key, and every head makes its key and its value from the latent
by a matrix of its own. These matrices move to the other side of the products: queries are multiplied by that of the
keys before they meet the latents, and what is attended by that of the values afterwards. So latents are never expanded.

Source:
    DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from langchain_quantllm.compat.peft import is_peft_layer_class
from langchain_quantllm.compat.transformers_latent import LatentDimensions, expansion_of, latent_attentions
from langchain_quantllm.engine.attention import without_gradients
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.forward_patch import ForwardPatch
from langchain_quantllm.engine.kv_cache import LayerShape
from langchain_quantllm.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Absorption:
    """The matrices of one layer.

    Args:
        key: From latents to the parts of keys that are not rotated, of shape `(heads, plain, rank)`.
        value: From latents to values, of shape `(heads, value, rank)`.
    """

    key: torch.Tensor
    value: torch.Tensor

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """Turn queries of shape `(1, heads, tokens, plain + rotary)` into those of `(1, heads, tokens, rotary + rank)`.

        A row of the pool has the rotated key first, then the latent.
        """
        plain = self.key.shape[1]
        return torch.cat([query[..., plain:], torch.matmul(query[..., :plain], self.key)], -1)

    def expand(self, attended: torch.Tensor) -> torch.Tensor:
        """Turn attended latents of shape `(1, tokens, heads, rank)` into values of `(1, tokens, heads, value)`."""
        return torch.matmul(attended.transpose(1, 2), self.value.transpose(1, 2)).transpose(1, 2)


class LatentLayers:
    """The layers of a model that cache latents.

    Attributes:
        absorptions: The matrices of each, by the ids of the attention modules.
    """

    def __init__(self, model: Any) -> None:
        """Begin with none; see `build`."""
        self._model = model
        self._patches: list[ForwardPatch] = []
        self._copies: dict[int, torch.Tensor] = {}
        self.absorptions: Mapping[int, Absorption] = {}

    @property
    def copied_bytes(self) -> int:
        """Bytes of matrices that are copies, as the layer's own weights are quantized."""
        return sum(copy.nbytes for copy in self._copies.values())

    @without_gradients
    def build(self, layers: Sequence[int], shapes: Sequence[LayerShape]) -> list[LayerShape]:
        """Find the layers, anew after a change of the model.

        Args:
            layers: Numbers of the layers that keep keys and values.
            shapes: What each of them keeps in the model's own cache.

        Returns:
            The same, with the layers that keep latents named so.

        Raises:
            UnsupportedError: If the matrices of a layer cannot be read.
        """
        self.close()
        found, absorptions = list(shapes), {}
        places = {layer: place for place, layer in enumerate(layers)}
        for module, sizes in latent_attentions(self._model):
            place = places.get(sizes.layer)
            if place is None or not _keeps_latents(shapes[place], sizes):
                continue
            layer = expansion_of(module)
            weight, is_copy = _dense_weight(layer, sizes, shapes[place])
            if is_copy:
                self._copies[id(layer)] = weight
                self._patches.append(ForwardPatch(layer, self._run_copy))
            matrices = weight.unflatten(0, (-1, sizes.plain + sizes.value))
            key, value = matrices.split([sizes.plain, sizes.value], 1)
            absorptions[id(module)] = Absorption(key=key, value=value)
            found[place] = replace(found[place], key_dim=sizes.rotary, value_dim=sizes.rank, is_latent=True)
        self.absorptions = absorptions
        return found

    def close(self) -> None:
        """Restore every module's `forward`, and drop the matrices."""
        for patch in self._patches:
            patch.close()
        self._patches, self._copies, self.absorptions = [], {}, {}

    def _run_copy(
        self,
        context: ForwardContext,
        module: Any,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Multiply by the copy: a quantized layer may round its input, which absorbed products do not."""
        del context
        copy = self._copies.get(id(module))
        if copy is None or len(args) != 1 or kwargs:
            return forward(*args, **kwargs)
        return torch.nn.functional.linear(args[0], copy)


def _keeps_latents(shape: LayerShape, sizes: LatentDimensions) -> bool:
    return shape.is_latent or (shape.kv_heads, shape.key_dim, shape.value_dim) == (1, sizes.rank, sizes.rotary)


def _dense_weight(layer: Any, sizes: LatentDimensions, shape: LayerShape) -> tuple[torch.Tensor, bool]:
    """Return the weight of a linear layer, of shape `(heads * (plain + value), rank)`, and whether it is a copy.

    A layer of any quantization gives the columns of its weight for the rows of an identity matrix.

    Raises:
        UnsupportedError: If the layer does more than to multiply.
    """
    if is_peft_layer_class(type(layer)):
        msg = "an adapter changes how its latents become keys and values"
        raise UnsupportedError(msg)
    if getattr(layer, "bias", None) is not None:
        msg = "its latents become keys and values with a bias"
        raise UnsupportedError(msg)
    if type(layer) is torch.nn.Linear and not layer.weight.is_meta:
        return layer.weight, False
    columns = layer(torch.eye(sizes.rank, dtype=shape.dtype, device=shape.device)[None])[0]
    return columns.to(shape.dtype).T.contiguous(), True
