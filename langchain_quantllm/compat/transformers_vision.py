"""The part of transformers' models that reads images: its call, its results, and how a prompt's tensors divide.

transformers promises neither the tensors that a processor makes nor how a model divides them into images. What does not
match raises `ValueError` here; whether the results are right is found by comparing logits (`engine/image_check`).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

_OF_TOKENS = frozenset({"mm_token_type_ids", "token_type_ids"})
"""Inputs that tell the kind of each token, of shape `(1, tokens)`."""


class ImageFeatures(NamedTuple):
    """What the language model is given for one image.

    `embeddings` stand in place of its tokens', of shape `(tokens, hidden)`. `deepstack` are added to the outputs of
    the first decoder layers, one tensor of that shape for each. Source: https://arxiv.org/abs/2406.04334.
    """

    embeddings: torch.Tensor
    deepstack: tuple[torch.Tensor, ...] = ()


def vision_model(model: Any) -> Any:
    """Return the innermost part of a model that reads images; None if it reads none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for part in (getattr(base, "model", None), base):
        if hasattr(part, "get_image_features"):
            return part
    return None


def image_token_id(model: Any) -> int | None:
    """Return the token id that stands for a part of an image; None if the config names none."""
    names = ("image_token_id", "image_token_index")
    return next((found for name in names if (found := getattr(model.config, name, None)) is not None), None)


def looking_ahead(model: Any) -> Literal["nowhere", "everywhere", "in windows"]:
    """Say in which layers all tokens of an unbroken run of image tokens attend to each other.

    In Gemma 3 in all of them, in the larger Gemma 4 in those with a sliding window.
    """
    if getattr(model.config.get_text_config(), "use_bidirectional_attention", None) == "vision":
        return "in windows"
    has_types = "token_type_ids" in inspect.signature(vision_model(model).forward).parameters
    return "everywhere" if has_types else "nowhere"


def text_modules(model: Any) -> set[int]:
    """Return the ids of the modules that compute the text: the decoder's, and the output head's."""
    modules = [*vision_model(model).get_decoder().modules()]
    if (head := model.get_output_embeddings()) is not None:
        modules += head.modules()
    return set(map(id, modules))


# A prompt's tensors, image by image.


