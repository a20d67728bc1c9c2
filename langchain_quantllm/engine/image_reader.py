"""Images in the running batch: the vision tower's features, kept by content, and their places in a forward.

Owns the cache of features, and the patches that put them into the language model: in place of the embeddings of image
tokens, and onto the outputs of the first decoder layers where a model wants that (DeepStack). Knows no requests.
"""

from __future__ import annotations

from collections import OrderedDict, abc
from typing import Any

import torch

from langchain_quantllm.compat.transformers_vision import ImageFeatures, deepstack_layers, image_features
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.forward_patch import ForwardPatch
from langchain_quantllm.engine.image_overlay import ImageOverlay
from langchain_quantllm.engine.prompt_images import Image, PromptImages
from langchain_quantllm.engine.step import PrefillChunk
from langchain_quantllm.errors import GenerationError

CACHE_BYTES = 256 * 2**20
"""Most bytes of features that are kept for images to come again."""


class ImageReader:
    """Reads images by a model's own vision tower. Used by one thread at a time."""

    def __init__(self, model: Any, cache_bytes: int = CACHE_BYTES) -> None:
        """Patch the model's token embedding.

        Args:
            model: The model; outside of the engine's forwards it runs as it is.
            cache_bytes: Most bytes of features that are kept.
        """
        self._model = model
        self._cache_bytes = cache_bytes
        self._kept: OrderedDict[int, ImageFeatures] = OrderedDict()
        self._held_bytes = 0
        self._patches: list[ForwardPatch] = []
        self.runs = 0
        """Runs of the vision tower so far, of one image each."""
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget all features, and patch the model anew, as after a change of it."""
        self.close()
        self._device = self._model.get_input_embeddings().weight.device
        self._patches = [ForwardPatch(self._model.get_input_embeddings(), _embed)]

    def close(self) -> None:
        """Take the patches off the model, and release all features."""
        for patch in self._patches:
            patch.close()
        self._patches = []
        self._kept.clear()
        self._held_bytes = 0

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
    def read(self, images: PromptImages) -> None:
        """Run the vision tower over the images of a prompt that it has not seen.

        Raises:
            GenerationError: If it gives another number of features than the prompt has tokens.
            Exception: Whatever the model raises.
        """
        for image in images.images:
            if (count := len(self._features(image).embeddings)) != image.tokens:
                msg = (
                    f"the model's vision tower gives {count} features for an image that has {image.tokens} tokens in "
                    "the prompt; does the processor belong to this model?"
                )
                raise GenerationError(msg)
        images.are_read = True

    def overlay(self, chunks: abc.Sequence[PrefillChunk], first: int) -> ImageOverlay | None:
        """Collect the features of the image tokens in a step.

        Args:
            chunks: The step's chunks of prompts, packed behind each other.
            first: Packed tokens before them.
        """
        rows: list[int] = []
        parts: list[ImageFeatures] = []
        for chunk in chunks:
            if chunk.sequence.images is not None:
                for image, at, of_image in chunk.sequence.images.rows(chunk.start, chunk.count):
                    rows += [first + row for row in of_image]
                    parts.append(_cut(self._features(image), at, len(of_image)))
            first += chunk.count
        if not rows:
            return None
        deepstack = zip(*(part.deepstack for part in parts), strict=True)
        return ImageOverlay(
            rows=torch.tensor(rows).to(self._device, non_blocking=True),
            tokens=first,
            embeddings=torch.cat([part.embeddings for part in parts]),
            deepstack=tuple(torch.cat(level) for level in deepstack),
        )

    def _features(self, image: Image) -> ImageFeatures:
        """Return the features of an image: kept ones, or new ones."""
        if (kept := self._kept.get(image.content)) is not None:
            self._kept.move_to_end(image.content)
            return kept
        self.runs += 1
        features = image_features(self._model, image.inputs, self._device)
        features = ImageFeatures(*(_moved(part, self._device) for part in features))
        self._patch_layers(len(features.deepstack))
        self._keep(image.content, features)
        return features

    def _keep(self, content: int, features: ImageFeatures) -> None:
        self._kept[content] = features
        self._held_bytes += _bytes_of(features)
        while self._held_bytes > self._cache_bytes and self._kept:
            _, dropped = self._kept.popitem(last=False)
            self._held_bytes -= _bytes_of(dropped)

    def _patch_layers(self, levels: int) -> None:
        patched = len(self._patches) - 1
        for level, layer in enumerate(deepstack_layers(self._model)[:levels]):
            if level >= patched:
                self._patches.append(ForwardPatch(layer, _adder(level)))


def _moved(features: Any, device: torch.device) -> Any:
    return tuple(part.to(device) for part in features) if isinstance(features, tuple) else features.to(device)


def _cut(features: ImageFeatures, first: int, count: int) -> ImageFeatures:
    kept = slice(first, first + count)
    return ImageFeatures(features.embeddings[kept], tuple(level[kept] for level in features.deepstack))


def _bytes_of(features: ImageFeatures) -> int:
    return sum(part.nbytes for part in (features.embeddings, *features.deepstack))


def _embed(
    context: ForwardContext,
    module: Any,
    forward: abc.Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Embed tokens, and put the features of images in the place of their tokens."""
    embedded = forward(*args, **kwargs)
    images = context.images
    if images is None or embedded.dim() != 3 or embedded.shape[1] != images.tokens:
        return embedded
    rows, features = images.rows.to(embedded.device), images.embeddings[None].to(embedded.device, embedded.dtype)
    return embedded.index_copy(1, rows, features)


def _adder(level: int) -> Any:
    """Make the replacement of a decoder layer that adds features of images to its output."""

    def add(
        context: ForwardContext,
        module: Any,
        forward: abc.Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        # For a patch below this one, of another engine of the model, there are none: they are added once.
        images, context.images = context.images, None
        try:
            output = forward(*args, **kwargs)
        finally:
            context.images = images
        if images is None or level >= len(images.deepstack):
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        rows = images.rows.to(hidden.device)
        hidden = hidden.index_add(1, rows, images.deepstack[level][None].to(hidden.device, hidden.dtype))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return add
