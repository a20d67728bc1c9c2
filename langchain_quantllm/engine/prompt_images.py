"""The images of one prompt: their tensors, their tokens' places, and their names in the KV cache.

Made where a request is submitted. Knows no device; `image_features` runs the model's vision tower.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from langchain_quantllm.compat import transformers_vision
from langchain_quantllm.compat.transformers_vision import unbroken_runs
from langchain_quantllm.errors import InvalidOptionError

_OFFSET_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Image:
    """One image, or one tile of a large one.

    Args:
        inputs: Its tensors, on the CPU.
        content: A number that stands for its content: that of another image is different.
        tokens: How many tokens of the prompt stand for it.
    """

    inputs: Mapping[str, torch.Tensor]
    content: int
    tokens: int


class ImageRows(NamedTuple):
    """Tokens of one image in a part of a prompt: features `first` to `first + len(rows)` belong to these rows."""

    image: Image
    first: int
    rows: list[int]


class PromptImages:
    """The images of one prompt, which all samples of a call share.

    Attributes:
        images: The images, in the order of their tokens.
        positions: Positions of the prompt's tokens, of shape `(3, tokens)`, where the model's have three dimensions.
        position_delta: Is added to the positions of all later tokens.
        are_read: Whether the vision tower has taken all of them once.
        groups_need_window: Whether the tokens of `groups` see each other in layers with a window only.
    """

    def __init__(
        self,
        images: Sequence[Image],
        places: Sequence[int],
        positions: torch.Tensor | None = None,
        position_delta: int = 0,
        *,
        looks_ahead: Literal["nowhere", "everywhere", "in windows"] = "nowhere",
    ) -> None:
        """Note where the images stand.

        Args:
            images: The images.
            places: Indices of their tokens in the prompt, in order.
            positions: See the attributes.
            position_delta: Likewise.
            looks_ahead: In which layers the tokens of an unbroken run of image tokens all see each other.
        """
        self.images = tuple(images)
        self.positions = positions
        self.position_delta = position_delta
        self.are_read = False
        starts = itertools.accumulate((image.tokens for image in self.images), initial=0)
        self._places = [list(places[start : start + i.tokens]) for i, start in zip(self.images, starts, strict=False)]
        self._runs = [] if looks_ahead == "nowhere" else list(unbroken_runs(places))
        self.groups_need_window = looks_ahead == "in windows"
        contents = self._contents_seen()
        self._keys = {
            place: -(content << _OFFSET_BITS | offset) - 1
            for content, of_image in zip(contents, self._places, strict=True)
            for offset, place in enumerate(of_image)
        }
        self._end = places[-1] + 1

    def _contents_seen(self) -> list[int]:
        """List numbers of what the tokens of each image see: its content, and that of images in the same run."""
        if not self._runs:
            return [image.content for image in self.images]
        runs = [next(start for start, stop in self._runs if start <= at[0] < stop) for at in self._places]
        seen: dict[int, list[int]] = {}
        for image, run in zip(self.images, runs, strict=True):
            seen.setdefault(run, []).append(image.content)
        return [image.content ^ _joint(seen[run]) for image, run in zip(self.images, runs, strict=True)]

    def groups(self, start: int, count: int) -> tuple[tuple[int, int], ...]:
        """List the runs of tokens that all see each other, with one among `count` tokens from `start` on, as bounds."""
        return tuple((first, stop) for first, stop in self._runs if first < start + count and stop > start)

    def chunk_end(self, start: int, end: int) -> int:
        """Move the end of a chunk out of a run whose tokens all see each other: before it, or else behind it."""
        for first, stop in self._runs:
            if first < end < stop:
                return first if first > start else stop
        return end

    def content(self, start: int, ids: Sequence[int]) -> Sequence[int]:
        """Return tokens from `start` on with image tokens replaced by numbers below 0 of their images' content.

        The token ids of two images are alike, and their keys and values are not.
        """
        if start >= self._end:
            return ids
        return [self._keys.get(i, token) for i, token in enumerate(ids, start)]

    def rows(self, start: int, count: int) -> Iterator[ImageRows]:
        """List the images with tokens among `count` ones from `start` on; rows are relative to `start`."""
        for image, places in zip(self.images, self._places, strict=True):
            if places[0] >= start + count or places[-1] < start:
                continue
            here = [(offset, place - start) for offset, place in enumerate(places) if start <= place < start + count]
            if here:
                yield ImageRows(image, here[0][0], [row for _, row in here])

    @property
    def middle(self) -> int:
        """Index of a token in the middle of the first image."""
        return self._places[0][len(self._places[0]) // 2]

    def positions_of(self, start: int, count: int) -> torch.Tensor:
        """Return the positions of tokens, generated ones too, of shape `(3, count)`, int32."""
        order = torch.arange(start, start + count, dtype=torch.int32).expand(3, -1) + self.position_delta
        if self.positions is None:
            return order
        known = self.positions[:, start : start + count].int()
        return torch.cat([known, order[:, known.shape[1] :]], 1)


def read_prompt(model: Any, ids: Sequence[int], media: Mapping[str, Any]) -> PromptImages:
    """Find the images of a prompt.

    Args:
        model: The model.
        ids: The prompt, with as many image tokens as the images need.
        media: The processor's tensors.

    Raises:
        InvalidOptionError: If tokens and images do not fit together.
    """
    token = transformers_vision.image_token_id(model)
    places = [i for i, one in enumerate(ids) if one == token]
    try:
        parts = transformers_vision.split_images(media)
        counts = transformers_vision.token_counts(model, parts, places)
        positions, delta = None, 0
        if transformers_vision.has_rope_index(model):
            positions, delta = transformers_vision.rope_positions(model, ids, media)
    except (ValueError, RuntimeError, LookupError, StopIteration) as error:
        msg = f"the prompt's images do not fit its tokens: {error}."
        raise InvalidOptionError(msg) from error
    if not places or min(counts) < 1:
        msg = "the prompt has images, and no tokens that stand for them; is the image's place in the chat template?"
        raise InvalidOptionError(msg)
    images = [Image(inputs=p, content=_content(p), tokens=n) for p, n in zip(parts, counts, strict=True)]
    return PromptImages(images, places, positions, delta, looks_ahead=transformers_vision.looking_ahead(model))


def _joint(contents: Sequence[int]) -> int:
    """Compute one number of the contents of several images in their order."""
    return int.from_bytes(hashlib.blake2b(repr(contents).encode(), digest_size=16).digest(), "little")


def _content(inputs: Mapping[str, torch.Tensor]) -> int:
    """Compute a number of 128 bits from the bytes, shapes and dtypes of tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(inputs.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy())
    return int.from_bytes(digest.digest(), "little")