def split_images(media: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Divide the tensors of a processor into those of single images, or of the tiles that an image was cut into.

    Raises:
        ValueError: If they are of an unknown layout.
    """
    inputs = {name: value for name, value in media.items() if name not in _OF_TOKENS}
    pixels = inputs.get("pixel_values")
    if not all(isinstance(value, torch.Tensor) for value in inputs.values()) or pixels is None:
        msg = f"the processor gives {', '.join(sorted(inputs))}"
        raise ValueError(msg)
    if "image_grid_thw" in inputs:  # Qwen's: patches behind each other
        grids = inputs["image_grid_thw"]
        parts = pixels.split(grids.prod(-1).tolist())
        return [{"pixel_values": part, "image_grid_thw": grids[i : i + 1]} for i, part in enumerate(parts)]
    by_tile = pixels.dim() == 5 and pixels.shape[0] == 1 and "image_sizes" not in inputs  # Idefics 3's
    at = 1 if by_tile else 0
    count = pixels.shape[at]
    if any(value.dim() <= at or value.shape[at] != count for value in inputs.values()):
        msg = "the processor's tensors are not one for each image"
        raise ValueError(msg)
    images = [{name: value.narrow(at, i, 1) for name, value in inputs.items()} for i in range(count)]
    if pixels.dim() == 4 and "image_sizes" in inputs:  # Pixtral's: padded to the largest image
        for image in images:
            height, width = image["image_sizes"][0].tolist()
            image["pixel_values"] = image["pixel_values"][:, :, :height, :width]
    return images


def token_counts(model: Any, images: Sequence[Mapping[str, torch.Tensor]], places: Sequence[int]) -> list[int]:
    """Compute how many tokens of a prompt stand for each image.

    Args:
        model: The model.
        images: The tensors of each image, as `split_images` returns them.
        places: Indices of the image tokens in the prompt.

    Raises:
        ValueError: If the prompt has another number of image tokens.
    """
    config = model.config
    vision = config.vision_config
    if "image_grid_thw" in images[0]:
        counts = [int(image["image_grid_thw"].prod()) // vision.spatial_merge_size**2 for image in images]
    elif "image_sizes" in images[0] and images[0]["pixel_values"].dim() == 4:
        side = vision.patch_size * getattr(config, "spatial_merge_size", 1)
        counts = [int((image["image_sizes"] // side).prod()) for image in images]
    else:
        counts = [stop - start for start, stop in unbroken_runs(places)]
        if len(counts) != len(images):  # an image of several tiles, or several images behind each other
            counts = [len(places) // len(images)] * len(images)
    if sum(counts) != len(places):
        msg = f"the prompt has {len(places)} tokens for images, and its images need {sum(counts)}"
        raise ValueError(msg)
    return counts


def unbroken_runs(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Iterate over the bounds of the unbroken runs of rising indices."""
    for _, pairs in itertools.groupby(enumerate(places), lambda pair: pair[1] - pair[0]):
        run = [place for _, place in pairs]
        yield run[0], run[-1] + 1


def image_features(model: Any, image: Mapping[str, torch.Tensor], device: torch.device) -> ImageFeatures:
    """Run the model's own vision tower over one image.

    Args:
        model: The model.
        image: The image's tensors.
        device: Where the tensors are moved to first.

    Raises:
        ValueError: If the tower takes other tensors, or gives none that stand for tokens.
    """
    read = vision_model(model).get_image_features
    if unknown := sorted(image.keys() - inspect.signature(read).parameters.keys()):
        msg = f"its vision tower takes no {unknown[0]}"
        raise ValueError(msg)
    output = read(**moved_inputs(model, image, device))
    deepstack = getattr(output, "deepstack_features", None) or ()
    return ImageFeatures(_joined(getattr(output, "pooler_output", output)), tuple(map(_joined, deepstack)))


def moved_inputs(model: Any, inputs: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Move a processor's tensors to a device, those of real numbers in the model's dtype."""
    return {
        name: value.to(device, model.dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }


def _joined(features: Any) -> torch.Tensor:
    """Put features of shape `(tokens, hidden)`, in a list or with dimensions in front, behind each other."""
    parts = list(features) if isinstance(features, list | tuple) else [features]
    if not parts or not all(isinstance(part, torch.Tensor) and part.dim() >= 2 for part in parts):
        msg = "its vision tower gives something other than features of tokens"
        raise ValueError(msg)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def deepstack_layers(model: Any) -> list[Any]:
    """List the decoder layers, to whose outputs deepstack features are added; empty if there is no such list."""
    return list(getattr(vision_model(model).get_decoder(), "layers", ()))


# Positions in three dimensions.


def has_rope_index(model: Any) -> bool:
    """Say whether a model's positions have three dimensions, so that those of an image's tokens are not their order."""
    return hasattr(vision_model(model), "get_rope_index")


def remembers_positions(model: Any) -> bool:
    """Say whether a model goes on from the positions of the last image that it was given, unless it is told others."""
    return any(hasattr(module, "rope_deltas") for module in model.modules())


def rope_positions(model: Any, ids: Sequence[int], media: Mapping[str, Any]) -> tuple[torch.Tensor, int]:
    """Compute the positions of a prompt with images.

    Args:
        model: A model with `has_rope_index`.
        ids: The prompt.
        media: The processor's tensors.

    Returns:
        Positions of shape `(3, tokens)`, and the number to be added to the positions of all later tokens.

    Raises:
        ValueError: If the model's function takes something that the processor does not give.
    """
    compute = vision_model(model).get_rope_index
    tokens = torch.tensor([list(ids)], device="cpu")
    given = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == image_token_id(model)).int(),
        **media,
    }
    parameters = inspect.signature(compute).parameters
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if missing := [name for name in needed if name not in given]:
        msg = f"its positions follow from {missing[0]}, which the processor does not give"
        raise ValueError(msg)
    positions, delta = compute(**{name: value for name, value in given.items() if name in parameters})
    return positions.reshape(3, -1), int(delta)


def with_text_tokens(media: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Lengthen the inputs that tell the kind of each token to so many tokens, by tokens of text."""
    longer = {n: torch.nn.functional.pad(v, (0, tokens - v.shape[1])) for n, v in media.items() if n in _OF_TOKENS}
    return {**media, **longer}
